"""Inputs of decode_attention. B batch, T new tokens, S cache slots, N and K heads, H head width."""

from __future__ import annotations

import torch

from grist_kernels.cases import Case, normal


def _case(
    name: str, lengths: list[int], T: int, S: int, N: int, K: int, H: int, sinks: bool = False, large: bool = False, **options
) -> Case:  # fmt: skip
    def build(generator):
        B = len(lengths)
        arguments = {
            "q": normal(generator, B, T, N, H),
            "k_cache": normal(generator, B, S, K, H),
            "v_cache": normal(generator, B, S, K, H),
            "lengths": torch.tensor(lengths, dtype=torch.int32),
            **options,
        }
        for b, length in enumerate(lengths):  # slots that nobody has written
            arguments["k_cache"][b, length:] = float("nan")
            arguments["v_cache"][b, length:] = float("nan")
        return arguments | ({"sinks": normal(generator, N)} if sinks else {})

    return Case(name, build, large=large)


CASES = [
    _case("first_token", [1, 1], 1, 16, 4, 2, 32),
    _case("one_token", [5, 63, 40], 1, 64, 4, 2, 60, sinks=True),
    _case("window", [5, 63, 40], 1, 64, 4, 1, 80, window=8, sinks=True),
    _case("several_tokens", [7, 63], 5, 63, 6, 2, 32, window=20),
    _case("prompt_padded_left", [3, 10], 10, 16, 2, 2, 16, sinks=True),
    _case("full_cache", [64], 64, 64, 2, 1, 16),
    _case("gpt_oss", [4096, 1000, 2048, 4000], 1, 4096, 64, 8, 64, sinks=True, large=True),
]
