"""How fast a model answers: time to the first token, time between tokens, throughput, memory.

    python -m grist_tools.profile_latency runs/quickstart/model --batches 1,4 --prompts 32,128 --outputs 32
    python -m grist_tools.profile_latency runs/quickstart/model --against transformers,llamacpp
    python -m grist_tools.profile_latency --endpoint http://127.0.0.1:8000/v1 --model NAME --rate 4 --requests 100

Every combination of batch, prompt and output length that fits the context is run greedily on random prompts, with the
host waiting for each token as a reader would. One untimed repetition goes first. Decoding is held against the device's own
copy speed and prefill against its matrix product (latency_roofline.py has the formulas); torch.profiler says where the
time of the largest shape goes. --against runs other people's software on the same weights in the same run, in turns.

--endpoint measures any server that speaks OpenAI's API instead, with requests that arrive at random (a Poisson process).
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from grist_tools import endpoint
from grist_tools.console import fail, parser_for, run
from grist_tools.latency import (
    OURS,
    Contestant,
    Row,
    Shape,
    figures,
    grid,
    in_turns,
    memory_of,
    ours,
    random_prompts,
    same_ids,
)
from grist_tools.latency_peers import PEERS
from grist_tools.loading import add_model_options, open_model


def numbers(text: str) -> list[int]:
    """`1,4,16` as argparse reads it."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected numbers from 1, got {text}")
    return values


def peers(text: str) -> list[str]:
    """`transformers,vllm` as argparse reads it."""
    names = list(dict.fromkeys(text.split(",")))
    if strays := set(names) - PEERS.keys():
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(PEERS)}, got {', '.join(sorted(strays))}")
    return names


def parser() -> argparse.ArgumentParser:
    parser = parser_for("profile_latency", __doc__)
    add_model_options(parser)
    next(action for action in parser._actions if action.dest == "directory").nargs = "?"  # --endpoint has no DIR
    parser.add_argument("--batches", type=numbers, default=[1, 4], metavar="N,N", help="(default: 1,4)")
    parser.add_argument("--prompts", type=numbers, default=[32, 128], metavar="N,N", help="(default: 32,128)")
    parser.add_argument("--outputs", type=numbers, default=[32], metavar="N,N", help="(default: 32)")
    parser.add_argument("--repetitions", type=int, default=5, help="timed, a shape (default: %(default)s)")
    parser.add_argument("--against", type=peers, default=[], metavar="A,B", help=f"some of {', '.join(PEERS)}")
    parser.add_argument(
        "--ops", type=int, default=6, help="rows of where the time goes; 0: none (default: %(default)s)"
    )
    parser.add_argument(
        "--out", metavar="JSON", help="file to write, and a PNG beside it (default: latency.json beside DIR)"
    )
    endpoint.add_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    try:
        if (options.endpoint is None) == (options.directory is None):
            raise ValueError("give a model directory, or --endpoint URL with --model NAME")
        return endpoint.profile(options, given) if options.endpoint else _profile(options, given)
    except (ValueError, OSError, ImportError) as error:
        return fail("profile_latency", error)


def _profile(options: argparse.Namespace, given: list[str]) -> int:
    import torch

    from grist_eval.environment import write_json
    from grist_model.hub import local_directory
    from grist_tools.latency_ops import breakdown, parts_table
    from grist_tools.latency_peers import Setting, opened
    from grist_tools.latency_text import draw, latency_table
    from grist_tools.timing import ceilings

    if options.repetitions < 1:
        raise ValueError(f"--repetitions must be at least 1, got {options.repetitions}")
    model, _, device = open_model(options)
    shapes = grid(options.batches, options.prompts, options.outputs, model.config.context_length)
    best = ceilings(device, getattr(torch, options.dtype))
    memory = {shape: _memory(model, shape, device) for shape in shapes}  # before others share it
    directory = local_directory(options.directory)
    with ExitStack() as stack:
        setting = Setting(directory, options.dtype, device, shapes, torch.get_num_threads())
        others = opened(options.against, setting, stack)
        rows = _rows(model, shapes, others, options.repetitions, best, memory)
    print(latency_table(rows))
    report = _report(options, given, model, device, rows)
    report["ceilings"] = asdict(best)
    if options.ops:
        largest = max(shapes, key=lambda shape: shape.batch * (shape.prompt + shape.output))
        parts = breakdown(model, largest, device, options.ops)
        print(f"\nbatch {largest.batch}, prompt {largest.prompt}, output {largest.output}:\n{parts_table(parts)}")
        report["operations"] = {"shape": largest._asdict()} | {
            phase: [part._asdict() for part in found] for phase, found in parts.items()
        }
    out = Path(options.out) if options.out else Path(options.directory).resolve().parent / "latency.json"
    write_json(report, out)
    picture = out.with_suffix(".png")
    draw(rows, f"{report['model']} in {options.dtype} on {report['device']}", picture)
    print(f"written to {out} and {picture.name}")
    return 0


def _memory(model, shape: Shape, device: str) -> Row:
    prompts, answer = random_prompts(shape, model.config.vocab_size), ours(model)
    return memory_of(lambda: answer(prompts, shape.output), device)


def _rows(
    model, shapes: list[Shape], others: dict[str, Contestant], repetitions: int, best: Any, memory: dict[Shape, Row]
) -> list[Row]:
    """Of every shape ours, then the others, with the share of our ids that they wrote too."""
    from tqdm import tqdm

    from grist_tools.latency_roofline import prefill_flops, shares, step_bytes

    contestants = {OURS: ours(model), **others}
    rows = []
    for shape in tqdm(shapes, desc="shapes", leave=False, disable=None):
        prompts = random_prompts(shape, model.config.vocab_size)
        answers = in_turns(contestants, prompts, shape.output, repetitions)
        for name, found in answers.items():
            row = figures(shape, found)
            row |= shares(row, step_bytes(model, shape), prefill_flops(model, shape), best)
            if others:
                row = {"who": name, **row, "same_ids": same_ids(answers[OURS][0].ids, found[0].ids)}
            rows.append(row | (memory[shape] if name == OURS else {}))
    return rows


def _report(options: argparse.Namespace, given: list[str], model, device: str, rows: list[Row]) -> dict[str, Any]:
    import torch

    from grist_eval.environment import provenance
    from grist_kernels import describe

    return {
        "what": "latency",
        "command": ["python", "-m", "grist_tools.profile_latency", *given],
        **provenance(device),
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
