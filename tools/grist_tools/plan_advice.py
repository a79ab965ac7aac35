"""From one layout to a choice among all of them: what fits, how fast each is, and which to take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from grist_tools.memory import Memory, estimate
from grist_tools.plan_layout import CHECKPOINTING, Layout, can_run, layouts, micro_batch
from grist_tools.plan_links import Assumptions
from grist_tools.plan_recompute import again, described
from grist_tools.plan_time import StepTime, step_time

if TYPE_CHECKING:
    from grist_tools.plan_gpus import Gpu
    from grist_train.config import TrainConfig

WORTH_A_CHANGE = 0.03  # a predicted gain below this is not worth leaving the run file for
TRACED_CANDIDATES = 3  # how many of the fastest layouts are traced, at most, until one fits


@dataclass(frozen=True)
class Candidate:
    """A layout, what it needs and how long a step takes with it."""

    layout: Layout
    memory: Memory
    time: StepTime


@dataclass(frozen=True)
class Advice:
    """What to do.

    Attributes:
        own: The layout of the run file.
        best: What to take instead, or `own` itself; None if nothing that the trainer can do fits.
        reasons: Why, one for each thing that differs.
        changes: If `own` does not fit: single changes that by the formula would; if nothing does, more GPUs.
    """

    own: Candidate
    best: Candidate | None
    reasons: list[str]
    changes: list[tuple[str, Candidate]]


def measured_memory(run: TrainConfig, layout: Layout, gpu: Gpu) -> Memory:
    """Traced where the trainer's step can be traced; else the formula, which then says why."""
    on_gpu = gpu.architecture is not None
    if run.preferences is not None:
        return estimate(run, layout, on_gpu, "formula: steps on pairs of answers are not traced")
    from grist_kernels.launch import Target
    from grist_tools.plan_trace import trace

    target = None if gpu.architecture is None else Target(gpu.architecture, gpu.processors)
    try:
        traced = trace(layout.config(run), layout.gpus, layout.micro_size, layout.micro_batches, target)
    except RuntimeError as error:  # the trainer's own step failed on these tensors; the reader is told with what
        reason = str(error).partition("\n")[0].partition(". ")[0]
        return estimate(run, layout, on_gpu, f"formula: the step was not traced ({type(error).__name__}: {reason})")
    return Memory(dict(traced.peak.roles), traced.peak.phase, "traced", on_gpu)


def advise(
    run: TrainConfig,
    own: Layout,
    gpu: Gpu,
    capacity_bytes: float,
    assumed: Assumptions,
    memory_of: Callable[[TrainConfig, Layout, Gpu], Memory] = measured_memory,
) -> Advice:
    """Try the run as it is, then every layout that the trainer can do, by formula; trace the fastest until one fits."""
    mine = Candidate(own, memory_of(run, own, gpu), step_time(run, own, gpu, assumed))
    own_fits = mine.memory.peak_bytes <= capacity_bytes
    by_formula = _by_formula(run, layouts(run, own), gpu, assumed)
    fitting = [each for each in by_formula if each.memory.peak_bytes <= capacity_bytes and each.layout != own]
    fitting.sort(key=lambda each: each.time.total)
    enough = mine.time.total * (1 - WORTH_A_CHANGE) if own_fits else float("inf")
    for each in fitting[:TRACED_CANDIDATES]:
        if each.time.total >= enough:
            break
        memory = memory_of(run, each.layout, gpu)
        if memory.peak_bytes <= capacity_bytes:
            best = replace(each, memory=memory)
            return Advice(
                mine,
                best,
                reasons(run, mine, best),
                [] if own_fits else changes(run, own, gpu, capacity_bytes, assumed),
            )
    if own_fits:
        return Advice(mine, mine, [f"no other layout is predicted to be {WORTH_A_CHANGE:.0%} faster and fits"], [])
    return Advice(mine, None, [], _more_gpus(run, own, gpu, capacity_bytes, assumed))


def _by_formula(run: TrainConfig, tried: list[Layout], gpu: Gpu, assumed: Assumptions) -> list[Candidate]:
    on_gpu = gpu.architecture is not None
    return [Candidate(each, estimate(run, each, on_gpu), step_time(run, each, gpu, assumed)) for each in tried]


def changes(
    run: TrainConfig, own: Layout, gpu: Gpu, capacity_bytes: float, assumed: Assumptions
) -> list[tuple[str, Candidate]]:
    """Single changes with which it would fit, each tried by the formula, the fastest first."""
    found = []
    for layout in _single_changes(run, own):
        [tried] = _by_formula(run, [layout], gpu, assumed)
        if tried.memory.peak_bytes <= capacity_bytes:
            found.append((layout.options(run), tried))
    return sorted(found, key=lambda change: change[1].time.total)


