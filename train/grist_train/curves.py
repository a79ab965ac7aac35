"""Draw the curves of one run, or of several over each other, from the metrics that the trainer wrote.

Input is `metrics.jsonl`: one JSON object a line, training rows with a `loss`, evaluation rows with a
`validation_bits_per_byte`. Output is one PNG. Nothing here needs a display: figures are drawn on Agg directly, so that
neither pyplot's global state nor a window system is touched from inside a training process.
"""

from __future__ import annotations

import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHING = 0.95  # share of the previous value in the moving average drawn over the raw training loss
MAX_POINTS = 4000  # more points than this are not visible in a figure 1,600 pixels wide


class Series(NamedTuple):
    """One curve: steps and values of equal length, steps ascending."""

    steps: list[int]
    values: list[float]


class Metrics(NamedTuple):
    """Rows of one `metrics.jsonl`, each kind sorted by step with one row a step."""

    training: list[dict[str, Any]]
    evaluation: list[dict[str, Any]]

    def series(self, key: str, over_layers: Callable[[list[float]], float] = fmean) -> Series:
        """Finite numbers under `key`, from the kind of row that holds it; a list (over layers) is reduced to one."""
        steps: list[int] = []
        values: list[float] = []
        for row in self.evaluation if key.startswith("validation_") else self.training:
            value = row.get(key)
            if isinstance(value, list):
                value = over_layers(value) if value else None
            if isinstance(value, (int, float)) and math.isfinite(value):
                steps.append(row["step"])
                values.append(float(value))
        return Series(steps, values)


def read_metrics(path: str | Path) -> Metrics:
    """Read a `metrics.jsonl`.

    A run that was killed and resumed repeats some steps: the row written last wins. A line cut short by a kill is left
    out with a warning that names it, because a torn line must not cost the picture of a finished run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds no usable row.
    """
    path = Path(path)
    training: dict[int, dict[str, Any]] = {}
    evaluation: dict[int, dict[str, Any]] = {}
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                warnings.warn(f"{path}:{number}: left out, not a whole JSON line ({error})", stacklevel=2)
                continue
            if not isinstance(row, dict) or not isinstance(row.get("step"), int):
                warnings.warn(f"{path}:{number}: left out, expected an object with an integer 'step'", stacklevel=2)
                continue
            kind = evaluation if any(key.startswith("validation_") for key in row) else training
            kind[row["step"]] = row
    if not training and not evaluation:
        raise ValueError(f"{path}: no metrics to draw; expected JSON lines with a 'step', as the trainer writes them")
    return Metrics([training[step] for step in sorted(training)], [evaluation[step] for step in sorted(evaluation)])


def smooth(values: list[float], weight: float = SMOOTHING) -> list[float]:
    """Exponential moving average without the start-up bias (Adam's correction), so that the first points are honest."""
    smoothed: list[float] = []
    average = 0.0
    for count, value in enumerate(values, start=1):
        average = weight * average + (1 - weight) * value
        smoothed.append(average / (1 - weight**count))
    return smoothed


def _thin(series: Series) -> Series:
    stride = math.ceil(len(series.steps) / MAX_POINTS)
    return Series(series.steps[::stride], series.values[::stride]) if stride > 1 else series


def _draw(axes: Axes, series: Series, color: str, label: str, **style) -> None:
    thinned = _thin(series)
    if len(thinned.steps) == 1:
        style["marker"] = "o"  # a line of one point draws nothing
    axes.plot(thinned.steps, thinned.values, color=color, label=label, markersize=3, **style)


def _draw_noisy(axes: Axes, series: Series, color: str, label: str) -> None:
    _draw(axes, series, color, "_nolegend_", alpha=0.25, linewidth=0.7)
    _draw(axes, Series(series.steps, smooth(series.values)), color, label, linewidth=1.4)


def _loss(axes: Axes, metrics: Metrics, color: str, label: str) -> None:
    _draw_noisy(axes, metrics.series("loss"), color, label)
    _draw(axes, metrics.series("validation_loss"), color, "_nolegend_", linestyle="--", marker="o", linewidth=1.0)
    axes.set_title("loss (nats per token; dashed: validation)")


def _bits_per_byte(axes: Axes, metrics: Metrics, color: str, label: str) -> None:
    series = metrics.series("validation_bits_per_byte")
    if series.values:
        _draw(axes, series, color, f"{label}: best {min(series.values):.3f}", marker="o", linewidth=1.4)
    axes.set_title("validation bits per byte")


def _learning_rate(axes: Axes, metrics: Metrics, color: str, label: str) -> None:
    _draw(axes, metrics.series("lr"), color, label, linewidth=1.4)
    axes.set_title("learning rate")


def _gradient_norm(axes: Axes, metrics: Metrics, color: str, label: str) -> None:
    series = metrics.series("grad_norm")
    _draw_noisy(axes, series, color, label)
    if series.values and min(series.values) > 0:
        axes.set_yscale("log")
    axes.set_title("gradient norm before clipping")


def _throughput(axes: Axes, metrics: Metrics, color: str, label: str) -> None:
    _draw_noisy(axes, metrics.series("tokens_per_second"), color, label)
    axes.set_ylim(bottom=0)
    axes.set_title("tokens per second")


