"""What descriptors make of the attention kernels on Hopper: bulk copies, and no more registers than pointers take."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="builds are Triton's")

# A register or two either way is the assembler's whim; the programs on a multiprocessor are not to become fewer.
WHIM = 4


@pytest.fixture(scope="module")
def builds() -> dict[tuple[str, int, int], tuple[int, dict]]:
    """(kernel, head width, with descriptors) -> (bulk copies in the PTX, report)."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    program = Path(__file__).with_name("attention_to_build.py")
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(kernel, H, given): (copies, report) for kernel, H, given, copies, report in json.loads(done.stdout)}


@pytest.mark.parametrize("H", [64, 128])
@pytest.mark.parametrize("kernel", ["forward", "dq", "dkv"])
def test_descriptors_become_bulk_copies_and_save_registers(builds, kernel, H):
    (none, pointers), (copies, descriptors) = (builds[kernel, H, given] for given in (0, 1))
    assert none == 0
    assert copies >= 2  # keys and values, or queries and gradients
    for report in (pointers, descriptors):
        assert report["spilled_bytes"] == 0
        assert not report["serialized"]
        assert report["matrix_instructions"] > 0
    assert descriptors["registers"] <= pointers["registers"] + WHIM