def _single_changes(run: TrainConfig, own: Layout) -> list[Layout]:
    share = own.micro_size * own.micro_batches
    tried = [
        *(replace(own, activation_checkpointing=kind) for kind in CHECKPOINTING),
        replace(own, reduce_every_micro_batch=True),
        replace(own, reshard_after_forward=True),
    ]
    size = own.micro_size // 2
    while size >= 1:
        if share % size == 0:
            tried.append(replace(own, micro_size=size, micro_batches=share // size))
        size //= 2
    shared = 2
    while run.model.experts and shared <= own.gpus_per_node:
        tried.append(replace(own, expert_parallel=shared))
        shared *= 2
    for ranks in (2, 4, 8):
        # As many ranks read the same sequences, and so each of them as many more.
        if own.context_parallel == 1 and own.micro_size == 1:
            tried.append(replace(own, context_parallel=ranks, micro_batches=own.micro_batches * ranks))
    return [layout for layout in tried if layout != own and can_run(run, layout)]


def _more_gpus(
    run: TrainConfig, own: Layout, gpu: Gpu, capacity_bytes: float, assumed: Assumptions
) -> list[tuple[str, Candidate]]:
    """The smallest number of GPUs, doubled and doubled again, on which some layout fits; the fastest there."""
    for factor in (2, 4, 8, 16, 32):
        gpus = own.gpus * factor
        try:
            size, number = micro_batch(replace(run, batch=replace(run.batch, micro_size=1)), gpus)
        except ValueError:
            continue
        start = replace(own, gpus=gpus, micro_size=size, micro_batches=number)
        fitting = [
            each
            for each in _by_formula(run, layouts(run, start), gpu, assumed)
            if each.memory.peak_bytes <= capacity_bytes
        ]
        if fitting:
            best = min(fitting, key=lambda each: each.time.total)
            return [(f"{gpus} GPUs {best.layout.options(run)}".strip(), best)]
    return []


def reasons(run: TrainConfig, own: Candidate, best: Candidate) -> list[str]:
    """What the better layout does differently, and why that helps."""
    before, after = own.layout, best.layout
    found = []
    if before.expert_parallel != after.expert_parallel:
        found.append(_why_experts(run, after))
    if before.activation_checkpointing != after.activation_checkpointing:
        found.append(_why_recomputed(run, own, best))
    if after.micro_size != before.micro_size:
        larger = after.micro_size > before.micro_size
        found.append(
            "larger micro-batches gather parameters less often" if larger else "smaller micro-batches keep less at once"
        )
    if before.reshard_after_forward != after.reshard_after_forward:
        kept = not after.reshard_after_forward
        found.append(
            "gathered parameters fit: they are gathered once" if kept else "gathered parameters are let go early"
        )
    if before.reduce_every_micro_batch != after.reduce_every_micro_batch and after.micro_batches > 1:
        once = not after.reduce_every_micro_batch
        found.append("whole gradients fit: they are reduced once a step" if once else "whole gradients would not fit")
    if before.context_parallel != after.context_parallel:
        found.append(f"{after.context_parallel} ranks share a sequence: each keeps that part of its activations")
    if before.replicate != after.replicate:
        found.append(f"{after.replicate} copies: parameters are gathered over {after.shards} ranks only")
    return found


def _why_recomputed(run: TrainConfig, own: Candidate, best: Candidate) -> str:
    words = described(best.layout.activation_checkpointing)
    if not words:
        return "activations fit: no block is computed twice"
    was, will = (again(run.model, each.layout.activation_checkpointing, each.memory.on_gpu) for each in (own, best))
    less = will.projections + will.attention + will.feed_forward < was.projections + was.attention + was.feed_forward
    return f"more activations fit: {words}" if less else f"activations would not fit otherwise: {words}"


def _why_experts(run: TrainConfig, after: Layout) -> str:
    model, tokens = run.model, after.micro_size * run.data.sequence_length
    gathered = 3 * model.experts * model.width * model.expert_width
    sent = 2 * tokens * model.active_experts * model.width
    if after.expert_parallel == 1:
        return f"gathering a layer's experts moves {gathered / 1e6:,.0f} M values, sending tokens {sent / 1e6:,.0f} M"
    return f"sending tokens moves {sent / 1e6:,.0f} M values a layer, gathering its experts {gathered / 1e6:,.0f} M"
