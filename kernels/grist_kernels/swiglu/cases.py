"""Inputs of swiglu. F expert width."""

from __future__ import annotations

from typing import Any

from grist_kernels.cases import Case, normal

GPT_OSS: dict[str, Any] = {"alpha": 1.702, "limit": 7.0}


def _case(name: str, *shape: int, scale: float = 3.0, large: bool = False, **options) -> Case:
    """scale 3 puts some elements beyond GPT-OSS's limit of 7."""

    def build(generator):
        return {"gate_up": normal(generator, *shape, scale=scale), **options}

    return Case(name, build, ("gate_up",), large=large)


def _strided(generator):
    return {"gate_up": normal(generator, 9, 63, 200)[:, ::2, 40:160], **GPT_OSS}


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
    _case("gpt_oss_20b", 16384, 5760, interleaved=True, large=True, **GPT_OSS),
]
