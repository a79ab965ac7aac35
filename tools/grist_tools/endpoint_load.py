"""Requests to a server that speaks OpenAI's API, at the times of a Poisson process, and what came of each.

The gaps between requests are exponential, and nobody waits for an earlier request to end, as users do not. Every draw is of the
seed, so that two servers are asked the same things at the same times.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import threading
import time
from typing import Any, NamedTuple

from grist_tools.endpoint_stream import EndpointError, post

API_KEY = "OPENAI_API_KEY"  # in the environment; a command line is seen by others
_WORDS = """the miller and his daughter carried grain to the mill where water turned the wheel and the wheel turned the stone
that ground grain to flour for bread in every house of the village by the river when snow lay on the road""".split()


class Request(NamedTuple):
    """at_seconds: after the first. words: of the prompt. tokens: most that are to be written."""

    at_seconds: float
    words: str
    tokens: int


class Heard(NamedTuple):
    """What came of a request. Seconds from when it was sent: of every event with text, and of the end. tokens: as the server
    counted them, else the events. error: what went wrong, None for a whole answer."""

    sent_seconds: float
    late_seconds: float
    text_seconds: list[float]
    end_seconds: float
    prompt_tokens: int | None
    tokens: int
    counted: bool
    error: str | None


def schedule(count: int, rate: float, words: list[int], tokens: list[int], seed: int) -> list[Request]:
    """`count` requests of a Poisson process of `rate` a second; an infinite rate sends all at once."""
    draw = random.Random(seed)
    at, requests = 0.0, []
    for _ in range(count):
        text = " ".join(draw.choices(_WORDS, k=draw.choice(words)))
        requests.append(Request(at, text, draw.choice(tokens)))
        at += 0.0 if math.isinf(rate) else draw.expovariate(rate)
    return requests


def body_of(request: Request, options: argparse.Namespace) -> dict[str, Any]:
    if options.api == "chat":
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": request.words}]}
    else:
        asked = {"prompt": request.words}
    asked |= {"model": options.model, "max_tokens": request.tokens, "temperature": 0}
    return asked | {"stream": True, "stream_options": {"include_usage": True}} | options.body


def ask(url: str, body: dict[str, Any], timeout: float, start: float, at_seconds: float) -> Heard:
    """One request, now. start: on time.perf_counter(), when the first was due."""
    key = os.environ.get(API_KEY)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    sent = time.perf_counter()
    came: list[float] = []
    usage: dict[str, Any] = {}
    ended, error = False, None
    try:
        for event in post(url, body, headers, timeout):
            usage = event.data.get("usage") or usage
            for choice in event.data.get("choices") or []:
                ended = ended or bool(choice.get("finish_reason"))
                if _text_of(choice):
                    came.append(event.seconds - sent)
        if not ended:
            raise EndpointError("ended early", "the stream ended without a finish_reason")
        if not came:
            raise EndpointError("no text", "the answer is empty")
    except EndpointError as found:
        error = str(found)
    end = time.perf_counter() - sent
    tokens = usage.get("completion_tokens")
    return Heard(
        sent - start,
        sent - start - at_seconds,
        came,
        end,
        usage.get("prompt_tokens"),
        tokens or len(came),
        bool(tokens),
        error,
    )


def _text_of(choice: dict[str, Any]) -> str | None:
    """Of a completion, or of a chat, where a model may think aloud first."""
    delta = choice.get("delta") or {}
    return choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")


def run_all(url: str, requests: list[Request], options: argparse.Namespace) -> tuple[list[Heard], float]:
    """Every request in a thread of its own, at its time. -> what came of them, and seconds from the first to the last end."""
    heard: dict[int, Heard] = {}
    start = time.perf_counter()

    def one(number: int, request: Request) -> None:
        heard[number] = ask(url, body_of(request, options), options.timeout, start, request.at_seconds)

    threads = []
    for number, request in enumerate(requests):
        time.sleep(max(0.0, start + request.at_seconds - time.perf_counter()))
        threads.append(threading.Thread(target=one, args=(number, request), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join()
    found = [heard[number] for number in range(len(requests))]
    return found, max(each.sent_seconds + each.end_seconds for each in found)


def address(endpoint: str, api: str) -> str:
    """URL of the API's door, with or without the /v1 that servers have before it."""
    base = endpoint.rstrip("/")
    if not base.endswith("/v1"):
        base += "/v1"
    return f"{base}/{'chat/completions' if api == 'chat' else 'completions'}"
