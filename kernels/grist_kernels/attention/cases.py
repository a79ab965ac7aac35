"""Inputs of attention. B batch, T time, N query heads, K key/value heads, H head width."""

from __future__ import annotations

import torch

from grist_kernels.cases import Case, normal


def _case(
    name: str, B: int, T: int, N: int, K: int, H: int, sinks: bool = False, large: bool = False, **options
) -> Case:  # fmt: skip
    def build(generator):
        arguments = {
            "q": normal(generator, B, T, N, H),
            "k": normal(generator, B, T, K, H),
            "v": normal(generator, B, T, K, H),
            **options,
        }
        return arguments | ({"sinks": normal(generator, N)} if sinks else {})

    return Case(name, build, ("q", "k", "v", "sinks") if sinks else ("q", "k", "v"), large=large)


def _packed(
    name: str, lengths: list[int], N: int, K: int, H: int, sinks: bool = False, large: bool = False, **options
) -> Case:
    def build(generator):
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        total = sum(lengths)
        arguments = {
            "q": normal(generator, total, N, H),
            "k": normal(generator, total, K, H),
            "v": normal(generator, total, K, H),
            "cu_seqlens": ends,
            **options,
        }
        return arguments | ({"sinks": normal(generator, N)} if sinks else {})

    return Case(name, build, ("q", "k", "v", "sinks") if sinks else ("q", "k", "v"), large=large)


def _views_of_qkv(generator):
    """Queries, keys and values as views of one projection, as models make them."""
    qkv = normal(generator, 2, 63, 8, 32)
    return {"q": qkv[:, :, :4], "k": qkv[:, :, 4:6], "v": qkv[:, :, 6:], "window": 20}


def _heads_first(generator):
    """(B, N, T, H) in memory, as other software keeps it."""
    q, k, v = (normal(generator, 2, heads, 63, 32).transpose(1, 2) for heads in (4, 2, 2))
    return {"q": q, "k": k, "v": v}


def at_size(size: int, rows: int) -> list[Case]:
    """Calls whose launches are those of heads of this width: packed documents with sinks, which need the most registers, with
    and without a narrow window; narrower heads that are padded to this width, which are read through pointers everywhere; for
    the commonest width calls without documents too."""
    half = rows // 2
    lengths, window = [half, rows - half], min(128, half)
    found = [
        _packed(f"head_{size}_packed", lengths, 8, 1, size, sinks=True),
        _packed(f"head_{size}_packed_window", lengths, 8, 1, size, sinks=True, window=window),
    ]
    if size <= 128:
        found.append(_packed(f"head_{size - 16}_packed", lengths, 8, 1, size - 16, sinks=True))
    if size == 64:
        found.append(_case("head_64", 1, rows, 8, 1, size))
        found.append(_case("head_64_window", 1, rows, 8, 1, size, sinks=True, window=window))
    return found


# 32,768 tokens of documents, a few long ones and many short ones, as text on the web is.
_DOCUMENTS = [9000, 1, 517, 4096, 63, 128, 2047, 300, 5000, 1500, 4, 800, 6000, 250, 64, 1100, 31, 1867]

CASES = [
    _case("one_token", 1, 1, 2, 1, 8, sinks=True),
    _case("odd", 2, 63, 6, 2, 60),
    _case("single_key_head", 2, 63, 5, 1, 80),
    _case("sinks", 2, 63, 4, 2, 32, sinks=True),
    _case("window", 2, 150, 4, 2, 32, window=17),
    _case("window_of_one", 1, 63, 2, 2, 16, window=1, sinks=True),
    _case("window_longer_than_time", 1, 63, 2, 1, 16, window=1000, sinks=True),
    _case("window_and_sinks", 2, 200, 8, 2, 64, window=64, sinks=True),
    _case("long_blocks", 1, 400, 2, 1, 32, window=100, sinks=True),
    _case("own_scale", 1, 63, 2, 2, 16, scale=0.05, sinks=True),
    _case("with_lse", 2, 63, 4, 2, 32, sinks=True, window=9, return_lse=True),
    _packed("packed", [30, 1, 0, 32], 4, 2, 60),
    _packed("packed_window_sinks", [0, 70, 300, 64], 4, 2, 32, sinks=True, window=20),
    _packed("packed_lse", [5, 58], 2, 1, 16, return_lse=True),
    Case("views_of_qkv", _views_of_qkv, ("q", "k", "v")),
    Case("heads_first", _heads_first, ("q", "k", "v")),
    _case("gpt_oss_full", 1, 4096, 64, 8, 64, sinks=True, large=True),
    _case("gpt_oss_full_8k", 1, 8192, 64, 8, 64, sinks=True, large=True),
    _case("gpt_oss_full_32k", 1, 32768, 64, 8, 64, sinks=True, large=True),
    _case("gpt_oss_window", 1, 4096, 64, 8, 64, sinks=True, window=128, large=True),
    _case("gpt_oss_window_8k", 1, 8192, 64, 8, 64, sinks=True, window=128, large=True),
    _case("gpt_oss_window_32k", 1, 32768, 64, 8, 64, sinks=True, window=128, large=True),
    _packed("gpt_oss_documents", _DOCUMENTS, 64, 8, 64, sinks=True, large=True),
    _packed("gpt_oss_documents_window", _DOCUMENTS, 64, 8, 64, sinks=True, window=128, large=True),
    _case("head_width_128", 1, 4096, 32, 8, 128, large=True),
    _case("head_width_128_8k", 1, 8192, 32, 8, 128, large=True),
    _case("head_width_128_32k", 1, 32768, 32, 8, 128, large=True),
    _case("head_width_128_window", 1, 8192, 32, 8, 128, window=128, large=True),
    _packed("head_width_128_documents", _DOCUMENTS, 32, 8, 128, large=True),
]
