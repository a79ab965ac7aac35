"""Will a run fit, and how long will it take? Answers from the run file alone, without a GPU.

    python -m grist_tools.plan --config train/runs/gpt_oss_20b.yaml --gpus 64 --gpu h200
    python -m grist_tools.plan --config train/runs/moe_1b.yaml --gpus 8 --gpu h100 --batch.micro_size 4

Options with a dot are settings of the run, as the trainer takes them. Ends with status 0 if the run fits, 1 if not.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from grist_tools.console import count, fail, parser_for, run, size, table

if TYPE_CHECKING:
    from grist_tools.memory import Memory
    from grist_train.config import TrainConfig
    from grist_train.data_config import Phase

# Name on the command line: (the device in grist_train.metrics.PEAK_FLOPS, memory in GiB as torch reports it).
GPUS = {
    "a100": ("A100", 79.2),
    "h100": ("H100", 79.1),
    "h200": ("H200", 139.7),
    "b200": ("B200", 178.3),
    "l40s": ("L40S", 44.4),
    "mi300x": ("MI300X", 191.5),
    "rtx4090": ("RTX 4090", 23.6),
}
DEFAULT_MFU = 0.3  # an assumption, not a measurement: say --mfu what your own runs reach


def parser() -> argparse.ArgumentParser:
    parser = parser_for("plan", __doc__)
    parser.add_argument("--config", required=True, metavar="YAML", help="run file, as train/runs/moe_1b.yaml")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs over all machines")
    parser.add_argument("--gpu", choices=GPUS, required=True, help="kind of GPU")
    parser.add_argument("--memory-gib", type=float, help="memory of one GPU, where yours has another amount")
    parser.add_argument(
        "--mfu", type=float, default=DEFAULT_MFU, help="assumed model FLOPs utilisation (default: %(default)s)"
    )
    return parser


def run_file(path: str, overrides: list[str]) -> TrainConfig:
    """The settings of a run file, with overrides as on the trainer's command line. Raises ValueError for wrong ones."""
    from grist_train.config import parse

    try:
        return parse(["--config", path, *overrides])
    except SystemExit as end:  # what parse makes of wrong input; here status 1 means that the run does not fit
        raise ValueError(str(end.code).removeprefix("error: ")) from end


def micro_batch(config: TrainConfig, gpus: int) -> tuple[int, int]:
    """Sequences in a micro-batch and micro-batches a step on each GPU.

    Raises:
        ValueError: the global batch cannot be dealt out evenly.
    """
    total = config.batch.global_size
    if gpus < 1 or total % gpus:
        raise ValueError(f"batch.global_size {total} cannot be dealt out to {gpus} GPUs evenly")
    share = total // gpus
    micro = min(config.batch.micro_size or share, share)
    if share % micro:
        raise ValueError(f"{share} sequences a GPU and step are not filled by micro-batches of {micro}")
    return micro, share // micro


def memory_table(memory: Memory, capacity_bytes: float) -> str:
    """One line a category, with its share of the GPU."""
    rows = [(name, size(value), f"{value / capacity_bytes:.1%}") for name, value in memory.categories().items()]
    rows.append(("peak", size(memory.peak_bytes), f"{memory.peak_bytes / capacity_bytes:.1%}"))
    return table(["memory of one GPU", "bytes", "of the GPU"], rows)


def knobs(config: TrainConfig, gpus: int, capacity_bytes: float) -> list[str]:
    """Single changes with which a run that does not fit would, each tried; best tried in this order."""
    from grist_tools.memory import estimate

    def fits(changed: TrainConfig, number: int) -> Memory | None:
        try:
            micro, steps = micro_batch(changed, number)
        except ValueError:
            return None
        memory = estimate(changed, number, micro, steps)
        return memory if memory.peak_bytes <= capacity_bytes else None

    found = []
    for text, changed, number in candidates(config, gpus):
        if memory := fits(changed, number):
            found.append(f"{text}  ->  {size(memory.peak_bytes)}")
    return found


def candidates(config: TrainConfig, gpus: int) -> list[tuple[str, TrainConfig, int]]:
    """Changes to try: (as one would type it, the changed run, GPUs)."""
    from dataclasses import replace

    def compute(**changes) -> TrainConfig:
        return replace(config, compute=replace(config.compute, **changes))

    tried: list[tuple[str, TrainConfig, int]] = []
    if config.compute.activation_checkpointing != "block":
        block = compute(activation_checkpointing="block")
        tried.append(("--compute.activation_checkpointing block", block, gpus))
    if not config.compute.reduce_every_micro_batch:
        tried.append(("--compute.reduce_every_micro_batch true", compute(reduce_every_micro_batch=True), gpus))
    if not config.compute.reshard_after_forward:
        tried.append(("--compute.reshard_after_forward true", compute(reshard_after_forward=True), gpus))
    micro = micro_batch(config, gpus)[0] // 2
    while micro >= 1:
        smaller = replace(config, batch=replace(config.batch, micro_size=micro))
        tried.append((f"--batch.micro_size {micro}", smaller, gpus))
        micro //= 2
    everything = compute(activation_checkpointing="block", reduce_every_micro_batch=True, reshard_after_forward=True)
    everything = replace(everything, batch=replace(config.batch, micro_size=1))
    tried.append(("all of the above with --batch.micro_size 1", everything, gpus))
    for factor in (2, 4, 8, 16, 32):
        tried.append((f"all of the above on {gpus * factor} GPUs", everything, gpus * factor))
    return tried


