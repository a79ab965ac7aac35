"""A plan as tables for people and as JSON for programs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from grist_tools.console import count, size, table
from grist_tools.memory import counted
from grist_tools.plan_advice import Advice, Candidate
from grist_tools.plan_recompute import described as recomputed_in_words
from grist_tools.plan_roles import ROLES

if TYPE_CHECKING:
    from grist_tools.plan_gpus import Gpu
    from grist_tools.plan_links import Assumptions
    from grist_train.config import TrainConfig


@dataclass(frozen=True)
class Budget:
    """What a run adds up to.

    Attributes:
        tokens: Of the whole run, or those asked for.
        seconds: Predicted, checkpoints and evaluation not counted.
        price: Of one GPU and hour, or None.
    """

    tokens: float
    seconds: float
    price: float | None

    def cost(self, gpus: int) -> float | None:
        return None if self.price is None else self.price * gpus * self.seconds / 3600


@dataclass(frozen=True)
class Plan:
    """Everything that is said about a run."""

    run: TrainConfig
    gpu_name: str
    gpu: Gpu
    capacity_bytes: float
    assumed: Assumptions
    advice: Advice
    own_budget: Budget
    best_budget: Budget | None

    @property
    def fits(self) -> bool:
        return self.advice.own.memory.peak_bytes <= self.capacity_bytes


def text(plan: Plan) -> str:
    """The whole plan, as printed."""
    own = plan.advice.own
    layout = own.layout
    parts = [
        f"{plan.run.name} on {layout.gpus} x {plan.gpu_name}: {described(own)}",
        memory_table(own, plan.capacity_bytes),
        time_table(plan),
        verdict(plan),
        advice_text(plan),
        padding_text(plan),
        assumptions_text(plan.assumed),
    ]
    return "\n\n".join(part for part in parts if part)


def described(candidate: Candidate) -> str:
    """A layout in words."""
    layout = candidate.layout
    words = [
        f"{_counted(layout.micro_batches, 'micro-batch', 'es')} of {_counted(layout.micro_size, 'sequence', 's')} a rank",
        f"experts shared by {layout.expert_parallel}" if layout.expert_parallel > 1 else "",
        f"{layout.replicate} copies" if layout.replicate > 1 else "",
        f"sequences shared by {layout.context_parallel}" if layout.context_parallel > 1 else "",
        recomputed_in_words(layout.activation_checkpointing),
        "" if layout.reshard_after_forward else "parameters kept gathered",
        "gradients reduced every micro-batch" if layout.reduce_every_micro_batch else "",
    ]
    return ", ".join(word for word in words if word)


def _counted(number: int, name: str, ending: str) -> str:
    return f"{number} {name}{'' if number == 1 else ending}"


def memory_table(own: Candidate, capacity_bytes: float) -> str:
    """One line a category, with its share of the GPU."""
    held = own.memory.categories()
    rows = [(role, size(held[role]), f"{held[role] / capacity_bytes:.1%}") for role in ROLES if held.get(role)]
    peak = own.memory.peak_bytes
    rows.append(("peak", size(peak), f"{peak / capacity_bytes:.1%}"))
    return table([f"memory of one rank, in the {own.memory.phase} ({own.memory.source})", "bytes", "of it"], rows)


def time_table(plan: Plan) -> str:
    """What a step and the run take, as the run file has it and, beside it, with the layout that is recommended."""
    from grist_model.accounting import active_parameters, parameters

    columns = [(plan.advice.own, plan.own_budget)]
    best = plan.advice.best
    if best is not None and best is not plan.advice.own and plan.best_budget is not None:
        columns.append((best, plan.best_budget))
    model = plan.run.model
    whole = f"{count(parameters(model))} parameters, {count(active_parameters(model))} active a token"
    named = [time_figures(plan, candidate, budget) for candidate, budget in columns]
    rows = [(name, *(figures[name] for figures in named)) for name in named[0]]
    return table([whole, "run file", "recommended"][: 1 + len(columns)], rows)


def time_figures(plan: Plan, candidate: Candidate, budget: Budget) -> dict[str, str]:
    """Name -> figure, for one layout."""
    time, gpus = candidate.time, candidate.layout.gpus
    rate = tokens_per_second(plan.run, candidate)
    figures = {
        "a step": f"{time.total:.3g} s",
        "  compute": f"{time.compute / time.total:.0%}",
        "  gathering and reducing, not hidden": f"{time.gather / time.total:.0%}",
        "  exchanging tokens": f"{time.exchange / time.total:.0%}",
        "  update": f"{time.update / time.total:.0%}",
        "tokens a second": count(rate),
        "  a GPU": count(rate / gpus),
        "MFU": f"{mfu(plan, candidate):.1%}",
        f"{count(budget.tokens)} tokens take": duration(budget.seconds),
    }
    cost = budget.cost(gpus)
    if cost is not None:
        figures[f"  at {budget.price:g} a GPU and hour"] = f"{cost:,.0f}"
    return figures


def tokens_per_second(run: TrainConfig, candidate: Candidate) -> float:
    return run.batch.global_size * run.data.sequence_length / candidate.time.total


def mfu(plan: Plan, candidate: Candidate) -> float:
    """As grist_train.metrics has it: without recomputation."""
    from grist_model.accounting import flops_per_token

    flops = flops_per_token(plan.run.model, plan.run.data.sequence_length)
    return tokens_per_second(plan.run, candidate) * flops / (candidate.layout.gpus * plan.gpu.peak_flops)


def verdict(plan: Plan) -> str:
    memory = plan.advice.own.memory
    return f"{'fits' if plan.fits else 'does not fit'}: {size(memory.peak_bytes)} of {size(plan.capacity_bytes)}"


def advice_text(plan: Plan) -> str:
    """What to take, or what would help."""
    advice, lines = plan.advice, []
    if advice.changes:
        lines.append("by formula, any one of these would make it fit:")
        lines += [
            f"  {named}  ->  {size(each.memory.peak_bytes)}, {each.time.total:.3g} s a step"
            for named, each in advice.changes
        ]
    if advice.best is None:
        return "\n".join(lines or ["no layout that the trainer can run fits, on up to 32 times as many GPUs"])
    if advice.best is advice.own:
        return "\n".join([*lines, f"recommended: as it is ({advice.reasons[0]})"])
    best = advice.best
    lines.append(f"recommended: {best.layout.options(plan.run)}")
    lines.append(
        f"  {described(best)}: {size(best.memory.peak_bytes)} ({best.memory.source}), {best.time.total:.3g} s a step"
    )
    return "\n".join(lines + [f"  - {reason}" for reason in advice.reasons])


def padding_text(plan: Plan) -> str:
    """Said where a third and more of what travels is padding: FSDP2 cuts stacks of experts into whole experts, a rank at
    least one, unless ranks share them."""
    lines = []
    for name, each in (("run file", plan.advice.own), ("recommended", plan.advice.best)):
        if each is None or (name == "recommended" and each is plan.advice.own):
            continue
        counts = counted(plan.run.model, each.layout.shards, each.layout.expert_parallel)
        padded = (counts.dense + counts.experts) / counts.block_values
        if padded >= 1.5:
            lines.append(
                f"{name}: {plan.run.model.experts} experts cut over {each.layout.shards} ranks: blocks travel as "
                f"{padded:.1f} times their size, which is padding"
            )
    return "\n".join(lines)


def _in_short(candidate: Candidate) -> str:
    return f"{size(candidate.memory.peak_bytes)}, {candidate.time.total:.3g} s a step"


def assumptions_text(assumed: Assumptions) -> str:
    return (
        f"Times are predictions. Assumed: {assumed.products:.0%} of the peak in products, {assumed.experts:.0%} in "
        f"experts, {assumed.attention:.0%} in attention;\n{assumed.memory:.0%} of the memory bandwidth, "
        f"{assumed.links:.0%} of the links, {assumed.network:.0%} of the network; the busiest rank of shared experts has "
        f"{assumed.imbalance:g} times the mean.\nCommunication hides behind compute one block ahead; token exchange does "
        "not. Launches, reading data, checkpoints and evaluation are not counted."
    )


def duration(seconds: float) -> str:
    """`3.2 days`, `5.0 hours`, `12 minutes` or `40 s`."""
    for unit, length, digits in (("days", 86400, 1), ("hours", 3600, 1), ("minutes", 60, 0)):
        if seconds >= length * (1 if unit == "minutes" else 2):
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: bytes, seconds, tokens."""
    advice = plan.advice
    best = None if advice.best is None or plan.best_budget is None else _candidate(plan, advice.best, plan.best_budget)
    return {
        "run": plan.run.name,
        "gpu": {"name": plan.gpu_name, **asdict(plan.gpu)},
        "capacity_bytes": plan.capacity_bytes,
        "fits": plan.fits,
        "assumptions": asdict(plan.assumed),
        "own": _candidate(plan, advice.own, plan.own_budget),
        "recommended": best,
        "reasons": advice.reasons,
        "changes": [
            {"options": named, "peak_bytes": each.memory.peak_bytes, "step_s": each.time.total}
            for named, each in advice.changes
        ],
    }


def _candidate(plan: Plan, candidate: Candidate, budget: Budget) -> dict[str, Any]:
    memory, time = candidate.memory, candidate.time
    return {
        "layout": asdict(candidate.layout),
        "options": candidate.layout.options(plan.run),
        "memory": {
            "source": memory.source, "phase": memory.phase, "peak_bytes": memory.peak_bytes, "bytes": memory.categories()
        },
        "time": {**asdict(time), "step_s": time.total, "bound_by": time.bound_by},
        "tokens_per_second": tokens_per_second(plan.run, candidate),
        "mfu": mfu(plan, candidate),
        "budget": {"tokens": budget.tokens, "seconds": budget.seconds, "cost": budget.cost(candidate.layout.gpus)},
    }  # fmt: skip
