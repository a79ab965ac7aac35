"""The native kernels compute the ops: against float64, at awkward sizes, without reading what they should not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from native_setting import natively  # noqa: F401

import grist_kernels
from grist_kernels import backend, native
from grist_kernels.native import decode_attention, linear, moe, rms_norm, step

pytestmark = pytest.mark.usefixtures("natively")
# One rounding of the result; products of numbers around 1 with up to 512 terms add a few more in float32.
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 2**-8}
TYPES = pytest.mark.parametrize("dtype", list(CLOSE), ids=["float32", "bfloat16"])


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def assert_near(got: torch.Tensor, exact: torch.Tensor) -> None:
    assert got.isfinite().all()
    bound = CLOSE[got.dtype] * float(exact.abs().max())
    assert float((got.double() - exact).abs().max()) <= bound


@TYPES
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 8, 9, 17])
@pytest.mark.parametrize(("outputs", "width"), [(257, 300), (3, 5), (1, 16), (130, 512)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_linear(dtype, rows, outputs, width, has_bias):
    x, weight = draw(rows, 1, width, dtype=dtype), draw(outputs, width, dtype=dtype)
    bias = draw(outputs, dtype=dtype) if has_bias else None
    assert linear.fits(x, weight, bias)
    got = linear.linear(x, weight, bias)
    assert got.shape == (rows, 1, outputs)
    assert got.dtype == dtype
    assert_near(got, F.linear(x.double(), weight.double(), None if bias is None else bias.double()))


def test_linear_mixes_types_and_takes_rows_with_gaps():
    x, weight = draw(3, 2, 40).transpose(0, 1), draw(50, 100, dtype=torch.bfloat16)[::2, :40]
    assert linear.fits(x, weight, None)
    assert_near(linear.linear(x, weight, None), F.linear(x.double(), weight.double()))
    assert not linear.fits(x, draw(40, 50).t(), None)
    assert linear.linear(draw(0, 40), weight).shape == (0, 25)


@TYPES
@pytest.mark.parametrize(
    ("tokens", "active", "experts", "D", "width"),
    [(1, 1, 1, 1, 1), (1, 4, 32, 96, 80), (3, 3, 5, 70, 37), (8, 2, 4, 130, 64)],
)
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("alpha", [None, 1.702])
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("interleaved", [False, True])
def test_moe(dtype, tokens, active, experts, D, width, biases, alpha, limit, interleaved):
    x, weights = draw(tokens, D, dtype=dtype), draw(tokens, active).abs()
    ids = draw(tokens, experts).topk(active, -1).indices
    shapes = ((experts, D, 2 * width), (experts, width, D), (experts, 2 * width), (experts, D))
    parameters = [draw(*shape, dtype=dtype) for shape in shapes]
    for expert in set(range(experts)) - set(ids.flatten().tolist()):
        for parameter in parameters:
            parameter[expert] = float("nan")  # nobody asked this expert
    given = parameters if biases else [*parameters[:2], None, None]
    options = {"alpha": alpha, "limit": limit, "interleaved": interleaved}
    assert moe.fits(x, ids, parameters[0], parameters[1])
    got = moe.moe(x, ids, weights, *given, **options)
    wide = [None if parameter is None else parameter.double().nan_to_num() for parameter in given]
    with backend.using("reference"):
        exact = grist_kernels.moe(x.double(), ids, weights.double(), *wide, **options)  # pyright: ignore
    bound = 4 * CLOSE[dtype] * max(1.0, float(exact.abs().max()))
    assert float((got.double() - exact).abs().max()) <= bound
    torch.testing.assert_close(got, grist_kernels.moe(x, ids.int(), weights, *given, **options), rtol=0, atol=0)


def test_moe_adds_an_expert_that_is_named_twice_twice():
    x, w_up, w_down = draw(2, 20), draw(3, 20, 12), draw(3, 6, 20)

    def outputs(times: int) -> torch.Tensor:
        ids, weights = torch.ones(2, times, dtype=torch.int64), torch.ones(2, times)
        return moe.moe(x, ids, weights, w_up, w_down, None, None, alpha=None, limit=None, interleaved=False)

    once, twice = outputs(1), outputs(2)
    torch.testing.assert_close(twice, 2 * once, rtol=1e-6, atol=1e-6)


@TYPES
@pytest.mark.parametrize("lengths", [[5, 300, 0], [1, 2, 3], [128, 129, 257]])
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize(("N", "K", "H"), [(4, 2, 64), (3, 3, 60), (4, 1, 128), (2, 2, 8), (2, 1, 80)])
@pytest.mark.parametrize("window", [None, 1, 7, 200])
@pytest.mark.parametrize("sinks", [False, True])
def test_decode_attention(dtype, lengths, tokens, N, K, H, window, sinks):
    q, (k, v) = draw(3, tokens, N, H, dtype=dtype), draw(2, 3, 310, K, H, dtype=dtype).unbind()
    for row, length in enumerate(lengths):
        for cache in (k, v):
            cache[row, length:] = float("nan")  # nobody has written these slots
    sink = draw(N, dtype=dtype) if sinks else None
    assert decode_attention.fits(q, k, v)
    got = decode_attention.decode_attention(q, k, v, torch.tensor(lengths), window=window, sinks=sink, scale=None)
    wide = {"window": window, "sinks": None if sink is None else sink.double()}
    with backend.using("reference"):
        exact = grist_kernels.decode_attention(q.double(), k.double(), v.double(), torch.tensor(lengths), **wide)
    assert_near(got, exact)
    for row, length in enumerate(lengths):
        assert got[row, : max(0, tokens - length)].count_nonzero() == 0  # queries before the first token


def test_decode_attention_reads_caches_of_any_row_strides():
    both = draw(2, 2, 90, 2, 48)  # keys and values side by side, heads first, in a longer cache
    k, v = (both[:, :, :70, i].transpose(1, 2) for i in (0, 1))
    q, lengths = draw(2, 6, 2, 48).transpose(1, 2), torch.tensor([70, 33], dtype=torch.int32)
    got = grist_kernels.decode_attention(q, k, v, lengths, window=40, scale=0.3)
    with backend.using("reference"):
        exact = grist_kernels.decode_attention(q.double(), k.double(), v.double(), lengths, window=40, scale=0.3)
    assert decode_attention.fits(q, k, v)
    assert_near(got, exact)
    assert not decode_attention.fits(q, k.double(), v)
    assert not decode_attention.fits(draw(2, 2, 2, 96)[..., ::2], k, v)


@TYPES
@pytest.mark.parametrize("width", [1, 7, 64, 2880])
@pytest.mark.parametrize("residual", [False, True])
def test_rms_norm(dtype, width, residual):
    x, weight = 3 * draw(2, 4, width, dtype=dtype), draw(width, dtype=dtype)
    added = draw(2, 4, width, dtype=dtype) if residual else None
    assert rms_norm.fits(x, weight, added)
    y, total = rms_norm.rms_norm(x, weight, 1e-5, added)
    exact_total = x.double() + (0 if added is None else added.double())
    assert_near(total, exact_total)
    assert_near(y, grist_kernels.rms_norm(exact_total, weight.double(), 1e-5))
    assert rms_norm.rms_norm(torch.zeros(1, width), draw(width), 1e-5)[0].count_nonzero() == 0


@TYPES
def test_mlp(dtype):
    x, gate_up, down = draw(2, 3, 40, dtype=dtype), draw(2 * 37, 40, dtype=dtype), draw(21, 37, dtype=dtype)
    biases = draw(2 * 37, dtype=dtype), draw(21, dtype=dtype)
    got = step.mlp(x, step.Projection(gate_up, biases[0]), step.Projection(down, biases[1]), 1.702, 7.0)
    hidden = F.linear(x.double(), gate_up.double(), biases[0].double())
    act = grist_kernels.swiglu(hidden, alpha=1.702, limit=7.0)
    assert_near(got, F.linear(act, down.double(), biases[1].double()))


def test_a_result_does_not_depend_on_the_number_of_threads():
    x, weight = draw(3, 512), draw(1000, 512)
    q, (k, v) = draw(1, 2, 8, 64), draw(2, 1, 500, 2, 64).unbind()
    experts = draw(8, 512, 256), draw(8, 128, 512)

    def results() -> list[torch.Tensor]:
        ids = torch.tensor([[0, 3], [3, 5], [6, 7]])
        return [
            linear.linear(x, weight),
            decode_attention.decode_attention(q, k, v, torch.tensor([500]), window=None, sinks=None, scale=None),
            moe.moe(x, ids, torch.ones(3, 2), *experts, None, None, alpha=None, limit=None, interleaved=False),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results()
        torch.set_num_threads(3)
        together = results()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_nothing_else_comes_here():
    x = draw(1, 16)
    assert native.takes(x)
    assert not native.takes(x.double())
    assert not native.takes(x.half())
    with torch.enable_grad():
        assert not native.takes(x)
    for mode in ("reference", "triton"):
        with backend.using(mode):
            assert not native.takes(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not native.takes(x)
    with native.using("0"):
        assert not native.takes(x)
        with pytest.raises(RuntimeError, match="there is no native library"):
            native.call("grist_linear", b"")
    assert not native.takes(x.to("meta"))
    assert not native.holds(x.double())
    assert native.holds(None, x, torch.nn.Parameter(x))

    def which(x: torch.Tensor) -> torch.Tensor:
        return torch.ones(2) if native.takes(x) else torch.zeros(3)

    assert torch.compile(which, backend="eager", fullgraph=True)(x).shape == (3,)
