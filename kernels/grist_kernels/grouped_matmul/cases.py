"""Inputs of grouped_matmul. R rows, E experts."""

from __future__ import annotations

import torch

from grist_kernels.cases import Case, normal


def _case(
    name: str, counts: list[int], width_in: int, width_out: int, bias: bool = False, spare: int = 0, large: bool = False
):
    """spare rows follow the last expert's and belong to nobody."""

    def build(generator):
        arguments = {
            "x": normal(generator, sum(counts) + spare, width_in),
            "w": normal(generator, len(counts), width_in, width_out, scale=width_in**-0.5),
            "offsets": torch.tensor(counts).cumsum(0).int(),
        }
        return arguments | ({"bias": normal(generator, len(counts), width_out)} if bias else {})

    return Case(name, build, ("x", "w", "bias") if bias else ("x", "w"), large=large)


def at_size(size: int, rows: int) -> list[Case]:
    """Calls whose launches are those of tiles of so many rows: few rows in all for a recorder, who wants no large weights."""
    rows_each = {16: 8, 32: 32, 64: 96, 128: 512}[size]
    width, experts = (2880, max(1, min(8, rows // rows_each))) if rows >= 1024 else (320, 1)
    return [
        _case(f"tile_{size}", [rows_each] * experts, width, width, bias=True),
        _case(f"tile_{size}_no_bias", [rows_each] * experts, width, width),
    ]


CASES = [
    _case("one_row", [1], 8, 16),
    _case("odd", [20, 13, 30], 60, 80, bias=True),
    _case("empty_experts", [0, 17, 0, 0, 5, 0], 32, 24, bias=True),
    _case("one_takes_all", [0, 0, 63, 0], 60, 33),
    _case("rows_of_nobody", [5, 0, 9], 16, 16, bias=True, spare=7),
    _case("no_rows_at_all", [0, 0], 16, 16, bias=True, spare=3),
    _case("aligned", [64, 128, 64], 64, 64),
    _case("gpt_oss_20b", [512] * 32, 2880, 5760, bias=True, large=True),
    _case("uneven", [8192, *[128] * 62, 0], 2048, 1536, large=True),
]
