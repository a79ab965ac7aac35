"""The decoder: embedding, blocks, final norm, head. B batch, T time, D model width, V vocabulary, L layers."""

from __future__ import annotations

import re
from typing import Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

import grist_kernels
from grist_model import products
from grist_model.attention import Attention, KVCache
from grist_model.config import ModelConfig
from grist_model.layers import Embedding, Linear, norm
from grist_model.moe import LayerStats, Router, RouterStats, feed_forward
from grist_model.rope import RotaryAngles

# What torch.compile, activation checkpointing and DDP insert into parameter names.
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|module)\.")


def plain_name(name: str) -> str:
    """A parameter's name as in the bare model, whatever wraps its modules."""
    return _WRAPPERS.sub("", name)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = Attention(config, layer)
        self.mlp_norm = norm(config)
        self.mlp = feed_forward(config)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | None = None,
        return_stats: bool = False,
        context_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, LayerStats | None]:
        # Statistics are returned, never kept on the side: activation checkpointing runs a block twice.
        update_BTD = self.attention(self.attention_norm(x_BTD), cos, sin, cu_seqlens, cache, context_group)
        y_BTD, x_BTD = self.mlp_norm(update_BTD, residual=x_BTD)
        update_BTD, stats = self.mlp(y_BTD, return_stats)
        return x_BTD + update_BTD, stats


