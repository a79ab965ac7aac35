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


def _views_of_qkv(generator):
    """Queries and keys as views of one projection, as models make them."""
    qkv = normal(generator, 2, 300, 8, 64)
    cos, sin = _tables(torch.arange(300), 64)
    return {"q": qkv[:, :, :4], "k": qkv[:, :, 4:6], "cos": cos, "sin": sin}


CASES = [
    _case("one_token", 1, 1, 1, 1, 2),
    _case("odd", 2, 63, 6, 2, 60),
    _case("per_sequence", 3, 63, 4, 2, 80, per_sequence=True),
    _case("several_blocks", 2, 2100, 4, 1, 64),
    _case("several_blocks_per_sequence", 5, 600, 4, 1, 64, per_sequence=True),
    Case("packed", _packed, ("q", "k"), float32=("cos", "sin")),
    Case("views_of_qkv", _views_of_qkv, ("q", "k"), float32=("cos", "sin")),
    _case("gpt_oss", 4, 4096, 64, 8, 64, large=True),
]
