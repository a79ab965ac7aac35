"""The mixture-of-experts layer on a GPU: dropless, without waiting for the device, without atomics, the same bits every time.

T tokens, D model width, E experts, A active experts per token, F expert width, R = T * A rows sorted by expert.

Forward:
    route, schedule    the device sorts the pairs and lays out tiles (grist_kernels.expert_rows)
    gate_up            gathers tokens while it multiplies; bias and SwiGLU in its epilogue. h (R, 2F) is kept for the backward
    forward            the down projection, a grouped product with its bias -> y (R, D)
    combine            weighted sum of each token's A rows of y, in float32
Backward, with everything else recomputed (a composition of grouped products keeps 2.5 times as much):
    d_hidden           p = d_out w_down^T; in its epilogue SwiGLU's backward, the weighted activation, and the weights'
                       gradient: act . p is what d_out . y would be, so y need not be kept (SonicMoE, Guo et al., 2025)
    d_weights          sums those, and adds d_out . b_down
    outer (twice)      gradients of w_down and w_gate_up, whose operands are gathered by token while they are multiplied
    segment_sum        gradients of the biases
    forward, combine   gradient of x: d_h w_gate_up^T, then the sum of each token's rows
"""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels import launch
from grist_kernels.expert_rows import Routing, Schedule, route, schedule
from grist_kernels.grouped_matmul.launches import tile_rows
from grist_kernels.grouped_matmul.triton_kernel import matrices_of, multiply, outer, rows_of, segment_sum
from grist_kernels.launch import Config, cdiv
from grist_kernels.moe.kernels import _combine_kernel, _d_hidden_kernel, _d_weights_kernel, _gate_up_kernel
from grist_kernels.moe.launches import BUDGETS, CANDIDATES, FORMULAS, SIZES
from grist_kernels.two_faces import differentiable, faces

__all__ = ["BUDGETS", "CANDIDATES", "FORMULAS", "SIZES", "moe"]

Optionals = tuple[float, float, dict[str, bool]]


def _config(kernel: str, like: Tensor, block: int) -> Config:
    target = launch.target(like.device)
    return {"BLOCK_M": block, **launch.config("moe", kernel, target, like.dtype, block, FORMULAS[kernel])}


def _options(alpha: float | None, limit: float | None, interleaved: bool) -> Optionals:
    """The numbers as the kernels take them, and which of them are given."""
    given = {"HAS_ALPHA": alpha is not None, "HAS_LIMIT": limit is not None, "INTERLEAVED": interleaved}
    return 1.0 if alpha is None else float(alpha), 0.0 if limit is None else float(limit), given


