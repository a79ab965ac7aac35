"""Flash attention on a GPU: launches and gradients of the device code in kernels.py.

B batch, T time, N query and K key/value heads, H head width. Everything is one layout, (B, T, heads, H) with any strides but
the last; packed sequences are B = 1 with bounds for each token. Memory beyond inputs and outputs is O(T): lse and delta,
(B, N, T) float32, and two integers a token when packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grist_kernels import launch
from grist_kernels.attention.kernels import _bounds_kernel, _dkv_kernel, _dq_kernel, _forward_kernel
from grist_kernels.attention.launches import BUDGETS, CANDIDATES, FORMULAS, SIZES, padded_width, row_name, size_bucket
from grist_kernels.column_sums import sum_rows
from grist_kernels.launch import Config, cdiv
from grist_kernels.two_faces import differentiable, faces

__all__ = ["BUDGETS", "CANDIDATES", "FORMULAS", "SIZES", "attention", "backward", "forward", "token_bounds"]

BOUNDS_BLOCK = 256


def token_bounds(cu_seqlens: Tensor, T: int, window: int | None) -> Tensor:
    """(2, T) int32 for packed tokens: the first key that each sees, and the end of the queries that see it."""
    bounds = torch.empty((2, T), dtype=torch.int32, device=cu_seqlens.device)
    n_sequences = cu_seqlens.shape[0] - 1
    launch.run(
        _bounds_kernel, (cdiv(T, BOUNDS_BLOCK),), cu_seqlens.device, cu_seqlens.contiguous(), bounds[0], bounds[1], T,
        window or 0, n_sequences, n_sequences.bit_length(), HAS_WINDOW=window is not None, BLOCK=BOUNDS_BLOCK, num_warps=4,
    )  # fmt: skip
    return bounds


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bounds: Tensor | None, window: int | None, scale: float,
    offset: int = 0, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q (B, T, N, H), k and v (B, T_keys, K, H) -> out (B, T, N, H) in q's type or dtype, lse (B, N, T) float32.

    Query i stands at position i + offset among the keys. bounds: as token_bounds makes them, the window included.
    """
    (q, q_strides), (k, k_strides), (v, v_strides) = (_strided(x) for x in (q, k, v))
    B, T, N, _ = q.shape
    out = torch.empty(q.shape, dtype=dtype or q.dtype, device=q.device)
    lse = torch.empty((B, N, T), dtype=torch.float32, device=q.device)
    config = _config("forward", q, window)
    config, (k_rows, v_rows) = _described(config, config["BLOCK_K"], k, v)
    launch.run(
        _forward_kernel, (B * N, cdiv(T, config["BLOCK_Q"])), q.device,
        q, k_rows, v_rows, out, lse, lse if sinks is None else sinks, lse if bounds is None else bounds[0],
        T, k.shape[1], N, offset, window or 0, float(scale), *q_strides, *k_strides, *v_strides,
        HAS_SINKS=sinks is not None, **_constants(q, k, bounds, window), **config,
    )  # fmt: skip
    return out, lse


