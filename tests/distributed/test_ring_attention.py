"""Attention of a sequence spread over 2 and 4 ranks is attention of the whole sequence, gradients included."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from assertions import assert_close
from torch import Tensor
from torch.multiprocessing.spawn import spawn

from grist_kernels import attention, backend
from grist_kernels.attention import partial
from grist_kernels.attention.ring import ring_attention, zigzag_merge, zigzag_positions, zigzag_split

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}  # relative to the largest element


@dataclass(frozen=True)
class Case:
    """One sequence; `chunk` is half of a rank's share, in tokens."""

    name: str
    chunk: int
    N: int = 4
    K: int = 2
    window: int | None = None
    sinks: bool = False
    scale: float | None = None
    dtype: torch.dtype = torch.float64
    B: int = 2
    H: int = 6


CASES = [
    Case("causal", 35, dtype=torch.float32),
    Case("causal_float64", 33),
    Case("one_token_chunks", 1, sinks=True),
    Case("single_key_head", 17, N=5, K=1),
    Case("no_groups", 17, N=3, K=3, H=5),
    Case("sinks", 35, sinks=True, dtype=torch.float32),
    Case("sinks_float64", 19, sinks=True, scale=0.3, B=1),
    Case("window_within_chunk", 35, window=9, sinks=True, dtype=torch.float32),
    Case("window_within_chunk_float64", 23, window=9),
    Case("window_across_chunks", 11, window=30, sinks=True),
    Case("window_of_a_chunk", 11, window=11),
    Case("window_one_more_than_a_chunk", 11, window=12, sinks=True),
    Case("window_of_one", 7, window=1, sinks=True),
    Case("window_longer_than_time", 7, window=10_000, sinks=True),
    Case("several_blocks", 150, B=1, N=2, K=1, window=200, sinks=True),
]


