"""Kernels that the instrument of grist_tools.kernel_builds must tell apart: good ones, and one for each way to be bad.

Run as a program, with TRITON_INTERPRET=0, this builds each for each architecture and prints what was found as JSON.
"""

from __future__ import annotations

import json
import sys

import torch
import triton
import triton.language as tl

from grist_kernels import launch
from grist_tools.binary_report import binary_of, reports
from grist_tools.kernel_recorder import Build, Launch, build_of, compiled, recorded


@triton.jit
def _copy_kernel(x_ptr, out_ptr, n, STEP: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets * STEP, mask=offsets < n, other=0)
    tl.store(out_ptr + offsets, x, mask=offsets < n)


@triton.jit
def _center_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """All of x in registers, because the mean is needed before the first element can be written."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets)
    tl.store(out_ptr + offsets, x - tl.sum(x, 0) / BLOCK)


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, out_ptr, K, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """One tile of a @ b."""
    rows = tl.arange(0, M)[:, None]
    columns = tl.arange(0, N)[None, :]
    steps = tl.arange(0, STEP)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, K, STEP):
        a = tl.load(a_ptr + rows * K + start + steps[None, :])
        b = tl.load(b_ptr + (start + steps[:, None]) * N + columns)
        total = tl.dot(a, b, total)
    tl.store(out_ptr + rows * N + columns, total)


@triton.jit(do_not_specialize=["c"])
def _arguments_kernel(
    x_ptr, out_ptr, nothing, one, sixteen, seventeen, long, c, scale, flag, BLOCK: tl.constexpr
):  # fmt: skip
    """One argument of every kind that the just-in-time compiler treats in its own way."""
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.load(x_ptr + tl.arange(0, BLOCK)) * scale)


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _copy(step: int) -> None:
    x, out = _empty(4096 * step, dtype=torch.int8), _empty(4096, dtype=torch.int8)
    launch.run(_copy_kernel, (2,), x.device, x, out, 4096, STEP=step, BLOCK=2048, num_warps=4)


def _center(block: int) -> None:
    x, out = _empty(block, dtype=torch.float32), _empty(block, dtype=torch.float32)
    launch.run(_center_kernel, (1,), x.device, x, out, BLOCK=block, num_warps=2)


def _product(n: int, **constants: int) -> None:
    a, b = _empty(128, 4096, dtype=torch.bfloat16), _empty(4096, n, dtype=torch.bfloat16)
    out = _empty(128, n, dtype=torch.float32)
    launch.run(_product_kernel, (1,), a.device, a, b, out, 4096, M=128, N=n, STEP=64, **constants)


CALLS = {
    "wide": lambda: _copy(1),
    "narrow": lambda: _copy(2),
    "fits": lambda: _center(4096),
    "spills": lambda: _center(65536),
    "product": lambda: _product(128, num_warps=4, num_stages=3),
    # Four warps cannot hold 128 x 256 sums: the assembler gives up on asynchronous products.
    "serialized": lambda: _product(256, num_warps=4, num_stages=3),
    "too_much_shared": lambda: _product(256, num_warps=8, num_stages=6),
}


def arguments_build() -> Build:
    x, out = _empty(16, dtype=torch.bfloat16), _empty(16, dtype=torch.float32)
    arguments = (x, out, None, 1, 16, 17, 2**31, 16, 0.5, True)
    return build_of(Launch(_arguments_kernel, (1,), arguments, {"BLOCK": 16, "num_warps": 2}), "sm_90")


def main() -> None:
    found, binaries = [], []
    for name, call in CALLS.items():
        with recorded() as launches:
            call()
        for architecture in launch.ARCHITECTURES:
            found.append([name, architecture])
            binaries.append(binary_of(compiled(build_of(launches[0], architecture)), architecture))
    rows = [[*where, it.as_json()] for where, it in zip(found, reports(binaries), strict=True)]
    build = arguments_build()
    arguments = {
        "signature": dict(build.signature),
        "constants": [[where[0], value] for where, value in build.constants],
        "divisible": [where[0] for where, found in build.attributes if found],
        "options": dict(build.options),
    }
    json.dump({"reports": rows, "arguments": arguments}, sys.stdout)


if __name__ == "__main__":
    main()
