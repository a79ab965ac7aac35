"""How FSDP2 cuts stacks of experts that ranks gather whole: so that padding makes no rank hold, or receive, what is not there.

FSDP2 cuts the first dimension of a tensor and pads it to a multiple of the ranks: 128 experts over 512 ranks travel as 512.
Another dimension (`shard_placement_fn`) must divide evenly. Where neither the experts nor their rows do, fewer ranks than there
are can cut them, and the others hold copies, as with HSDP.

S ranks of one copy of the model, E experts; a tensor is (E, rows, ...).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from torch import nn
from torch.distributed.tensor import Shard


def ranks_of(shapes: Iterable[Sequence[int]], shards: int) -> int:
    """A divisor of the S = `shards` ranks: over how many of them to cut tensors of these shapes. The S / ranks groups of so
    many neighbours are copies of each other.

    It is the number that leaves the fewest values on a rank, and of several the one that sends the fewest: all S, unless they
    would pad and fewer would have a rank hold no more.
    """
    shapes = [tuple(shape) for shape in shapes]
    divisors = (ranks for ranks in range(1, shards + 1) if shards % ranks == 0)
    return min(divisors, key=lambda ranks: (sum(held(shape, ranks) for shape in shapes), ranks))


def dimension(shape: Sequence[int], ranks: int) -> int:
    """0, the experts, or 1, the rows of each: the first that `ranks` divide. Where they divide neither, 0, which is padded."""
    return next((dim for dim in (0, 1) if shape[dim] % ranks == 0), 0)


def held(shape: Sequence[int], ranks: int) -> int:
    """Values of such a tensor on the first of so many ranks, padding included; no rank holds more."""
    dim = dimension(shape, ranks)
    return -(-shape[dim] // ranks) * (math.prod(shape) // shape[dim])


def placement(parameter: nn.Parameter, ranks: int) -> Shard:
    """What FSDP2 asks of every parameter of a module."""
    return Shard(dimension(parameter.shape, ranks))
