"""Devices: `auto` finds one, a missing one is named."""

from __future__ import annotations

import pytest
import torch

from grist_train.config import ComputeConfig
from grist_train.distributed import compute_dtype, pick_device


def test_auto_takes_the_best_there_is():
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert pick_device("auto").type == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_device_is_named():
    with pytest.raises(ValueError, match="device=cuda was asked for, but this machine has"):
        pick_device("cuda")


def test_compute_type_follows_the_device():
    assert compute_dtype(ComputeConfig(), torch.device("cpu")) == torch.float32
    assert compute_dtype(ComputeConfig(), torch.device("cuda")) == torch.bfloat16
    assert compute_dtype(ComputeConfig(dtype="bfloat16"), torch.device("cpu")) == torch.bfloat16
