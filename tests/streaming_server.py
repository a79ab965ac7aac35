"""A server on this machine that streams as OpenAI's API does: three tokens an answer, or what a test wants to go wrong."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = ("The ", "mill ", "turns.")
WAIT_SECONDS = 0.05  # before the first word
STEP_SECONDS = 0.02  # between words


def chunk(**choice: Any) -> dict[str, Any]:
    return {"object": "chat.completion.chunk", "choices": [{"index": 0, **choice}]}


def whole_answer(handler: Any, body: dict[str, Any]) -> None:
    """A role without text, the words, why it ended, and how many tokens there were."""
    chat = "messages" in body
    handler.begin()
    handler.send_event(chunk(delta={"role": "assistant", "content": ""}))
    time.sleep(WAIT_SECONDS)
    for number, word in enumerate(WORDS):
        if number:
            time.sleep(STEP_SECONDS)
        handler.send_event(chunk(delta={"content": word}) if chat else chunk(text=word))
    handler.send_event(chunk(delta={}, finish_reason="stop"))
    handler.send_event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(WORDS)}})
    handler.send_line("[DONE]")


class Server:
    """url: of the API. asked: (path, headers, body) of every request."""

    def __init__(self, url: str):
        self.url = url
        self.asked: list[tuple[str, dict[str, str], dict[str, Any]]] = []


@contextmanager
def streaming_server(answer: Any = whole_answer) -> Iterator[Server]:
    """answer(handler, body): writes what is to be streamed, by `begin`, `send_event`, `send_line` and what http.server has."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            served.asked.append((self.path, dict(self.headers), body))
            answer(self, body)

        def begin(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()

        def send_line(self, text: str) -> None:
            self.wfile.write(f"data: {text}\n\n".encode())
            self.wfile.flush()

        def send_event(self, event: dict[str, Any]) -> None:
            self.send_line(json.dumps(event))

        def log_message(self, format: str, *args: Any) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served = Server(f"http://127.0.0.1:{listening.server_port}/v1")
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()
