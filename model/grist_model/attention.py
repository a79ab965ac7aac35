"""Grouped-query attention.

B batch, T time, D model width, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

import grist_kernels
from grist_model import few_rows, native_step
from grist_model.cache import KVCache
from grist_model.config import ModelConfig
from grist_model.layers import Linear, RMSNorm

__all__ = ["Attention", "KVCache"]


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and, where configured, a window and learned sinks."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.head_width = H = config.attention_head_width
        self.window = config.layer_window(layer)
        bias = config.attention_bias
        self.q = Linear(config.width, config.heads * H, bias=bias)
        self.k = Linear(config.width, config.kv_heads * H, bias=bias)
        self.v = Linear(config.width, config.kv_heads * H, bias=bias)
        self.o = Linear(config.heads * H, config.width, bias=bias)
        self.q_norm, self.k_norm = None, None
        if config.qk_norm != "none":
            by_head = config.qk_norm == "head"
            self.q_norm = RMSNorm(H if by_head else config.heads * H, config.norm_eps)
            self.k_norm = RMSNorm(H if by_head else config.kv_heads * H, config.norm_eps)
        self.sinks = nn.Parameter(torch.empty(config.heads)) if config.sinks else None

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
        context_group: dist.ProcessGroup | None = None,
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). cos, sin as RotaryAngles makes them, None without rotation; cu_seqlens over the flattened
        B * T stream. context_group: ranks that share every sequence; x is this rank's zigzag share of it."""
        if cos is not None and cos.dtype != torch.float32:
            raise ValueError(
                f"cos and sin must be float32, but are {cos.dtype}: rounded angles turn distant tokens wrongly. "
                "With FSDP, use MixedPrecisionPolicy(cast_forward_inputs=False)"
            )
        if cache is not None:
            whole = native_step.attention(self, x_BTD, None if cos is None or sin is None else (cos, sin), cache)
            if whole is not None:
                return whole
        q_BTNH = self._heads(self.q(x_BTD), self.q_norm)
        k_BTKH = self._heads(self.k(x_BTD), self.k_norm)
        v_BTKH = self._heads(self.v(x_BTD), None)
        if cos is not None and sin is not None:
            if cache is not None and few_rows.fits(x_BTD):
                q_BTNH, k_BTKH = few_rows.rope(q_BTNH, k_BTKH, *cache.whole_heads(cos, sin))
            else:
                q_BTNH, k_BTKH = grist_kernels.rope(q_BTNH, k_BTKH, cos, sin)
        if cache is not None:
            out_BTNH = cache.attend(self.layer, q_BTNH, k_BTKH, v_BTKH, self.window, self.sinks)
        elif context_group is not None:
            options = {"group": context_group, "window": self.window, "sinks": self.sinks}
            out_BTNH = grist_kernels.ring_attention(q_BTNH, k_BTKH, v_BTKH, **options)
        elif cu_seqlens is None:
            out_BTNH = _causal_attention(q_BTNH, k_BTKH, v_BTKH, self.window, self.sinks)
        else:
            q, k, v = (part.flatten(0, 1) for part in (q_BTNH, k_BTKH, v_BTKH))
            out_BTNH = _causal_attention(q, k, v, self.window, self.sinks, cu_seqlens).view(q_BTNH.shape)
        return self.o(out_BTNH.flatten(2))

    def _heads(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """(B, T, heads * H) -> (B, T, heads, H), normalized by head or over all of them."""
        heads = x.unflatten(-1, (-1, self.head_width))
        if norm is None:
            return heads
        return norm(heads) if norm.weight.shape[0] == self.head_width else norm(x).view(heads.shape)


def _causal_attention(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None, cu_seqlens: Tensor | None = None
) -> Tensor:
    return cast(Tensor, grist_kernels.attention(q, k, v, window=window, sinks=sinks, cu_seqlens=cu_seqlens))
