"""The steps of `spread.py` for the executors of datatrove (local, Slurm, Ray), which start, retry and log tasks.

    from datatrove.executor import SlurmPipelineExecutor
    from grist_data import PrepareConfig
    from grist_data.datatrove_steps import SpreadStep

    config = PrepareConfig(source="files", paths=("/data/*.parquet",), tokenizer="gpt2", out="/data/tokens", workers=1)
    before = None
    for name, tasks in (("survey", 64), ("plan", 1), ("encode", 256), ("finish", 1)):
        before = SlurmPipelineExecutor(
            [SpreadStep(name, config)], tasks, "04:00:00", "cpu", logging_dir=f"/data/logs/{name}", depends=before
        )
    before.run()

Needs datatrove: pip install datatrove.
"""

from __future__ import annotations

from typing import Any

from datatrove.pipeline.base import PipelineStep  # pyright: ignore[reportMissingImports]

from grist_data import spread
from grist_data.prepare_config import PrepareConfig


class SpreadStep(PipelineStep):
    """Task `rank` of `world_size` of a step: survey, plan, encode or finish; plan and finish are for one task.

    It takes no documents from steps before it, and passes none on. Raises as the functions of `spread.py`.
    """

    type = "gristmill"

    def __init__(self, step: str, config: PrepareConfig) -> None:
        if step not in spread.STEPS:
            raise ValueError(f"unknown step {step!r}: expected one of {', '.join(spread.STEPS)}")
        self.name = step
        super().__init__()
        self._step, self._config = step, config

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        with self.track_time():
            spread.run_step(self._step, self._config, rank, world_size)
        return data