def _gate_up(
    x: Tensor, w: Tensor, bias: Tensor | None, active: int, routing: Routing, tiles: Schedule, block: int, keep: bool,
    options: Optionals,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> h (R, 2F), empty unless it is kept, and its activation (R, F)."""
    alpha, limit, given = options
    rows, (_, D, wide) = routing.pair.shape[0], w.shape
    F = wide // 2
    act = torch.empty((rows, F), dtype=x.dtype, device=x.device)
    h = torch.empty((rows, wide) if keep else (0, wide), dtype=x.dtype, device=x.device)
    config = _config("gate_up", x, block)
    launch.run(
        _gate_up_kernel, (tiles.tiles * cdiv(F, config["BLOCK_N"] // 2),), x.device,
        x, w, w if bias is None else bias, h if keep else act, act, routing.pair, *tiles, tiles.tiles,
        x.stride(0), *w.stride(), 0 if bias is None else bias.stride(0), alpha, limit,
        D=D, F=F, ACTIVE=active, HAS_BIAS=bias is not None, KEEP=keep, **given, **config,
    )  # fmt: skip
    return h, act


def _combine(y: Tensor, place: Tensor, n_tokens: int, active: int, weights: Tensor | None) -> Tensor:
    """y (R, D) -> (T, D): the sum of each token's rows, times their weights (T * A,) if there are weights."""
    D = y.shape[1]
    out = torch.empty((n_tokens, D), dtype=y.dtype, device=y.device)
    block = min(1024, max(64, launch.next_power_of_2(D)))
    rows = 2048 // block
    launch.run(
        _combine_kernel, (cdiv(n_tokens, rows) * cdiv(D, block),), y.device,
        y, place if weights is None else weights, place, out, n_tokens,
        D=D, ACTIVE=active, HAS_WEIGHTS=weights is not None, ROWS=rows, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return out


def _forward(
    x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, b_gate_up: Tensor | None,
    b_down: Tensor | None, alpha: float | None, limit: float | None, interleaved: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """-> out (T, D); for the backward: h (R, 2F), and a Routing's three. keep: whether there will be one."""
    x, (n_tokens, active), n_experts = rows_of(x), ids.shape, w_down.shape[0]
    block = tile_rows(n_tokens * active, n_experts)
    routing = route(ids, n_experts)
    tiles = schedule(routing.ends, n_tokens * active, block)
    options = _options(alpha, limit, interleaved)
    w_gate_up = matrices_of(w_gate_up)
    b_gate_up = None if b_gate_up is None else rows_of(b_gate_up)
    h, act = _gate_up(x, w_gate_up, b_gate_up, active, routing, tiles, block, keep, options)
    y = multiply(act, w_down, b_down, tiles, block)
    out = _combine(y, routing.place, n_tokens, active, weights.reshape(-1))
    return out, h, routing.place, routing.pair, routing.ends


def _d_hidden(
    d_out: Tensor, w_down: Tensor, h: Tensor, weights: Tensor, routing: Routing, tiles: Schedule, block: int,
    options: Optionals,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """-> gradient of h (R, 2F), weighted activations (R, F), shares of the weights' gradients (column blocks, R)."""
    alpha, limit, given = options
    rows, (_, F, D) = routing.pair.shape[0], w_down.shape
    config = _config("d_hidden", d_out, block)
    column_blocks = cdiv(F, config["BLOCK_N"])
    d_h, act = torch.empty_like(h), torch.empty((rows, F), dtype=h.dtype, device=h.device)
    partial = torch.empty((column_blocks, rows), dtype=torch.float32, device=h.device)
    w_expert, w_out, w_in = w_down.stride()
    launch.run(
        _d_hidden_kernel, (tiles.tiles * column_blocks,), d_out.device,
        d_out, w_down, h, weights, d_h, act, partial, routing.pair, *tiles, tiles.tiles, rows, d_out.stride(0),
        w_expert, w_in, w_out, alpha, limit, D=D, F=F, ACTIVE=rows // max(1, d_out.shape[0]), **given, **config,
    )  # fmt: skip
    return d_h, act, partial


def _d_weights(
    partial: Tensor, d_out: Tensor, b_down: Tensor | None, ids: Tensor, place: Tensor, dtype: torch.dtype
) -> Tensor:
    d_weights = torch.empty(ids.shape, dtype=dtype, device=d_out.device)
    n_pairs, rows = ids.numel(), 16
    launch.run(
        _d_weights_kernel, (cdiv(n_pairs, rows),), d_out.device,
        partial, d_out, d_out if b_down is None else b_down, ids, place, d_weights, n_pairs, partial.shape[1],
        partial.shape[0], d_out.stride(0), 0 if b_down is None else b_down.stride(0),
        D=d_out.shape[1], ACTIVE=ids.shape[1], HAS_BIAS=b_down is not None, ROWS=rows, BLOCK=128, num_warps=4,
    )  # fmt: skip
    return d_weights


def _backward(
    d_out: Tensor, x: Tensor, ids: Tensor, weights: Tensor, w_gate_up: Tensor, w_down: Tensor, b_down: Tensor | None,
    h: Tensor, place: Tensor, pair: Tensor, ends: Tensor, alpha: float | None, limit: float | None, interleaved: bool,
    has_b_gate_up: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weights, w_gate_up, w_down, b_gate_up and b_down; an empty tensor stands for a bias not there."""
    (n_tokens, active), n_experts, rows = ids.shape, w_down.shape[0], pair.shape[0]
    d_out, x, ids = rows_of(d_out), rows_of(x), ids.contiguous()
    flat_weights = weights.reshape(-1)
    block, routing = tile_rows(rows, n_experts), Routing(place, pair, ends)
    tiles = schedule(ends, rows, block)
    options = _options(alpha, limit, interleaved)
    w_down, b_down = matrices_of(w_down), None if b_down is None else rows_of(b_down)
    d_h, act, partial = _d_hidden(d_out, w_down, h, flat_weights, routing, tiles, block, options)
    d_weights = _d_weights(partial, d_out, b_down, ids, place, weights.dtype)
    d_w_down = outer(act, d_out, tiles.starts, n_experts, block, pair, dy_active=active)
    if b_down is None:
        d_b_down = x.new_empty(0)
    else:
        d_b_down = segment_sum(d_out, tiles.starts, n_experts, pair, active, flat_weights)
    d_w_gate_up = outer(x, d_h, tiles.starts, n_experts, block, pair, x_active=active)
    d_b_gate_up = segment_sum(d_h, tiles.starts, n_experts) if has_b_gate_up else x.new_empty(0)
    d_rows = multiply(d_h, w_gate_up.transpose(1, 2), None, tiles, block)
    d_x = _combine(d_rows, place, n_tokens, active, None)
    return d_x, d_weights, d_w_gate_up, d_w_down, d_b_gate_up, d_b_down


def _fake_forward(x, ids, weights, w_gate_up, w_down, b_gate_up, b_down, alpha, limit, interleaved, keep):
    rows, wide = ids.numel(), w_gate_up.shape[2]
    integers = [ids.new_empty(size, dtype=torch.int32) for size in (rows, rows, w_down.shape[0])]
    return x.new_empty(x.shape), x.new_empty(rows if keep else 0, wide), *integers


def _fake_backward(
    d_out, x, ids, weights, w_gate_up, w_down, b_down, h, place, pair, ends, alpha, limit, interleaved, has_b_gate_up
):
    E, D, wide = w_gate_up.shape
    return (
        x.new_empty(x.shape), weights.new_empty(weights.shape), x.new_empty(w_gate_up.shape), x.new_empty(w_down.shape),
        x.new_empty((E, wide) if has_b_gate_up else 0), x.new_empty(0 if b_down is None else (E, D)),
    )  # fmt: skip


_FORWARD = faces(
    "moe(Tensor x, Tensor ids, Tensor weights, Tensor w_gate_up, Tensor w_down, Tensor? b_gate_up, Tensor? b_down,"
    " float? alpha, float? limit, bool interleaved, bool keep) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_BACKWARD = faces(
    "moe_backward(Tensor d_out, Tensor x, Tensor ids, Tensor weights, Tensor w_gate_up, Tensor w_down, Tensor? b_down,"
    " Tensor h, Tensor place, Tensor pair, Tensor ends, float? alpha, float? limit, bool interleaved,"
    " bool has_b_gate_up) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx, inputs, output) -> None:
    x, ids, weights, w_gate_up, w_down, b_gate_up, b_down, *options, _ = inputs
    ctx.save_for_backward(x, ids, weights, w_gate_up, w_down, b_down, *output[1:])
    ctx.options, ctx.has_b_gate_up = options, b_gate_up is not None


def _gradients(ctx, run, d_out, *_):
    if d_out is None:
        return (None,) * 11
    saved = ctx.saved_tensors  # once: recomputation (torch.utils.checkpoint) gives them up at the first reading
    d_x, d_weights, d_w_gate_up, d_w_down, d_b_gate_up, d_b_down = run(d_out, *saved, *ctx.options, ctx.has_b_gate_up)
    has_b_down = saved[5] is not None
    biases = d_b_gate_up if ctx.has_b_gate_up else None, d_b_down if has_b_down else None
    return d_x, None, d_weights, d_w_gate_up, d_w_down, *biases, None, None, None, None


_experts = differentiable(_FORWARD, _BACKWARD, _save, _gradients)


def moe(
    x: Tensor, expert_ids: Tensor, expert_weights: Tensor, w_gate_up: Tensor, w_down: Tensor, b_gate_up: Tensor | None,
    b_down: Tensor | None, *, alpha: float | None, limit: float | None, interleaved: bool,
) -> Tensor:  # fmt: skip
    """As grist_kernels.moe."""
    tensors = (x, expert_weights, w_gate_up, w_down, b_gate_up, b_down)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    inputs = (x, expert_ids, expert_weights, w_gate_up, w_down, b_gate_up, b_down, alpha, limit, interleaved, keep)
    return _experts(*inputs)[0]
