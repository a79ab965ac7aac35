"""What every step was trained on, written down: `RUN/samples_seen/rank-N.jsonl`, with `data.log_samples`.

A row a step and rank: `step`, `position` (of its first sample in the run), and for each sample `samples`: source, epoch, window
and first token in it, with xxh3_64 of the tokens that went into the model. The first four are computed from the position; the
hash is of what arrived, so that the two can be held against each other.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

import numpy as np
import xxhash

from grist_data import Batch, Batches
from grist_train.config import TrainConfig
from grist_train.distributed import World, barrier
from grist_train.metrics import truncate_rows
from grist_train.preference_batches import PreferenceBatches


class SampleLog:
    """Does nothing unless the run asks for it."""

    def __init__(self, config: TrainConfig, world: World, first_step: int) -> None:
        """Drops rows after `first_step`, of all ranks that there ever were: the run goes on from there."""
        self._world, self._file = world, None
        if not config.data.log_samples:
            return
        folder = config.run_dir / "samples_seen"
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for path in folder.glob("rank-*.jsonl"):
                truncate_rows(path, first_step, config.steps)
        barrier(world)
        self._file: TextIO | None = open(_path(folder, world.rank), "a", encoding="utf-8", buffering=1)  # noqa: SIM115

    def record(self, step: int, batches: Batches | PreferenceBatches, micro_batches: list[Batch]) -> None:
        """step: that trains on these, the last that batches gave."""
        if self._file is None:
            return
        assert isinstance(batches, Batches), (
            "data.log_samples is a setting of `data`, which pairs of answers stand instead of"
        )
        rows = [row for batch in micro_batches for row in batch.ids_BT.cpu().numpy()]
        first = batches.state_dict()["pos"] - self._world.data_size * len(rows)  # of all ranks
        positions = first + self._world.data_rank * len(rows) + np.arange(len(rows))
        samples = batches.order.samples(positions)
        facts = [
            [batches.order.names[source], int(epoch), int(window), int(token), xxhash.xxh3_64_hexdigest(row.tobytes())]
            for source, epoch, window, token, row in zip(*samples[:4], rows, strict=True)
        ]
        self._file.write(json.dumps({"step": step, "position": int(positions[0]), "samples": facts}) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _path(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.jsonl"
