"""The CPU's fast routes leave tiny inputs to the reference. Tests are made of tiny inputs, so they switch that off."""

from __future__ import annotations

import pytest

from grist_kernels.rms_norm import pytorch_fast as rms_norm_fast
from grist_kernels.rope import pytorch_fast as rope_fast
from grist_kernels.swiglu import pytorch_fast as swiglu_fast


@pytest.fixture(autouse=True)
def _no_input_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rms_norm_fast, rope_fast, swiglu_fast):
        monkeypatch.setattr(module, "SMALL", 0)
