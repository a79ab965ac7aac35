"""A request to an HTTP server whose answer is a stream of events, and when each event came. Standard library only."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, NamedTuple
from urllib.parse import urlsplit

SHOWN = 300  # characters of what a server said, in messages


class Event(NamedTuple):
    """seconds: on time.perf_counter()."""

    seconds: float
    data: dict[str, Any]


class EndpointError(Exception):
    """A request that got no whole answer. kind: short, the same for all that failed alike."""

    def __init__(self, kind: str, detail: str):
        super().__init__(f"{kind}: {detail}")
        self.kind = kind


def post(url: str, body: dict[str, Any], headers: dict[str, str], timeout: float) -> Iterator[Event]:
    """The events of a server-sent stream (WHATWG HTML, 9.2) whose `data` is a JSON object a line, as OpenAI's API, vLLM,
    llama.cpp and transformers send it. Ends with the stream, or at `[DONE]`.

    timeout: seconds that the server may be silent. Raises EndpointError.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is no address of a server: expected http://HOST:PORT/...")
    make = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = make(parts.hostname, parts.port, timeout=timeout)
    try:
        connection.request("POST", parts.path, json.dumps(body), {"Content-Type": "application/json", **headers})
        yield from _events(_accepted(connection.getresponse()))
    except TimeoutError:
        raise EndpointError("timeout", f"{url} was silent for {timeout:g} s") from None
    except (OSError, HTTPException) as error:
        raise EndpointError(type(error).__name__, f"{url}: {error}") from error
    finally:
        connection.close()


def _accepted(response: HTTPResponse) -> HTTPResponse:
    if response.status != 200:
        said = response.read(2**16).decode("utf-8", "replace")[:SHOWN]
        raise EndpointError(f"status {response.status}", said)
    return response


def _events(response: HTTPResponse) -> Iterator[Event]:
    while line := response.readline():
        now = time.perf_counter()
        if not line.startswith(b"data:"):  # a comment that keeps the connection open, an event's name, an empty line
            continue
        text = line[5:].strip()
        if text == b"[DONE]":
            return
        try:
            data = json.loads(text)
        except ValueError:
            raise EndpointError("malformed event", repr(text[:SHOWN])) from None
        if data is None:  # llama.cpp's, where it has nothing to show of a prompt among several
            continue
        if not isinstance(data, dict):
            raise EndpointError("malformed event", repr(text[:SHOWN]))
        if data.get("error"):
            raise EndpointError("error in the stream", str(data["error"])[:SHOWN])
        yield Event(now, data)