def inputs(case: Case, world: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    time = 2 * world * case.chunk
    shapes = {name: (case.B, time, heads, case.H) for name, heads in (("q", case.N), ("k", case.K), ("v", case.K))}
    shapes |= {"d_out": shapes["q"]} | ({"sinks": (case.N,)} if case.sinks else {})
    return {name: torch.randn(shape, generator=draw, dtype=case.dtype) for name, shape in shapes.items()}


def run(function, tensors: dict[str, Tensor], **options) -> dict[str, Tensor]:
    """The output and the gradients of a function of q, k, v and perhaps sinks."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items() if name != "d_out"}
    out = function(**leaves, **options)
    gradients = torch.autograd.grad(out, list(leaves.values()), tensors["d_out"])
    return {"out": out.detach()} | {f"d_{name}": g for name, g in zip(leaves, gradients, strict=True)}


def on_the_ring(tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None, **options) -> dict[str, Tensor]:
    """As `run(attention, ...)` on whole sequences, computed by all ranks of the group and gathered."""
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    shares = {name: x if name == "sinks" else zigzag_split(x, rank, world) for name, x in tensors.items()}
    results = run(ring_attention, shares, group=group, **options)
    whole = {}
    for name, x in results.items():
        if name == "d_sinks":
            dist.all_reduce(x, group=group)
            whole[name] = x
        else:
            gathered = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world)]
            dist.all_gather(gathered, x.contiguous(), group=group)
            whole[name] = zigzag_merge(gathered)
    return whole


def check_equals_attention(case: Case, world: int, group: dist.ProcessGroup | None = None) -> None:
    tensors = inputs(case, world)
    options = {"window": case.window, "scale": case.scale}
    with backend.using("reference"):
        want = run(attention, tensors, **options)
    got = on_the_ring(tensors, group, **options)
    assert got.keys() == want.keys()
    for name in want:
        allowed = TOLERANCE[case.dtype] * float(want[name].abs().max())
        if name == "d_sinks":  # a sum over all tokens that cancels: measured against what is summed
            allowed = max(allowed, TOLERANCE[case.dtype] * want["out"].shape[1] ** 0.5)
        assert_close(f"{case.name}, {world} ranks: {name}", got[name], want[name], atol=allowed)


def check_same_bits_again(world: int) -> None:
    case = Case("again", 40, sinks=True, window=100, dtype=torch.float32)
    first, second = (on_the_ring(inputs(case, world), window=case.window) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), f"{name} changes from run to run"


def check_bfloat16(world: int) -> None:
    """Pieces are merged in float32 and rounded once, at the end, however many ranks there are."""
    case = Case("bfloat16", 21, sinks=True, dtype=torch.bfloat16)
    tensors = inputs(case, world)
    rounded, exact = run(attention, tensors), run(attention, {name: x.float() for name, x in tensors.items()})
    for name, got in on_the_ring(tensors).items():
        assert got.dtype == torch.bfloat16
        if name == "d_sinks":  # the shares are rounded before they are summed
            continue
        # As every flash backward this one reads the rounded output, where autograd does not: 4 as in the cases of attention.
        factor = 1.0 if name == "out" else 4.0
        allowed = factor * float((rounded[name].float() - exact[name]).abs().max())
        assert_close(f"bfloat16: {name}", got, exact[name], atol=allowed)


def check_pairs(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk pairs computed by all ranks, forward and backward, and keys and values sent."""
    chunk, chunks = 10, 2 * world
    counts = {"forward": 0, "backward": 0, "sent": 0}

    def counted(name, function):
        def wrapper(*arguments, **options):
            counts[name] += 1
            return function(*arguments, **options)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(partial, "partial_attention", counted("forward", partial.partial_attention))
        patch.setattr(partial, "partial_attention_backward", counted("backward", partial.partial_attention_backward))
        patch.setattr(dist, "batch_isend_irecv", counted("sent", dist.batch_isend_irecv))
        for window, pairs, stops in (
            (None, chunks * (chunks + 1) // 2, world),
            (1, chunks, 1),
            (2, 2 * chunks - 1, min(world, 3)),  # a chunk and its neighbour, which is one rank up or down
            (chunk + 1, 2 * chunks - 1, min(world, 3)),
            (chunk + 2, 3 * chunks - 3, min(world, 5)),
        ):
            counts.update(forward=0, backward=0, sent=0)
            on_the_ring(inputs(Case("pairs", chunk), world), window=window)
            computed = torch.tensor([counts["forward"], counts["backward"]])
            if window is None:  # balanced: one pair more than two a stop
                assert computed.tolist() == [2 * world + 1] * 2
            dist.all_reduce(computed)
            assert computed.tolist() == [pairs, pairs], f"window {window}, {world} ranks"
            # Keys and values in both passes, to every stop but home; gradients to every stop, and home again.
            sent = 2 * (stops - 1) + (stops if stops > 1 else 0)
            assert counts["sent"] == sent, f"window {window}, {world} ranks"


def check_rope_positions(rank: int, world: int) -> None:
    """Positions are data like any other: split and merged they are 0, 1, 2, ..."""
    whole = torch.arange(6 * world)
    mine = zigzag_positions(rank, world, 6 * world)
    assert torch.equal(mine, zigzag_split(whole[None], rank, world)[0])
    gathered = torch.empty(world, 6, dtype=torch.int64)
    dist.all_gather_into_tensor(gathered.view(-1), mine)
    assert torch.equal(zigzag_merge(gathered, dim=0), whole)


def check_compiled() -> None:
    """A compiled caller gets the same bits."""
    tensors = inputs(Case("compiled", 5, dtype=torch.float32), 2)

    def function(q, k, v):
        return ring_attention(2 * q, k, v, window=7) + 1

    want, got = run(function, tensors), run(torch.compile(function, backend="aot_eager"), tensors)
    for name in want:
        assert torch.equal(got[name], want[name]), f"compiled: {name}"


def check_subgroups(rank: int) -> None:
    """Rings of the ranks 0 and 2, 1 and 3, at once, each with its own sequence; and rings of one."""
    groups: list[Any] = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    alone: list[Any] = [dist.new_group([i]) for i in range(4)]
    case = Case("subgroup", 9 + rank % 2, sinks=True, window=15)
    check_equals_attention(case, 2, groups[rank % 2])
    check_equals_attention(case, 1, alone[rank])
    x = torch.zeros(1, 2, 2, 4)
    with pytest.raises(ValueError, match="not a member of group"):
        ring_attention(x, x, x, group=groups[(rank + 1) % 2])


def join(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN: a receive that is not waited for shows
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )


def check_rank_with_kernels(rank: int, world: int, store: str) -> None:
    """Pieces by the interpreted Triton kernels: what runs on a GPU, but for the messages."""
    import interpreter_shim

    interpreter_shim.install()
    join(rank, world, store)
    with backend.using("triton"):
        check_equals_attention(Case("kernels", 35, B=1, dtype=torch.float32), world)
        check_equals_attention(Case("kernels", 11, window=30, sinks=True, scale=0.3, dtype=torch.float32), world)
        check_bfloat16(world)
    dist.destroy_process_group()


def check_rank(rank: int, world: int, store: str) -> None:
    join(rank, world, store)
    for case in CASES:
        check_equals_attention(case, world)
    check_same_bits_again(world)
    check_bfloat16(world)
    check_pairs(world, pytest.MonkeyPatch())
    check_rope_positions(rank, world)
    if world == 4:
        check_subgroups(rank)
    else:
        check_compiled()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 4])
