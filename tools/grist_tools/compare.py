"""Variants of a model in one table: format, size, bits per weight, quality, speed.

    python -m grist_tools.compare runs/quickstart/model exports/int8 exports/int4 --data datasets/shakespeare
    python -m grist_tools.compare model exports/mxfp4 model.gguf --text book.txt --tasks hellaswag --task-data hellaswag.jsonl
    python -m grist_tools.compare model exports/int4 --results model.json --results int4.json

Quality is bits per byte on --data or --text and the tasks of --tasks, all by grist_eval, whose options these are; --results
takes them from reports of `python -m grist_eval` instead, matched to a variant by the checksums of its weights. Speed is a
short profile of this library; profile_latency measures at more length. Of a .gguf file format and size are told.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from grist_eval import question_options
from grist_eval.tasks import TASKS
from grist_tools.console import fail, parser_for, run
from grist_tools.loading import add_model_options

ONE_MODEL = ("items_out", "documents_out", "samples_out")  # files that every variant would write anew


def parser() -> argparse.ArgumentParser:
    parser = parser_for("compare", __doc__)
    add_model_options(parser)
    directory = next(action for action in parser._actions if action.dest == "directory")
    directory.nargs, directory.help = (
        "+",
        "model directories, or .gguf files; the first is what the others are compared with",
    )
    parser.add_argument("--tasks", default="", metavar="A,B", help="tasks of grist_eval to run on every variant")
    parser.add_argument(
        "--results",
        action="append",
        default=[],
        type=Path,
        metavar="JSON",
        help="report of grist_eval; may be repeated",
    )
    parser.add_argument("--latency", type=_shape, default=(1, 64, 32), metavar="B,P,O", help="(default: 1,64,32)")
    parser.add_argument("--repetitions", type=int, default=3, help="of the answer; 0: no speed (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.json"), help="and a .md beside it (default: %(default)s)"
    )
    for task in TASKS.values():
        task.add_options(parser)
    question_options.add_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="of everything sampled (default: %(default)s)")
    return parser


def _shape(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    if len(values) != 3 or min(values) < 1:
        raise argparse.ArgumentTypeError(f"expected sequences,prompt,output, such as 1,64,32, got {text}")
    return values


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(given)
    from grist_eval.environment import pick_device, provenance, write_json
    from grist_tools.compare_variants import markdown, measured, reports_by_weights

    try:
        if options.repetitions < 0:
            raise ValueError(f"--repetitions must be 0 or more, got {options.repetitions}")
        for name in ONE_MODEL:
            if getattr(options, name, None):
                raise ValueError(f"--{name.replace('_', '-')} is of one model: use it with python -m grist_eval")
        device = pick_device(options.device)
        known = reports_by_weights(options.results)
        rows = [measured(variant, options, known) for variant in options.directory]
        present = {row.get("weights_sha256") for row in rows}
        if strays := [str(path) for key, (path, _) in known.items() if key not in present]:
            raise ValueError(f"{', '.join(strays)}: not of the weights of any variant here")
        text = markdown(rows)
        print(text)
        report = {
            "what": "compare",
            "command": ["python", "-m", "grist_tools.compare", *given],
            **provenance(device),
            "rows": rows,
        }
        write_json(report, options.out)
        question_options.write_text(text + "\n", options.out.with_suffix(".md"))
    except (ValueError, OSError, ImportError) as error:
        return fail("compare", error)
    print(f"written to {options.out} and {options.out.with_suffix('.md').name}")
    return 0


if __name__ == "__main__":
    run(main)
