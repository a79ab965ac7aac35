"""A portable directory into a sharded model: every rank reads its part, and the whole is what `load` reads."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file
from tiny_house import config

import grist_model
from grist_model.config import ModelConfig
from grist_train.config import ComputeConfig
from grist_train.distributed import full_state_dict, shard, start, stop

PLAIN = {"sinks": False, "mlp_bias": False, "router_bias": False, "swiglu_alpha": None, "swiglu_limit": None}
GPT2 = {
    **PLAIN, "experts": 0, "activation": "gelu", "norm": "layer", "positions": "learned", "mlp_bias": True, "kv_heads": 4,
    "window_layers": "none", "window": None,
}  # fmt: skip
FAMILIES = {
    "gpt_oss": config(),
    "qwen3_moe": config(**PLAIN, qk_norm="head", window_layers="none", window=None, layers=3, expert_width=20),
    "llama": config(**PLAIN, experts=0, window_layers="none", window=None, attention_bias=False),
    "gpt2": config(**GPT2),
}


def _on_a_rank(
    rank: int, ranks: int, port: int, directory: str, shape: ModelConfig, compute: ComputeConfig, results
) -> None:
    import os

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = start("cpu", threads=1)
    model = grist_model.build(shape, device="meta")
    shard(model, world, compute)
    model.to_empty(device="cpu")
    grist_model.load_into(model, directory)
    state = full_state_dict(model, world)
    if rank == 0:
        results["state"] = {name: tensor.clone() for name, tensor in state.items()}
    with torch.no_grad():
        results[rank] = model.hidden(torch.arange(24).view(2, 12))
    stop()


@pytest.mark.parametrize(
    ("family", "ranks", "expert_parallel"),
    [("gpt_oss", 3, 1), ("gpt_oss", 4, 2), ("qwen3_moe", 2, 1), ("qwen3_moe", 4, 4), ("llama", 3, 1), ("gpt2", 2, 1)],
)
def test_every_rank_reads_what_it_holds(tmp_path, family, ranks, expert_parallel):
    model = grist_model.build(FAMILIES[family])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    assert grist_model.save(model, tmp_path / "model") == family
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    compute = ComputeConfig(expert_parallel=expert_parallel)
    with mp.Manager() as manager:
        results = manager.dict()
        arguments = (ranks, port, str(tmp_path / "model"), FAMILIES[family], compute, results)
        mp.spawn(_on_a_rank, arguments, nprocs=ranks)  # pyright: ignore[reportPrivateImportUsage]
        found = dict(results)
    want = model.state_dict()
    assert found["state"].keys() == want.keys()
    for name, tensor in want.items():
        assert torch.equal(found["state"][name], tensor), name
    with torch.no_grad():
        hidden = model.hidden(torch.arange(24).view(2, 12))
    for rank in range(ranks):
        torch.testing.assert_close(found[rank], hidden)


def test_a_plain_model_too_and_what_does_not_fit_is_refused(tmp_path):
    model = grist_model.build(FAMILIES["gpt_oss"])
    grist_model.save(model, tmp_path / "model")
    other = grist_model.build(FAMILIES["gpt_oss"], device="meta")
    with pytest.raises(ValueError, match="meta device"):
        grist_model.load_into(other, tmp_path / "model")
    other.to_empty(device="cpu")
    grist_model.load_into(other, tmp_path / "model")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(other(ids), model(ids))
    with pytest.raises(ValueError, match=r"another shape: num_hidden_layers \(2 there, 3 here\)"):
        grist_model.load_into(grist_model.build(config(layers=3)), tmp_path / "model")


def test_a_head_that_is_not_the_embedding_it_is_tied_to_is_refused(tmp_path):
    shape = config(tied_embeddings=True)
    grist_model.save(grist_model.build(shape), tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        grist_model.load_into(grist_model.build(shape), tmp_path / "model")
