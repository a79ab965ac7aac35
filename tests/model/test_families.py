from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from grist_kernels.moe_mxfp4.dequantise import dequantise_mxfp4
from grist_model import ModelConfig, RopeScaling, YarnConfig, generate, load, save
from grist_model.families import family_for, gpt_oss

transformers = pytest.importorskip("transformers")

SHAPES = {
    "yarn, windows, sinks": {},
    "yarn, truncated ramp": {"yarn": YarnConfig(factor=8.0, original_context=16, truncate=True)},
    "linear rope": {"yarn": None, "rope_scaling": RopeScaling("linear", 4.0)},
    "llama 3 rope": {"yarn": None, "rope_scaling": RopeScaling("llama3", 8.0, original_context=64)},
    "plain rope": {"yarn": None, "rope_theta": 10000.0},
    "tied": {"tied_embeddings": True},
    "windows everywhere": {"window_layers": "all"},
    "no window": {"window": None},
    "window in no layer": {"window_layers": "none"},
    "no attention biases, another limit": {"attention_bias": False, "swiglu_limit": 0.3},
    "bias balance, never moved": {"balance": "bias"},
}
shapes = pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())


def in_transformers(directory):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@shapes
def test_transformers_gives_our_logits_and_our_greedy_text(make_model, ids, tmp_path, changes):
    model = make_model(**changes)
    assert save(model, tmp_path / "model") == "gpt_oss"
    theirs = in_transformers(tmp_path / "model")
    with torch.no_grad():
        expected, got = model(ids), theirs(ids).logits
    assert float(expected.abs().max()) > 0.5
    assert float((got - expected).abs().max()) < 1e-4
    prompt = ids[:, :9]
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    assert text[:, 9:].tolist() == generate(model, prompt, max_new_tokens=20, temperature=0)


@pytest.mark.parametrize("tied", [False, True])
def test_we_load_what_transformers_saves(ids, tmp_path, tied):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    theirs = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    with torch.no_grad():
        assert float((ours(ids) - theirs(ids).logits).abs().max()) < 1e-4
    assert ours.config.tied_embeddings == tied
    assert ours.config.yarn == YarnConfig(factor=32.0, original_context=4096)


@shapes
def test_config_survives_the_round_trip(tiny, changes):
    config = tiny(**changes)
    if config.layer_window(0) is None:  # two ways to say that no layer slides, read back as one
        config = dataclasses.replace(config, window=None, window_layers="none")
    hf_config = json.loads(json.dumps(gpt_oss.config_to_hf(config)))
    assert ModelConfig.from_hf(hf_config) == config


def test_both_spellings_of_rope_are_written_and_either_is_read(tiny):
    config = tiny()
    written = config.to_hf()
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 150000.0
    assert written["rope_scaling"].items() <= written["rope_parameters"].items()
    for spelling in (["rope_parameters"], ["rope_theta", "rope_scaling"]):
        others = {"rope_parameters", "rope_theta", "rope_scaling"} - set(spelling)
        assert ModelConfig.from_hf({k: v for k, v in written.items() if k not in others}) == config


