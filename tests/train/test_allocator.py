"""The allocator setting is taken where there is glibc and harmless elsewhere."""

from __future__ import annotations

import platform

import torch

from grist_train.allocator import keep_freed_memory


def test_setting_is_taken_on_glibc_only():
    assert keep_freed_memory() == (platform.system() == "Linux" and platform.libc_ver()[0] == "glibc")
    assert torch.ones(2**24).sum().item() == 2**24
