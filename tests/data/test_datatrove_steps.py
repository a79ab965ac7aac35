"""The steps under datatrove's own executor: the bytes of a preparation on one machine."""

from __future__ import annotations

from pathlib import Path

import pytest
from text_corpus import corpus_texts, write_jsonl

from grist_data.prepare import prepare
from grist_data.prepare_config import PrepareConfig

executor = pytest.importorskip("datatrove.executor")


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_datatrove_makes_the_same_bytes(tmp_path):
    from grist_data.datatrove_steps import SpreadStep

    file = write_jsonl(tmp_path / "a.jsonl", corpus_texts(60))
    settings = {"source": "files", "paths": (str(file),), "vocab_size": 300, "unit_bytes": 3000, "workers": 1}
    alone = prepare(PrepareConfig(out=str(tmp_path / "alone"), **settings))
    config = PrepareConfig(out=str(tmp_path / "d"), **settings)
    before = None
    for name, tasks in (("survey", 3), ("plan", 1), ("encode", 5), ("finish", 1)):
        logs = str(tmp_path / "logs" / name)
        before = executor.LocalPipelineExecutor(
            [SpreadStep(name, config)], tasks, workers=2 if tasks > 1 else 1, logging_dir=logs, depends=before
        )
    assert before is not None
    before.run()
    assert contents(tmp_path / "d") == contents(alone)
    with pytest.raises(ValueError, match="unknown step 'join': expected one of survey, plan, encode, finish"):
        SpreadStep("join", config)
