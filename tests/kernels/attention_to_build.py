"""Build the attention kernels for Hopper with and without descriptors, and print what each takes as JSON.

A program of test_attention_builds.py, run with TRITON_INTERPRET=0.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack

import torch

from grist_kernels import attention, backend, launch
from grist_kernels.attention import launches
from grist_tools.binary_report import binary_of, reports
from grist_tools.kernel_recorder import GPUS, build_of, compiled, recorded

ARCHITECTURE = "sm_90"


def launched(H: int, descriptors: int) -> list:
    """forward, dq and dkv of causal attention without options, the largest of all calls."""
    gpu = GPUS[ARCHITECTURE]
    q, k = (torch.empty(1, 64, heads, H, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (8, 1))
    with ExitStack() as stack:
        for kernel, formula in launches.FORMULAS.items():
            config = {**formula(gpu, torch.bfloat16, H), "DESCRIPTORS": descriptors}
            stack.enter_context(launch.forcing("attention", kernel, config))
        stack.enter_context(backend.using("triton"))
        stack.enter_context(launch.assuming(gpu))
        made = stack.enter_context(recorded())
        out = attention(q, k, k)
        torch.autograd.grad(out, (q, k), torch.empty_like(out))
    return made


def main() -> None:
    found, binaries = [], []
    for H in (64, 128):
        for descriptors in (0, 1):
            for each in launched(H, descriptors):
                build = compiled(build_of(each, ARCHITECTURE))
                found.append([each.name, H, descriptors, build.asm["ptx"].count("cp.async.bulk.tensor")])
                binaries.append(binary_of(build, ARCHITECTURE))
    rows = [[*key, report.as_json()] for key, report in zip(found, reports(binaries), strict=True)]
    json.dump(rows, sys.stdout)


if __name__ == "__main__":
    main()
