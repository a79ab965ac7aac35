"""The same greedy answer again and again, by one contestant or several in turns: when each token was there.

B sequences at once.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

OURS = "gristmill"
PERCENTILES = (50, 90, 99)
# What `memory_of` calls its figure, by what it measured.
MEMORY = ("peak_device_bytes", "device_bytes", "peak_process_bytes", "peak_process_since_start_bytes")
_CLEAR_REFS = Path("/proc/self/clear_refs")

Row = dict[str, Any]


class Shape(NamedTuple):
    """One point of the grid: sequences at once, tokens of each prompt, tokens written after it."""

    batch: int
    prompt: int
    output: int


class Answer(NamedTuple):
    """ids: the new ones, a list a sequence. seconds: from the call until the host knew the n-th id of every sequence."""

    ids: list[list[int]]
    seconds: list[float]


# Prompts of equal length, and how many ids to write after each -> what was written, and when.
Contestant = Callable[[list[list[int]], int], Answer]


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


def random_prompts(shape: Shape, vocab_size: int) -> list[list[int]]:
    """The same for every contestant and every run."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (shape.batch, shape.prompt), generator=generator).tolist()


def ours(model) -> Contestant:
    """`grist_model.generate`, as a program would call it."""
    from grist_model import generate

    device = model.embedding.weight.device

    def answer(prompts: list[list[int]], output: int) -> Answer:
        seconds = [0.0] * output
        known = [0] * len(prompts)

        def heard(row: int, _token: int) -> None:
            seconds[known[row]] = time.perf_counter() - started
            known[row] += 1

        wait_for(device)
        started = time.perf_counter()
        ids = generate(model, prompts, max_new_tokens=output, temperature=0, on_token=heard)
        return Answer(ids, seconds)

    return answer


def in_turns(
    contestants: Mapping[str, Contestant], prompts: list[list[int]], output: int, repetitions: int
) -> dict[str, list[Answer]]:
    """`repetitions` answers of each, after one that is not kept. Another one begins each time: a clock that drifts hits all
    alike."""
    names = list(contestants)
    for name in names:
        contestants[name](prompts, output)
    answers: dict[str, list[Answer]] = {name: [] for name in names}
    for number in range(repetitions):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            answers[name].append(contestants[name](prompts, output))
    return answers


def figures(shape: Shape, answers: list[Answer]) -> Row:
    """Medians over the repetitions, and percentiles over all times between tokens."""
    import numpy as np

    first = median(answer.seconds[0] for answer in answers)
    row: Row = {
        **shape._asdict(),
        "first_token_ms": 1e3 * first,
        "prefill_tokens_per_second": shape.batch * shape.prompt / first,
        "tokens_per_second": shape.batch * shape.output / median(answer.seconds[-1] for answer in answers),
    }
    between = np.concatenate([np.diff(answer.seconds) for answer in answers])
    if between.size:
        values = np.percentile(between, PERCENTILES)
        row |= {f"between_tokens_p{p}_ms": 1e3 * float(v) for p, v in zip(PERCENTILES, values, strict=True)}
        # Of whole answers: a contestant that shows several tokens at once has times of zero between them.
        each = median((answer.seconds[-1] - answer.seconds[0]) / (shape.output - 1) for answer in answers)
        row["decode_step_ms"] = 1e3 * each
        row["decode_tokens_per_second"] = shape.batch / each
    return row


def measure(model, shape: Shape, device: str, repetitions: int) -> Row:
    """Latencies of our model at one shape, and the memory that it took."""
    prompts = random_prompts(shape, model.config.vocab_size)
    contestant = ours(model)
    memory = memory_of(lambda: contestant(prompts, shape.output), device)
    answers = in_turns({OURS: contestant}, prompts, shape.output, repetitions)[OURS]
    return {**figures(shape, answers), **memory}


def same_ids(ids: list[list[int]], others: list[list[int]]) -> float:
    """How far two answers agree: of each sequence the share of ids before the first that differs, on average."""
    shares = []
    for a, b in zip(ids, others, strict=True):
        differs = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
        shares.append((differs[0] if differs else len(a)) / len(a))
    return sum(shares) / len(shares)


def wait_for(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_of(work: Callable[[], Any], device: str) -> dict[str, int]:
    """The most that was in use during `work`, weights included: of the GPU by torch, or of this process.

    Linux can forget the process's earlier peak (proc(5), clear_refs); where that is not possible, the figure is the most since
    the process started, and its name says so.
    """
    import torch

    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        work()
        return {"peak_device_bytes": torch.cuda.max_memory_allocated(device)}
    if device.startswith("mps"):
        work()
        return {"device_bytes": torch.mps.current_allocated_memory()}
    forgotten = _forget_peak()
    work()
    if forgotten:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return {"peak_process_bytes": next(1024 * int(x.split()[1]) for x in lines if x.startswith("VmHWM:"))}
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_process_since_start_bytes": peak if sys.platform == "darwin" else peak * 1024}


def _forget_peak() -> bool:
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:  # not Linux, or a sandbox that does not allow it
        return False
    return True
