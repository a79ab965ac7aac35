"""Inputs of moe. T tokens, D model width, E experts, A active experts per token, F expert width."""

from __future__ import annotations

from typing import Any

import torch

from grist_kernels.cases import Case, normal

GPT_OSS: dict[str, Any] = {"alpha": 1.702, "limit": 7.0, "interleaved": True}
_WEIGHTS = ("x", "expert_weights", "w_gate_up", "w_down")
_BIASES = ("b_gate_up", "b_down")


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
            "w_gate_up": normal(generator, E, D, 2 * F, scale=2 * D**-0.5),
            "w_down": normal(generator, E, F, D, scale=F**-0.5),
            **options,
        }
        if bias:
            arguments |= {"b_gate_up": normal(generator, E, 2 * F), "b_down": normal(generator, E, D)}
        return arguments

    return Case(name, build, _WEIGHTS + (_BIASES if bias else ()), float32=("expert_weights",), large=large)


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
    _case("one_token", 1, 60, 8, 4, 20),
    _case("odd", 63, 60, 5, 2, 20),
    _case("no_bias", 63, 60, 5, 3, 20, bias=False),
    _case("gpt_oss", 63, 32, 8, 4, 40, **GPT_OSS),
    _case("halves_clamped", 63, 32, 4, 2, 40, alpha=1.702, limit=7.0),
    _case("one_expert", 20, 16, 1, 1, 8),
    _case("one_takes_all", 63, 24, 6, 1, 16, ids=lambda T, A: torch.full((T, A), 3), **GPT_OSS),
    _case("same_expert_twice", 20, 16, 3, 2, 8, ids=lambda T, A: torch.full((T, A), 1)),
    _case("narrow_ids", 20, 16, 3, 2, 8, ids=lambda T, A: (torch.arange(T * A) % 3).view(T, A).int()),
    _case("several_blocks", 1100, 16, 2, 1, 512, ids=lambda T, A: torch.zeros(T, A, dtype=torch.int64), **GPT_OSS),
    _case("gpt_oss_20b", 8192, 2880, 32, 4, 2880, large=True, **GPT_OSS),
    _case("gpt_oss_120b", 4096, 2880, 128, 4, 2880, large=True, **GPT_OSS),
    _case("fine_grained", 32768, 2048, 128, 8, 768, bias=False, large=True),
    _case("few_experts", 8192, 4096, 8, 2, 14336, bias=False, large=True),
    _case("one_decoded", 1, 2880, 32, 4, 2880, large=True, **GPT_OSS),
    _case("laptop", 2048, 256, 32, 4, 256, large=True, **GPT_OSS),
]
