"""Products on a CPU without gradients are F.linear's, by whichever way they go."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from native_setting import natively, without_native  # noqa: F401

from grist_kernels import backend
from grist_model import products
from grist_model.layers import Linear


@pytest.fixture
def no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def multiplied(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of what a weight was multiplied with by the fast path."""
    seen: list[tuple[int, ...]] = []
    linear, addmm = F.linear, torch.addmm
    monkeypatch.setattr(products.F, "linear", lambda x, w, *b: (seen.append(tuple(x.shape)), linear(x, w, *b))[1])
    monkeypatch.setattr(products.torch, "addmm", lambda b, x, w: (seen.append(tuple(x.shape)), addmm(b, x, w))[1])
    return seen


@pytest.mark.usefixtures("without_native")
@pytest.mark.parametrize("shape", [(1, 1, 300), (300,), (2, 1, 300), (3, 300), (1, 9, 300), (32, 1, 300)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_are_those_of_float64(no_gradients, multiplied, shape, has_bias):
    layer = Linear(300, 257, bias=has_bias)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    x = torch.randn(shape)
    bias = None if layer.bias is None else layer.bias.double()
    exact = F.linear(x.double(), layer.weight.double(), bias)
    multiplied.clear()
    got = layer(x)
    assert multiplied == [(257, 300)]  # the weight is on the left: the other way round is the slow kind
    assert got.is_contiguous()
    usual = F.linear(x, layer.weight, layer.bias)
    assert (got - exact).abs().max() <= 4 * (usual - exact).abs().max()


@pytest.mark.usefixtures("without_native")
def test_what_does_not_fit_runs_as_it_always_did(no_gradients, multiplied, monkeypatch):
    weight, x = torch.randn(257, 300), torch.randn(1, 300)
    with torch.enable_grad():
        products.linear(x, weight)
    with backend.using("reference"):
        products.linear(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert products.linear(x, weight).dtype == torch.bfloat16
    products.linear(torch.randn(33, 300), weight)
    products.linear(torch.randn(127, 300), weight)
    products.linear(x.double(), weight.double())
    products.linear(torch.randn(0, 300), weight)
    products.linear(torch.randn(1, 8), torch.randn(9, 8))  # small
    monkeypatch.setattr(products, "_has_mkl", False)
    products.linear(x, weight)
    assert multiplied == [(1, 300)] * 3 + [(33, 300), (127, 300), (1, 300), (0, 300), (1, 8), (1, 300)]


@pytest.mark.skipif(products._onednn is None, reason="this torch was built without oneDNN")
@pytest.mark.parametrize("has_bias", [False, True])
def test_prompts_go_to_onednn(no_gradients, multiplied, has_bias):
    layer = Linear(300, 257, bias=has_bias)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape))
    x = torch.randn(2, 300, 64).transpose(1, 2)
    bias = None if layer.bias is None else layer.bias.double()
    exact = F.linear(x.double(), layer.weight.double(), bias)
    usual = F.linear(x, layer.weight, layer.bias)
    multiplied.clear()
    got = layer(x)
    assert multiplied == []
    assert (got - exact).abs().max() <= 4 * (usual - exact).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_go_to_the_native_kernel(natively, monkeypatch, dtype):  # noqa: F811
    weight, seen = torch.randn(257, 300).to(dtype), []
    whole = products.native.linear
    monkeypatch.setattr(products.native, "linear", lambda x, *given: (seen.append(tuple(x.shape)), whole(x, *given))[1])
    for shape in [(300,), (2, 4, 300), (9, 300), (0, 300)]:
        x = torch.randn(shape).to(dtype)
        exact = F.linear(x.double(), weight.double())
        torch.testing.assert_close(products.linear(x, weight).double(), exact, rtol=1e-2, atol=0.1)
    with torch.enable_grad():
        products.linear(torch.randn(1, 300).to(dtype), weight)
    assert seen == [(300,), (2, 4, 300)]