def backward(
    d_out: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor | None,
    lse: Tensor, bounds: Tensor | None, window: int | None, scale: float, offset: int = 0,
    delta: Tensor | None = None, dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and sinks, as forward takes them, from those of out and lse; in their own types or dtype.

    out, or instead of it delta (B, N, T) float32: the row sums of d_out * out, less d_lse.
    """
    tensors = [_strided(x) for x in (q, k, v, d_out, d_out if out is None else out)]
    (q, q_strides), (k, k_strides), (v, v_strides), (d_out, d_strides), (out_or_any, o_strides) = tensors
    (B, T, N, _), (T_keys, K) = q.shape, k.shape[1:3]
    dq, dk, dv = (torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device) for x in (q, k, v))
    has_delta = delta is not None
    delta = delta.contiguous() if has_delta else torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    lse = lse.contiguous()
    constants = _constants(q, k, bounds, window)
    config = _config("dq", q, window)
    config, (k_rows, v_rows) = _described(config, config["BLOCK_K"], k, v)
    blocks = cdiv(T, config["BLOCK_Q"])
    shares = None if sinks is None else torch.empty((B * blocks, N), dtype=torch.float32, device=q.device)
    launch.run(
        _dq_kernel, (B * N, blocks), q.device,
        q, k_rows, v_rows, d_out, out_or_any, lse if d_lse is None else d_lse.contiguous(), lse, delta,
        lse if sinks is None else sinks, lse if shares is None else shares, dq, lse if bounds is None else bounds[0],
        T, T_keys, N, offset, window or 0, float(scale), *q_strides, *k_strides, *v_strides, *d_strides, *o_strides,
        HAS_SINKS=sinks is not None, HAS_D_LSE=d_lse is not None, HAS_DELTA=has_delta, **constants, **config,
    )  # fmt: skip
    config = _config("dkv", q, window)
    config, (q_rows, d_rows) = _described(config, config["BLOCK_Q"], q, d_out)
    first, beyond = (lse, lse) if bounds is None else (bounds[0], bounds[1])
    launch.run(
        _dkv_kernel, (B * K, cdiv(T_keys, config["BLOCK_K"])), q.device,
        q_rows, k, v, d_rows, lse, delta, dk, dv, first, beyond,
        T, T_keys, N, K, offset, window or 0, float(scale), *q_strides, *k_strides, *v_strides, *d_strides,
        **constants, **config,
    )  # fmt: skip
    return dq, dk, dv, None if sinks is None or shares is None else sum_rows(shares, sinks.dtype)


def _config(kernel: str, q: Tensor, window: int | None) -> Config:
    row = row_name(kernel, window)
    return launch.config("attention", row, launch.target(q.device), q.dtype, size_bucket(q.shape[-1]), FORMULAS[row])


def _described(config: Config, block: int, *tensors: Tensor) -> tuple[Config, tuple[Any, ...]]:
    """The launch, and what it gets for tensors (B, T, heads, H) that it reads in blocks of rows: descriptors, if the table asks
    for them (DESCRIPTORS) and the hardware takes all of these tensors, else the tensors."""
    if not config["DESCRIPTORS"] or not all(_describable(x) for x in tensors):
        return {**config, "DESCRIPTORS": 0}, tensors
    from triton.tools.tensor_descriptor import TensorDescriptor

    def described(x: Tensor) -> TensorDescriptor:
        B, T, heads, H = x.shape
        strides = [x.stride(0), x.stride(2), x.stride(1), 1]
        return TensorDescriptor(x, [B, heads, T, H], strides, [1, 1, block, H])

    return config, tuple(described(x) for x in tensors)


def _describable(x: Tensor) -> bool:
    """Bulk copies want rows of a power of two columns, and addresses and strides of whole 16 bytes (CUDA driver API,
    cuTensorMapEncodeTiled)."""
    H, unit = x.shape[-1], 16 // x.element_size()
    fitting = all(stride > 0 and stride % unit == 0 for stride in x.stride()[:-1])
    return fitting and padded_width(H) == H and x.numel() > 0 and x.data_ptr() % 16 == 0


def _constants(q: Tensor, k: Tensor, bounds: Tensor | None, window: int | None) -> dict[str, int]:
    H = q.shape[-1]
    return {
        "GROUP": q.shape[2] // k.shape[2], "H": H, "HEAD": padded_width(H), "HAS_WINDOW": window is not None,
        "PACKED": bounds is not None,
    }  # fmt: skip


def _strided(x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """x with its batch, time and head strides. A copy if the last axis has gaps, or if a tile of 128 rows spans more than 32
    bits of elements: within a tile offsets are 32 bits wide."""
    if (x.stride(-1) != 1 and x.shape[-1] > 1) or x.stride(1) >= 2**23:
        x = x.contiguous()
    return x, (x.stride(0), x.stride(1), x.stride(2))


def _forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens: Tensor | None, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, bounds): bounds is empty unless packed."""
    bounds = None if cu_seqlens is None else token_bounds(cu_seqlens, q.shape[1], window)
    out, lse = forward(q, k, v, sinks, bounds, window, scale)
    return out, lse, torch.empty((2, 0), dtype=torch.int32, device=q.device) if bounds is None else bounds


def _backward(
    d_out: Tensor | None, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor,
    lse: Tensor, bounds: Tensor, window: int | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and sinks (empty without sinks)."""
    d_out = torch.zeros_like(out) if d_out is None else d_out
    packed = bounds if bounds.shape[1] else None
    dq, dk, dv, d_sinks = backward(d_out, d_lse, q, k, v, sinks, out, lse, packed, window, scale)
    return dq, dk, dv, lse.new_empty(0) if d_sinks is None else d_sinks


def _fake_forward(q, k, v, sinks, cu_seqlens, window, scale):
    B, T, N, _ = q.shape
    lse = q.new_empty((B, N, T), dtype=torch.float32)
    return q.new_empty(q.shape), lse, q.new_empty((2, 0 if cu_seqlens is None else T), dtype=torch.int32)


def _fake_backward(d_out, d_lse, q, k, v, sinks, out, lse, bounds, window, scale):
    d_sinks = lse.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_sinks


_FORWARD = faces(
    "attention(Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? cu_seqlens, int? window, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
)
_BACKWARD = faces(
    "attention_backward(Tensor? d_out, Tensor? d_lse, Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor out, Tensor lse, "
    "Tensor bounds, int? window, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)


def _save(ctx, inputs, output) -> None:
    q, k, v, sinks, _, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, sinks, *output)


def _gradients(ctx, run, d_out: Tensor | None, d_lse: Tensor | None, _):
    if d_out is None and d_lse is None:
        return (None,) * 7
    *gradients, d_sinks = run(d_out, d_lse, *ctx.saved_tensors, *ctx.options)
    return *gradients, d_sinks if ctx.needs_input_grad[3] else None, None, None, None


_attended = differentiable(_FORWARD, _BACKWARD, _save, _gradients)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    sinks: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """As grist_kernels.attention."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if cu_seqlens is None:
        out, lse, _ = _attended(q, k, v, sinks, None, window, scale)
        return (out, lse) if return_lse else out
    out, lse, _ = _attended(*(x.unsqueeze(0) for x in (q, k, v)), sinks, cu_seqlens, window, scale)
    # squeeze and not [0], whose gradient is a tensor of zeros to copy into.
    return (out.squeeze(0), lse.squeeze(0)) if return_lse else out.squeeze(0)
