"""Every family against transformers: logits, gradients, files, over randomised small configurations."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grist_model import ModelConfig, build, generate, load, save
from grist_model.attention import KVCache
from grist_model.families import FAMILIES

transformers = pytest.importorskip("transformers")
V, T = 97, 40

ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.5},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}
booleans = st.booleans()


@st.composite
def attention_settings(draw, head_width: bool = True):
    kv_heads, group = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 2, 3]))
    heads, H = kv_heads * group, draw(st.sampled_from([8, 16]))
    rope = draw(st.sampled_from(sorted(ROPES)))
    found = {
        "vocab_size": V,
        "hidden_size": heads * H,
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        # A dynamic scaling changes nothing within max_position_embeddings.
        "max_position_embeddings": 24 if rope == "dynamic" else 64,
        "rope_parameters": {**ROPES[rope], "rope_theta": draw(st.sampled_from([1e4, 5e5]))},
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(booleans),
        "intermediate_size": draw(st.sampled_from([24, 40])),
    }
    if head_width and draw(booleans):
        found |= {"head_dim": 8, "hidden_size": 20 * heads}
    elif head_width:
        found["head_dim"] = H
    return found


@st.composite
def expert_settings(draw, count: str, normalise: bool = True):
    experts = draw(st.integers(2, 5))
    found = {count: experts, "num_experts_per_tok": draw(st.integers(1, experts))}
    return found | ({"norm_topk_prob": draw(booleans)} if normalise else {})


@st.composite
def llama(draw):
    return draw(attention_settings()) | {"attention_bias": draw(booleans), "mlp_bias": draw(booleans)}


@st.composite
def qwen3(draw):
    found = draw(attention_settings()) | {"attention_bias": draw(booleans)}
    if draw(booleans):
        kinds = [
            draw(st.sampled_from(["sliding_attention", "full_attention"])) for _ in range(found["num_hidden_layers"])
        ]
        found |= {"use_sliding_window": True, "sliding_window": draw(st.integers(2, 30)), "layer_types": kinds}
    return found


@st.composite
def qwen3_moe(draw):
    found = draw(attention_settings()) | draw(expert_settings("num_experts")) | {"attention_bias": draw(booleans)}
    if draw(booleans):
        found |= {"use_sliding_window": True, "sliding_window": draw(st.integers(2, 30))}
    return found | {"moe_intermediate_size": draw(st.sampled_from([16, 24]))}


@st.composite
def mixtral(draw):
    window = draw(st.sampled_from([None, 5, 17]))
    return draw(attention_settings()) | draw(expert_settings("num_local_experts", False)) | {"sliding_window": window}


@st.composite
def olmoe(draw):
    return draw(attention_settings(head_width=False)) | draw(expert_settings("num_experts"))


@st.composite
def gpt2(draw):
    heads = draw(st.integers(1, 3))
    return {
        "vocab_size": V,
        "n_positions": 64,
        "n_embd": heads * 8,
        "n_layer": draw(st.integers(1, 3)),
        "n_head": heads,
        "n_inner": draw(st.sampled_from([None, 40])),
        "activation_function": draw(st.sampled_from(["gelu_new", "gelu"])),
        "tie_word_embeddings": draw(booleans),
    }


@st.composite
def gpt_oss(draw):
    found = draw(attention_settings()) | draw(expert_settings("num_local_experts", False))
    kinds = [draw(st.sampled_from(["sliding_attention", "full_attention"])) for _ in range(found["num_hidden_layers"])]
    return found | {"sliding_window": draw(st.integers(2, 30)), "layer_types": kinds, "attention_bias": draw(booleans)}


CONFIGS = {
    "gpt_oss": (transformers.GptOssConfig, gpt_oss()),
    "llama": (transformers.LlamaConfig, llama()),
    "qwen3": (transformers.Qwen3Config, qwen3()),
    "qwen3_moe": (transformers.Qwen3MoeConfig, qwen3_moe()),
    "mixtral": (transformers.MixtralConfig, mixtral()),
    "olmoe": (transformers.OlmoeConfig, olmoe()),
    "gpt2": (transformers.GPT2Config, gpt2()),
}
families = pytest.mark.parametrize("family", CONFIGS)


def test_every_family_is_tested():
    assert set(CONFIGS) == set(FAMILIES) - {"gristmill"}


def _theirs(family: str, given: dict, seed: int = 0):
    torch.manual_seed(seed)
    config = CONFIGS[family][0](**given, attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # none zero or one: none can be ignored
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def _ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(0, V, (rows, T), generator=torch.Generator().manual_seed(3))


def _state_bytes(directory) -> dict[str, bytes]:
    from safetensors import safe_open

    with safe_open(directory / "model.safetensors", framework="pt") as file:
        return {name: file.get_tensor(name).numpy().tobytes() for name in file.keys()}  # noqa: SIM118


@families
def test_logits_caches_and_files_are_those_of_transformers(family, tmp_path_factory):
    @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(given_settings=CONFIGS[family][1], seed=st.integers(0, 100))
    def check(given_settings, seed):
        folder = tmp_path_factory.mktemp(family)
        theirs = _theirs(family, given_settings, seed)
        theirs.save_pretrained(folder / "theirs")
        ours = load(folder / "theirs")
        ids = _ids()
        with torch.no_grad():
            want = theirs(ids).logits
            assert float((ours(ids) - want).abs().max()) < 1e-4
            assert torch.equal(ours(ids).argmax(-1), want.argmax(-1))
            _check_cache(ours, ids, want, given_settings)
        assert save(ours, folder / "ours") == family
        assert _state_bytes(folder / "ours") == _state_bytes(folder / "theirs")
        again = transformers.AutoModelForCausalLM.from_pretrained(
            folder / "ours", dtype=torch.float32, attn_implementation="eager"
        )
        with torch.no_grad():
            assert float((again.eval()(ids).logits - want).abs().max()) < 1e-4
        third = load(folder / "ours")
        assert third.config == ours.config
        for (name, a), b in zip(ours.state_dict().items(), third.state_dict().values(), strict=True):
            assert torch.equal(a, b), name

    check()


def _check_cache(ours, ids, want, given_settings) -> None:
    """A prompt and then a token at a time: the same logits. Not with a dynamic scaling, where keys stay turned as they were."""
    if given_settings.get("rope_parameters", {}).get("rope_type") == "dynamic":
        return
    cache = KVCache(ours.config, len(ids), T)
    got = [ours(ids[:, : T - 6], cache=cache)]
    got += [ours(ids[:, t : t + 1], cache=cache) for t in range(T - 6, T)]
    assert float((torch.cat(got, 1) - want[:, T - 7 :]).abs().max()) < 1e-4


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
def test_gradients_of_every_parameter(family, tmp_path):
    shared = {
        "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 16, "intermediate_size": 24, "num_experts_per_tok": 2, "max_position_embeddings": 64,
        "attention_bias": True, "sliding_window": 9,
    }  # fmt: skip
    own = {
        "gpt_oss": {"num_local_experts": 4},
        "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "norm_topk_prob": True},
    }
    theirs = _theirs(family, shared | own[family])
    theirs.save_pretrained(tmp_path / "before")
    ours, ids = load(tmp_path / "before"), _ids()
    for model, logits in ((ours, ours(ids)), (theirs, theirs(ids).logits)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    # Gradients as a model's weights: the family's own layout says which is which.
    state = {name: parameter.grad for name, parameter in ours.named_parameters()}
    save(state, tmp_path / "ours", config=ours.config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.grad)
    theirs.save_pretrained(tmp_path / "theirs")
    got, want = load(tmp_path / "ours").state_dict(), load(tmp_path / "theirs").state_dict()
    for name, expected in want.items():
        assert float(expected.abs().max()) > 0, name
        assert float((got[name] - expected).abs().max()) < 1e-4 * float(expected.abs().max()), name


@families
def test_greedy_text(family, tmp_path):
    theirs = _theirs(family, _example(family))
    theirs.save_pretrained(tmp_path)
    prompt = _ids()[:, :9]
    text = theirs.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert text[:, 9:].tolist() == generate(load(tmp_path), prompt, max_new_tokens=12, temperature=0)


def _example(family: str) -> dict:
    if family == "gpt2":
        return {"vocab_size": V, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4}
    found = {
        "vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 24, "max_position_embeddings": 64, "head_dim": 8,
    }  # fmt: skip
    experts = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 16}
    return found | (experts if family not in ("llama", "qwen3") else {})


@families
def test_every_piece_covers_each_element_once(family):
    config = ModelConfig.from_hf(CONFIGS[family][0](**_example(family)).to_dict())
    layout = FAMILIES[family].layout(config)
    ours = {
        name: torch.zeros(shape, dtype=torch.int32) for name, shape in layout.shapes.items() if name not in layout.zeros
    }
    theirs = {name: torch.zeros(shape, dtype=torch.int32) for name, shape in layout.hf_shapes.items()}
    for piece in layout.pieces:
        ours[piece.name][piece.at] += 1
        theirs[piece.hf_name][piece.hf_at] += 1
        part = torch.arange(ours[piece.name][piece.at].numel()).view(ours[piece.name][piece.at].shape)
        if piece.to_hf is not None and piece.from_hf is not None:
            assert torch.equal(piece.from_hf(piece.to_hf(part)), part)
    assert all(bool((count == 1).all()) for count in [*ours.values(), *theirs.values()])
    assert {name: tuple(tensor.shape) for name, tensor in build(config).state_dict().items()} == layout.shapes


@families
def test_settings_turn_back(family):
    @settings(max_examples=30, deadline=None)
    @given(given_settings=CONFIGS[family][1])
    def check(given_settings):
        config = ModelConfig.from_hf(CONFIGS[family][0](**given_settings).to_dict())
        written = json.loads(json.dumps(config.to_hf()))
        assert written["model_type"] == family
        assert ModelConfig.from_hf(written) == config
        old = {key: value for key, value in written.items() if key != "rope_parameters"}  # as transformers 4 writes it
        assert ModelConfig.from_hf(old) == config

    check()


def test_gpt2_files_as_they_are_published(tmp_path):
    """Names without the prefix, and the causal masks among the tensors."""
    from safetensors.torch import load_file, save_file

    theirs = _theirs("gpt2", _example("gpt2"))
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    published = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    masks = {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64).tril() for layer in range(2)}
    save_file(published | masks, path, metadata={"format": "pt"})
    with torch.no_grad():
        assert float((load(tmp_path)(_ids()) - theirs(_ids()).logits).abs().max()) < 1e-4
