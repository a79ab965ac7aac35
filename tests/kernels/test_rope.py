"""What is true of every rotation. T time, H head width."""

from __future__ import annotations

import pytest
import torch
from assertions import assert_close

from grist_kernels import rope


def _tables(positions, head_width=64):
    frequency = 10000.0 ** (-torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angle = positions.double()[..., None] * frequency
    return angle.cos().float(), angle.sin().float()


def _qk(B=2, T=90, N=4, K=2, H=64):
    return torch.randn(B, T, N, H), torch.randn(B, T, K, H)


def test_rotation_keeps_length():
    q, k = _qk()
    for before, after in zip((q, k), rope(q, k, *_tables(torch.arange(90))), strict=True):
        assert_close("length", after.norm(dim=-1), before.norm(dim=-1), rtol=1e-5)


def test_position_zero_changes_nothing():
    q, k = _qk()
    assert torch.equal(rope(q, k, *_tables(torch.zeros(90)))[0], q)


def test_rotations_compose():
    q, k = _qk()
    once = rope(q, k, *_tables(torch.full((90,), 5)))
    twice = rope(*once, *_tables(torch.full((90,), 7)))
    at_once = rope(q, k, *_tables(torch.full((90,), 12)))
    assert_close("q", twice[0], at_once[0], atol=1e-5)
    assert_close("k", twice[1], at_once[1], atol=1e-5)


def test_negative_angle_undoes():
    q, k = _qk()
    cos, sin = _tables(torch.arange(90))
    assert_close("q", rope(*rope(q, k, cos, sin), cos, -sin)[0], q, atol=1e-5)


def test_products_depend_on_the_distance_only():
    q, k = (x[:, :1].expand(-1, 90, -1, -1) for x in _qk(K=4))
    q_at, k_at = rope(q, k, *_tables(torch.arange(90)))
    score = torch.einsum("btnh,bsnh->bnts", q_at, k_at)
    for distance in (0, 1, 17):
        diagonal = score.diagonal(-distance, 2, 3)
        assert_close(f"distance {distance}", diagonal, diagonal[..., :1].expand_as(diagonal), atol=1e-4)


def test_pairs_are_half_a_head_apart():
    """Rotate-half, as Llama and GPT-OSS: element i turns with i + H/2, not with its neighbour."""
    q = torch.zeros(1, 300, 1, 64)
    q[..., 3] = 1
    cos, sin = _tables(torch.arange(300))
    out, _ = rope(q, q, cos, sin)
    want = torch.zeros_like(q)
    want[0, :, 0, 3], want[0, :, 0, 35] = cos[:, 3], sin[:, 3]
    assert torch.equal(out, want)


@pytest.mark.parametrize("T", [5, 300], ids=["small", "blocked"])
def test_tables_per_sequence_are_the_same_as_one_by_one(T):
    q, k = _qk(B=3, T=T)
    cos, sin = _tables(torch.randint(0, 500, (3, T)))
    together = rope(q, k, cos, sin)
    for b in range(3):
        alone = rope(q[b : b + 1], k[b : b + 1], cos[b], sin[b])
        assert_close("q", together[0][b], alone[0][0], atol=1e-6)
        assert_close("k", together[1][b], alone[1][0], atol=1e-6)


@pytest.mark.parametrize("T", [2, 70], ids=["small", "blocked"])
def test_gradient_is_the_opposite_rotation(T):
    q, k = (torch.randn(2, T, heads, 128, dtype=torch.float64, requires_grad=True) for heads in (2, 1))
    cos, sin = (x.double() for x in _tables(torch.arange(T), 128))
    dq, dk = torch.randn_like(q), torch.randn_like(k)
    grads = torch.autograd.grad(rope(q, k, cos, sin), (q, k), (dq, dk))
    for name, got, want in zip(("dq", "dk"), grads, rope(dq, dk, cos, -sin), strict=True):
        assert_close(name, got, want.detach(), atol=1e-12)


def test_bad_shapes_are_named():
    q, k = _qk()
    cos, sin = _tables(torch.arange(90))
    with pytest.raises(ValueError, match=r"cos and sin must both be \(90, P\) or \(2, 90, P\) with 1 <= P <= 32"):
        rope(q, k, cos[:89], sin[:89])
    with pytest.raises(ValueError, match="differ in heads only"):
        rope(q, k[:, :89], cos, sin)
    with pytest.raises(ValueError, match="must be even to form pairs, but is 63"):
        rope(q[..., :63], k[..., :63], cos, sin)
    with pytest.raises(ValueError, match="one floating type"):
        rope(q, k.double(), cos, sin)
    positions = torch.arange(90)
    with pytest.raises(ValueError, match=r"cos and sin must both be \(rows, P\)"):
        rope(q, k, cos.expand(2, 90, 32), sin.expand(2, 90, 32), positions=positions)
    with pytest.raises(ValueError, match=r"positions must be int32 or int64 \(90,\) or \(2, 90\)"):
        rope(q, k, cos, sin, positions=positions[:89])
    with pytest.raises(ValueError, match=r"but is torch\.float32 \(90,\)"):
        rope(q, k, cos, sin, positions=positions.float())


def test_positions_choose_rows_of_the_tables():
    q, k = _qk()
    cos, sin = _tables(torch.arange(500))
    positions = torch.randint(0, 500, (2, 90))
    got = rope(q, k, cos, sin, positions=positions)
    for name, out, want in zip("qk", got, rope(q, k, cos[positions], sin[positions]), strict=True):
        assert_close(name, out, want, atol=1e-6)  # the fast route adds the products in another order


def test_a_position_without_a_row_is_not_silent():
    q, k = _qk()
    cos, sin = _tables(torch.arange(50))
    with pytest.raises(IndexError):
        rope(q, k, cos, sin, positions=torch.arange(90))


def test_partial_rotation_leaves_the_rest():
    q, k = _qk()
    cos, sin = _tables(torch.arange(90), 24)
    for out, x in zip(rope(q, k, cos, sin), (q, k), strict=True):
        assert torch.equal(out[..., 24:], x[..., 24:])
    for out, x in zip(rope(q, k, cos, sin), rope(q[..., :24], k[..., :24], cos, sin), strict=True):
        assert_close("rotated part", out[..., :24], x, atol=1e-6)
