"""A linear layer with a packed weight on a GPU: the weight leaves memory in its few bits, and is decoded in registers."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels import launch
from grist_kernels.grouped_matmul.triton_kernel import rows_of
from grist_kernels.launch import cdiv
from grist_kernels.quantized import PackedWeight
from grist_kernels.quantized_linear.kernels import _add_shares_kernel, _forward_kernel
from grist_kernels.quantized_linear.launches import BUDGETS, CANDIDATES, FORMULAS, SIZES, shares_of, tile_rows
from grist_kernels.two_faces import faces

__all__ = ["BUDGETS", "CANDIDATES", "FORMULAS", "SIZES", "quantized_linear"]

_KINDS = {"int8": 0, "fp8": 1, "int4": 2, "mxfp4": 3}  # as the constants of kernels.py
_SUM_BLOCK = 512


def _codes(kind: str, codes: Tensor) -> Tensor:
    """As the kernel reads them, where they lie unless there are gaps: four bits in words of eight, fp8 as bytes."""
    codes = codes.contiguous()
    if kind == "int8":
        return codes
    if kind == "fp8":
        return codes.view(torch.uint8)
    return (codes.clone() if codes.storage_offset() % 4 else codes).view(torch.int32)


def _forward(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, kind: str, inputs: int
) -> Tensor:
    rows = rows_of(x.reshape(-1, inputs))
    (n_rows, _), outputs = rows.shape, codes.shape[0]
    out = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype, device=x.device)
    target, block_m = launch.target(x.device), tile_rows(n_rows)
    config = launch.config("quantized_linear", "forward", target, x.dtype, block_m, FORMULAS["forward"])
    shares = shares_of(target, n_rows, outputs, inputs, block_m, config)
    made = out if shares == 1 else torch.empty((shares, n_rows, outputs), dtype=torch.float32, device=x.device)
    launch.run(
        _forward_kernel, (cdiv(n_rows, block_m) * cdiv(outputs, config["BLOCK_N"]), shares), x.device,
        rows, _codes(kind, codes), scales.contiguous(), scales if zeros is None else zeros.contiguous(),
        rows if bias is None else bias.contiguous(), made, n_rows, outputs, rows.stride(0),
        IN=inputs, KIND=_KINDS[kind], GROUP=1 if scales.dim() == 1 else inputs // scales.shape[1],
        HAS_ZEROS=zeros is not None, HAS_BIAS=bias is not None, SHARES=shares, BLOCK_M=block_m, **config,
    )  # fmt: skip
    if shares > 1:
        launch.run(
            _add_shares_kernel, (cdiv(out.numel(), _SUM_BLOCK),), x.device,
            made, rows if bias is None else bias.contiguous(), out, out.numel(), outputs,
            HAS_BIAS=bias is not None, SHARES=shares, BLOCK=_SUM_BLOCK, num_warps=4,
        )  # fmt: skip
    return out


_FORWARD = faces(
    "quantized_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, str kind, int inputs) -> Tensor",
    _forward,
    lambda x, codes, *_: x.new_empty(*x.shape[:-1], codes.shape[0]),
)


def quantized_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """As grist_kernels.quantized_linear, without gradients."""
    run = _FORWARD.traced if torch.compiler.is_compiling() else _FORWARD.eager
    codes, scales = weight.codes_and_scales
    return run(x, codes, scales, weight.tensors.get("zero"), bias, weight.kind, weight.shape[1])
