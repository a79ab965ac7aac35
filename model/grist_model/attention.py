"""Grouped-query attention and its key/value cache.

B batch, T time, S cache slots, D model width, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

import grist_kernels
from grist_model.config import ModelConfig
from grist_model.layers import Linear, RMSNorm


class KVCache:
    """Keys and values of the tokens so far: one (B, S, K, H) buffer of each per layer, filled from slot 0.

    A call of the model is begin, write in every layer, commit. The buffers take type and device from the first keys
    written. There is one per layer: a single stacked tensor makes compilers copy the stack at every layer.
    """

    def __init__(self, config: ModelConfig, batch: int, slots: int, device: torch.device | str | None = None):
        self.slots = slots
        self.used = 0  # by the longest sequence; kept here so that nobody has to ask the device
        self.lengths_B = torch.zeros(batch, dtype=torch.int64, device=device)  # tokens of each sequence
        self.row_B1 = torch.arange(batch, device=device)[:, None]
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * config.layers
        self._new_tokens = 0
        self._positions_BT = self._lengths_with_new_B = self.lengths_B
        self._equal_lengths = True

    def begin(self, new_tokens: int) -> Tensor:
        """-> (B, T): where the next new_tokens tokens of each sequence stand. Raises ValueError if there is no room."""
        if self.used + new_tokens > self.slots:
            raise ValueError(
                f"the key/value cache has {self.slots} slots, {self.used} of them used: no room for {new_tokens} more"
            )
        self._new_tokens = new_tokens
        self._positions_BT = self.lengths_B[:, None] + torch.arange(new_tokens, device=self.lengths_B.device)
        self._lengths_with_new_B = self.lengths_B + new_tokens
        return self._positions_BT

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
        """Store the new tokens' k and v (B, T, K, H), then attend from q (B, T, N, H) to everything stored."""
        k_BSKH, v_BSKH = self._write(layer, k, v)
        if self.used == 0:  # a prompt sees only itself
            return _causal_attention(q, k, v, window, sinks)
        return grist_kernels.decode_attention(q, k_BSKH, v_BSKH, self._lengths_with_new_B, window=window, sinks=sinks)

    def commit(self, lengths_B: Tensor | None = None) -> None:
        """Count the new tokens; lengths_B, after prompts padded on the right, tells how many of each were real."""
        self.used += self._new_tokens
        self.lengths_B = self._lengths_with_new_B if lengths_B is None else lengths_B.to(self.lengths_B)
        self._equal_lengths = self._equal_lengths and lengths_B is None

    def truncate(self, length: int) -> None:
        """Forget what stands at position `length` and after it in every sequence, such as tokens tried and rejected."""
        if length < 0:
            raise ValueError(f"a cache can be truncated to a length of 0 or more, but not to {length}")
        self.used = min(self.used, length)
        self.lengths_B = self.lengths_B.clamp(max=length)

    def replace(self, rows: list[int], other: KVCache) -> None:
        """The sequences of `rows` become those of another cache, of len(rows) sequences; this one may still be empty.

        Raises ValueError if they do not fit.
        """
        if len(rows) != len(other.lengths_B) or other.used > self.slots:
            raise ValueError(
                f"{len(rows)} rows of a cache of {self.slots} slots cannot become the {len(other.lengths_B)} sequences, "
                f"of up to {other.used} tokens, of another"
            )
        row_R = torch.tensor(rows, device=self.lengths_B.device)
        for layer, given in enumerate(other._buffers):
            if given is None:
                raise ValueError(f"the other cache has no keys of layer {layer} yet: run the model on it first")
            for own, new in zip(self._layer_buffers(layer, *given), given, strict=True):
                own[row_R, : other.used] = new[:, : other.used]
        self.lengths_B = self.lengths_B.index_copy(0, row_R, other.lengths_B)
        self.used = max(self.used, other.used)
        self._equal_lengths = False

    def keep(self, rows: list[int]) -> None:
        """Forget every sequence but those of `rows`, which become the batch, in this order."""
        row_R = torch.tensor(rows, device=self.lengths_B.device)
        self.lengths_B = self.lengths_B[row_R]
        self.row_B1 = self.row_B1[: len(rows)]
        self._buffers = [None if pair is None else (pair[0][row_R], pair[1][row_R]) for pair in self._buffers]

    def _write(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """-> the layer's buffers, up to the last slot in use."""
        buffers = self._layer_buffers(layer, k, v)
        end = self.used + self._new_tokens
        for buffer, new in zip(buffers, (k, v), strict=True):
            if self._equal_lengths:
                buffer[:, self.used : end] = new.detach()
            else:
                buffer[self.row_B1, self._positions_BT] = new.detach()
        return buffers[0][:, :end], buffers[1][:, :end]

    def _layer_buffers(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's buffers, made on first use with the head count, head width, type and device of k and v."""
        buffers = self._buffers[layer]
        if buffers is None:
            shape = (self.row_B1.shape[0], self.slots, *k.shape[2:])
            buffers = self._buffers[layer] = (k.new_empty(shape), v.new_empty(shape))
        return buffers


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
    ) -> Tensor:
        """x (B, T, D) -> (B, T, D). cos, sin as RotaryAngles makes them, None without rotation; cu_seqlens over the flattened
        B * T stream."""
        if cos is not None and cos.dtype != torch.float32:
            raise ValueError(
                f"cos and sin must be float32, but are {cos.dtype}: rounded angles turn distant tokens wrongly. "
                "With FSDP, use MixedPrecisionPolicy(cast_forward_inputs=False)"
            )
        q_BTNH = self._heads(self.q(x_BTD), self.q_norm)
        k_BTKH = self._heads(self.k(x_BTD), self.k_norm)
        v_BTKH = self._heads(self.v(x_BTD), None)
        if cos is not None and sin is not None:
            q_BTNH, k_BTKH = grist_kernels.rope(q_BTNH, k_BTKH, cos, sin)
        if cache is not None:
            out_BTNH = cache.attend(self.layer, q_BTNH, k_BTKH, v_BTKH, self.window, self.sinks)
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
