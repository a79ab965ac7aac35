"""What is in a run folder, read for the report: every file may be missing, half-written or still growing.

What could not be read is kept in words (`problems`), so that the page says so in the place where it would have stood.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from grist_tools.plot import labels
from grist_train.curves import Metrics, Series, read_metrics

MAX_RUNS = 8  # colours that the eye still tells apart
MAX_SAMPLE_CHARS = 60_000
_METRICS = "metrics.jsonl"
Value = TypeVar("Value")


@dataclass(frozen=True)
class Checkpoint:
    """A folder of `checkpoints/`.

    Attributes:
        step: Of its name.
        n_bytes: Of all its files.
        validation_loss: Of its state.json; None when there was no evaluation at that step.
        whole: False while it is being written, or when that was cut short.
    """

    step: int
    n_bytes: int
    validation_loss: float | None
    whole: bool


@dataclass(frozen=True)
class Run:
    """A run folder.

    Attributes:
        label: Short name that no other run of the page has.
        problems: File name -> why it is not here, of those that are absent or could not be read.
        notes: What is odd about `metrics.jsonl`, line by line.
        bad_batches: Rows of `bad_batches.jsonl`, in the order of the file.
    """

    label: str
    folder: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: Metrics
    notes: tuple[str, ...]
    evaluation: dict[str, Any]
    bad_batches: list[dict[str, Any]]
    samples: str
    checkpoints: tuple[Checkpoint, ...]
    problems: dict[str, str]

    @property
    def step(self) -> int:
        """The last step that was written down, 0 before the first."""
        rows = self.metrics.training or self.metrics.evaluation
        return rows[-1]["step"] if rows else 0

    @property
    def steps(self) -> int | None:
        """Steps that the configuration asks for."""
        steps = self.config.get("steps")
        return steps if isinstance(steps, int) else None

    def last(self, key: str) -> float | None:
        """The last number under `key` in a training row, NaN included."""
        for row in reversed(self.metrics.training):
            if is_number(row.get(key)):
                return float(row[key])
        return None

    def figures(self) -> list[str]:
        """Keys of the training rows, those of one row after those of an earlier one."""
        return list(dict.fromkeys(chain.from_iterable(self.metrics.training)))

    def not_finite(self) -> Series:
        """Training steps whose loss or gradient norm is no finite number; values are the losses."""
        rows = [row for row in self.metrics.training if not all(_finite(row.get(key)) for key in ("loss", "grad_norm"))]
        return Series([row["step"] for row in rows], [row.get("loss", math.nan) for row in rows])


def is_number(value: Any) -> TypeGuard[float]:
    """A number of a JSON row; true and false are none, NaN is one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: Any) -> bool:
    return value is None or (is_number(value) and math.isfinite(value))


def read_runs(folders: Sequence[str]) -> list[Run]:
    """Run folders, or the `metrics.jsonl` in them, in the order given.

    Raises:
        FileNotFoundError: one is no run folder.
        ValueError: one is given twice, or there are more than MAX_RUNS.
    """
    if len(folders) > MAX_RUNS:
        raise ValueError(f"at most {MAX_RUNS} runs can be told apart on one page, got {len(folders)}")
    paths = [_folder(given) for given in folders]
    named = labels([path / _METRICS for path in paths])
    if len(named) < len(paths):
        raise ValueError(f"a run is given twice: {', '.join(folders)}; name each one once")
    return [_read_run(label, path.parent) for label, path in named.items()]


def _folder(given: str) -> Path:
    path = Path(given)
    path = path.parent if path.name == _METRICS else path
    if not any((path / name).is_file() for name in ("config.yaml", _METRICS, "environment.json")):
        raise FileNotFoundError(
            f"{given} is no run folder: expected one with a config.yaml, a {_METRICS} or an environment.json, such as the "
            "trainer writes under runs/"
        )
    return path


def _read_run(label: str, folder: Path) -> Run:
    problems: dict[str, str] = {}

    def read(name: str, parse: Callable[[Path], Value], otherwise: Value) -> Value:
        try:
            return parse(folder / name)
        except FileNotFoundError:
            problems[name] = f"There is no {name}."
        except (OSError, ValueError) as error:
            problems[name] = f"{name} could not be read: {error}"
        return otherwise

    metrics, notes = read(_METRICS, _metrics, (Metrics([], []), ()))
    return Run(
        label=label,
        folder=folder,
        config=read("config.yaml", _yaml, {}),
        environment=read("environment.json", _json, {}),
        metrics=metrics,
        notes=notes,
        evaluation=read("evaluation.json", _json, {}),
        bad_batches=read("bad_batches.jsonl", _json_lines, []),
        samples=read("samples.txt", _text, ""),
        checkpoints=_checkpoints(folder / "checkpoints"),
        problems=problems,
    )


def _metrics(path: Path) -> tuple[Metrics, tuple[str, ...]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = read_metrics(path)
    # The folder's place is not the reader's concern, and would make pages of equal runs differ.
    return metrics, tuple(str(each.message).replace(str(path), path.name) for each in caught)


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        return _mapping(yaml.safe_load(path.read_text(encoding="utf-8", errors="replace")))
    except yaml.YAMLError as error:
        raise ValueError(f"no valid YAML ({error})") from error


def _json(path: Path) -> dict[str, Any]:
    return _mapping(json.loads(path.read_text(encoding="utf-8", errors="replace")))


def _mapping(tree: Any) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise ValueError(f"expected a mapping of keys to values, got {type(tree).__name__}")
    return tree


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Rows of a file that may still be written to: its last line may be torn, any other may not."""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_mapping(json.loads(line)))
        except ValueError as error:
            if number < len(lines):
                raise ValueError(f"row {number}: {error}") from error
    return rows


def _text(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        text = file.read(MAX_SAMPLE_CHARS + 1)
    left_out = "\n... (the rest is in the file)\n" if len(text) > MAX_SAMPLE_CHARS else ""
    return text[:MAX_SAMPLE_CHARS] + left_out


def _checkpoints(directory: Path) -> tuple[Checkpoint, ...]:
    found = []
    for path in sorted(directory.iterdir()) if directory.is_dir() else []:
        match = re.fullmatch(r"(\.?)step-(\d+)(\.partial)?", path.name)
        if match is None:
            continue
        try:
            found.append(_checkpoint(path, int(match.group(2)), whole=not match.group(1)))
        except FileNotFoundError:
            continue  # a run that goes on removes old ones, and renames new ones, while they are looked at
    return tuple(sorted(found, key=lambda each: (each.step, each.whole)))


def _checkpoint(path: Path, step: int, whole: bool) -> Checkpoint:
    n_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    loss = None
    if whole:
        try:
            loss = _json(path / "state.json").get("validation_loss")
        except ValueError:
            whole = False
    return Checkpoint(step, n_bytes, float(loss) if is_number(loss) else None, whole)
