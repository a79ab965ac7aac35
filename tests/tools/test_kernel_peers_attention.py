"""PyTorch's attention as a peer of ours: which calls each door is offered, and that it is called right.

FlexAttention has no backward on a CPU, and varlen_attn does not run there. Stand-ins are called in their place, which compute
what their documentation says and take what their signatures take.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import pytest
import torch
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention import varlen as varlen_module

from grist_kernels import OPS
from grist_kernels.attention.reference import masked_attention
from grist_kernels.cases import Case, expected, run
from grist_tools import kernel_peers_attention
from grist_tools.bench_kernels_case import bench_case, error_ratio
from grist_tools.kernel_peers import Peer, peers

SMALL = [
    pytest.param(OPS[name], case, id=f"{name}-{case.name}")
    for name in ("attention", "decode_attention")
    for case in OPS[name].cases
    if not case.large and case.arguments(torch.float32).get("block_table") is None
]


SIGNATURE = inspect.signature(flex_module.flex_attention)


def case(op: str, name: str) -> Case:
    return next(each for each in OPS[op].cases if each.name == name)


def ratio(op, each: Case, function, arguments, gradients: tuple[str, ...]) -> float:
    wanted = expected(op.reference, each, each.arguments(torch.float32))
    if not gradients:
        wanted = {name: value for name, value in wanted.items() if not name.startswith("d_")}
    return error_ratio(run(function, arguments, gradients), wanted)


def flex_stand_in(q, k, v, *, block_mask: Any, scale: float | None, enable_gqa: bool, **options: Any):
    """flex_attention by its block mask's own rule: q (B, N, T, H), k and v (B, K, S, H)."""
    SIGNATURE.bind(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=enable_gqa, **options)
    assert enable_gqa
    B, T, S = q.shape[0], q.shape[2], k.shape[2]
    batch, query = torch.arange(B)[:, None, None], torch.arange(T)[:, None]
    visible = block_mask.mask_mod(batch, torch.tensor(0), query, torch.arange(S)).expand(B, T, S)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = masked_attention(q, k, v, visible[:, None, None], None, scale)
    if "return_aux" not in options:
        return out.transpose(1, 2)
    assert options["return_aux"].lse
    return out.transpose(1, 2), flex_module.AuxOutput(lse=lse)


@functools.wraps(varlen_module.varlen_attn)
def varlen_stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    """varlen_attn: (T, heads, H), window (left, 0) without the query itself, sequences aligned at their ends, lse (N, T)."""
    inspect.signature(varlen_stand_in).bind(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options)
    left, right = options["window_size"]
    assert right == 0
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert query.shape[1] == key.shape[1] or options["enable_gqa"]
    outs, lses = [], []
    for i in range(len(cu_seq_q) - 1):
        q, (first, last) = query[cu_seq_q[i] : cu_seq_q[i + 1]], cu_seq_k[i : i + 2].tolist()
        used = last - first if options.get("seqused_k") is None else int(options["seqused_k"][i])
        k, v = key[first : first + used], value[first : first + used]
        assert len(q) <= max_q
        assert last - first <= max_k
        distance = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
        visible = (distance >= 0) & ((distance <= left) if left >= 0 else True)
        out, lse = masked_attention(q[None], k[None], v[None], visible, None, options["scale"])
        outs.append(out[0])
        lses.append(lse[0])
    out, lse = torch.cat(outs), torch.cat(lses, 1).detach()  # as there: nobody differentiates lse
    return (out, lse) if options["return_aux"] is not None else out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("op", "each"), SMALL)
def test_flex_attention_sees_what_ours_sees(op, each):
    """The real one, in eager mode, forward."""
    torch._dynamo.reset()
    function, prepare = kernel_peers_attention.FLEX[op.name]
    assert ratio(op, each, function, prepare(each.arguments(torch.float32)), ()) <= 1


@pytest.mark.parametrize(("op", "each"), SMALL)
def test_flex_attention_s_gradients(op, each, monkeypatch):
    monkeypatch.setattr(flex_module, "flex_attention", flex_stand_in)
    function, prepare = kernel_peers_attention.FLEX[op.name]
    # A sink added through lse rounds once more than one in the softmax.
    assert ratio(op, each, function, prepare(each.arguments(torch.float32)), each.gradients) <= 2


