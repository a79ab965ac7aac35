"""What a process holds of a parameter that may be sharded."""

from __future__ import annotations

from torch import Tensor


def local_part(parameter: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """The tensor this process holds and where it starts in the whole parameter."""
    if not hasattr(parameter, "to_local"):
        return parameter.detach(), (0,) * parameter.dim()
    from torch.distributed.tensor import DTensor  # here: a model on one process need not wait for this import

    assert isinstance(parameter, DTensor)
    # Not public, but what torch.distributed.checkpoint itself places shards with; uneven and empty shards included.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(parameter.shape, parameter.device_mesh, parameter.placements)
    return parameter.to_local().detach(), tuple(offset)
