"""The experts with MXFP4 weights on a GPU: weights leave memory at half a byte each, and are decoded in registers.

T tokens, D model width, E experts, A active experts per token, F expert width, R = T * A rows sorted by expert.

The forward of grist_kernels.moe with other products: route, schedule, gate_up (gather, bias and SwiGLU in one), down, combine.
Nothing waits for the device, so that a CUDA graph can hold it; nothing is added atomically, for the same bits on every run.
A block of weights is read once for each tile of rows of its expert: once in all, for the few tokens of a step of generation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels import launch
from grist_kernels.expert_rows import Routing, Schedule, route, schedule
from grist_kernels.grouped_matmul.launches import tile_rows
from grist_kernels.grouped_matmul.triton_kernel import rows_of
from grist_kernels.launch import Config, cdiv
from grist_kernels.moe.triton_kernel import Optionals, _combine, _options
from grist_kernels.moe_mxfp4.kernels import _down_kernel, _gate_up_kernel
from grist_kernels.moe_mxfp4.launches import BUDGETS, CANDIDATES, FORMULAS, SIZES
from grist_kernels.two_faces import faces

__all__ = ["BUDGETS", "CANDIDATES", "FORMULAS", "SIZES", "moe_mxfp4"]


def _config(kernel: str, like: Tensor, block: int) -> Config:
    target = launch.target(like.device)
    return {"BLOCK_M": block, **launch.config("moe_mxfp4", kernel, target, like.dtype, block, FORMULAS[kernel])}


def _words(blocks: Tensor) -> Tensor:
    """Blocks (..., 16) uint8 as words (..., 4) int32, which lie where the bytes do unless those are not contiguous."""
    blocks = blocks.contiguous()
    return (blocks.clone() if blocks.storage_offset() % 4 else blocks).view(torch.int32)


def _gate_up(
    x: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor | None, active: int, routing: Routing, tiles: Schedule,
    block: int, options: Optionals,
) -> Tensor:  # fmt: skip
    """-> the activation (R, F)."""
    alpha, limit, given = options
    rows, F = routing.pair.shape[0], blocks.shape[1] // 2
    act = torch.empty((rows, F), dtype=x.dtype, device=x.device)
    config = _config("gate_up", x, block)
    launch.run(
        _gate_up_kernel, (tiles.tiles * cdiv(F, config["BLOCK_N"] // 2),), x.device,
        x, _words(blocks), scales.contiguous(), x if bias is None else bias, act, routing.pair, *tiles, tiles.tiles,
        x.stride(0), 0 if bias is None else bias.stride(0), alpha, limit,
        D=x.shape[1], F=F, ACTIVE=active, HAS_BIAS=bias is not None, **given, **config,
    )  # fmt: skip
    return act


def _down(
    act: Tensor, blocks: Tensor, scales: Tensor, bias: Tensor | None, tiles: Schedule, block: int
) -> Tensor:  # fmt: skip
    """-> what each row's expert makes of it (R, D)."""
    (rows, F), D = act.shape, blocks.shape[1]
    y = torch.empty((rows, D), dtype=act.dtype, device=act.device)
    config = _config("down", act, block)
    launch.run(
        _down_kernel, (tiles.tiles * cdiv(D, config["BLOCK_N"]),), act.device,
        act, _words(blocks), scales.contiguous(), act if bias is None else bias, y, *tiles, tiles.tiles,
        0 if bias is None else bias.stride(0), IN=F, OUT=D, HAS_BIAS=bias is not None, **config,
    )  # fmt: skip
    return y


def _forward(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up_blocks: Tensor, gate_up_scales: Tensor, down_blocks: Tensor,
    down_scales: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None, alpha: float | None, limit: float | None,
    interleaved: bool,
) -> Tensor:  # fmt: skip
    x, (n_tokens, active), n_experts = rows_of(x), ids.shape, down_blocks.shape[0]
    b_gate_up, b_down = (None if bias is None else rows_of(bias) for bias in (b_gate_up, b_down))
    block = tile_rows(n_tokens * active, n_experts)
    routing = route(ids, n_experts)
    tiles = schedule(routing.ends, n_tokens * active, block)
    options = _options(alpha, limit, interleaved)
    act = _gate_up(x, gate_up_blocks, gate_up_scales, b_gate_up, active, routing, tiles, block, options)
    y = _down(act, down_blocks, down_scales, b_down, tiles, block)
    return _combine(y, routing.place, n_tokens, active, weights.reshape(-1))


_FORWARD = faces(
    "moe_mxfp4(Tensor x, Tensor ids, Tensor weights, Tensor gate_up_blocks, Tensor gate_up_scales, Tensor down_blocks, "
    "Tensor down_scales, Tensor? b_gate_up, Tensor? b_down, float? alpha, float? limit, bool interleaved) -> Tensor",
    _forward,
    lambda x, *_: x.new_empty(x.shape),
)


def moe_mxfp4(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, gate_up_blocks: Tensor, gate_up_scales: Tensor,
    down_blocks: Tensor, down_scales: Tensor, b_gate_up: Tensor | None, b_down: Tensor | None, *,
    alpha: float | None, limit: float | None, interleaved: bool,
) -> Tensor:  # fmt: skip
    """As grist_kernels.moe_mxfp4, without gradients."""
    run = _FORWARD.traced if torch.compiler.is_compiling() else _FORWARD.eager
    return run(
        x, expert_ids, expert_weights, gate_up_blocks, gate_up_scales, down_blocks, down_scales, b_gate_up, b_down, alpha,
        limit, interleaved,
    )  # fmt: skip
