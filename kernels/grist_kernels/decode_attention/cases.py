"""Inputs of decode_attention. B batch, T new tokens, S cache slots, N and K heads, H head width, P page size."""

from __future__ import annotations

from typing import Any

import torch

from grist_kernels.cases import Arguments, Case, normal


def _arguments(generator, lengths: list[int], T: int, S: int, N: int, K: int, H: int, sinks: bool) -> Arguments:
    B = len(lengths)
    arguments = {
        "q": normal(generator, B, T, N, H),
        "k_cache": normal(generator, B, S, K, H),
        "v_cache": normal(generator, B, S, K, H),
        "lengths": torch.tensor(lengths, dtype=torch.int32),
    }
    for b, length in enumerate(lengths):  # slots that nobody has written
        arguments["k_cache"][b, length:] = float("nan")
        arguments["v_cache"][b, length:] = float("nan")
    return arguments | ({"sinks": normal(generator, N)} if sinks else {})


def _case(
    name: str, lengths: list[int], T: int, S: int, N: int, K: int, H: int, sinks: bool = False, large: bool = False, **options
) -> Case:  # fmt: skip
    def build(generator):
        return _arguments(generator, lengths, T, S, N, K, H, sinks) | options

    return Case(name, build, large=large)


def _paged(
    name: str, lengths: list[int], T: int, pages: int, P: int, N: int, K: int, H: int, sinks: bool = False,
    large: bool = False, **options,
) -> Case:  # fmt: skip
    """Pages in a random order among pages of nobody's, and a table that names no page where nothing is written."""

    def build(generator):
        arguments = _arguments(generator, lengths, T, pages * P, N, K, H, sinks)
        return paged(arguments, P, generator) | options

    return Case(name, build, large=large)


def paged(arguments: Arguments, page_size: int, generator: torch.Generator) -> Arguments:
    """The same call with its caches cut into pages, in an order that the generator draws; S a multiple of page_size."""
    caches = {name: arguments[name] for name in ("k_cache", "v_cache")}
    B, S, K, H = caches["k_cache"].shape
    used, pages = B * S // page_size, S // page_size
    place = torch.randperm(used + 3, generator=generator, device=generator.device)[:used]
    found: dict[str, Any] = dict(arguments)
    for name, cache in caches.items():
        found[name] = cache.new_full((used + 3, page_size, K, H), float("nan"))
        found[name][place] = cache.reshape(used, page_size, K, H)
    first_slot = torch.arange(pages) * page_size
    unwritten = first_slot >= arguments["lengths"][:, None]
    found["block_table"] = place.view(B, pages).int().masked_fill(unwritten, -1)
    return found


def _strided(generator):
    """Keys and values side by side, heads first in memory, in a cache that is longer than what is asked for; q with gaps."""
    both = normal(generator, 2, 2, 90, 2, 48)
    k_cache, v_cache = (both[:, :, :70, i].transpose(1, 2) for i in (0, 1))
    q = normal(generator, 2, 6, 2, 96)[..., ::2].transpose(1, 2)
    return {"q": q, "k_cache": k_cache, "v_cache": v_cache, "lengths": torch.tensor([70, 33]), "window": 40}


def _columns_far_apart(generator):
    """The layout (B, K, H, S) of keys, in which a head's columns are not neighbours."""
    k_cache, v_cache = (normal(generator, 2, 2, 16, 40).permute(0, 3, 1, 2) for _ in range(2))
    return {
        "q": normal(generator, 2, 1, 4, 16),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "lengths": torch.tensor([40, 9]),
    }


def at_size(size: int, rows: int) -> list[Case]:
    """Calls whose launches are those of heads of width `size`, with a cache of `rows` slots, and enough for splits."""
    S = max(rows, 4096)
    return [
        _case(f"one_token_{size}", [S], 1, S, 64, 8, size, sinks=True),
        _paged(f"window_{size}", [S // 64 * 64 - 5], 1, S // 64, 64, 64, 8, size, sinks=True, window=128),
        _case(f"several_tokens_{size}", [S], 16, S, 64, 8, size),
    ]


CASES = [
    _case("first_token", [1, 1], 1, 16, 4, 2, 32),
    _case("one_token", [5, 63, 40], 1, 64, 4, 2, 60, sinks=True),
    _case("window", [5, 63, 40], 1, 64, 4, 1, 80, window=8, sinks=True),
    _case("several_tokens", [7, 63], 5, 63, 6, 2, 32, window=20),
    _case("prompt_padded_left", [3, 10], 10, 16, 2, 2, 16, sinks=True),
    _case("full_cache", [64], 64, 64, 2, 1, 16),
    _case("empty_cache", [0, 0, 7], 1, 8, 2, 1, 16, sinks=True),
    _case("several_splits", [900, 37], 1, 1000, 3, 1, 64, sinks=True),
    _case("several_splits_and_tokens", [777], 3, 800, 4, 2, 80, window=600),
    _case("wide_heads", [70, 3], 1, 80, 2, 1, 256),
    _case("narrow_heads", [300], 2, 520, 2, 1, 8, scale=0.2, sinks=True),
    _paged("paged", [5, 63, 33], 1, 4, 16, 4, 2, 60, sinks=True),
    _paged("paged_window", [50, 7], 4, 5, 12, 4, 1, 32, window=9),
    _paged("paged_splits", [600, 0], 1, 20, 32, 2, 1, 32, sinks=True),
    Case("strided", _strided),
    Case("columns_far_apart", _columns_far_apart),
    _case("gpt_oss", [4096, 1000, 2048, 4000], 1, 4096, 64, 8, 64, sinks=True, large=True),
    _case("gpt_oss_window", [4096, 1000, 2048, 4000], 1, 4096, 64, 8, 64, sinks=True, window=128, large=True),
    _case("gpt_oss_long", [131072], 1, 131072, 64, 8, 64, sinks=True, large=True),
    _paged("gpt_oss_paged", [32768, 9000], 1, 512, 64, 64, 8, 64, sinks=True, large=True),
    _case("head_width_128", [32768], 1, 32768, 32, 8, 128, large=True),
]
