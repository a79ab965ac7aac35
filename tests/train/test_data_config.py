"""Sources and stages of a run: what the YAML means, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from grist_train.config import TrainConfig, load
from grist_train.data import stage_starts, stages_begun
from grist_train.data_config import BatchConfig, DataConfig, SourceConfig, StageConfig

SOURCES = {"books": SourceConfig("datasets/books", 3.0), "code": SourceConfig("datasets/code", 0.0)}
STAGES = (
    StageConfig(10, weights={"books": 1.0, "code": 1.0}),
    StageConfig(20, global_size=24),
    StageConfig(30, sequence_length=64),
)


def _run(stages=STAGES, size: int = 8) -> TrainConfig:
    return TrainConfig(data=DataConfig(sources=SOURCES, stages=stages), batch=BatchConfig(global_size=size))


def test_a_stage_changes_what_it_names():
    phases = _run().phases
    assert [phase.after_step for phase in phases] == [0, 10, 20, 30]
    assert [dict(phase.weights) for phase in phases[:2]] == [{"books": 3.0}, {"books": 1.0, "code": 1.0}]
    assert [(phase.global_size, phase.sequence_length) for phase in phases] == [(8, 256), (8, 256), (24, 256), (24, 64)]


def test_a_single_dataset_is_a_mixture_of_one():
    (phase,) = TrainConfig().phases
    assert dict(phase.weights) == {"data": 1.0}


def test_from_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    data = {
        "sources": {
            "books": {"directory": "b", "weight": 0.5},
            "code": {"directory": "c", "prepare": {"vocab_size": 9000}},
        },
        "stages": [{"after_step": 5, "weights": {"code": 1.0}}],
    }
    path.write_text(yaml.safe_dump({"data": data}))
    config = load(path)
    assert config.data.sources["books"] == SourceConfig("b", 0.5)
    prepare = config.data.sources["code"].prepare
    assert prepare is not None
    assert prepare.vocab_size == 9000
    assert config.data.stages == (StageConfig(5, weights={"code": 1.0}),)


def test_positions_of_stages_follow_the_batch_size():
    assert stage_starts(_run().phases, None) == [80, 160, 160 + 240]


def test_a_run_that_goes_on_keeps_what_is_behind_it():
    config = _run()
    begun = stages_begun(config, 15, stage_starts(config.phases, None))
    assert begun == [(10, 80)]
    state = {"step": 15, "stages": begun, "batches": {"pos": 120}}
    assert stage_starts(config.phases, state) == [80, 160, 400]
    # With another batch from here on, later stages begin elsewhere, and what is behind stays.
    assert stage_starts(_run(size=40).phases, state) == [80, 120 + 5 * 40, 320 + 240]
    # A stage that begins with the very next step has not begun.
    at_ten = {"step": 10, "stages": stages_begun(config, 10, [80, 160, 400]), "batches": {"pos": 80}}
    assert at_ten["stages"] == []
    assert stage_starts(config.phases, at_ten) == [80, 160, 400]


@pytest.mark.parametrize("stages", [STAGES[1:], (StageConfig(11), *STAGES[1:]), (StageConfig(5), *STAGES)])
def test_stages_behind_a_run_may_not_change(stages):
    state = {"step": 15, "stages": [(10, 80)], "batches": {"pos": 120}}
    with pytest.raises(ValueError, match="what is behind a run may not change"):
        stage_starts(_run(stages).phases, state)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"directory": "elsewhere"}, "data.sources stands instead of data.directory"),
        ({"sources": {"books": SourceConfig("b", -1.0)}}, "data.sources.books.weight must be at least 0"),
        ({"sources": {"books": SourceConfig("b", 0.0)}}, "are all 0"),
        ({"stages": (StageConfig(3), StageConfig(2))}, "rising numbers of steps"),
        (
            {"stages": (StageConfig(3, sequence_length=4096),)},
            r"4096 \(after step 3\) is longer than model.context_length",
        ),
        ({"stages": (StageConfig(3, global_size=0),)}, r"global_size must be at least 1, but is 0 \(after step 3\)"),
    ],
)
def test_what_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(data=DataConfig(**{"sources": SOURCES, **changes}))
