from __future__ import annotations

import math

import pytest
import torch

from grist_model import ModelConfig, RopeScaling, YarnConfig
from grist_model.rope import RotaryAngles, frequencies


def published_yarn_frequencies(width: int, theta: float, yarn: YarnConfig) -> list[float]:
    """The formula of the YaRN paper pair by pair, in double precision."""

    def pair(turns: float) -> float:
        return width * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = max(pair(yarn.beta_fast), 0), min(pair(yarn.beta_slow), width - 1)
    out = []
    for i in range(width // 2):
        stretched = min(max((i - low) / (high - low), 0.0), 1.0)
        plain = theta ** (-2 * i / width)
        out.append(stretched * plain / yarn.factor + (1 - stretched) * plain)
    return out


def test_gpt_oss_frequencies_and_magnitude():
    yarn = YarnConfig(factor=32.0, original_context=4096)
    expected = torch.tensor(published_yarn_frequencies(64, 150000.0, yarn))
    torch.testing.assert_close(frequencies(64, 150000.0, yarn), expected, rtol=2e-6, atol=0)
    rope = RotaryAngles(ModelConfig(head_width=64, yarn=yarn))
    cos, sin = rope(torch.arange(5))
    assert rope.magnitude == pytest.approx(1.3465735902799727)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full((5, 32), rope.magnitude**2))


def test_fast_pairs_are_kept_and_slow_ones_are_divided_by_the_factor():
    yarn = YarnConfig(factor=32.0, original_context=4096)
    plain, stretched = frequencies(64, 150000.0, None), frequencies(64, 150000.0, yarn)
    torch.testing.assert_close(stretched[:8], plain[:8])
    torch.testing.assert_close(stretched[-8:], plain[-8:] / 32)


def test_linear_scaling_turns_as_a_position_divided_by_the_factor():
    plain, scaled = frequencies(64, 10000.0, None), frequencies(64, 10000.0, RopeScaling("linear", 4.0))
    torch.testing.assert_close(scaled * 4, plain, rtol=0, atol=0)


def test_llama_3_scaling_pair_by_pair():
    """The published rule in terms of wavelengths, in double precision, with Llama 3.1's settings."""
    scaling = RopeScaling("llama3", 8.0, original_context=8192)
    for i, got in enumerate(frequencies(128, 500000.0, scaling).tolist()):
        plain = 500000.0 ** (-2 * i / 128)
        wavelength = 2 * math.pi / plain
        if wavelength > 8192 / 1.0:
            want = plain / 8
        elif wavelength < 8192 / 4.0:
            want = plain
        else:
            smooth = (8192 / wavelength - 1.0) / (4.0 - 1.0)
            want = (1 - smooth) * plain / 8 + smooth * plain
        assert got == pytest.approx(want, rel=5e-6), i
    assert RotaryAngles(ModelConfig(rope_scaling=scaling)).magnitude == 1.0


@pytest.mark.parametrize("conversion", ["bfloat16", "half", "meta and back"])
def test_angles_stay_float32_and_right(conversion):
    rope = RotaryAngles(ModelConfig())
    expected = frequencies(64, 150000.0, None)
    if conversion == "meta and back":
        rope.to("meta")
        assert rope.frequency_P.is_meta
        rope.to_empty(device="cpu")
    else:
        rope.to(torch.bfloat16 if conversion == "bfloat16" else torch.float16)
    assert rope.frequency_P.dtype == torch.float32
    assert torch.equal(rope.frequency_P, expected)
    assert not rope.state_dict()


def test_positions_of_any_shape():
    rope = RotaryAngles(ModelConfig(head_width=8))
    cos_T, _ = rope(torch.arange(6))
    cos_BT, _ = rope(torch.arange(6).expand(2, 6))
    assert cos_T.shape == (6, 4)
    assert torch.equal(cos_BT[1], cos_T)
