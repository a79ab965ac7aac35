"""Settings of checkpoints that cannot be meant are refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest

from grist_train.checkpoint_config import CheckpointConfig, check_checkpoint


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep_last": 0}, r"keep_last must be at least 1, but is 0"),
        ({"keep_every": 0}, r"keep_every must be at least 1, or null for none, but is 0"),
        ({"keep_every": 300}, r"keep_every 300 must be a multiple of checkpoint\.every 200"),
        ({"keep_every": 300, "every": 0}, r"keep_every 300 must be a multiple of checkpoint\.every 0"),
        ({"max_failures": 0}, r"max_failures must be at least 1, but is 0"),
        ({"deadline_seconds": 0.0}, r"deadline_seconds must be above 0, or null to wait, but is 0\.0"),
        ({"pinned": True, "asynchronous": False}, r"checkpoint\.pinned is about the copy"),
    ],
)
def test_nonsense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        check_checkpoint(replace(CheckpointConfig(), **changes))


def test_what_can_be_meant_is_accepted():
    check_checkpoint(CheckpointConfig())
    check_checkpoint(CheckpointConfig(every=0, keep_last=1, verify="none", deadline_seconds=0.5))
    check_checkpoint(CheckpointConfig(every=100, keep_every=1000, pinned=True, max_failures=1))
