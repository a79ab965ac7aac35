"""Trackers: which are opened, and what reaches them. Weights & Biases is played by a module of our own."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from grist_train.config import TrainConfig, to_dict
from grist_train.logging_config import LoggingConfig
from grist_train.trackers import TensorBoard, open_trackers, scalars

ROW = {"step": 3, "tokens": 768, "loss": 2.5, "dead_experts": [0, 1], "grad_norm": None, "skipped": True}


class FakeWandb(ModuleType):
    """What a run of it was begun with, told and given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.began: list[dict] = []
        self.rows: list[dict] = []
        self.axes: list[tuple[str, str | None]] = []
        self.finished = 0

    def init(self, **settings) -> FakeWandb:
        self.began.append(settings)
        self.id = settings["id"] or "new-id"
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, row: dict) -> None:
        self.rows.append(row)

    def finish(self) -> None:
        self.finished += 1


def config(tmp_path, **logging) -> TrainConfig:
    made = TrainConfig(name="one", out=str(tmp_path), logging=LoggingConfig(**logging))
    made.run_dir.mkdir(exist_ok=True)
    return made


def test_figures_of_layers_are_told_apart_and_what_is_not_known_is_left_out():
    assert scalars(ROW) == {
        "tokens": 768,
        "loss": 2.5,
        "dead_experts/layer_0": 0,
        "dead_experts/layer_1": 1,
        "skipped": True,
    }
    assert scalars({"grad_norm_by_layer": [1.0, None]}) == {"grad_norm_by_layer/layer_0": 1.0}


def test_a_run_that_is_resumed_stays_one_run_of_wandb(tmp_path, monkeypatch):
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    asked = config(tmp_path, tensorboard=False, wandb="mill", wandb_mode="offline")
    for first_step in (0, 2):
        (tracker,) = open_trackers(asked, first_step)
        tracker.write(ROW)
        tracker.close()
    first, again = fake.began
    assert (first["project"], first["name"], first["mode"]) == ("mill", "one", "offline")
    assert first["config"] == to_dict(asked)
    assert first["dir"] == str(asked.run_dir)
    assert (first["id"], again["id"], again["resume"]) == (None, "new-id", "allow")
    assert json.loads((asked.run_dir / "wandb.json").read_text()) == {"id": "new-id"}
    assert fake.axes[:2] == [("step", None), ("*", "step")]
    assert fake.rows == [{"step": 3, **scalars(ROW)}] * 2
    assert fake.finished == 2


def test_wandb_is_imported_only_where_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert open_trackers(config(tmp_path, tensorboard=False), 0) == []
    with pytest.raises(ImportError, match=r"logging.wandb needs the package wandb: pip install wandb"):
        open_trackers(config(tmp_path, tensorboard=False, wandb="mill"), 0)


def test_tensorboard_has_every_figure_and_hides_what_is_repeated(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    asked = config(tmp_path)
    for first_step, loss in ((0, 9.0), (1, 2.0)):
        (tracker,) = open_trackers(asked, first_step)
        assert isinstance(tracker, TensorBoard)
        for step in (first_step + 1, first_step + 2):
            tracker.write({"step": step, "loss": loss, "load_cv": [0.5, 0.25]})
        tracker.close()
    read = EventAccumulator(str(asked.run_dir / "tensorboard"))
    read.Reload()
    assert [(each.step, each.value) for each in read.Scalars("loss")] == [(1, 9.0), (2, 2.0), (3, 2.0)]
    assert [each.value for each in read.Scalars("load_cv/layer_1")] == [0.25] * 3
