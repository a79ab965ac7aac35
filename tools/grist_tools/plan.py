"""Will a run fit, how long will it take, what will it cost, and what should be changed? From the run file alone, without a GPU.

    python -m grist_tools.plan --config train/runs/gpt_oss_20b.yaml --gpus 64 --gpu h200 --tokens 1T --price 2.5
    python -m grist_tools.plan --config train/runs/moe_1b.yaml --gpus 8 --gpu h100 --batch.micro_size 4

Options with a dot are settings of the run, as the trainer takes them. Ends with status 0 if the run fits, 1 if not.

Memory is traced: the trainer's own step, as rank 0 of so many, on tensors that have sizes and no storage. Time is predicted
from assumptions that are printed with it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING

from grist_tools.console import fail, parser_for, run
from grist_tools.plan_gpus import GPUS, NAMES, Gpu, this_cpu

if TYPE_CHECKING:
    from grist_tools.plan_advice import Candidate
    from grist_tools.plan_links import Assumptions
    from grist_tools.plan_report import Budget
    from grist_train.config import TrainConfig
    from grist_train.data_config import Phase

SUFFIXES = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def parser() -> argparse.ArgumentParser:
    parser = parser_for("plan", __doc__)
    parser.add_argument("--config", required=True, metavar="YAML", help="run file, as train/runs/moe_1b.yaml")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs over all machines (processes, with --gpu cpu)")
    parser.add_argument("--gpu", choices=NAMES, required=True, help="kind of GPU; cpu is this machine")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="GPUs of one machine (default: %(default)s)")
    parser.add_argument("--memory-gib", type=float, help="memory of one GPU, where yours has another amount")
    parser.add_argument("--tokens", type=tokens, help="tokens to train on, as 300B; default: those of the run file")
    parser.add_argument("--price", type=float, help="of one GPU for an hour, in the currency you want to read")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def tokens(written: str) -> float:
    """`300B`, `1e12` or `300000000000`. Raises argparse's error for anything else."""
    unit = SUFFIXES.get(written[-1:].lower(), 1.0)
    try:
        value = float(written[:-1] if written[-1:].lower() in SUFFIXES else written) * unit
    except ValueError:
        value = 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be a number of tokens above 0, as 300B or 1e12, but is {written!r}")
    return value


def run_file(path: str, overrides: list[str]) -> TrainConfig:
    """The settings of a run file, with overrides as on the trainer's command line, and the model of its `initial`.

    Raises ValueError for wrong ones.
    """
    from grist_train.config import parse

    try:
        config = parse(["--config", path, *overrides])
    except SystemExit as end:  # what parse makes of wrong input; here status 1 means that the run does not fit
        raise ValueError(str(end.code).removeprefix("error: ")) from end
    if config.initial is None:
        return config
    from grist_model import config_of
    from grist_model.hub import local_directory

    return replace(config, model=config_of(local_directory(config.initial)))


def heaviest(config: TrainConfig, gpus: int) -> TrainConfig:
    """The run with the batch of its phase that puts the most tokens through the model at once: what memory depends on."""
    from grist_tools.plan_layout import micro_batch

    alone = [of_phase(config, phase) for phase in config.phases]
    return max(alone, key=lambda run: micro_batch(run, gpus)[0] * run.data.sequence_length)


def of_phase(config: TrainConfig, phase: Phase) -> TrainConfig:
    """The run as if it were this phase throughout."""
    data = replace(config.data, sequence_length=phase.sequence_length, stages=())
    batch = replace(config.batch, global_size=phase.global_size, micro_size=phase.micro_size)
    return replace(config, data=data, batch=batch)


def steps_of(config: TrainConfig, number: int) -> int:
    """Steps of one phase of a run."""
    ends = [*(phase.after_step for phase in config.phases[1:]), config.steps]
    return max(0, min(ends[number], config.steps) - config.phases[number].after_step)


def budget(
    config: TrainConfig, candidate: Candidate, gpu: Gpu, assumed: Assumptions, wanted: float | None, price: float | None
) -> Budget:
    """Tokens and seconds of the run with a layout, every phase with its own batch; or of as many tokens as are wanted."""
    from grist_tools.plan_layout import micro_batch
    from grist_tools.plan_report import Budget
    from grist_tools.plan_time import step_time

    layout = candidate.layout
    total, seconds = 0.0, 0.0
    for number, phase in enumerate(config.phases):
        alone = of_phase(config, phase)
        size, micro_batches = micro_batch(layout.config(alone), layout.gpus)
        time = step_time(alone, replace(layout, micro_size=size, micro_batches=micro_batches), gpu, assumed)
        total += steps_of(config, number) * phase.tokens_per_step
        seconds += steps_of(config, number) * time.total
    return Budget(total, seconds, price) if wanted is None else Budget(wanted, seconds * wanted / total, price)


def main(arguments: list[str] | None = None) -> int:
    options, overrides = parser().parse_known_args(arguments)
    from grist_tools.plan_advice import advise
    from grist_tools.plan_layout import layout_of
    from grist_tools.plan_links import Assumptions
    from grist_tools.plan_report import Plan, as_json, text

    try:
        if options.gpus < 1 or options.gpus_per_node < 1:
            raise ValueError(
                f"--gpus and --gpus-per-node must be at least 1, got {options.gpus}, {options.gpus_per_node}"
            )
        config = run_file(options.config, overrides)
        heavy = heaviest(config, options.gpus)
        per_node = min(options.gpus_per_node, options.gpus)
        gpu = this_cpu(per_node) if options.gpu == "cpu" else GPUS[options.gpu]
        capacity_bytes = options.memory_gib * 2**30 if options.memory_gib else gpu.memory_bytes
        assumed = Assumptions()
        advice = advise(heavy, layout_of(heavy, options.gpus, per_node), gpu, capacity_bytes, assumed)
        own = budget(config, advice.own, gpu, assumed, options.tokens, options.price)
        best = None if advice.best is None else budget(config, advice.best, gpu, assumed, options.tokens, options.price)
    except (ValueError, FileNotFoundError) as error:
        return fail("plan", error)
    plan = Plan(heavy, options.gpu, gpu, capacity_bytes, assumed, advice, own, best)
    print(json.dumps(as_json(plan), indent=1) if options.json else text(plan))
    return 0 if plan.fits else 1


if __name__ == "__main__":
    run(main)