@pytest.mark.parametrize(("op", "each"), SMALL)
def test_varlen_attn_is_called_as_documented(op, each, monkeypatch):
    monkeypatch.setattr(kernel_peers_attention, "_varlen_missing", lambda *_: "")
    monkeypatch.setattr(varlen_module, "varlen_attn", varlen_stand_in)
    arguments = each.arguments(torch.float32)
    peer = peers(op, arguments, all_of_them=False)["varlen_attn"]
    with_lse = arguments.get("sinks") is not None or arguments.get("return_lse", False)
    assert peer.forward_only == (with_lse and op.name == "attention")
    gradients = () if peer.forward_only else each.gradients
    assert ratio(op, each, peer.function, peer.prepare(arguments), gradients) <= 2


def test_who_is_offered_which_call():
    def names(op: str, name: str) -> dict[str, Peer]:
        return peers(OPS[op], case(op, name).arguments(torch.float32), all_of_them=False)

    sdpa = {"SDPA", "SDPA flash", "SDPA cuDNN"}
    for name in ("odd", "heads_first"):
        assert names("attention", name).keys() == {"eager", "varlen_attn"} | sdpa
    for name in ("sinks", "window", "packed", "with_lse"):
        assert names("attention", name).keys() == {"eager", "varlen_attn"}
    assert names("decode_attention", "several_tokens").keys() == {"eager", "varlen_attn"} | sdpa
    assert names("decode_attention", "one_token").keys() == {"eager", "varlen_attn"}
    assert names("decode_attention", "paged").keys() == {"eager"}
    with_all = peers(OPS["attention"], case("attention", "odd").arguments(torch.float32), all_of_them=True)
    assert with_all.keys() == {"eager", "varlen_attn", "compile", "FlexAttention"} | sdpa


def test_who_cannot_run_here_says_why_and_is_not_timed(monkeypatch):
    found = bench_case(
        OPS["attention"], case("attention", "odd"), torch.float32, "cpu", which_peers="some", budget_ms=1.0
    )
    assert found["ok"]
    assert found["peers"]["SDPA"]["forward"]["median_ms"] > 0
    for name in ("SDPA flash", "SDPA cuDNN", "varlen_attn"):
        assert found["peers"][name] == {"ok": False, "failed": "absent: needs a CUDA device"}
    monkeypatch.setattr(varlen_module, "varlen_attn", lambda query, key, value: None)
    on_cuda: Any = type("Query", (), {"is_cuda": True})()
    assert "has no window_size" in kernel_peers_attention._varlen_missing(on_cuda, "window_size")


def test_a_peer_without_a_backward_is_timed_forward(monkeypatch):
    monkeypatch.setattr(kernel_peers_attention, "_varlen_missing", lambda *_: "")
    monkeypatch.setattr(varlen_module, "varlen_attn", varlen_stand_in)
    found = bench_case(
        OPS["attention"], case("attention", "sinks"), torch.float32, "cpu", which_peers="some", budget_ms=1.0
    )
    peer = found["peers"]["varlen_attn"]
    assert peer["ok"]
    assert "no backward" in peer["note"]
    assert "forward" in peer
    assert "backward" not in peer
    assert "backward" in found


def test_the_backends_of_sdpa_are_asked_for_by_name(monkeypatch):
    """On CUDA each one alone."""
    asked = []
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda backend: asked.append(backend) or torch.no_grad())
    on_cuda: Any = type("Query", (), {"is_cuda": True})()
    arguments = case("attention", "odd").arguments(torch.float32)
    backends = torch.nn.attention.SDPBackend
    found = kernel_peers_attention._sdpa_backends(on_cuda, kernel_peers_attention._sdpa, "", dict)
    for name, backend in (("SDPA flash", backends.FLASH_ATTENTION), ("SDPA cuDNN", backends.CUDNN_ATTENTION)):
        found[name].function(**arguments)
        assert asked[-1] == backend
    assert len(found) == len(asked) == 2
