"""Steps that were skipped (step_guard.py): written down with what they would have learned from, and not too many of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch

from grist_train.checkpoint import Checkpoints
from grist_train.config import TrainConfig
from grist_train.distributed import World
from grist_train.guard import NonFiniteLossError

BAD_BATCHES_FILE = "bad_batches.jsonl"


class BadSteps:
    """left_out: steps whose samples are passed over, after a return to a checkpoint before them.

    A line of `RUN/bad_batches.jsonl` for every skipped step: `step`, `why`, `loss` and `grad_norm` (null where not finite),
    `position` of its first sample in the run, and `samples`, as the task describes them.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        describe: Callable[[int, int], list[dict[str, Any]]],
        state: dict[str, Any] | None,
    ) -> None:
        """describe: (first position, number of samples) -> what they are. state: state.json of a run that goes on."""
        self._config, self._world, self._describe = config, world, describe
        self._positions: dict[int, tuple[int, int]] = {}  # of the steps that are not read yet
        self._in_a_row: list[int] = []
        self._rolled_back_to: set[int] = set()
        self._last = ""
        self.left_out: set[int] = set() if state is None else set(state.get("left_out", ()))

    def begin(self, step: int, first: int, after: int) -> None:
        """A step that trains on the samples at the positions from first up to after."""
        self._positions[step] = (first, after - first)

    def read(self, step: int, loss: float, grad_norm: float, skipped: bool) -> None:
        """The figures of a step, once they are known; the same on every rank, in the order of the steps."""
        first, n = self._positions.pop(step)
        if not skipped:
            self._in_a_row.clear()
            return
        self._in_a_row.append(step)
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        self._last = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        if not self._world.is_main:
            return
        row = {
            "step": step,
            "why": "the loss stands far above the last ones" if finite else "not finite",
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "position": first,
            "samples": self._describe(first, n),
        }
        with open(self._config.run_dir / BAD_BATCHES_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    @property
    def too_many(self) -> bool:
        """Whether more steps in a row were skipped than `guard.patience` allows."""
        return len(self._in_a_row) > self._config.guard.patience

    def require_few(self) -> None:
        """Raises NonFiniteLossError for too many."""
        if self.too_many:
            raise NonFiniteLossError(
                f"{len(self._in_a_row)} steps in a row could not be used (the last, {self._last}); see "
                f"{self._config.run_dir / BAD_BATCHES_FILE}. The checkpoints before them are intact: try a lower learning "
                "rate, a longer warmup or gradient clipping (optimizer.lr, schedule.warmup_steps, optimizer.clip), or "
                "guard.rollback to leave these samples out"
            )

    def roll_back(
        self, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], checkpoints: Checkpoints, batches: Any
    ) -> dict[str, Any]:
        """Go back to the last checkpoint -> its state.json; the skipped steps after it are left out from here on.

        Raises NonFiniteLossError where the run does not ask for it, where there is no checkpoint, and for a checkpoint that
        the run has gone back to before.
        """
        checkpoints.wait()
        steps = checkpoints.steps()
        if not (self._config.guard.rollback and steps) or steps[-1] in self._rolled_back_to:
            self.require_few()
        target = steps[-1]
        self._rolled_back_to.add(target)
        self.left_out |= set(self._in_a_row)
        self._in_a_row.clear()
        self._positions.clear()
        state = checkpoints.load(target, model, optimizers)
        batches.load_state_dict(state["batches"])
        return state

    def state_dict(self) -> dict[str, Any]:
        return {"left_out": sorted(self.left_out)}