class Transformer(nn.Module):
    """model(ids_BT) -> logits_BTV; model.hidden(ids_BT) -> hidden_BTD, for a loss that makes its logits in pieces.

    Every parameter is used inside the forward of the submodule that owns it, so that FSDP's hooks on blocks and
    experts fire.

    context_group: ranks that share every sequence of `hidden`, which is then given this rank's share (context parallelism);
    None, as it is unless a trainer sets it for a while, for whole sequences.
    """

    context_group: dist.ProcessGroup | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embedding = Embedding(config.vocab_size, config.width)
        learned = config.positions == "learned"
        self.position_embedding = Embedding(config.context_length, config.width) if learned else None
        self.rope = None if learned else RotaryAngles(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.norm = norm(config)
        self.head = None if config.tied_embeddings else Linear(config.width, config.vocab_size, bias=False)

    @property
    def unembedding(self) -> nn.Parameter:
        """(V, D): the matrix that turns hidden states into logits; the embedding's own when they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight  # pyright: ignore[reportReturnType]

    @overload
    def hidden(
        self,
        ids_BT: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        positions_BT: Tensor | None = None,
        return_router: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def hidden(
        self,
        ids_BT: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        positions_BT: Tensor | None = None,
        return_router: Literal[True],
    ) -> tuple[Tensor, RouterStats]: ...

    def hidden(
        self,
        ids_BT: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        positions_BT: Tensor | None = None,
        return_router: bool = False,
    ) -> Tensor | tuple[Tensor, RouterStats]:
        """ids (B, T) integers in [0, V) -> hidden states (B, T, D) after the final norm, with RouterStats if asked for.

        cu_seqlens (documents + 1,) int32 or int64: document borders 0, ..., B * T in the flattened stream of ids;
        documents do not see each other and positions restart at each. positions_BT overrides the positions
        that tokens have (default: 0 to T - 1 in every row; with a context_group, those of this rank's share).

        Raises ValueError if ids are not (B, T) integers, or shared sequences are packed documents.
        """
        _check_ids(ids_BT)
        group = self.context_group
        if group is not None and cu_seqlens is not None:
            raise ValueError("sequences that ranks share cannot be packed documents: leave out cu_seqlens")
        if positions_BT is not None:
            positions = positions_BT
        elif group is not None:
            positions = _shared_positions(ids_BT, group)
        else:
            positions = _positions(ids_BT, cu_seqlens)
        x_BTD, layers = self._run_blocks(ids_BT, positions, cu_seqlens, None, return_router, group)
        if not return_router:
            return self.norm(x_BTD)
        stats = RouterStats.stack(layers) if layers else RouterStats.empty(self.config.layers, x_BTD.device)
        return self.norm(x_BTD), stats

    def forward(
        self,
        ids_BT: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        positions_BT: Tensor | None = None,
        cache: KVCache | None = None,
        lengths_B: Tensor | None = None,
        last: int | None = None,
    ) -> Tensor:
        """ids (B, T) -> logits (B, T, V), in the type of the model; last=n: of the last n tokens alone, (B, n, V).

        With a cache, ids are the next T tokens of each sequence, `last` is 1 unless given, and the cache grows by T. The
        first call may be prompts of unequal length, padded on the right with any id; lengths_B (B,) then counts the real
        ones, and the logits are those after the last of them. cu_seqlens and positions_BT are for calls without a cache.

        Raises ValueError if the arguments do not fit together or the cache is full.
        """
        if last is not None and not 1 <= last <= ids_BT.shape[-1]:
            raise ValueError(f"last must be between 1 and the {ids_BT.shape[-1]} tokens of the call, but is {last}")
        if cache is None:
            if lengths_B is not None:
                raise ValueError(
                    "lengths_B says how much of a prompt is real when a cache is filled; pass a cache with it"
                )
            hidden_BTD = self.hidden(ids_BT, cu_seqlens=cu_seqlens, positions_BT=positions_BT)
            return self._logits(hidden_BTD if last is None else hidden_BTD[:, -last:])
        if cu_seqlens is not None or positions_BT is not None:
            raise ValueError("a cache keeps its own positions: pass neither cu_seqlens nor positions_BT with it")
        if lengths_B is not None and last not in (None, 1):
            raise ValueError(f"prompts of unequal length give the logits after each: leave out last, which is {last}")
        return self._forward_cached(ids_BT, cache, lengths_B, last or 1)

    def update_selection_bias(self, tokens_per_expert_LE: Tensor) -> None:
        """Move every router's selection bias against the load: bias += rate * sign(mean - count), then centre it.

        tokens_per_expert_LE: the counts of one optimizer step, summed over micro-batches and ranks, so that every rank
        makes the same update. DeepSeek-V3 (2024), section 2.1.2.

        Raises ValueError unless the model has balance "bias" and the counts are (L, E).
        """
        config = self.config
        if config.balance != "bias" or not config.experts:
            raise ValueError(
                f'update_selection_bias needs experts and balance "bias", but balance is {config.balance!r}'
            )
        if tuple(tokens_per_expert_LE.shape) != (config.layers, config.experts):
            raise ValueError(
                f"tokens_per_expert_LE must be {(config.layers, config.experts)}, "
                f"but is {tuple(tokens_per_expert_LE.shape)}"
            )
        with torch.no_grad():
            counts_LE = tokens_per_expert_LE.to(self.embedding.weight.device, torch.float32)
            step_LE = config.bias_update_rate * (counts_LE.mean(1, keepdim=True) - counts_LE).sign()
            for router, step_E in zip(self.routers(), step_LE, strict=True):
                bias_E = router.selection_bias
                assert bias_E is not None
                bias_E += step_E
                bias_E -= bias_E.mean()

    def routers(self) -> list[Router]:
        """The routers, layer by layer; none in a dense model."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def _forward_cached(self, ids_BT: Tensor, cache: KVCache, lengths_B: Tensor | None, last: int) -> Tensor:
        _check_ids(ids_BT)
        positions_BT = cache.begin(ids_BT.shape[1], lengths_B)
        x_BTD, _ = self._run_blocks(ids_BT, positions_BT, None, cache, False)
        cache.commit()
        if lengths_B is None:
            return self._logits(self.norm(x_BTD[:, -last:]))
        row_B1 = torch.arange(len(lengths_B), device=x_BTD.device)[:, None]
        return self._logits(self.norm(x_BTD[row_B1, lengths_B.to(x_BTD.device)[:, None] - 1]))

    def _run_blocks(
        self,
        ids_BT: Tensor,
        positions: Tensor,
        cu_seqlens: Tensor | None,
        cache: KVCache | None,
        return_router: bool,
        context_group: dist.ProcessGroup | None = None,
    ) -> tuple[Tensor, list[LayerStats]]:
        cos, sin = (None, None) if self.rope is None else self.rope(positions)
        x_BTD = self.embedding(ids_BT)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions)
        layers: list[LayerStats] = []
        for block in self.blocks:
            x_BTD, stats = block(x_BTD, cos, sin, cu_seqlens, cache, return_router, context_group)
            if stats is not None:
                layers.append(stats)
        return x_BTD, layers

    def _logits(self, hidden_BTD: Tensor) -> Tensor:
        return softcapped(products.linear(hidden_BTD, self.unembedding), self.config.logit_softcap)


def softcapped(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap) (Gemma 2), or the logits where there is no cap."""
    return logits if cap is None else (logits / cap).tanh() * cap


def _check_ids(ids_BT: Tensor) -> None:
    if ids_BT.dim() != 2 or ids_BT.is_floating_point() or ids_BT.is_complex() or ids_BT.dtype == torch.bool:
        raise ValueError(f"ids must be integers (B, T), but are {tuple(ids_BT.shape)} {ids_BT.dtype}")


def _positions(ids_BT: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """(T,) for plain rows; (B, T) when documents are packed: each token's distance from the start of its document."""
    B, T = ids_BT.shape
    if cu_seqlens is None:
        return torch.arange(T, device=ids_BT.device)
    stream = torch.arange(B * T, device=ids_BT.device, dtype=cu_seqlens.dtype)
    document = torch.searchsorted(cu_seqlens, stream, right=True) - 1
    return (stream - cu_seqlens[document]).view(B, T)


def _shared_positions(ids_BT: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(T,) of this rank's share of sequences, as zigzag_split cuts them."""
    ranks = dist.get_world_size(group)
    whole = ranks * ids_BT.shape[1]
    return grist_kernels.zigzag_positions(dist.get_rank(group), ranks, whole, ids_BT.device)


def build(
    config: ModelConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Transformer:
    """A model with the initial weights of `initialize(model, seed=0)`.

    device None is the CPU; "meta" gives shapes only (then: `to_empty(device=...)` and `initialize`, or `load`).
    dtype None is float32; rotary angles and selection biases are float32 in any case.
    """
    from grist_model.initialization import initialize

    target = torch.device("cpu" if device is None else device)
    with target:
        model = Transformer(config).to(dtype or torch.float32)
    if target.type != "meta":
        initialize(model, seed=0)
    return model
