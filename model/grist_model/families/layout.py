"""What every family's table of tensors is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grist_model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorMap:
    """One tensor: its name and shape in our state dict and its name in the file.

    hf_name None: the family has no such tensor and it must be all zeros, as for a selection bias that was never moved.
    to_hf and from_hf change the layout, None where it is the same; both keep the shape. also_named: other names under
    which a file may repeat the same tensor.
    """

    name: str
    shape: tuple[int, ...]
    hf_name: str | None
    to_hf: Callable[[Tensor], Tensor] | None = None
    from_hf: Callable[[Tensor], Tensor] | None = None
    also_named: tuple[str, ...] = ()


def own_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of everything in our state dict, in order."""
    from grist_model.transformer import build

    return {name: tuple(tensor.shape) for name, tensor in build(config, device="meta").state_dict().items()}
