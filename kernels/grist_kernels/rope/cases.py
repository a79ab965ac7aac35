"""Inputs of rope. B batch, T time, N and K heads, H head width."""

from __future__ import annotations

import torch
from torch import Tensor

from grist_kernels.cases import Case, normal


def _tables(positions: Tensor, head_width: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    frequency = theta ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle = positions.double().unsqueeze(-1) * frequency
    return angle.cos(), angle.sin()


def _case(name: str, B: int, T: int, N: int, K: int, H: int, per_sequence: bool = False, large: bool = False) -> Case:
    def build(generator):
        positions = torch.arange(T)
        if per_sequence:
            positions = torch.randint(0, 1000, (B, T), generator=generator)
        cos, sin = _tables(positions, H)
        return {"q": normal(generator, B, T, N, H), "k": normal(generator, B, T, K, H), "cos": cos, "sin": sin}

    return Case(name, build, ("q", "k"), float32=("cos", "sin"), large=large)


def _packed(generator):
    cos, sin = _tables(torch.cat((torch.arange(40), torch.arange(23))), 80)
    return {"q": normal(generator, 63, 5, 80), "k": normal(generator, 63, 1, 80), "cos": cos, "sin": sin}


def _packed_with_positions(generator):
    cos, sin = _tables(torch.arange(50), 64)
    positions = torch.cat((torch.arange(40), torch.arange(23)))
    q, k = normal(generator, 63, 5, 64), normal(generator, 63, 1, 64)
    return {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions}


def _positions_per_sequence(generator):
    cos, sin = _tables(torch.arange(1000), 60)
    positions = torch.randint(0, 1000, (3, 17), generator=generator, dtype=torch.int32)
    positions[1, 5] = 999  # the last row has nothing behind it
    q, k = normal(generator, 3, 17, 4, 60), normal(generator, 3, 17, 2, 60)
    return {"q": q, "k": k, "cos": cos, "sin": sin, "positions": positions}


def _views_of_qkv(generator):
    """Queries and keys as views of one projection, as models make them."""
    qkv = normal(generator, 2, 300, 8, 64)
    cos, sin = _tables(torch.arange(300), 64)
    return {"q": qkv[:, :, :4], "k": qkv[:, :, 4:6], "cos": cos, "sin": sin}


def _heads_first(generator):
    """The layout (B, N, T, H) of other people's attention, seen through a transposition."""
    cos, sin = _tables(torch.arange(33), 32)
    q, k = (normal(generator, 2, heads, 33, 32).transpose(1, 2) for heads in (4, 2))
    return {"q": q, "k": k, "cos": cos, "sin": sin}


def _partial(H: int, rotated: int):
    def build(generator):
        cos, sin = _tables(torch.arange(21), rotated)
        return {"q": normal(generator, 2, 21, 3, H), "k": normal(generator, 2, 21, 1, H), "cos": cos, "sin": sin}

    return build


def _at(T: int, N: int, K: int, H: int) -> Case:
    return _case(f"t{T}_{N}x{K}x{H}", 1, T, N, K, H, large=True)


def at_size(size: int, rows: int) -> list[Case]:
    """Calls whose launches are those of heads with `size` pairs, for `rows` tokens."""
    return [_case(f"pairs_{size}", 1, rows, 64 * 32 // size, 8, 2 * size)]


_BOTH, _CONSTANT = ("q", "k"), ("cos", "sin")

CASES = [
    _case("one_token", 1, 1, 1, 1, 2),
    _case("odd", 2, 63, 6, 2, 60),
    _case("per_sequence", 3, 63, 4, 2, 80, per_sequence=True),
    _case("several_blocks", 2, 2100, 4, 1, 64),
    _case("several_blocks_per_sequence", 5, 600, 4, 1, 64, per_sequence=True),
    Case("packed", _packed, _BOTH, float32=_CONSTANT),
    Case("packed_with_positions", _packed_with_positions, _BOTH, float32=_CONSTANT),
    Case("positions_per_sequence", _positions_per_sequence, _BOTH, float32=_CONSTANT),
    Case("views_of_qkv", _views_of_qkv, _BOTH, float32=_CONSTANT),
    Case("heads_first", _heads_first, _BOTH, float32=_CONSTANT),
    Case("partial", _partial(64, 16), _BOTH, float32=_CONSTANT),
    Case("partial_odd", _partial(54, 12), _BOTH, float32=_CONSTANT),
    *(_at(T, *heads) for T in (4096, 8192, 32768) for heads in ((64, 8, 64), (32, 8, 128))),
]
