"""What is true of a mixture of experts, and that it is GPT-OSS's. T tokens, D width, E experts, A active, F expert width."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from assertions import assert_close

from grist_kernels import OPS, backend, moe, swiglu
from grist_kernels.cases import run
from grist_kernels.moe import reference

GPT_OSS: dict[str, Any] = {"alpha": 1.702, "limit": 7.0, "interleaved": True}


@pytest.fixture(params=["auto", "reference"], autouse=True)
def _each_implementation(request):
    with backend.using(request.param):
        yield


def _inputs(T=37, D=16, E=6, A=2, F=10, dtype=torch.float32):
    x, weights = torch.randn(T, D, dtype=dtype), torch.rand(T, A, dtype=dtype)
    ids = torch.rand(T, E).topk(A, -1).indices
    parameters = (
        torch.randn(E, D, 2 * F, dtype=dtype),
        torch.randn(E, F, D, dtype=dtype),
        torch.randn(E, 2 * F, dtype=dtype),
        torch.randn(E, D, dtype=dtype),
    )
    return x, ids, weights, parameters


def test_one_expert_is_a_dense_layer():
    x, _, _, (w_up, w_down, b_up, b_down) = _inputs(E=1, A=1)
    got = moe(x, torch.zeros(37, 1, dtype=torch.int64), torch.ones(37, 1), w_up, w_down, b_up, b_down, **GPT_OSS)
    assert_close("out", got, swiglu(x @ w_up[0] + b_up[0], **GPT_OSS) @ w_down[0] + b_down[0], atol=1e-4)


def test_equal_experts_do_not_care_who_is_chosen():
    x, ids, weights, parameters = _inputs()
    alike = [p[:1].expand_as(p).contiguous() for p in parameters]
    got = moe(x, ids, weights, *alike, **GPT_OSS)
    other = moe(x, (ids + 1) % 6, weights, *alike, **GPT_OSS)
    assert_close("out", got, other, atol=1e-4)


def test_order_of_a_tokens_experts_does_not_matter():
    x, ids, weights, parameters = _inputs()
    got = moe(x, ids.flip(1), weights.flip(1), *parameters)
    assert_close("out", got, moe(x, ids, weights, *parameters), atol=1e-4)


def test_tokens_do_not_disturb_each_other():
    x, ids, weights, parameters = _inputs()
    together = moe(x, ids, weights, *parameters)
    for t in (0, 17, 36):
        alone = moe(x[t : t + 1], ids[t : t + 1], weights[t : t + 1], *parameters)
        assert_close(f"token {t}", together[t : t + 1], alone, atol=1e-4)


def test_output_is_linear_in_the_expert_weights():
    x, ids, weights, parameters = _inputs()
    assert_close("out", moe(x, ids, 3 * weights, *parameters), 3 * moe(x, ids, weights, *parameters), atol=1e-3)
    assert_close("zero", moe(x, ids, 0 * weights, *parameters), torch.zeros_like(x))


def test_experts_without_tokens_get_gradients_of_exactly_zero():
    x, _, weights, parameters = _inputs()
    ids = torch.tensor([[1, 4]]).expand(37, 2)
    for p in parameters:
        p.requires_grad_()
    moe(x, ids, weights, *parameters).sum().backward()
    for name, p in zip(("w_gate_up", "w_down", "b_gate_up", "b_down"), parameters, strict=True):
        assert p.grad is not None
        for e in range(6):
            if e in (1, 4):
                assert (p.grad[e] != 0).any(), f"{name} of expert {e}"
            else:
                assert_close(f"d_{name} of expert {e}", p.grad[e], torch.zeros_like(p[e]))


@pytest.mark.parametrize(
    "options", [{}, {"alpha": 1.702, "limit": 2.0}, {"alpha": 1.702, "limit": 2.0, "interleaved": True}]
)
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(options, bias):
    x, ids, weights, parameters = _inputs(T=4, D=3, E=3, A=2, F=2, dtype=torch.float64)
    leaves = tuple(t.requires_grad_() for t in (x, weights, *(parameters if bias else parameters[:2])))
    assert torch.autograd.gradcheck(lambda x, weights, *p: moe(x, ids, weights, *p, **options), leaves)


def test_matches_gpt_oss_of_transformers():
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    x, ids, weights, (w_up, w_down, b_up, b_down) = _inputs()
    config = SimpleNamespace(
        intermediate_size=10, num_local_experts=6, hidden_size=16, swiglu_alpha=1.702, swiglu_limit=7.0,
        _experts_implementation="eager",
    )  # fmt: skip
    experts = modeling.GptOssExperts(config)
    for name, value in (
        ("gate_up_proj", w_up),
        ("down_proj", w_down),
        ("gate_up_proj_bias", b_up),
        ("down_proj_bias", b_down),
    ):
        getattr(experts, name).data = value
    want = experts(x, ids, weights)
    assert_close("out", moe(x, ids, weights, w_up, w_down, b_up, b_down, **GPT_OSS), want, atol=1e-3, rtol=1e-5)


def test_weights_may_be_views():
    x, ids, weights, parameters = _inputs()
    turned = [p.transpose(1, 2).contiguous().transpose(1, 2) for p in parameters[:2]]
    assert_close("out", moe(x, ids, weights, *turned), moe(x, ids, weights, *parameters[:2]), atol=1e-4)


def test_expert_weights_may_have_another_type():
    x, ids, weights, parameters = _inputs()
    weights = weights.bfloat16().requires_grad_()
    moe(x, ids, weights, *parameters).sum().backward()
    assert weights.grad is not None
    assert weights.grad.dtype == torch.bfloat16


def test_no_tokens():
    x, ids, weights, parameters = _inputs()
    for p in parameters:
        p.requires_grad_()
    out = moe(x[:0], ids[:0], weights[:0], *parameters)
    assert out.shape == (0, 16)
    out.sum().backward()
    for p in parameters:
        assert p.grad is not None
        assert_close("gradient", p.grad, torch.zeros_like(p))


def test_bad_arguments_are_named():
    x, ids, weights, (w_up, w_down, b_up, b_down) = _inputs()
    with pytest.raises(ValueError, match=r"x must be \(T, 16\) to match w_gate_up"):
        moe(x[:, :8], ids, weights, w_up, w_down)
    with pytest.raises(ValueError, match=r"w_down must be \(E, F, D\) = \(6, 10, 16\)"):
        moe(x, ids, weights, w_up, w_down[:5])
    with pytest.raises(ValueError, match=r"must both be \(37, A\)"):
        moe(x, ids, weights[:, :1], w_up, w_down)
    with pytest.raises(ValueError, match="expert_ids must be int32 or int64"):
        moe(x, ids.float(), weights, w_up, w_down)
    with pytest.raises(ValueError, match=r"b_down must be \(6, 16\) torch.float32"):
        moe(x, ids, weights, w_up, w_down, b_up, b_down[:, :3])
    with pytest.raises(ValueError, match="one floating type"):
        moe(x, ids, weights, w_up.double(), w_down)
    with pytest.raises(ValueError, match="alpha must be positive"):
        moe(x, ids, weights, w_up, w_down, alpha=-1.0)


@pytest.mark.parametrize("wrong", [-1, 6])
def test_expert_out_of_range_is_named(wrong):
    x, ids, weights, parameters = _inputs()
    ids[3, 1] = wrong
    with pytest.raises((ValueError, RuntimeError), match=r"expert_ids must be in|out of bounds"):
        moe(x, ids, weights, *parameters)


@pytest.mark.parametrize("case", [case for case in OPS["moe"].cases if not case.large], ids=lambda case: case.name)
def test_the_reference_in_blocks_is_the_reference(case):
    """What large sizes are compared with."""
    arguments = case.arguments(torch.float64)
    want = run(OPS["moe"].reference, arguments, case.gradients)
    got = run(reference.moe_in_blocks, arguments, case.gradients)
    for name, value in want.items():
        assert_close(f"{case.name} {name}", got[name], value, atol=1e-11, rtol=1e-11)
