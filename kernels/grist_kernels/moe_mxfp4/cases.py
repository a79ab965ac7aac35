"""Inputs of moe_mxfp4. T tokens, D model width, E experts, A active experts per token, F expert width."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grist_kernels.cases import Case, normal
from grist_kernels.moe.cases import GPT_OSS

_RMS = 2.9  # of E2M1 values whose bits are random


def quantised(generator: torch.Generator, *shape: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Random MXFP4 weights of a shape (..., in): blocks (..., in / 32, 16) and scales (..., in / 32); about `scale` large."""
    *outer, width = shape
    middle = 127 + round(math.log2(scale / _RMS))
    options = {"generator": generator, "device": generator.device, "dtype": torch.uint8}
    blocks = torch.randint(256, (*outer, width // 32, 16), **options)
    return blocks, torch.randint(middle - 1, middle + 2, (*outer, width // 32), **options)


def _case(
    name: str, T: int, D: int, E: int, A: int, F: int, bias: bool = True, ids=None, large: bool = False, **options
) -> Case:  # fmt: skip
    """ids: None for random choices, or a function (T, A) -> expert ids."""

    def build(generator):
        scores = torch.rand(T, E, generator=generator, dtype=torch.float64)
        arguments = {
            "x": normal(generator, T, D),
            "expert_ids": scores.topk(A, -1).indices if ids is None else ids(T, A),
            "expert_weights": torch.rand(T, A, generator=generator, dtype=torch.float64),
            **options,
        }
        arguments["gate_up_blocks"], arguments["gate_up_scales"] = quantised(generator, E, 2 * F, D, scale=2 * D**-0.5)
        arguments["down_blocks"], arguments["down_scales"] = quantised(generator, E, D, F, scale=F**-0.5)
        if bias:
            arguments |= {"b_gate_up": normal(generator, E, 2 * F), "b_down": normal(generator, E, D)}
        return arguments

    return Case(name, build, float32=("expert_weights",), large=large)


def _extreme_scales(generator):
    """The smallest scale with values of any kind, and the largest with zeros of both signs."""
    arguments = _case("", 9, 64, 3, 2, 96, **GPT_OSS).build(generator)
    for layer in ("gate_up", "down"):
        blocks, scales = arguments[f"{layer}_blocks"], arguments[f"{layer}_scales"]
        scales[:, ::3, 0] = 0
        scales[:, 1::3, 0] = 254
        blocks[:, 1::3, 0] &= 0x88
    return arguments


def _strided(generator):
    """Weights that are not contiguous, and x with gaps between its rows."""
    arguments = _case("", 21, 64, 4, 2, 32).build(generator)
    arguments["x"] = normal(generator, 21, 96)[:, :64]
    for name in ("gate_up_blocks", "gate_up_scales", "down_blocks", "down_scales"):
        arguments[name] = arguments[name].transpose(0, 1).contiguous().transpose(0, 1)
    return arguments


def at_size(size: int, rows: int) -> list[Case]:
    """Calls whose launches are those of tiles of so many rows: few rows in all for a recorder, who wants no large weights."""
    rows_each = {16: 8, 32: 32, 64: 96, 128: 512}[size]
    width, E = (2880, max(1, min(8, rows // rows_each))) if rows >= 1024 else (320, 1)
    ids = lambda T, A: (torch.arange(T * A) % E).view(T, A)  # noqa: E731
    return [
        _case(f"tile_{size}_gpt_oss", rows_each * E // 4, width, E, 4, width, ids=ids, **GPT_OSS),
        _case(f"tile_{size}_halves", rows_each * E // 4, width, E, 4, width, bias=False, ids=ids),
    ]


CASES = [
    _case("one_token", 1, 64, 8, 4, 32),
    _case("odd", 63, 96, 5, 2, 32),
    _case("no_bias", 21, 32, 5, 3, 96, bias=False),
    _case("gpt_oss", 33, 160, 4, 2, 96, **GPT_OSS),
    _case("halves_clamped", 21, 32, 4, 2, 64, alpha=1.702, limit=7.0),
    _case("one_expert", 20, 64, 1, 1, 32),
    _case("one_takes_all", 63, 32, 6, 1, 64, ids=lambda T, A: torch.full((T, A), 3), **GPT_OSS),
    _case("same_expert_twice", 20, 32, 3, 2, 32, ids=lambda T, A: torch.full((T, A), 1)),
    _case("narrow_ids", 20, 32, 3, 2, 32, ids=lambda T, A: (torch.arange(T * A) % 3).view(T, A).int()),
    Case("extreme_scales", _extreme_scales, float32=("expert_weights",)),
    Case("strided", _strided, float32=("expert_weights",)),
    _case("gpt_oss_20b_one_token", 1, 2880, 32, 4, 2880, large=True, **GPT_OSS),
    _case("gpt_oss_20b_batch", 64, 2880, 32, 4, 2880, large=True, **GPT_OSS),
    _case("gpt_oss_20b_prompt", 4096, 2880, 32, 4, 2880, large=True, **GPT_OSS),
]
