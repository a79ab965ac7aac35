"""Models that are wide enough for the fast ways of a step of generation, and what any such way must give."""

from __future__ import annotations

import torch

from grist_kernels import backend
from grist_model import ModelConfig, Transformer, build, generate
from grist_model.attention import KVCache

WIDE = ModelConfig(vocab_size=331, context_length=128, layers=3, width=256, experts=8, expert_width=128, window=9)
KINDS = {
    "gpt_oss": WIDE,
    "dense": ModelConfig(vocab_size=331, context_length=128, layers=2, width=256, experts=0, sinks=False, window=None),
    "qwen3_moe": ModelConfig(
        vocab_size=331, context_length=128, layers=2, width=256, experts=8, expert_width=128, sinks=False, qk_norm="head",
        attention_bias=False, mlp_bias=False, router_bias=False, swiglu_alpha=None, swiglu_limit=None,
    ),
    "gpt2": ModelConfig(
        vocab_size=331, context_length=128, layers=2, width=256, experts=0, activation="gelu", norm="layer", sinks=False,
        positions="learned", kv_heads=4, window=None, expert_width=512,
    ),
}  # fmt: skip


def wide_model(kind: str) -> Transformer:
    """One of KINDS, in which no parameter is zero or one."""
    model = build(KINDS[kind])
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return model


def check_steps(kind: str) -> None:
    """A prompt, single tokens and several at once have the reference's logits, and the text is the reference's."""
    model = wide_model(kind)
    ids = torch.randint(331, (2, 40), generator=torch.Generator().manual_seed(1))

    def steps(rollback: int | None) -> torch.Tensor:
        cache = KVCache(model.config, 2, 40, rollback=rollback)
        pieces = [model(piece, cache=cache, last=piece.shape[1]) for piece in ids.split([20, 1, 1, 4, *[1] * 14], 1)]
        return torch.cat(pieces, 1)

    got = steps(0)
    with backend.using("reference"):
        expected = steps(None)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert (got != expected).any()  # the sums went another way
    prompt = ids[0, :20].tolist()
    text = generate(model, prompt, max_new_tokens=40, temperature=0)
    with backend.using("reference"):
        assert generate(model, prompt, max_new_tokens=40, temperature=0) == text


def check_changed_weights() -> None:
    """Weights that change between two calls are seen: nothing keeps a copy."""
    model = build(KINDS["qwen3_moe"])

    def last_logits() -> torch.Tensor:
        cache = KVCache(model.config, 1, 6)
        for token in range(5):
            model(torch.tensor([[token]]), cache=cache)
        return model(torch.tensor([[5]]), cache=cache)[:, 0]

    before = last_logits()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(1.5)
    changed = last_logits()
    assert not torch.allclose(before, changed)
    exact = model.double()(torch.arange(6)[None])[:, -1].float()
    torch.testing.assert_close(changed, exact, rtol=1e-4, atol=1e-4)
