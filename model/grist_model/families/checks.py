"""What a config.json must hold before a family reads it: sizes that have no sensible default, values of the right kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

_INTEGERS = """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads
num_key_value_heads head_dim max_position_embeddings num_experts num_local_experts num_experts_per_tok experts_per_token
sliding_window max_window_layers decoder_sparse_step n_positions n_ctx n_embd n_layer n_head n_inner
original_max_position_embeddings initial_context_length"""
_NUMBERS = """rope_theta rms_norm_eps layer_norm_epsilon initializer_range router_aux_loss_coef swiglu_alpha swiglu_limit
attention_dropout partial_rotary_factor factor beta_fast beta_slow low_freq_factor high_freq_factor attention_factor"""
_BOOLEANS = """attention_bias mlp_bias tie_word_embeddings norm_topk_prob use_sliding_window truncate scale_attn_weights
scale_attn_by_inverse_layer_idx add_cross_attention"""
_OBJECTS = "rope_parameters rope_scaling quantization_config gristmill"

_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    **dict.fromkeys(_INTEGERS.split(), ("a whole number", (int,))),
    **dict.fromkeys(_NUMBERS.split(), ("a number", (int, float))),
    **dict.fromkeys(_BOOLEANS.split(), ("true or false", (bool,))),
    **dict.fromkeys(_OBJECTS.split(), ("an object", (dict,))),
    "layer_types": ("a list", (list,)),
    "mlp_only_layers": ("a list", (list,)),
    "hidden_act": ("a text", (str,)),
    "activation_function": ("a text", (str,)),
    "rope_type": ("a text", (str,)),
}


def check_settings(config: Mapping[str, Any], required: Iterable[str] = (), where: str = "config.json") -> None:
    """Raise ValueError that names every required key that is missing, and every known key of another kind; null is allowed
    where a key may be left out."""
    missing = [key for key in required if config.get(key) is None]
    if missing:
        raise ValueError(
            f"{where} lacks {', '.join(missing)}: fetch it again, or write what the model was trained with"
        )
    wrong = [
        f"{key} must be {kind}, but is {config[key]!r}"
        for key, (kind, types) in _KINDS.items()
        if config.get(key) is not None and not _is(config[key], types)
    ]
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}")
    for key in ("rope_parameters", "rope_scaling"):
        if config.get(key):
            check_settings(config[key], where=f"{where}, {key}")


def _is(value: Any, types: tuple[type, ...]) -> bool:
    # A bool is an int to Python, and not to whoever reads "num_hidden_layers": true.
    return isinstance(value, types) and (bool in types or not isinstance(value, bool))
