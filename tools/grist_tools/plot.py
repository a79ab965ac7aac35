"""Draw the curves of one run, or lay several runs over each other.

python -m grist_tools.plot runs/quickstart                      # writes runs/quickstart/curves.png
python -m grist_tools.plot runs/a runs/b --out both.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from grist_tools.console import fail, parser_for, run


def metrics_of(run: str) -> Path:
    """A run folder's metrics file, or the file itself when one is given.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(run)
    path = path / "metrics.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no metrics at {path}: expected a run folder with a metrics.jsonl, or such a file")
    return path


def labels(paths: list[Path]) -> dict[str, Path]:
    """A short, unlike name for each run: its folder, and as much of the path above it as tells them apart."""
    folders = [path.resolve().parent for path in paths]
    depth = 1
    while True:
        names = ["/".join(folder.parts[-depth:]) for folder in folders]
        if len(set(names)) == len(set(folders)):
            return dict(zip(names, paths, strict=True))
        depth += 1


def parser() -> argparse.ArgumentParser:
    parser = parser_for("plot", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder, or a metrics.jsonl")
    parser.add_argument("--out", metavar="PNG", help="picture to write (default for one run: curves.png beside it)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        paths = [metrics_of(run) for run in options.runs]
        if len(paths) > 1 and not options.out:
            raise ValueError("several runs in one picture need --out FILE.png")
        from grist_train.curves import plot

        print(plot(labels(paths), options.out or paths[0].with_name("curves.png")))
    except (ValueError, OSError) as error:
        return fail("plot", error)
    return 0


if __name__ == "__main__":
    run(main)
