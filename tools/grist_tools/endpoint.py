"""A server that speaks OpenAI's API, under requests that arrive at random: when tokens came, how many, what went wrong.

Arrivals are a Poisson process: the gaps between requests are exponential, and nobody waits for an earlier request to end, as
users do not. Every draw is of the seed, so that two servers are asked the same things at the same times.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import threading
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from grist_tools.console import table
from grist_tools.endpoint_stream import EndpointError, post

API_KEY = "OPENAI_API_KEY"  # in the environment; a command line is seen by others
_WORDS = """the miller and his daughter carried grain to the mill where water turned the wheel and the wheel turned the stone
that ground grain to flour for bread in every house of the village by the river when snow lay on the road""".split()

Row = dict[str, Any]


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


def add_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "a server (--prompts then counts words, --outputs tokens; each request draws one of each)"
    )
    group.add_argument("--endpoint", metavar="URL", help="of the API, as http://127.0.0.1:8000/v1")
    group.add_argument("--model", metavar="NAME", help="what the server calls the model")
    group.add_argument(
        "--rate", type=float, default=1.0, help="requests a second; inf: all at once (default: %(default)s)"
    )
    group.add_argument("--requests", type=int, default=32, help="(default: %(default)s)")
    group.add_argument("--api", choices=["chat", "completions"], default="chat", help="(default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="of arrivals, lengths and words (default: %(default)s)")
    group.add_argument("--timeout", type=float, default=120.0, help="seconds of silence (default: %(default)s)")
    group.add_argument(
        "--body",
        type=_json_object,
        default={},
        metavar="JSON",
        help="""more for each request, as '{"ignore_eos": true}'""",
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for what makes no measurement."""
    if not options.model:
        raise ValueError("--endpoint needs --model NAME, what the server calls the model (GET URL/models lists them)")
    if not options.rate > 0:  # NaN as well
        raise ValueError(f"--rate must be more than 0, got {options.rate}")
    if options.requests < 1:
        raise ValueError(f"--requests must be at least 1, got {options.requests}")
    if options.against:
        raise ValueError("--against compares on a model directory; measure each server with a run of its own")


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


def summary(heard: list[Heard], seconds: float) -> Row:
    """Figures over the answers that came whole, and how many did not, by kind."""
    whole = [each for each in heard if each.error is None]
    errors = Counter(each.error.split(":", 1)[0] for each in heard if each.error is not None)
    row: Row = {"requests": len(heard), "answered": len(whole), "errors": dict(errors), "seconds": seconds}
    if not whole:
        return row
    gaps = [b - a for each in whole for a, b in pairwise(each.text_seconds)]
    tokens = sum(each.tokens for each in whole)
    row |= {
        "requests_per_second": len(whole) / seconds,
        "output_tokens": tokens,
        "output_tokens_per_second": tokens / seconds,
        "tokens_counted_by": "the server" if all(each.counted for each in whole) else "events with text",
        "first_token_ms": percentiles([each.text_seconds[0] for each in whole]),
        "end_to_end_ms": percentiles([each.end_seconds for each in whole]),
        "latest_start_ms": 1e3 * max(each.late_seconds for each in heard),
    }
    prompt_tokens = [each.prompt_tokens for each in whole if each.prompt_tokens is not None]
    if len(prompt_tokens) == len(whole):
        row["prompt_tokens"] = sum(prompt_tokens)
    if gaps:
        row["between_tokens_ms"] = percentiles(gaps)
        # A server may send several tokens at once: the mean over an answer does not depend on how they are cut.
        means = [
            (each.text_seconds[-1] - each.text_seconds[0]) / (each.tokens - 1) for each in whole if each.tokens > 1
        ]
        row["per_token_ms"] = percentiles(means)
    return row


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50, p90, p99 in milliseconds, and the mean."""
    import numpy as np

    values = np.percentile(seconds, (50, 90, 99))
    named = {f"p{p}": 1e3 * float(value) for p, value in zip((50, 90, 99), values, strict=True)}
    return named | {"mean": 1e3 * float(np.mean(seconds))}


def summary_table(row: Row) -> str:
    names = {
        "first_token_ms": "to the first token",
        "between_tokens_ms": "between events with text",
        "per_token_ms": "per token, mean of an answer",
        "end_to_end_ms": "whole answer",
    }
    rows = [[names[key], *(f"{row[key][p]:.1f}" for p in ("p50", "p90", "p99", "mean"))] for key in names if key in row]
    lines = [f"{row['answered']} of {row['requests']} requests answered in {row['seconds']:.1f} s"]
    if rows:
        lines[0] += (
            f": {row['requests_per_second']:.2f} a second, {row['output_tokens_per_second']:,.1f} tokens a second "
            f"(counted by {row['tokens_counted_by']})"
        )
        lines.append(table(["ms", "p50", "p90", "p99", "mean"], rows))
    lines += [f"{number} x {kind}" for kind, number in row["errors"].items()]
    return "\n".join(lines)


def address(endpoint: str, api: str) -> str:
    """URL of the API's door, with or without the /v1 that servers have before it."""
    base = endpoint.rstrip("/")
    if not base.endswith("/v1"):
        base += "/v1"
    return f"{base}/{'chat/completions' if api == 'chat' else 'completions'}"


def profile(options: argparse.Namespace, given: list[str]) -> int:
    """Ask once, untimed; then run the schedule, print, write the JSON. Exit status 1 if no request was answered.

    Raises ValueError for options, OSError for a server that does not answer the first request.
    """
    from grist_eval.environment import provenance, write_json

    check_options(options)
    url = address(options.endpoint, options.api)
    requests = schedule(options.requests, options.rate, options.prompts, options.outputs, options.seed)
    first = ask(url, body_of(requests[0], options), options.timeout, time.perf_counter(), 0.0)
    if first.error:
        raise OSError(f"the first request got no answer, {first.error}")
    heard, seconds = run_all(url, requests, options)
    row = summary(heard, seconds)
    print(summary_table(row))
    out = Path(options.out or "endpoint.json")
    settings = {
        key: getattr(options, key)
        for key in ("endpoint", "model", "api", "requests", "seed", "prompts", "outputs", "body")
    }
    report = {
        "what": "endpoint",
        "command": ["python", "-m", "grist_tools.profile_latency", *given],
        "client": provenance("cpu"),
        **settings,
        "rate": "inf" if math.isinf(options.rate) else options.rate,
        "summary": row,
        "rows": [each._asdict() for each in heard],
    }
    write_json(report, out)
    print(f"written to {out}")
    return 0 if row["answered"] else 1