def speed_table(config: TrainConfig, gpus: int, peak_flops: float, mfu: float) -> str:
    """Tokens and time, from the FLOPs of the model and an assumed utilisation."""
    from grist_model.accounting import active_parameters, flops_per_token, parameters

    tokens_per_step = config.batch.global_size * config.data.sequence_length
    flops = flops_per_token(config.model, config.data.sequence_length)
    rate = gpus * peak_flops * mfu / flops
    tokens = [(steps_of(config, k) * phase.tokens_per_step, phase) for k, phase in enumerate(config.phases)]
    total_flops = sum(n * flops_per_token(config.model, phase.sequence_length) for n, phase in tokens)
    seconds = total_flops / (gpus * peak_flops * mfu)
    return table(
        ["time", ""],
        [
            (
                "parameters",
                f"{count(parameters(config.model))} ({count(active_parameters(config.model))} active a token)",
            ),
            ("training FLOPs a token", count(flops)),
            ("assumed utilisation", f"{mfu:.0%} of {peak_flops / 1e12:.0f} TFLOP/s"),
            ("tokens a second", f"{count(rate)} ({count(rate / gpus)} a GPU)"),
            ("a step", f"{count(tokens_per_step)} tokens, {tokens_per_step / rate:.3g} s"),
            ("the run", f"{config.steps:,} steps, {count(sum(n for n, _ in tokens))} tokens, {duration(seconds)}"),
        ],
    )


def steps_of(config: TrainConfig, number: int) -> int:
    """Steps of one phase of a run."""
    ends = [*(phase.after_step for phase in config.phases[1:]), config.steps]
    return max(0, min(ends[number], config.steps) - config.phases[number].after_step)


def heaviest(config: TrainConfig, gpus: int) -> TrainConfig:
    """The run with the batch of its phase that puts the most tokens through the model at once: what memory depends on."""
    from dataclasses import replace

    def of(phase: Phase) -> TrainConfig:
        data = replace(config.data, sequence_length=phase.sequence_length, stages=())
        return replace(
            config, data=data, batch=replace(config.batch, global_size=phase.global_size, micro_size=phase.micro_size)
        )

    return max(map(of, config.phases), key=lambda run: micro_batch(run, gpus)[0] * run.data.sequence_length)


def duration(seconds: float) -> str:
    """`3.2 days`, `5.0 hours`, `12 minutes` or `40 s`."""
    for unit, length, digits in (("days", 86400, 1), ("hours", 3600, 1), ("minutes", 60, 0)):
        if seconds >= length * (1 if unit == "minutes" else 2):
            return f"{seconds / length:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


def main(arguments: list[str] | None = None) -> int:
    options, overrides = parser().parse_known_args(arguments)
    from grist_tools.memory import estimate
    from grist_train.metrics import PEAK_FLOPS

    try:
        if not 0 < options.mfu <= 1:
            raise ValueError(f"--mfu must be above 0 and at most 1, got {options.mfu}")
        config = run_file(options.config, overrides)
        device, memory_gib = GPUS[options.gpu]
        capacity_bytes = (options.memory_gib or memory_gib) * 2**30
        heavy = heaviest(config, options.gpus)
        micro, accumulated = micro_batch(heavy, options.gpus)
        memory = estimate(heavy, options.gpus, micro, accumulated)
    except ValueError as error:
        return fail("plan", error)

    print(f"{config.name} on {options.gpus} x {options.gpu}: {accumulated} micro-batches of {micro} sequences a GPU\n")
    print(memory_table(memory, capacity_bytes), end="\n\n")
    print(speed_table(config, options.gpus, PEAK_FLOPS[device], options.mfu), end="\n\n")
    if memory.peak_bytes <= capacity_bytes:
        print(f"fits: {size(memory.peak_bytes)} of {size(capacity_bytes)}")
        return 0
    print(f"does not fit: {size(memory.peak_bytes)} of {size(capacity_bytes)}")
    ways = knobs(heavy, options.gpus, capacity_bytes)
    print("any one of these would:\n  " + "\n  ".join(ways) if ways else "no single change here would help")
    return 1


if __name__ == "__main__":
    run(main)