def test_ring_equals_attention_of_the_whole(tmp_path: Path, world):
    spawn(check_rank, args=(world, str(tmp_path / "store")), nprocs=world)


@pytest.mark.skipif(not backend.INTERPRETING, reason="needs TRITON_INTERPRET=1, and triton")
def test_ring_of_interpreted_kernels_equals_attention_of_the_whole(tmp_path: Path):
    spawn(check_rank_with_kernels, args=(2, str(tmp_path / "store")), nprocs=2)


def test_zigzag_pairs_the_first_chunk_with_the_last():
    x = torch.arange(12)[:, None].expand(12, 5)
    shares = [zigzag_split(x, rank, 3, dim=0) for rank in range(3)]
    assert [share[:, 0].tolist() for share in shares] == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert torch.equal(zigzag_merge(shares, dim=0), x)
    assert torch.equal(zigzag_merge(torch.stack(shares), dim=0), x)


def test_zigzag_carries_gradients():
    x = torch.randn(2, 8, 3, requires_grad=True)
    weight = torch.randn(2, 8, 3)
    merged = zigzag_merge([zigzag_split(x, rank, 2) for rank in range(2)])
    (merged * weight).sum().backward()
    assert x.grad is not None
    assert_close("gradient", x.grad, weight)


@pytest.fixture
def _group_of_one():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_group_of_one")
def test_group_of_one_is_plain_attention():
    check_equals_attention(Case("alone", 31, sinks=True, window=20), 1)


def test_bad_arguments_are_named():
    q, k = torch.zeros(1, 6, 4, 8), torch.zeros(1, 6, 2, 8)
    with pytest.raises(ValueError, match=r"multiple of 8, but is 12"):
        zigzag_split(torch.zeros(1, 12), 0, 4)
    with pytest.raises(ValueError, match=r"multiple of 4, but is 6"):
        zigzag_positions(1, 2, 6)
    with pytest.raises(ValueError, match="rank is 2 and world is 2"):
        zigzag_split(torch.zeros(1, 8), 2, 2)
    with pytest.raises(ValueError, match="axis 1 must be even, but that of rank 0 is 3"):
        zigzag_merge([torch.zeros(1, 3)] * 2)
    with pytest.raises(ValueError, match="T must be even and not 0, but is 5"):
        ring_attention(q[:, :5], k[:, :5], k[:, :5])
    with pytest.raises(ValueError, match=r"with one B and T, but are \(1, 6, 4, 8\) and \(1, 4, 2, 8\)"):
        ring_attention(q, k[:, :4], k[:, :4])
    with pytest.raises(ValueError, match=r"q must be \(B, T, N, H\)"):
        ring_attention(q[0], k[0], k[0])
    with pytest.raises(ValueError, match="ring_attention: window counts the query itself"):
        ring_attention(q, k, k, window=0)
    with pytest.raises(ValueError, match="ring_attention: sinks must be"):
        ring_attention(q, k, k, sinks=torch.zeros(3))
    with pytest.raises(ValueError, match="process group has not been initialized"):
        ring_attention(q, k, k)
