"""Inputs of swiglu. F expert width."""

from __future__ import annotations

from typing import Any

import torch

from grist_kernels.cases import Case, normal

GPT_OSS: dict[str, Any] = {"alpha": 1.702, "limit": 7.0}


def _case(name: str, *shape: int, scale: float = 3.0, large: bool = False, **options) -> Case:
    """scale 3 puts some elements beyond GPT-OSS's limit of 7."""

    def build(generator):
        return {"gate_up": normal(generator, *shape, scale=scale), **options}

    return Case(name, build, ("gate_up",), large=large)


def _on_the_limit(generator):
    """Gates and ups that are exactly the limit: clamped, and yet with a gradient."""
    return {"gate_up": torch.randint(-3, 4, (63, 34), generator=generator).double(), "alpha": 1.702, "limit": 2.0}


def _strided(generator):
    return {"gate_up": normal(generator, 9, 63, 200)[:, ::2, 40:160], **GPT_OSS}


def at_size(size: int, rows: int) -> list[Case]:
    """Calls whose launches are those of tiles of `size` columns: halves, and GPT-OSS's interleaved columns."""
    plain = _case(f"plain_{size}", rows, 2 * size)
    return [plain, _case(f"gpt_oss_interleaved_{size}", rows, 2 * size, interleaved=True, **GPT_OSS)]


CASES = [
    _case("plain", 2, 63, 120),
    _case("plain_interleaved", 2, 63, 120, interleaved=True),
    _case("gpt_oss", 2, 63, 120, **GPT_OSS),
    _case("gpt_oss_interleaved", 63, 160, interleaved=True, **GPT_OSS),
    _case("alpha_only", 63, 34, alpha=1.702),
    _case("limit_only", 63, 34, limit=2.0),
    _case("one_column", 5, 2, **GPT_OSS),
    _case("several_blocks", 1100, 1024, **GPT_OSS),
    Case("strided", _strided, ("gate_up",)),
    Case("on_the_limit", _on_the_limit, ("gate_up",)),
    *(_case(f"gpt_oss_interleaved_t{T}_2880", T, 5760, interleaved=True, large=True, **GPT_OSS) for T in (8192, 32768)),
    *(_case(f"plain_t{T}_{F}", T, 2 * F, large=True) for T in (8192, 32768) for F in (2880, 14336)),
]
