"""How a model's tensors lie in a family's files: pieces of ours against pieces of theirs.

A piece says ours[at] = from_hf(theirs[hf_at]), and back: theirs[hf_at] = to_hf(ours[at]). Together the pieces of a layout cover
every element on both sides exactly once, whether a file splits one of our tensors (an expert a tensor) or joins several
(GPT-2's c_attn).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from grist_model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
Index = tuple[int | slice, ...]


@dataclass(frozen=True)
class Piece:
    """name, at: one of our tensors and which part of it; () is all. hf_name, hf_at: the same in the file. to_hf and from_hf
    change the layout, None where it is the same; by_rows: both work on any rows of the first axis alone."""

    name: str
    hf_name: str
    at: Index = ()
    hf_at: Index = ()
    to_hf: Callable[[Tensor], Tensor] | None = None
    from_hf: Callable[[Tensor], Tensor] | None = None
    by_rows: bool = False

    def box(self, shape: Shape) -> list[tuple[int, int]]:
        """Begin and end of this piece along every axis of our tensor, of that shape."""
        begins_ends = []
        for axis, length in enumerate(shape):
            at = self.at[axis] if axis < len(self.at) else slice(None)
            begins_ends.append((at, at + 1) if isinstance(at, int) else at.indices(length)[:2])
        return begins_ends

    @property
    def same_rows(self) -> bool:
        """Whether the file's tensor has this piece's rows as its rows, so that some can be read without the others."""
        one_row = bool(self.at) and isinstance(self.at[0], int)
        return not self.hf_at and not one_row and (self.from_hf is None or self.by_rows)


@dataclass(frozen=True)
class Layout:
    """shapes: of our state dict. hf_shapes: of the file's tensors, in their order. zeros: tensors of ours that the family does
    not have and that must be all zeros, as a selection bias that was never moved. copies: a file's tensor -> other names
    under which the file may repeat it. computed: pattern of names that hold no trained values, which are passed over.
    optional_prefix: what some files leave out at the beginning of names.
    """

    shapes: dict[str, Shape]
    hf_shapes: dict[str, Shape]
    pieces: tuple[Piece, ...]
    zeros: tuple[str, ...] = ()
    copies: dict[str, tuple[str, ...]] = field(default_factory=dict)
    computed: str | None = None
    optional_prefix: str = ""

    @cached_property
    def of_ours(self) -> dict[str, list[Piece]]:
        """Pieces by our tensor."""
        return self._grouped("name")

    @cached_property
    def of_theirs(self) -> dict[str, list[Piece]]:
        """Pieces by the file's tensor."""
        return self._grouped("hf_name")

    def _grouped(self, key: str) -> dict[str, list[Piece]]:
        groups: dict[str, list[Piece]] = {}
        for piece in self.pieces:
            groups.setdefault(getattr(piece, key), []).append(piece)
        return groups


def own_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Name -> shape of everything in our state dict, in order."""
    from grist_model.transformer import build

    return {name: tuple(tensor.shape) for name, tensor in build(config, device="meta").state_dict().items()}


def transposed(x: Tensor) -> Tensor:
    return x.transpose(-1, -2)
