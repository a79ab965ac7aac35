"""Where rows of `metrics.jsonl` go besides that file: TensorBoard, and Weights & Biases where a run asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from grist_train.config import TrainConfig, to_dict


class Tracker(Protocol):
    """Takes rows as they are written; a run that is resumed may repeat steps."""

    def write(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_trackers(config: TrainConfig, first_step: int) -> list[Tracker]:
    """Those that the run asks for; on the main rank only. first_step: of the checkpoint that the run goes on from.

    Raises ImportError for a package that is asked for and not installed.
    """
    trackers: list[Tracker] = []
    if config.logging.tensorboard:
        trackers.append(TensorBoard(config.run_dir / "tensorboard", first_step))
    if config.logging.wandb is not None:
        trackers.append(WeightsAndBiases(config))
    return trackers


def scalars(row: dict[str, Any]) -> dict[str, float]:
    """The figures of a row, without the step and what is not known (null): of a list, which is over layers, each item as
    NAME/layer_I."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat |= {f"{name}/layer_{layer}": item for layer, item in enumerate(value) if item is not None}
        elif isinstance(value, (int, float)) and name != "step":
            flat[name] = value
    return flat


class TensorBoard:
    """Event files in a folder; steps after `first_step` that an earlier part of the run wrote are hidden."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def write(self, row: dict[str, Any]) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for one run folder, also when it is resumed: `RUN/wandb.json` remembers its id.

    W&B drops rows whose step is not above the last one, which a resumed run repeats; so the step is a figure of the row, and
    the axis of all others.
    """

    def __init__(self, config: TrainConfig) -> None:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("logging.wandb needs the package wandb: pip install wandb, or set it to null") from error
        record = config.run_dir / "wandb.json"
        known = json.loads(record.read_text(encoding="utf-8"))["id"] if record.is_file() else None
        self._run = wandb.init(
            project=config.logging.wandb,
            name=config.name,
            id=known,
            resume="allow",
            mode=config.logging.wandb_mode,
            dir=str(config.run_dir),
            config=to_dict(config),
        )
        if known is None:
            record.write_text(json.dumps({"id": self._run.id}), encoding="utf-8")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, row: dict[str, Any]) -> None:
        self._run.log({"step": row["step"], **scalars(row)})

    def close(self) -> None:
        self._run.finish()
