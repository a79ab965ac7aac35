"""Check and time a training step, ours beside transformers': one model, the same weights, batches, AdamW and precision.

    python -m grist_tools.bench_training                                # the quickstart model on this CPU
    python -m grist_tools.bench_training --device cuda                  # moe_1b in bfloat16
    python -m grist_tools.bench_training --recompute none,block --families gpt_oss

The model of a run file is trained as what it is (gpt_oss), and, of the same sizes but without sinks, windows and biases, as a
qwen3_moe, for which transformers has faster attention than its eager one. Both contestants first take the same few steps; where
losses differ, ours is not timed, and the command ends with status 1. Then they take turns, each in a process of its own. A
turn counts only if other processes left the machine alone meanwhile (Linux); --patience bounds the wait. A JSON goes to
benchmarks/.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_tools.bench_training_rows import race, results_table
from grist_tools.bench_training_steps import STEPS, THEIRS, Setup, run_of
from grist_tools.console import fail, parser_for, run
from grist_tools.quiet import QUIET_CORES

if TYPE_CHECKING:
    from grist_model.config import ModelConfig

RUNS = Path(__file__).parents[2] / "train" / "runs"
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {},
    "qwen3_moe": {
        "sinks": False, "mlp_bias": False, "router_bias": False, "attention_bias": False, "swiglu_alpha": None,
        "swiglu_limit": None, "qk_norm": "head", "window": None, "window_layers": "none",
    },
}  # fmt: skip
MOST_MICRO_BATCHES = 4  # of a step; a run file may have more
HOW = {
    "check": f"losses of the same steps; the largest difference, relative to those of {THEIRS}, is below `tolerance`",
    "value": "tokens a second, from the median turn; contestants in turns, another one first each time",
    "cpu_ms": "of the process's own processor time, the median: what others do disturbs it less",
    "quiet": f"how many turns count: those with less than {QUIET_CORES} cores in use by other processes. "
    "0: none was so quiet, and all count; null: this machine does not say",
    "peak_bytes": "CUDA: torch.cuda.max_memory_allocated. CPU: what the process held at most (VmHWM) beyond what it held "
    "before the model was built; libraries that are loaded later and what the C library keeps are in it",
    "planned_bytes": "what tensors take by python -m grist_tools.plan's trace of our step",
}
# Relative: of float32, sums in another order, carried through the updates; of bfloat16, roundings.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}


def parser() -> argparse.ArgumentParser:
    parser = parser_for("bench_training", __doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--run", metavar="YAML", help="a run file's model and batch (quickstart; moe_1b on CUDA)")
    parser.add_argument("--families", default=",".join(FAMILIES), help="default: %(default)s")
    parser.add_argument("--recompute", default="none", help="none, block or both, with a comma (default: %(default)s)")
    parser.add_argument("--dtype", choices=tuple(TOLERANCE), help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--layers", type=int, help="instead of the run file's")
    parser.add_argument("--sequence-length", type=int, help="instead of the run file's")
    parser.add_argument("--micro-size", type=int, help="instead of the run file's")
    parser.add_argument(
        "--micro-batches", type=int, help=f"a step; default: the run file's, at most {MOST_MICRO_BATCHES}"
    )
    parser.add_argument("--check-steps", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="of a turn (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=7, help="turns of each (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait in all (default: %(default)s)")
    parser.add_argument("--out", metavar="JSON", help="default: benchmarks/training-DEVICE-DATE.json")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for options that make no benchmark."""
    for name, known in (("families", set(FAMILIES)), ("recompute", {"none", "block"})):
        if strays := set(getattr(options, name).split(",")) - known:
            raise ValueError(
                f"--{name} must be some of {', '.join(sorted(known))}, but has {', '.join(sorted(strays))}"
            )
    for name in ("layers", "sequence_length", "micro_size", "micro_batches", "check_steps", "steps", "repetitions"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, but is {value}")


def setup_of(options: argparse.Namespace, family: str, recompute: bool, directory: str) -> Setup:
    """What is trained. Of the run file its model, which has to be a GPT-OSS, and its batch.

    Raises ValueError for a run file whose model has more than plain settings, FileNotFoundError for one that is not there.
    """
    import yaml

    path = (
        Path(options.run) if options.run else RUNS / ("moe_1b.yaml" if options.device == "cuda" else "quickstart.yaml")
    )
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    model = _model(path, settings["model"], options.layers, FAMILIES[family])
    micro = options.micro_size or settings["batch"]["micro_size"]
    number = options.micro_batches or min(MOST_MICRO_BATCHES, settings["batch"]["global_size"] // micro)
    dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    length = options.sequence_length or settings["data"]["sequence_length"]
    return Setup(directory, model, options.device, dtype, recompute, length, micro, number)


def _model(path: Path, settings: dict[str, Any], layers: int | None, changes: dict[str, Any]) -> ModelConfig:
    """Without losses of the router: transformers adds the balance loss in another way."""
    from grist_model.config import ModelConfig

    if nested := [name for name, value in settings.items() if isinstance(value, dict)]:
        raise ValueError(f"{path}: model.{nested[0]} has settings of its own, which the benchmark does not read")
    losses = {"balance": "none", "router_z_loss_weight": 0.0}
    model = replace(ModelConfig(**settings), **losses, **changes)
    return model if layers is None else replace(model, layers=layers)


def write_weights(setup: Setup, family: str) -> None:
    """Raises ValueError where the model is not of that family."""
    import grist_model

    model = grist_model.build(setup.model)
    grist_model.initialize(model, 0)
    written = grist_model.save(model, setup.directory)
    if written != family:
        raise ValueError(f"the model was to be a {family}, but only {written} expresses it: use another --run")


def planned_bytes(setup: Setup) -> int:
    """Of the tensors of our step at its peak, traced."""
    import torch

    from grist_kernels.launch import target
    from grist_tools.plan_trace import trace

    gpu = target(torch.device("cuda")) if setup.device == "cuda" else None
    return trace(run_of(setup), 1, setup.micro_size, setup.micro_batches, gpu).peak.total


def new_report(options: argparse.Namespace, command: list[str], peak: tuple[float, str]) -> dict[str, Any]:
    import importlib.metadata

    import torch

    from grist_eval.environment import provenance
    from grist_kernels import describe
    from grist_tools.bench_kernels import commit, gpu_state
    from grist_train.metrics import MFU_FORMULA

    where = provenance(options.device)
    where["versions"]["transformers"] = importlib.metadata.version("transformers")
    return {
        "what": "training",
        "command": ["python", "-m", "grist_tools.bench_training", *command],
        "commit": commit(),
        **where,
        "gpu": gpu_state(options.device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": describe(options.device),
        "options": vars(options),
        "tolerance": TOLERANCE,
        "how": HOW | {"mfu": MFU_FORMULA},
        "peak_flops": peak[0],
        "peak_flops_of": peak[1],
        "rows": [],
    }


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    import torch

    from grist_eval.environment import write_json
    from grist_tools.bench_kernels import default_out
    from grist_tools.bench_training_process import Contestant
    from grist_train.metrics import peak_flops

    try:
        check_options(options)
        peak = peak_flops(torch.device(options.device))
        report = new_report(options, sys.argv[1:] if arguments is None else arguments, peak)
        today = datetime.date.today().isoformat()
        out = Path(options.out) if options.out else default_out(report["device"], today, "training")
        for family in options.families.split(","):
            for recompute in options.recompute.split(","):
                with tempfile.TemporaryDirectory(prefix="grist-bench-training-") as folder:
                    setup = setup_of(options, family, recompute == "block", folder)
                    write_weights(setup, family)
                    planned = planned_bytes(setup)
                    contestants = [Contestant(who, setup) for who in STEPS]
                    rows = race(contestants, setup, options, TOLERANCE[setup.dtype], peak[0])
                named = {"model": family, "recompute": recompute}
                report["rows"] += [{**named, **row, "planned_bytes": planned} for row in rows]
                write_json(report, out)
    except (ValueError, ImportError, OSError, KeyError) as error:
        return fail("bench_training", error)
    print(results_table(report["rows"]))
    print(f"written to {out}")
    return 0 if all(row["ok"] for row in report["rows"]) else 1


if __name__ == "__main__":
    run(main)
