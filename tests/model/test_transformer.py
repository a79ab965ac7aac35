from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from grist_model import build

KINDS = {
    "gpt_oss": {},
    "dense": {"experts": 0},
    "shared expert and bias balance": {"shared_expert_width": 16, "balance": "bias"},
    "plain": {
        "attention_bias": False,
        "sinks": False,
        "mlp_bias": False,
        "router_bias": False,
        "swiglu_alpha": None,
        "swiglu_limit": None,
        "window": None,
        "yarn": None,
    },
    "tied": {"tied_embeddings": True, "window_layers": "all"},
    "GPT-2's layers": {
        "experts": 0,
        "activation": "gelu_tanh",
        "norm": "layer",
        "positions": "learned",
        "swiglu_alpha": None,
        "swiglu_limit": None,
        "yarn": None,
    },
    "norms of queries and keys, shares of all experts": {"qk_norm": "head", "router_weights": "all"},
    "norms over the width, windows in some layers": {"qk_norm": "width", "window_layers": (1, 2)},
}
kinds = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS.keys())


@kinds
def test_logits_are_hidden_times_unembedding(make_model, ids, changes):
    model = make_model(**changes)
    hidden = model.hidden(ids)
    assert hidden.shape == (3, 24, 32)
    torch.testing.assert_close(model(ids), hidden @ model.unembedding.T)
    assert (model.unembedding is model.embedding.weight) == model.config.tied_embeddings


def test_a_softcap_bounds_the_logits(make_model, ids):
    model = make_model(logit_softcap=2.0)
    with torch.no_grad():
        plain, capped = model.hidden(ids) @ model.unembedding.T, model(ids)
    torch.testing.assert_close(capped, 2.0 * torch.tanh(plain / 2.0))
    assert float(capped.abs().max()) < 2.0 < float(plain.abs().max())


@kinds
def test_gradients_reach_every_parameter(make_model, ids, changes):
    model = make_model(**changes)
    F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1).flatten()).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert silent == []
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@kinds
def test_the_future_is_unseen(make_model, ids, changes):
    model = make_model(**changes)
    changed = ids.clone()
    changed[:, 13:] = (changed[:, 13:] + 1) % 97
    with torch.no_grad():
        before, after = model(ids), model(changed)
    torch.testing.assert_close(after[:, :13], before[:, :13])
    assert float((after[:, 13:] - before[:, 13:]).abs().max()) > 1e-2


def test_a_window_forgets(make_model):
    """Two layers with a window of 4 see the last 7 tokens, no more."""
    model = make_model(layers=2, window=4, window_layers="all", experts=0)
    ids = torch.arange(16)[None]
    changed = ids.clone()
    changed[:, 3] = 90
    with torch.no_grad():
        difference = (model(ids) - model(changed)).abs().amax(-1)[0]
    assert float(difference[3:10].min()) > 1e-5
    torch.testing.assert_close(difference[10:], torch.zeros(6), atol=1e-5, rtol=0)


def test_packed_documents_equal_separate_ones(make_model, ids):
    """The border of a row is not the border of a document: the second one runs from row 0 into row 1."""
    model = make_model()
    stream, borders = ids[:2].flatten(), [0, 10, 31, 48]
    with torch.no_grad():
        packed = model.hidden(ids[:2], cu_seqlens=torch.tensor(borders, dtype=torch.int32)).flatten(0, 1)
        for start, end in pairwise(borders):
            torch.testing.assert_close(packed[start:end], model.hidden(stream[None, start:end])[0])


def test_given_positions_are_used(make_model, ids):
    model = make_model()
    T = ids.shape[1]
    with torch.no_grad():
        plain = model.hidden(ids)
        torch.testing.assert_close(model.hidden(ids, positions_BT=torch.arange(T).expand(3, T)), plain)
        # Rotary embedding is relative: a shift of all positions changes nothing, a stretch does.
        shifted = model.hidden(ids, positions_BT=torch.arange(T).expand(3, T) + 9)
        torch.testing.assert_close(shifted, plain, rtol=1e-4, atol=1e-4)
        stretched = model.hidden(ids, positions_BT=2 * torch.arange(T).expand(3, T))
    assert float((stretched - plain).abs().max()) > 1e-2


def test_activation_checkpointing_changes_nothing(make_model, ids):
    def grads(recompute: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        model = make_model()
        if recompute:
            for block in model.blocks:
                forward = block.forward
                block.forward = lambda *args, run=forward: checkpoint(run, *args, use_reentrant=False)
        hidden, stats = model.hidden(ids, return_router=True)
        (hidden.square().sum() + stats.aux_loss_sum + stats.z_loss_sum).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, stats.tokens_per_expert_LE

    (plain, counts), (recomputed, recounts) = grads(False), grads(True)
    assert torch.equal(counts, recounts)
    for name, grad in plain.items():
        torch.testing.assert_close(recomputed[name], grad, msg=name)


def test_bfloat16_model_is_close_to_the_float32_one(make_model, ids):
    model = make_model(experts=0)
    with torch.no_grad():
        exact = model(ids)
        rounded = model.to(torch.bfloat16)(ids)
    assert rounded.dtype == torch.bfloat16
    assert float((rounded.float() - exact).abs().mean()) < 0.02 * float(exact.abs().mean()) + 0.02


def test_rounded_angles_are_refused(make_model):
    """FSDP casts the inputs of a unit unless told not to."""
    model = make_model()
    cos, sin = model.rope(torch.arange(4))
    with pytest.raises(ValueError, match="cast_forward_inputs=False"):
        model.blocks[0](torch.zeros(1, 4, 32), cos.bfloat16(), sin.bfloat16())


def test_ids_must_be_integers_in_rows(make_model, ids):
    model = make_model()
    with pytest.raises(ValueError, match=r"ids must be integers \(B, T\), but are \(24,\)"):
        model(ids[0])
    with pytest.raises(ValueError, match=r"torch\.float32"):
        model.hidden(ids.float())


def test_build_on_meta_holds_shapes_only(tiny):
    model = build(tiny(), device="meta")
    assert all(p.is_meta for p in model.parameters())
    assert build(tiny(), dtype=torch.bfloat16).embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [{}, {"experts": 0}], ids=["moe", "dense"])
def test_blocks_compile_without_a_graph_break(make_model, ids, changes):
    """Traced forward and backward (backend aot_eager: no code is generated, which would take a minute)."""

    def run(compiled: bool) -> tuple[torch.Tensor, torch.Tensor]:
        model = make_model(layers=1, **changes)
        if compiled:
            for block in model.blocks:
                block.compile(fullgraph=True, backend="aot_eager")
        hidden, stats = model.hidden(ids, return_router=True)
        (hidden.square().mean() + stats.aux_loss_sum).backward()
        return hidden.detach(), model.blocks[0].attention.q.weight.grad

    for got, expected in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
