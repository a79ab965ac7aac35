"""GPT-2 (Radford et al., 2019): GPT2LMHeadModel. Its dropouts are not applied, here as in evaluation there.

D model width, F width of the feed-forward layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from grist_model.config import ModelConfig
from grist_model.families import decoder
from grist_model.families.layout import Layout, Piece, Shape, own_shapes, transposed

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "gpt2"
REQUIRED = ("vocab_size", "n_embd", "n_layer", "n_head")
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
_MODULES = {
    "attention_norm": "ln_1",
    "attention.o": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}
_AROUND = {
    "embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "norm": "transformer.ln_f",
    "head": "lm_head",
}
_QKV = ("attention.q", "attention.k", "attention.v")


def misfit(config: ModelConfig, state: Mapping[str, Tensor] | None = None) -> str | None:
    heads_fill = config.heads * config.attention_head_width == config.width and config.kv_heads == config.heads
    needs = {
        "learned positions": config.positions == "learned",
        "LayerNorm": config.norm == "layer",
        "dense layers (experts 0)": config.experts == 0,
        "GELU without a gate": config.activation != "swiglu",
        "biases in attention and in dense layers": config.attention_bias and config.mlp_bias,
        "as many key/value heads as heads, which fill the width": heads_fill,
        "no attention sinks": not config.sinks,
        "no qk_norm": config.qk_norm == "none",
        "no window": all(config.layer_window(layer) is None for layer in range(config.layers)),
        "no logit_softcap": config.logit_softcap is None,
    }
    return decoder.unmet("GPT-2", needs)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_ctx": config.context_length,  # llama.cpp's converter asks for it
        "n_layer": config.layers,
        "n_embd": config.width,
        "n_head": config.heads,
        "n_inner": config.expert_width,
        "activation_function": "gelu_new" if config.activation == "gelu_tanh" else "gelu",
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tied_embeddings,
        "use_cache": True,
    }


def config_from_hf(config: dict[str, Any]) -> ModelConfig:
    """Raises ValueError for settings that our model does not have."""
    decoder.refuse_unsupported(
        config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False
    )
    name = config.get("activation_function", "gelu_new")
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"config.json has activation_function {name!r}, but only {', '.join(_ACTIVATIONS)} are supported"
        )
    width, heads = config["n_embd"], config["n_head"]
    return ModelConfig(
        vocab_size=config["vocab_size"],
        context_length=config.get("n_positions", 1024),
        layers=config["n_layer"],
        width=width,
        heads=heads,
        kv_heads=heads,
        attention_bias=True,
        sinks=False,
        window=None,
        window_layers="none",
        experts=0,
        expert_width=config.get("n_inner") or 4 * width,
        mlp_bias=True,
        activation=_ACTIVATIONS[name],  # pyright: ignore[reportArgumentType]
        swiglu_alpha=None,
        swiglu_limit=None,
        positions="learned",
        norm="layer",
        norm_eps=config.get("layer_norm_epsilon", 1e-5),
        tied_embeddings=config.get("tie_word_embeddings", True),
        initializer_range=config.get("initializer_range", 0.02),
    )


def layout(config: ModelConfig) -> Layout:
    shapes = own_shapes(config)
    pieces, hf_shapes = [], {}
    for name, shape in shapes.items():
        for piece, hf_shape in _pieces(name, shape):
            pieces.append(piece)
            hf_shapes[piece.hf_name] = hf_shape
    copies = {"transformer.wte.weight": ("lm_head.weight",)} if config.tied_embeddings else {}
    # Published files hold the causal masks, and names without the prefix: they are of the model without its head.
    masks = r"\.attn\.(bias|masked_bias)$"
    return Layout(shapes, hf_shapes, tuple(pieces), copies=copies, computed=masks, optional_prefix="transformer.")


def _pieces(name: str, shape: Shape) -> Iterator[tuple[Piece, Shape]]:
    """Weights of linear maps are (in, out) in the file (a "Conv1D"), and queries, keys and values side by side in one."""
    module, _, leaf = name.rpartition(".")
    if module in _AROUND:
        yield Piece(name, f"{_AROUND[module]}.{leaf}"), shape
        return
    _, layer, inner = module.split(".", 2)
    prefix, turn = f"transformer.h.{layer}.", transposed if len(shape) == 2 else None
    if inner in _QKV:
        D = shape[0]
        columns = slice(_QKV.index(inner) * D, (_QKV.index(inner) + 1) * D)
        hf_at = (slice(None), columns) if leaf == "weight" else (columns,)
        hf_shape = (*shape[1:], 3 * D)
        yield Piece(name, f"{prefix}attn.c_attn.{leaf}", hf_at=hf_at, to_hf=turn, from_hf=turn), hf_shape
    else:
        yield Piece(name, f"{prefix}{_MODULES[inner]}.{leaf}", to_hf=turn, from_hf=turn), shape[::-1]
