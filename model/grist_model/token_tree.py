"""Many sequences in one pass of the model, every token that several of them begin with computed once.

Sequences that share beginnings (the choices of a question, questions after the same examples) are laid out as the tree of
their tokens: one stream of R tokens without padding, in which attention follows each token's path to the root. Keys and values
of a shared beginning are shared too.

R tokens of the stream, B sequences of a call, T own tokens of a sequence, S tokens of its path, N, K heads, H head width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

import grist_kernels
from grist_model.cache import KVCache

if TYPE_CHECKING:
    from grist_model.config import ModelConfig
    from grist_model.transformer import Transformer


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences begin with in common."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


class TokenTree:
    """The tree of some sequences of ids, and where its tokens stand in the stream.

    sequences: lists of ids. ids (R,) int64 and positions (R,): the stream. paths: of every sequence, in the order given, where
    its tokens stand in the stream, (S,) each. wanted: of every sequence, how many of its last tokens get logits; those tokens
    are the last n_wanted of the stream.

    Raises ValueError for an empty sequence, or one that wants more logits than it has tokens.
    """

    def __init__(self, sequences: Sequence[list[int]], wanted: Sequence[int]):
        for sequence, count in zip(sequences, wanted, strict=True):
            if not 1 <= count <= len(sequence):
                raise ValueError(f"a sequence of {len(sequence)} tokens cannot give logits after its last {count}")
        # Of sequences in lexicographic order, none shares more with an earlier one than with the one before it.
        order = sorted(range(len(sequences)), key=lambda i: sequences[i])
        paths: list[np.ndarray] = [np.empty(0, np.int64)] * len(sequences)
        ids: list[int] = []
        positions: list[int] = []
        self.own: list[tuple[int, int]] = []  # (sequence, how many of its first tokens others brought)
        before: list[int] = []
        path = np.empty(0, np.int64)
        for i in order:
            shared = shared_length(before, sequences[i])
            new = sequences[i][shared:]
            path = np.concatenate((path[:shared], np.arange(len(ids), len(ids) + len(new))))
            paths[i], before = path, sequences[i]
            if len(new):
                self.own.append((i, shared))
            ids += new
            positions += range(shared, len(sequences[i]))
        is_wanted = np.zeros(len(ids), bool)
        for path, count in zip(paths, wanted, strict=True):
            is_wanted[path[-count:]] = True
        stream = np.argsort(is_wanted, kind="stable")  # token of the tree at each place of the stream
        place = np.empty_like(stream)
        place[stream] = np.arange(len(stream))
        self.ids = np.asarray(ids, np.int64)[stream]
        self.positions = np.asarray(positions, np.int64)[stream]
        self.paths = [place[path] for path in paths]
        self.n_wanted = int(is_wanted.sum())

    def logits(self, model: Transformer) -> Tensor:
        """(n_wanted, V): after each of the last n_wanted tokens of the stream. One forward of the model."""
        device = model.embedding.weight.device
        ids_1R = torch.from_numpy(self.ids)[None].to(device)
        return model(ids_1R, cache=_TreeAttention(model.config, self, device), last=self.n_wanted)[0]


class _Part(NamedTuple):
    """Sequences whose own tokens attend in one call. roots: they share nothing with others that came before.

    queries (B, T): places in the stream, roots padded on the right, others on the left. real (B, T): what is no padding.
    path (B, S): places of all tokens that they see, padded on the right; lengths (B,).
    """

    roots: bool
    queries_BT: Tensor
    real_BT: Tensor
    path_BS: Tensor
    lengths_B: Tensor


class _TreeAttention(KVCache):
    """What the model takes for a cache: positions and attention of a tree, which is a whole text and leaves nothing behind."""

    def __init__(self, config: ModelConfig, tree: TokenTree, device: torch.device):
        super().__init__(config, 1, len(tree.ids), device)
        self.positions_1R = torch.from_numpy(tree.positions)[None].to(device)
        self.parts = [_part(tree, group, device) for group in _alike(tree)]

    def begin(self, new_tokens: int, lengths_B: Tensor | None = None) -> Tensor:
        return self.positions_1R

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
        q_RNH, k_RKH, v_RKH = q[0], k[0], v[0]
        out_RNH = torch.empty_like(q_RNH, memory_format=torch.contiguous_format)
        for part in self.parts:
            q_BTNH = q_RNH[part.queries_BT]
            if part.roots:
                k_BTKH, v_BTKH = k_RKH[part.queries_BT], v_RKH[part.queries_BT]
                out_BTNH = grist_kernels.attention(q_BTNH, k_BTKH, v_BTKH, window=window, sinks=sinks)
                assert isinstance(out_BTNH, Tensor)
            else:
                # A cache in pages of one slot: each sequence's page table is its path.
                out_BTNH = grist_kernels.decode_attention(
                    q_BTNH, k_RKH[:, None], v_RKH[:, None], part.lengths_B, window=window, sinks=sinks,
                    block_table=part.path_BS,
                )  # fmt: skip
            out_RNH[part.queries_BT[part.real_BT]] = out_BTNH[part.real_BT]
        return out_RNH[None]

    def commit(self) -> None:
        pass


def _alike(tree: TokenTree) -> list[list[tuple[int, int]]]:
    """Sequences with own tokens, by whether they are roots and, within a factor of two, by how many own tokens they have."""

    def kind(own: tuple[int, int]) -> tuple[bool, int]:
        i, shared = own
        return shared == 0, (len(tree.paths[i]) - shared).bit_length()

    return [list(group) for _, group in itertools.groupby(sorted(tree.own, key=kind), key=kind)]


def _part(tree: TokenTree, group: list[tuple[int, int]], device: torch.device) -> _Part:
    roots = group[0][1] == 0
    lengths = np.array([len(tree.paths[i]) for i, _ in group])
    own = lengths - np.array([shared for _, shared in group])
    T, S = own.max(), lengths.max()
    queries, path = np.zeros((len(group), T), np.int64), np.zeros((len(group), S), np.int64)
    real = np.arange(T) < own[:, None] if roots else np.arange(T) >= T - own[:, None]
    for row, (i, shared) in enumerate(group):
        queries[row, real[row]] = tree.paths[i][shared:]
        path[row, : lengths[row]] = tree.paths[i]
    on_device = (torch.from_numpy(array).to(device) for array in (queries, real, path, lengths))
    return _Part(roots, *on_device)