def _step_time(axes: Axes, metrics: Metrics, color: str, label: str) -> None:
    _draw_noisy(axes, metrics.series("time_backward_ms"), color, label)
    for part, style in (("forward", "--"), ("optimizer", "-."), ("data", ":")):
        series = metrics.series(f"time_{part}_ms")
        _draw(axes, Series(series.steps, smooth(series.values)), color, "_nolegend_", linestyle=style, linewidth=1.2)
    axes.set_ylim(bottom=0)
    axes.set_title("ms a step: backward; forward --, optimizer -., data ··")


def _memory(key: str, what: str, axes: Axes, metrics: Metrics, color: str, label: str) -> None:
    series = metrics.series(key)
    _draw(axes, series, color, label, linewidth=1.4)
    axes.set_ylim(0, max([axes.get_ylim()[1], *(1.1 * value for value in series.values)]))  # it hardly changes
    axes.set_title(f"peak memory of the first rank (GiB, {what})")


def _expert_load(axes: Axes, metrics: Metrics, color: str, label: str) -> None:
    _over_layers(axes, metrics, "load_max_over_mean", color, label)
    axes.set_title("busiest expert / mean load (dotted: worst layer)")


def _load_variation(axes: Axes, metrics: Metrics, color: str, label: str) -> None:
    _over_layers(axes, metrics, "load_cv", color, label)
    axes.set_title("load, standard deviation / mean (dotted: worst layer)")


def _over_layers(axes: Axes, metrics: Metrics, key: str, color: str, label: str) -> None:
    mean, worst = metrics.series(key), metrics.series(key, max)
    _draw_noisy(axes, mean, color, label)
    _draw(axes, Series(worst.steps, smooth(worst.values)), color, "_nolegend_", linestyle=":", linewidth=1.2)
    axes.set_ylim(bottom=0)


def _router_entropy(axes: Axes, metrics: Metrics, color: str, label: str) -> None:
    _draw_noisy(axes, metrics.series("router_entropy"), color, label)
    axes.set_title("router entropy (nats, mean over layers)")


def _dead_experts(axes: Axes, metrics: Metrics, color: str, label: str) -> None:
    series = metrics.series("dead_experts", sum)
    if series.values:
        _draw(axes, series, color, f"{label}: {series.values[-1]:.0f} at the end", linewidth=1.0)
    axes.set_title("experts without a token in the step, all layers")


# One panel a line: (function that draws one run into it, the key whose absence in every run leaves the panel out).
PANELS = [
    (_loss, "loss"),
    (_bits_per_byte, "validation_bits_per_byte"),
    (_learning_rate, "lr"),
    (_gradient_norm, "grad_norm"),
    (_throughput, "tokens_per_second"),
    (_step_time, "time_backward_ms"),
    (functools.partial(_memory, "memory_allocated_gib", "of the device"), "memory_allocated_gib"),
    (functools.partial(_memory, "memory_resident_gib", "of the process"), "memory_resident_gib"),
    (_expert_load, "load_max_over_mean"),
    (_load_variation, "load_cv"),
    (_router_entropy, "router_entropy"),
    (_dead_experts, "dead_experts"),
]


def plot(metrics_path: str | Path | Mapping[str, str | Path], out_path: str | Path) -> Path:
    """Draw loss, validation bits per byte, learning rate, gradient norm, tokens/s, what a step's time and memory go to, and the
    router's health as one PNG.

    Args:
        metrics_path: one `metrics.jsonl`, or a mapping of label to `metrics.jsonl` to lay several runs over each other.
        out_path: the PNG to write; written under a temporary name, then renamed.

    Returns:
        `out_path`.

    Raises:
        FileNotFoundError: a metrics file does not exist.
        ValueError: no run given, or a metrics file holds no usable row.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    out_path = Path(out_path)
    paths = (
        metrics_path if isinstance(metrics_path, Mapping) else {Path(metrics_path).resolve().parent.name: metrics_path}
    )
    if not paths:
        raise ValueError("no run to draw: pass at least one metrics.jsonl")
    runs = {label: read_metrics(path) for label, path in paths.items()}
    panels = [draw for draw, key in PANELS if any(metrics.series(key).steps for metrics in runs.values())]
    if not panels:
        raise ValueError(
            f"no curve to draw in {', '.join(str(path) for path in paths.values())}: no known key is finite"
        )

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.4 * columns, 3.6 * rows), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for index, draw in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        for number, (label, metrics) in enumerate(runs.items()):
            draw(axes, metrics, f"C{number % 10}", label)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        says_more = draw in (_bits_per_byte, _dead_experts)
        if (says_more or (index == 0 and len(runs) > 1)) and axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)))

    out_path.parent.mkdir(parents=True, exist_ok=True)
    partial = out_path.with_name(f".{out_path.name}.{os.getpid()}.part")
    try:
        canvas.print_figure(partial, format="png", dpi=110)
        os.replace(partial, out_path)
    finally:
        partial.unlink(missing_ok=True)
    return out_path
