"""Packed weights of a directory into a model: which layer gets them, and in what order of rows.

E experts, O outputs, I inputs, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import groupby

import torch
from torch import Tensor, nn

from grist_kernels.quantized import PackedWeight
from grist_model.families.layout import Piece
from grist_model.layers import Linear
from grist_model.moe import Experts
from grist_model.quantized_layers import QuantizedExperts, QuantizedLinear
from grist_model.transformer import Transformer
from grist_model.weight_reading import Weights


def pack_layers(model: Transformer, weights: Weights, device: torch.device) -> set[str]:
    """Put a packed layer in the place of each whose weights are stored packed; the names of the tensors that it took.

    Raises ValueError where nothing is stored packed, and for what is stored so but is no layer that can run so.
    """
    if not weights.packed:
        raise ValueError(
            "no weights here are quantized: leave quantized=True (--quantized) out, or make a quantized directory with "
            "`python -m grist_tools.export DIR --format int8 --out DIR2`"
        )
    taken: set[str] = set()
    for path, layer in list(model.named_modules()):
        if isinstance(layer, Linear):
            names = [f"{path}.weight"]
        elif isinstance(layer, Experts):
            names = [f"{path}.w_gate_up", f"{path}.w_down"]
        else:
            continue
        if not any(piece.hf_name in weights.packed for name in names for piece in weights.layout.of_ours[name]):
            continue
        model.set_submodule(path, _packed_layer(layer, names, model, weights, device))
        taken.update(names)
    left = sorted({piece.name for name in weights.packed for piece in weights.layout.of_theirs[name]} - taken)
    if left:
        raise ValueError(
            f"{left[0]} is stored quantized, and only linear layers and experts run so: load it without quantized=True"
        )
    return taken


def _packed_layer(
    layer: Linear | Experts, names: list[str], model: Transformer, weights: Weights, device: torch.device
) -> nn.Module:
    if isinstance(layer, Linear):
        return QuantizedLinear(_moved(_rows(names[0], weights.layout.of_ours[names[0]], weights), device), layer.bias)
    gate_up, down = (_moved(_experts(name, weights), device) for name in names)
    return QuantizedExperts(model.config, gate_up, down)


def _moved(weight: PackedWeight, device: torch.device) -> PackedWeight:
    return weight.mapped(lambda part: part.to(device).contiguous())


def _rows(name: str, pieces: Iterable[Piece], weights: Weights) -> PackedWeight:
    """One below the other, as a tensor of ours has its gates above its ups."""
    return _joined(name, [weights.read_packed(piece.hf_name) for piece in pieces], lambda parts: torch.cat(parts))


def _experts(name: str, weights: Weights) -> PackedWeight:
    """(E, O, I), from a tensor an expert and half, or from one of all experts."""
    pieces = weights.layout.of_ours[name]
    if not pieces[0].at:
        (piece,) = pieces
        found = weights.read_packed(piece.hf_name)
        # GPT-OSS has gates and ups by turns; rows of a packed weight are its columns.
        by_turns = name.endswith("w_gate_up") and piece.from_hf is not None
        return found.mapped(lambda part: torch.cat((part[:, 0::2], part[:, 1::2]), 1)) if by_turns else found
    ordered = sorted(pieces, key=lambda piece: [axis[0] for axis in piece.box(weights.layout.shapes[name])])
    each = [_rows(name, list(group), weights) for _, group in groupby(ordered, key=lambda piece: piece.at[0])]
    return _joined(name, each, lambda parts: torch.stack(parts))


def _joined(name: str, found: list[PackedWeight], join: Callable[[list[Tensor]], Tensor]) -> PackedWeight:
    first = found[0]
    alike = {(each.kind, *((part, t.dtype, t.shape[-1]) for part, t in each.tensors.items())) for each in found}
    kinds = {key[0] for key in alike}
    if len(kinds) > 1 or any(each.tensors.keys() != first.tensors.keys() for each in found):
        raise ValueError(
            f"{name}: its parts are quantized in different ways ({', '.join(sorted(kinds))}): load it without quantized=True"
        )
    return type(first)(**{part: join([each.tensors[part] for each in found]) for part in first.tensors})
