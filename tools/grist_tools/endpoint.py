"""A server that speaks OpenAI's API under load: options, figures, report. endpoint_load.py sends the requests."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from grist_tools.console import table
from grist_tools.endpoint_load import Heard, address, ask, body_of, run_all, schedule

Row = dict[str, Any]


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
