"""Turns and rows of the training benchmark: who may take part, how fast each is, how much memory each took."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

from grist_tools.bench_training_steps import THEIRS, Setup
from grist_tools.console import size, table
from grist_tools.quiet import QUIET_CORES

if TYPE_CHECKING:
    from grist_tools.bench_training_process import Turn

Row = dict[str, Any]


class Trainer(Protocol):
    """As bench_training_process.Contestant."""

    who: str

    def losses(self, steps: int) -> list[float]: ...
    def turn(self, steps: int, patience: float) -> Turn: ...
    def peak_bytes(self) -> int: ...
    def stop(self) -> None: ...


def race(
    trainers: Sequence[Trainer], setup: Setup, options: argparse.Namespace, tolerance: float, peak_flops: float
) -> list[Row]:
    """A row for each; the processes are ended. One that fails, or whose losses are not those of transformers, is not timed;
    where transformers fails, nobody's losses can be checked, and nobody is timed."""
    until = time.perf_counter() + options.patience
    try:
        losses, failed = _losses(trainers, options.check_steps)
        wrong = {who: _difference(losses, who, tolerance) for who in losses} | failed
        right = [trainer for trainer in trainers if wrong[trainer.who] is None]
        turns: dict[str, list[Turn]] = {trainer.who: [] for trainer in right}
        for number in range(options.repetitions):
            first = number % max(1, len(right))
            for trainer in right[first:] + right[:first]:
                turns[trainer.who].append(trainer.turn(options.steps, max(0.0, until - time.perf_counter())))
        peaks = {trainer.who: trainer.peak_bytes() for trainer in right}
    finally:
        for trainer in trainers:
            trainer.stop()
    rows = []
    for trainer in trainers:
        row: Row = {"who": trainer.who, "ok": wrong[trainer.who] is None, "losses": losses.get(trainer.who)}
        if row["ok"]:
            row |= _figures(turns[trainer.who], setup, peak_flops) | {"peak_bytes": peaks[trainer.who]}
            row["ratio"] = median_ms(turns[THEIRS]) / row["ms"]
        else:
            row["wrong"] = wrong[trainer.who]
        rows.append(row)
    return rows


def _losses(trainers: Sequence[Trainer], steps: int) -> tuple[dict[str, list[float]], dict[str, str | None]]:
    """Of every contestant its losses, or why there are none."""
    found, failed = {}, {}
    for trainer in trainers:
        try:
            found[trainer.who] = trainer.losses(steps)
        except RuntimeError as error:
            failed[trainer.who] = str(error)
    return found, failed


def _difference(losses: dict[str, list[float]], who: str, tolerance: float) -> str | None:
    """What is wrong with a contestant's losses, or None."""
    if THEIRS not in losses:
        return f"not checked: {THEIRS} has no losses"
    for step, (mine, theirs) in enumerate(zip(losses[who], losses[THEIRS], strict=True), 1):
        if not abs(mine - theirs) <= tolerance * abs(theirs):  # NaN is wrong too
            return f"the loss of step {step} is {mine:.6g}, but {THEIRS} has {theirs:.6g}"
    return None


def _counting(turns: list[Turn]) -> list[Turn]:
    return [turn for turn in turns if turn.others is None or turn.others <= QUIET_CORES] or turns


def median_ms(turns: list[Turn]) -> float:
    """Of the turns that count."""
    return median(turn.ms for turn in _counting(turns))


def _figures(turns: list[Turn], setup: Setup, peak_flops: float) -> Row:
    from grist_model.accounting import flops_per_token

    ms = sorted(turn.ms for turn in _counting(turns))
    rate = 1e3 * setup.tokens_per_step / median(ms)
    known = [turn for turn in turns if turn.others is not None]
    return {
        "unit": "tokens/s",
        "value": rate,
        "ms": median(ms),
        "lowest_ms": ms[0],
        "highest_ms": ms[-1],
        "cpu_ms": median(turn.cpu_ms for turn in turns),
        "mfu": rate * flops_per_token(setup.model, setup.sequence_length) / peak_flops,
        "repetitions": len(turns),
        "quiet": sum(turn.others <= QUIET_CORES for turn in known if turn.others is not None) if known else None,
    }


def results_table(rows: list[Row]) -> str:
    header = [
        "model",
        "recomputed",
        "who",
        "tokens/s",
        "ms a step",
        "cpu ms",
        "ratio",
        "MFU",
        "peak",
        "planned",
        "quiet",
    ]
    cells, notes = [], []
    for row in rows:
        names = [row["model"], row["recompute"], row["who"]]
        if not row["ok"]:
            notes.append(f"{', '.join(names)}: {row['wrong']}")
            cells.append([*names, "WRONG", *["-"] * 7])
            continue
        quiet = "-" if row["quiet"] is None else f"{row['quiet']}/{row['repetitions']}"
        planned = "-" if row["who"] == THEIRS else size(row["planned_bytes"])
        cells.append([
            *names, f"{row['value']:,.0f}", f"{row['ms']:.1f}", f"{row['cpu_ms']:.1f}", f"{row['ratio']:.2f}",
            f"{row['mfu']:.1%}", size(row["peak_bytes"]), planned, quiet,
        ])  # fmt: skip
    return "\n".join([table(header, cells), *notes])
