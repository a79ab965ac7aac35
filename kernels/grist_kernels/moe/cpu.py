"""The experts on a CPU in eager mode: one autograd function over the segments of rows that belong to one expert.

T tokens, D model width, E experts, A active experts per token, F expert width, R = T * A rows sorted by expert.

Against a composition of small ops this saves whole-tensor temporaries, the largest cost after the matrix products:
- Rows are gathered segment by segment into one reused buffer, forward and backward; sorted copies are never kept.
- Biases ride in addmm; the activation runs in cache-sized blocks (swiglu/pytorch_fast.py) and is recomputed in the backward.
- The results return to their tokens by a weighted gather-and-sum, which is what embedding_bag does in one pass.
- With p = d_out[token] @ w_down^T, the gradient of an expert weight is act . p + d_out . b_down, so the outputs of the
  experts need not be kept (the identity is from SonicMoE, Guo et al., 2025).
- Interleaved weights are put in halves first: E * D rows of weights are fewer than R rows of activations, and strided columns
  defeat vector instructions.
Measured speeds: kernels/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from grist_kernels.moe.ids import check_ids
from grist_kernels.swiglu.pytorch_fast import BackwardScratch, backward_block, forward_block, rows_per_block


def fits(x: Tensor) -> bool:
    """Eager float32 or float64 on a CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
    )


def moe(x, expert_ids, expert_weights, w_gate_up, w_down, b_gate_up, b_down, alpha, limit, interleaved) -> Tensor:
    """As grist_kernels.moe."""
    weights = expert_weights.to(x.dtype)
    return _Experts.apply(
        x, weights, w_gate_up, w_down, b_gate_up, b_down, expert_ids, _Options(alpha, limit, interleaved)
    )


@dataclass(frozen=True)
class _Options:
    alpha: float | None
    limit: float | None
    interleaved: bool


@dataclass(frozen=True)
class _Routing:
    """Which rows belong to which expert, and where each came from."""

    pair_R: Tensor  # the flat (token, slot) pair of each row
    token_R: Tensor  # the token of each row
    place_TA: Tensor  # the row of each pair
    segments: list[tuple[int, slice]]  # (expert, its rows), for experts that have some

    @property
    def longest(self) -> int:
        return max(rows.stop - rows.start for _, rows in self.segments)


