"""What is true of the gated activation, and that it is GPT-OSS's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from assertions import assert_close

from grist_kernels import swiglu

GPT_OSS: dict[str, Any] = {"alpha": 1.702, "limit": 7.0}


def test_plain_form_is_silu_times_up():
    gate, up = torch.randn(5, 30), torch.randn(5, 30)
    got = swiglu(torch.cat((gate, up), -1))
    assert_close("out", got, torch.nn.functional.silu(gate) * up, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"alpha": 1.702}, {"limit": 2.0}, GPT_OSS], ids=str)
def test_interleaved_is_a_permutation_of_halves(options):
    gate, up = torch.randn(5, 30) * 4, torch.randn(5, 30) * 4
    halves = swiglu(torch.cat((gate, up), -1), **options)
    assert torch.equal(swiglu(torch.stack((gate, up), -1).flatten(-2), interleaved=True, **options), halves)


def test_gpt_oss_form_matches_transformers():
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    experts = SimpleNamespace(**GPT_OSS)
    gate_up = torch.randn(63, 120) * 5
    want = modeling.GptOssExperts._apply_gate(experts, gate_up)
    assert_close("out", swiglu(gate_up, interleaved=True, **GPT_OSS), want, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("options", [{}, {"alpha": 1.702}, {"limit": 2.0}, {"alpha": 1.702, "limit": 2.0}], ids=str)
def test_gradcheck(options, interleaved):
    gate_up = (torch.randn(4, 6, dtype=torch.float64) * 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: swiglu(x, interleaved=interleaved, **options), (gate_up,))


def test_clamped_elements_get_no_gradient_and_elements_on_the_edge_do():
    """As clamp(): the bound itself still passes a gradient."""
    gate = torch.tensor([7.0, 7.1, -50.0, 1.0, 1.0])
    up = torch.tensor([1.0, 1.0, 1.0, 7.0, -7.1])
    gate_up = torch.cat((gate, up)).requires_grad_()
    swiglu(gate_up, **GPT_OSS).sum().backward()
    assert gate_up.grad is not None
    d_gate, d_up = gate_up.grad.chunk(2)
    assert (d_gate != 0).tolist() == [True, False, True, True, True]
    assert (d_up != 0).tolist() == [True, True, True, True, False]


def test_output_is_bounded_by_the_limits():
    out = swiglu(torch.randn(100, 60) * 1000, **GPT_OSS)
    assert out.abs().max() <= 7.0 * 8.0


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="even last axis 2F, but is"):
        swiglu(torch.randn(5, 7))
    with pytest.raises(ValueError, match="alpha must be positive"):
        swiglu(torch.randn(5, 8), alpha=0.0)
    with pytest.raises(ValueError, match="limit must be positive"):
        swiglu(torch.randn(5, 8), limit=-7.0)