def test_published_config_is_read():
    """config.json of openai/gpt-oss-20b, without its quantization_config."""
    config = ModelConfig.from_hf(
        {
            "architectures": ["GptOssForCausalLM"],
            "attention_bias": True,
            "attention_dropout": 0.0,
            "eos_token_id": 200002,
            "experts_per_token": 4,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2880,
            "initial_context_length": 4096,
            "initializer_range": 0.02,
            "intermediate_size": 2880,
            "layer_types": ["sliding_attention", "full_attention"] * 12,
            "max_position_embeddings": 131072,
            "model_type": "gpt_oss",
            "num_attention_heads": 64,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 32,
            "output_router_logits": False,
            "pad_token_id": 199999,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "factor": 32.0,
                "original_max_position_embeddings": 4096,
                "rope_type": "yarn",
                "truncate": False,
            },
            "rope_theta": 150000,
            "router_aux_loss_coef": 0.9,
            "sliding_window": 128,
            "swiglu_limit": 7.0,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": 201088,
        }
    )
    assert (config.layers, config.experts, config.active_experts, config.window) == (24, 32, 4, 128)
    assert config.yarn == YarnConfig(factor=32.0, original_context=4096)
    assert config.window_layers == "alternate"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized with gptq: dequantize"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1"),
        ({"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "layer_types must give"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 2.0}}, "rope_type 'longrope'"),
        ({"model_type": "mamba"}, "model_type 'mamba', but only gpt_oss, llama, .*, gristmill can be read"),
        ({"num_experts_per_tok": 5}, "active_experts must be between 1 and experts"),
    ],
)
def test_what_we_do_not_have_is_refused(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_hf(tiny().to_hf() | changes)


def test_other_attention_factors_are_refused(tiny):
    written = tiny().to_hf()
    written["rope_parameters"]["attention_factor"] = 1.5
    with pytest.raises(ValueError, match=r"attention_factor 1\.5"):
        ModelConfig.from_hf(written)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"experts": 0}, "experts > 0"),
        ({"sinks": False}, "attention sinks"),
        ({"mlp_bias": False}, "biases in experts"),
        ({"router_bias": False}, "a router bias"),
        ({"shared_expert_width": 8}, "no shared expert"),
        ({"swiglu_alpha": None, "swiglu_limit": None}, "swiglu_alpha 1.702, a swiglu_limit"),
        ({"balance": "bias"}, "no selection bias in use"),
        ({"qk_norm": "head"}, "no qk_norm"),
        ({"router_weights": "all"}, "router_weights chosen"),
        ({"logit_softcap": 5.0}, "no logit_softcap"),
        ({"positions": "learned", "yarn": None}, "rotary positions"),
        ({"norm": "layer"}, "RMSNorm"),
    ],
)
def test_everything_else_goes_into_our_own_family(make_model, ids, tmp_path, caplog, changes, reason):
    model = make_model(**changes)
    for router in model.routers():
        if router.selection_bias is not None:
            router.selection_bias.copy_(torch.tensor([0.3, 0.0, -0.1, -0.2]))
    assert save(model, tmp_path / "model") == "gristmill"
    assert reason in caplog.text
    assert ModelConfig.from_hf(json.loads((tmp_path / "model" / "config.json").read_text())) == model.config
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "model")(ids), model(ids))


def test_unknown_settings_of_our_own_family_are_refused(tiny):
    with pytest.raises(ValueError, match="does not know: softcap"):
        ModelConfig.from_hf(tiny(experts=0).to_hf() | {"softcap": 30.0})


def test_the_files_of_gpt_oss_interleave_gate_and_up(tiny):
    (piece,) = gpt_oss.layout(tiny()).of_ours["blocks.0.mlp.experts.w_gate_up"]
    x = torch.arange(4 * 32 * 48).view(4, 32, 48)
    assert piece.to_hf is not None
    assert piece.to_hf(x)[0, 0, :4].tolist() == [0, 24, 1, 25]


def test_config_alone_with_a_selection_bias_may_not_fit_gpt_oss(tiny):
    assert family_for(tiny()).MODEL_TYPE == "gpt_oss"
    assert family_for(tiny(balance="bias")).MODEL_TYPE == "gristmill"


def test_experts_in_mxfp4_are_read_as_the_numbers_they_stand_for(ids, make_model, tmp_path):
    """Files as OpenAI publishes them: blocks and scales, out-major, in place of the matrices."""
    save(make_model(expert_width=32), tmp_path, dtype=torch.bfloat16)
    path, draw = tmp_path / "model.safetensors", torch.Generator().manual_seed(0)
    tensors, want = load_file(path), {}
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        E, rows, columns = tensors.pop(name).shape
        blocks = torch.randint(256, (E, columns, rows // 32, 16), generator=draw).to(torch.uint8)
        scales = torch.randint(118, 124, (E, columns, rows // 32), generator=draw).to(torch.uint8)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        want[name] = dequantise_mxfp4(blocks, scales).transpose(1, 2)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    modules = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": modules}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load(tmp_path, dtype=torch.float32)
    state = ours.state_dict()
    for piece in gpt_oss.layout(ours.config).pieces:
        if piece.hf_name in want:
            tensor = state[piece.name]
            assert torch.equal(tensor if piece.to_hf is None else piece.to_hf(tensor), want[piece.hf_name]), piece.name
    with torch.no_grad():
        save(ours, tmp_path / "dequantised")
        logits = in_transformers(tmp_path / "dequantised")(ids).logits
        assert float((ours(ids) - logits).abs().max()) < 1e-4 * float(logits.abs().max())
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.experts\.down_proj_scales missing"):
        load(tmp_path)