def _route(expert_ids: Tensor, experts: int) -> _Routing:
    flat_R = expert_ids.reshape(-1)
    check_ids(flat_R, experts)
    pair_R = flat_R.argsort(stable=True)
    place_TA = torch.empty_like(pair_R)
    place_TA[pair_R] = torch.arange(pair_R.shape[0])
    segments, start = [], 0
    for expert, count in enumerate(torch.bincount(flat_R, minlength=experts).tolist()):
        if count:
            segments.append((expert, slice(start, start + count)))
        start += count
    return _Routing(pair_R, pair_R // expert_ids.shape[1], place_TA.view(expert_ids.shape), segments)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, expert_weights, w_gate_up, w_down, b_gate_up, b_down, expert_ids, options: _Options) -> Tensor:
        routing = _route(expert_ids, w_down.shape[0])
        w_up_halves = _in_halves(w_gate_up, options)
        b_up_halves = None if b_gate_up is None else _in_halves(b_gate_up, options)
        rows, F, D = routing.token_R.shape[0], w_down.shape[1], w_down.shape[2]
        h_R2F, y_RD = x.new_empty(rows, 2 * F), x.new_empty(rows, D)
        gathered, act = x.new_empty(routing.longest, D), x.new_empty(routing.longest, F)
        scratch = x.new_empty(min(rows_per_block(F), routing.longest), F)
        for e, segment in routing.segments:
            n = segment.stop - segment.start
            x_segment = torch.index_select(x, 0, routing.token_R[segment], out=gathered[:n])
            _linear(x_segment, w_up_halves[e], None if b_up_halves is None else b_up_halves[e], out=h_R2F[segment])
            for block in _blocks(n, F):
                gate, up = h_R2F[segment][block].chunk(2, -1)
                forward_block(gate, up, options.alpha, options.limit, out=act[block], scratch=scratch[: gate.shape[0]])
            _linear(act[:n], w_down[e], None if b_down is None else b_down[e], out=y_RD[segment])
        ctx.save_for_backward(x, expert_weights, w_gate_up, w_down, b_gate_up, b_down, h_R2F)
        ctx.routing, ctx.options = routing, options
        return torch.nn.functional.embedding_bag(
            routing.place_TA, y_RD, per_sample_weights=expert_weights.contiguous(), mode="sum"
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out: Tensor):
        x, expert_weights, w_gate_up, w_down, b_gate_up, b_down, h_R2F = ctx.saved_tensors
        routing, options = ctx.routing, ctx.options
        w_up_halves = _in_halves(w_gate_up, options)
        grads = _Gradients(x, w_up_halves, w_down, b_gate_up, b_down, routing)
        buffers = _BackwardBuffers(x, w_down.shape[1], routing.longest)
        weight_R = expert_weights.reshape(-1)[routing.pair_R]
        for e, segment in routing.segments:
            token, weight = routing.token_R[segment], weight_R[segment]
            _backward_segment(
                e, segment, token, weight, x, d_out, h_R2F, w_up_halves, w_down, b_down, options, grads, buffers
            )
        d_x = torch.nn.functional.embedding_bag(routing.place_TA, grads.x_RD, mode="sum")
        d_weights = grads.weight_R[routing.place_TA.view(-1)].view(expert_weights.shape)
        d_up = _from_halves(grads.w_up, options)
        d_b_up = None if grads.b_up is None else _from_halves(grads.b_up, options)
        return d_x, d_weights, d_up, grads.w_down, d_b_up, grads.b_down, None, None


class _Gradients:
    """Room for every gradient. Experts without rows are never written, so theirs must start at zero."""

    def __init__(self, x, w_up, w_down, b_gate_up, b_down, routing: _Routing):
        fresh = torch.empty_like if len(routing.segments) == w_down.shape[0] else torch.zeros_like
        rows = routing.token_R.shape[0]
        self.x_RD, self.weight_R = x.new_empty(rows, x.shape[1]), x.new_empty(rows)
        self.w_up = fresh(w_up, memory_format=torch.contiguous_format)
        self.w_down = fresh(w_down, memory_format=torch.contiguous_format)
        self.b_up = None if b_gate_up is None else fresh(b_gate_up, memory_format=torch.contiguous_format)
        self.b_down = None if b_down is None else fresh(b_down, memory_format=torch.contiguous_format)


class _BackwardBuffers:
    """Reused by every segment."""

    def __init__(self, x: Tensor, F: int, longest: int):
        self.x, self.d_out = x.new_empty(2, longest, x.shape[1]).unbind(0)
        self.d_act, self.act = x.new_empty(2, longest, F).unbind(0)
        self.d_h = x.new_empty(longest, 2 * F)
        self.swiglu = BackwardScratch(min(rows_per_block(F), longest), F, x)


def _backward_segment(
    e: int, segment: slice, token, weight, x, d_out, h_R2F, w_up, w_down, b_down, options: _Options,
    grads: _Gradients, buffers: _BackwardBuffers,
) -> None:  # fmt: skip
    """Everything that one expert's rows contribute."""
    n, F = segment.stop - segment.start, w_down.shape[1]
    d_out_rows = torch.index_select(d_out, 0, token, out=buffers.d_out[:n])
    p = torch.mm(
        d_out_rows, w_down[e].T, out=buffers.d_act[:n]
    )  # gradient of the activation before the expert's weight
    act, d_h, weight_column = buffers.act[:n], buffers.d_h[:n], weight.unsqueeze(1)
    d_weight = grads.weight_R[segment]
    for block in _blocks(n, F):
        gate, up = h_R2F[segment][block].chunk(2, -1)
        d_gate, d_up = d_h[block].chunk(2, -1)
        rows = gate.shape[0]
        unweighted = buffers.swiglu.act[:rows]
        # The activation's backward is linear in p: weigh its result's input once, and keep p for the weight's own gradient.
        weighted = torch.mul(p[block], weight_column[block], out=act[block])
        backward_block(gate, up, weighted, options.alpha, options.limit, d_gate, d_up, buffers.swiglu, want_act=True)
        torch.sum(p[block].mul_(unweighted), 1, out=d_weight[block])
        torch.mul(unweighted, weight_column[block], out=act[block])
    if b_down is not None and grads.b_down is not None:
        d_weight.addmv_(d_out_rows, b_down[e])
        torch.sum(torch.mul(d_out_rows, weight_column, out=buffers.x[:n]), 0, out=grads.b_down[e])
    torch.mm(act.T, d_out_rows, out=grads.w_down[e])
    x_rows = torch.index_select(x, 0, token, out=buffers.x[:n])
    torch.mm(x_rows.T, d_h, out=grads.w_up[e])
    if grads.b_up is not None:
        torch.sum(d_h, 0, out=grads.b_up[e])
    torch.mm(d_h, w_up[e].T, out=grads.x_RD[segment])


def _linear(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> None:
    if bias is None:
        torch.mm(x, w, out=out)
    else:
        torch.addmm(bias, x, w, out=out)


def _blocks(rows: int, width: int) -> list[slice]:
    step = rows_per_block(width)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _in_halves(w: Tensor, options: _Options) -> Tensor:
    """(..., 2F) with [gate | up], a copy if they were interleaved."""
    if not options.interleaved:
        return w
    return w.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def _from_halves(w: Tensor, options: _Options) -> Tensor:
    """The inverse of _in_halves."""
    if not options.interleaved:
        return w
    return w.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
