"""Fixtures that say whether the native kernels take part. A test file imports the one that it wants."""

from __future__ import annotations

import pytest
import torch

from grist_kernels import native


@pytest.fixture
def without_native():
    """PyTorch alone, as where there is no C compiler."""
    with native.using("0"):
        yield


@pytest.fixture
def natively():
    """The native kernels, without gradients; skipped where nothing can compile them."""
    if not native.available():
        pytest.skip("no C compiler, and no library that one has made")
    with torch.no_grad():
        yield
