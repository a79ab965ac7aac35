"""How fast a model answers: time to the first token, time between tokens, throughput, memory.

    python -m grist_tools.profile_latency runs/quickstart/model --batches 1,4 --prompts 32,128 --outputs 32

Every combination of batch, prompt and output length that fits the context is run greedily on random prompts, with the
host waiting for each token as a reader would. One untimed repetition goes first.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from grist_tools.console import fail, parser_for, run, size, table
from grist_tools.loading import add_model_options, open_model

if TYPE_CHECKING:
    import torch

PERCENTILES = (50, 90, 99)


class Shape(NamedTuple):
    """One point of the grid: sequences at once, tokens of each prompt, tokens written after it."""

    batch: int
    prompt: int
    output: int


def grid(batches: list[int], prompts: list[int], outputs: list[int], context: int) -> list[Shape]:
    """All combinations that fit the context.

    Raises:
        ValueError: none does.
    """
    shapes = [Shape(*each) for each in product(batches, prompts, outputs)]
    fitting = [shape for shape in shapes if shape.prompt + shape.output <= context]
    if not fitting:
        raise ValueError(f"no prompt and output length fit together into the model's context of {context} tokens")
    return fitting


def run_once(model, ids_BT: torch.Tensor, output: int) -> list[float]:
    """Seconds until each of the `output` tokens was known to the host, from the start of its own step."""
    import torch

    from grist_model.attention import KVCache

    device = ids_BT.device
    seconds = []
    with torch.inference_mode():
        _wait_for(device)
        started = time.perf_counter()
        cache = KVCache(model.config, ids_BT.shape[0], ids_BT.shape[1] + output, device=device)
        new_BT = ids_BT
        for _ in range(output):
            new_BT = model(new_BT, cache=cache)[:, -1:].argmax(-1)
            new_BT.tolist()  # what a reader waits for; it also waits for the device
            now = time.perf_counter()
            seconds.append(now - started)
            started = now
    return seconds


def measure(model, shape: Shape, device: str, repetitions: int) -> dict[str, Any]:
    """Latencies of one shape over some repetitions, and the memory that it took."""
    import numpy as np
    import torch

    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(model.config.vocab_size, (shape.batch, shape.prompt), generator=generator).to(device)
    _reset_peak(device)
    run_once(model, ids_BT, shape.output)
    runs = [run_once(model, ids_BT, shape.output) for _ in range(repetitions)]
    first = median(run[0] for run in runs)
    row: dict[str, Any] = {
        **shape._asdict(),
        "first_token_ms": 1e3 * first,
        "prefill_tokens_per_second": shape.batch * shape.prompt / first,
        "tokens_per_second": shape.batch * shape.output / median(sum(run) for run in runs),
        **_memory(device),
    }
    between = [seconds for run in runs for seconds in run[1:]]
    if between:
        values = np.percentile(between, PERCENTILES)
        row |= {f"between_tokens_p{p}_ms": 1e3 * float(v) for p, v in zip(PERCENTILES, values, strict=True)}
        row["decode_tokens_per_second"] = shape.batch / median(between)
    return row


def _wait_for(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _reset_peak(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: str) -> dict[str, int]:
    """The most that was in use: of the GPU since the last reset, or of this process since it started."""
    import torch

    if device.startswith("cuda"):
        return {"peak_device_bytes": torch.cuda.max_memory_allocated(device)}
    if device.startswith("mps"):
        return {"device_bytes": torch.mps.current_allocated_memory()}
    import resource

    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_process_bytes": kib if sys.platform == "darwin" else kib * 1024}


def latency_table(rows: list[dict[str, Any]]) -> str:
    header = ["batch", "prompt", "output", "first ms", "p50 ms", "p90 ms", "p99 ms", "tok/s", "decode tok/s", "memory"]

    def cells(row: dict[str, Any]) -> Iterator[str]:
        yield from (str(row[key]) for key in ("batch", "prompt", "output"))
        yield f"{row['first_token_ms']:.2f}"
        for p in PERCENTILES:
            value = row.get(f"between_tokens_p{p}_ms")
            yield "-" if value is None else f"{value:.2f}"
        yield f"{row['tokens_per_second']:,.0f}"
        decode = row.get("decode_tokens_per_second")
        yield "-" if decode is None else f"{decode:,.0f}"
        yield size(next(value for key, value in row.items() if key.endswith("_bytes")))

    return table(header, [list(cells(row)) for row in rows])


def numbers(text: str) -> list[int]:
    """`1,4,16` as argparse reads it."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers from 1, got {text}")
    return values


def parser() -> argparse.ArgumentParser:
    parser = parser_for("profile_latency", __doc__)
    add_model_options(parser)
    parser.add_argument("--batches", type=numbers, default=[1, 4], metavar="N,N", help="(default: 1,4)")
    parser.add_argument("--prompts", type=numbers, default=[32, 128], metavar="N,N", help="(default: 32,128)")
    parser.add_argument("--outputs", type=numbers, default=[32], metavar="N,N", help="(default: 32)")
    parser.add_argument("--repetitions", type=int, default=5, help="timed, a shape (default: %(default)s)")
    parser.add_argument("--out", metavar="JSON", help="file to write (default: latency.json beside DIR)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from grist_eval.environment import provenance, write_json

    try:
        if options.repetitions < 1:
            raise ValueError(f"--repetitions must be at least 1, got {options.repetitions}")
        model, _, device = open_model(options)
        shapes = grid(options.batches, options.prompts, options.outputs, model.config.context_length)
        rows = [
            measure(model, shape, device, options.repetitions)
            for shape in tqdm(shapes, desc="shapes", leave=False, disable=None)
        ]
        print(latency_table(rows))
        out = Path(options.out) if options.out else Path(options.directory).resolve().parent / "latency.json"
        write_json(_report(options, model, device, provenance(device), rows), out)
    except (ValueError, OSError) as error:
        return fail("profile_latency", error)
    print(f"written to {out}")
    return 0


def _report(options: argparse.Namespace, model, device: str, where: dict[str, Any], rows: list) -> dict[str, Any]:
    import torch

    from grist_kernels import describe

    return {
        **where,
        "model": str(options.directory),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": options.dtype,
        "threads": torch.get_num_threads(),
        "kernels": describe(torch.device(device).type),
        "repetitions": options.repetitions,
        "rows": rows,
    }


if __name__ == "__main__":
    run(main)
