"""Pairs of answers to micro-batches: chosen and rejected sequences laid end to end, without padding between them.

P pairs of a micro-batch, S = 2 * P sequences (chosen, rejected, chosen, ...), T tokens of all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from grist_data import Batch
from grist_data.batch import IGNORE
from grist_data.permutation import Feistel, hash64
from grist_data.preferences import PreferencePair

ROUND_TO = 128  # T is filled up to a multiple, so that there are few different shapes to compile and to allocate for


@dataclass(frozen=True)
class PairBatch(Batch):
    """ids_BT and targets_BT are (1, T): S sequences end to end, then a stretch without targets. n_valid_tokens counts pairs.

    lengths: of every stretch, the last included; they sum to T. answer_tokens_S: (S,) float32, targets of each sequence.
    reference_S: (S,) float32, log-probability of each answer under the reference, in nats; zeros while it is being measured.
    """

    lengths: tuple[int, ...] = ()
    answer_tokens_S: torch.Tensor | None = None
    reference_S: torch.Tensor | None = None


def pair_batch(
    pairs: Sequence[PreferencePair], reference_P2: np.ndarray | None, device: torch.device | str
) -> PairBatch:
    """reference_P2: log-probabilities (P, 2) of chosen and rejected answers, None before they are known."""
    sequences = [
        (ids, mask)
        for pair in pairs
        for ids, mask in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask))
    ]
    lengths = [
        len(ids) - 1 for ids, _ in sequences
    ]  # every token but the last is read, every one but the first is said
    filler = -sum(lengths) % ROUND_TO
    inputs = [ids[:-1] for ids, _ in sequences] + [np.zeros(filler, np.int64)]
    targets = [np.where(mask[1:], ids[1:], IGNORE) for ids, mask in sequences] + [np.full(filler, IGNORE)]
    lengths += [filler] if filler else []
    borders = np.concatenate([[0], np.cumsum(lengths)])
    reference = np.zeros((len(pairs), 2)) if reference_P2 is None else reference_P2
    return PairBatch(
        _row(inputs, device),
        _row(targets, device),
        torch.from_numpy(borders.astype(np.int32)).to(device),
        len(pairs),
        max(lengths),
        lengths=tuple(lengths),
        answer_tokens_S=torch.tensor([mask[1:].sum() for _, mask in sequences], dtype=torch.float32, device=device),
        reference_S=torch.from_numpy(reference.reshape(-1)).to(device, torch.float32),
    )


def _row(parts: list[np.ndarray], device: torch.device | str) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))[None].to(device)


class PreferenceBatches:
    """Endless: `next()` gives one optimizer step, the micro-batches of this rank.

    A step is global_size consecutive positions; rank r takes the r-th share. Every epoch has an order of its own, computed from
    (seed, epoch), and holds every pair once. So what a step computes depends neither on ranks nor on micro-batches.

    reference_P2: (pairs, 2) float64 log-probabilities of chosen and rejected answers under the reference.
    """

    def __init__(
        self,
        pairs: Sequence[PreferencePair],
        reference_P2: np.ndarray,
        global_size: int,
        micro_size: int,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self._pairs, self._reference_P2 = pairs, reference_P2
        self._global_size, self._micro_size = global_size, micro_size
        self._seed, self._rank, self._share = seed, rank, global_size // world_size
        self._device = device
        self._digest = digest(pairs)
        self._pos = 0

    @property
    def position(self) -> int:
        """Pairs that have been handed out, over all ranks."""
        return self._pos

    def __iter__(self) -> PreferenceBatches:
        return self

    def __next__(self) -> list[Batch]:
        first = self._pos + self._rank * self._share
        chosen = [self.pair_at(position) for position in range(first, first + self._share)]
        self._pos += self._global_size
        return [
            pair_batch([self._pairs[i] for i in part], self._reference_P2[part], self._device)
            for part in (chosen[at : at + self._micro_size] for at in range(0, self._share, self._micro_size))
        ]

    def pair_at(self, position: int) -> int:
        """Number of the pair at a position of the order."""
        epoch, place = divmod(position, len(self._pairs))
        return Feistel(len(self._pairs), (self._seed, "preferences", epoch))(place)

    def state_dict(self) -> dict[str, Any]:
        """Valid for any number of ranks and any batch size."""
        return {"pos": self._pos, "pairs": self._digest, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken. Raises ValueError when it belongs to other pairs or another order."""
        own = self.state_dict()
        if state.keys() != own.keys():
            raise ValueError(
                f"this run's checkpoints are of other data than pairs of answers ({', '.join(state)}): use another --name"
            )
        for key, what in (("pairs", "other pairs of answers"), ("seed", "another seed")):
            if state[key] != own[key]:
                raise ValueError(
                    f"the run began with {what} ({state[key]}, now {own[key]}): resume with those, or use another --name"
                )
        self._pos = state["pos"]


def digest(pairs: Sequence[PreferencePair]) -> str:
    """sha256 of all ids and masks."""
    found = hashlib.sha256()
    for pair in pairs:
        for ids, mask in ((pair.chosen_ids, pair.chosen_mask), (pair.rejected_ids, pair.rejected_mask)):
            found.update(len(ids).to_bytes(8, "little"))
            found.update(np.ascontiguousarray(ids, np.int64).tobytes())
            found.update(np.ascontiguousarray(mask, bool).tobytes())
    return found.hexdigest()


def drawn(pairs: Sequence[PreferencePair], most: int | None, seed: int) -> list[PreferencePair]:
    """At most so many pairs, in their order; their content and the seed decide which."""
    if most is None or len(pairs) <= most:
        return list(pairs)
    keys = _keys(pairs, "drawn", seed)
    return [pairs[i] for i in sorted(sorted(range(len(pairs)), key=keys.__getitem__)[:most])]


def _keys(pairs: Sequence[PreferencePair], what: str, seed: int) -> list[int]:
    return [hash64("preferences", what, seed, digest([pair])) for pair in pairs]


def split(pairs: Sequence[PreferencePair], val_fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the pairs for training and of those held out, which their content decides; neither is empty, unless
    val_fraction is 0 or there is a single pair."""
    keys = _keys(pairs, "held out", seed)
    if not val_fraction or len(pairs) < 2:
        return list(range(len(pairs))), []
    held_out = {i for i, key in enumerate(keys) if key < val_fraction * 2**64}
    by_key = sorted(range(len(pairs)), key=keys.__getitem__)
    if not held_out:
        held_out = {by_key[0]}
    if len(held_out) == len(pairs):
        held_out.remove(by_key[-1])
    return [i for i in range(len(pairs)) if i not in held_out], sorted(held_out)
