"""The keys of a GGUF file that describe the model. Names: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grist_model.config import ModelConfig
from grist_tools.gguf_names import ARCHITECTURES, sliding_layers
from grist_tools.gguf_source import Source
from grist_tools.gguf_values import FILE_TYPES

Values = dict[str, Any]  # str, bool, int (written as uint32), float (float32), or a list of texts, numbers or bools


def model_metadata(source: Source, kind: str) -> Values:
    """All keys but general.architecture and the tokenizer's."""
    config, name = source.config, ARCHITECTURES[source.family].name
    norm = "attention.layer_norm_rms_epsilon" if config.norm == "rms" else "attention.layer_norm_epsilon"
    own = {
        "vocab_size": config.vocab_size,
        "context_length": config.context_length,
        "block_count": config.layers,
        "embedding_length": config.width,
        "feed_forward_length": config.expert_width,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
        norm: float(config.norm_eps),
        **(_rope(config) if config.positions == "rotary" else {}),
        **(_experts(config) if config.experts else {}),
    }
    if source.family == "gpt_oss":
        own |= _windows(config)
    return {
        "general.type": "model",
        "general.name": _title(source),
        "general.file_type": FILE_TYPES[kind],
        "general.quantization_version": 2,
        **{f"{name}.{key}": value for key, value in own.items()},
    }


def model_warnings(source: Source) -> list[str]:
    """In what llama.cpp (its release 11549) computes something else than this model, or only from some release on."""
    config = source.config
    found = [_rounding(config), _betas(config)]
    if "attention.sliding_window_pattern" in (_windows(config) if source.family == "gpt_oss" else {}):
        found.append(
            "other layers slide than in GPT-OSS (attention.sliding_window_pattern): a llama.cpp older than this key would pass"
            " over it; release 11549 reads it"
        )
    if config.activation == "gelu":
        found.append("llama.cpp computes GELU by tanh, this model by erf: its logits differ by about a thousandth")
    return [each for each in found if each is not None]


def _rounding(config: ModelConfig) -> str | None:
    """The ends of YaRN's ramp are always rounded there, and no key of a GGUF file says otherwise."""
    from grist_model.rope import frequencies

    if config.yarn is None or config.yarn.truncate:
        return None
    H, theta = config.attention_head_width, config.rope_theta
    ours, theirs = (frequencies(H, theta, yarn) for yarn in (config.yarn, replace(config.yarn, truncate=True)))
    change = ((theirs - ours).abs() / ours).max().item()
    if change == 0:
        return None
    return (
        "llama.cpp rounds the ends of YaRN's ramp, and this model was trained without that (yarn.truncate: false): it will turn"
        f" positions by angles up to {change:.0%} off, and its answers differ from this model's, more so in long texts."
        " Train with yarn.truncate: true where llama.cpp must agree"
    )


def _betas(config: ModelConfig) -> str | None:
    """Their keys are written, but only some architectures read them."""
    yarn = config.yarn
    if yarn is None or (yarn.beta_fast, yarn.beta_slow) == (32.0, 1.0):
        return None
    return (
        "llama.cpp takes YaRN's beta_fast and beta_slow for 32 and 1 unless it is told: run it with"
        f" --yarn-beta-fast {yarn.beta_fast:g} --yarn-beta-slow {yarn.beta_slow:g}"
    )


def _title(source: Source) -> str:
    directory = source.directory.resolve()
    return directory.parent.name if directory.name == "model" else directory.name


def _rope(config: ModelConfig) -> Values:
    H, scaling = config.attention_head_width, config.rope_scaling
    found: Values = {
        "attention.key_length": H,
        "attention.value_length": H,
        "rope.dimension_count": H,
        "rope.freq_base": float(config.rope_theta),
    }
    if config.yarn is not None:
        return found | {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(config.yarn.factor),
            "rope.scaling.original_context_length": config.yarn.original_context,
            "rope.scaling.yarn_beta_fast": float(config.yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": float(config.yarn.beta_slow),
        }
    if scaling is not None and scaling.kind == "linear":
        return found | {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    return found  # llama3's scaling is the tensor rope_freqs.weight


def _windows(config: ModelConfig) -> Values:
    """Layers 0, 2, 4, ... slide unless a pattern says otherwise; a window as long as the context is none."""
    slides = sliding_layers(config)
    if not any(slides):
        return {"attention.sliding_window": config.context_length}
    assert config.window is not None
    found: Values = {"attention.sliding_window": config.window}
    if slides != [layer % 2 == 0 for layer in range(config.layers)]:
        found["attention.sliding_window_pattern"] = slides
    return found


def _experts(config: ModelConfig) -> Values:
    return {
        "expert_count": config.experts,
        "expert_used_count": config.active_experts,
        "expert_feed_forward_length": config.expert_width,
    }
