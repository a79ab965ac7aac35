"""What Llama and its descendants share: names and layouts of tensors, and most settings of config.json.

D model width, E experts, F expert width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from grist_model.config import ModelConfig
from grist_model.families.layout import Layout, Piece, Shape, own_shapes, transposed
from grist_model.families.rope_settings import rope_from_hf, rope_misfit, rope_to_hf
from grist_model.quantized_reading import schemes_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

_MODULES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp.down": "mlp.down_proj",
}
# Sizes that every config.json of these families names.
SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_AROUND = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}


@dataclass(frozen=True)
class ExpertNames:
    """How a family calls the router and the matrices of an expert, each a tensor (out, in) of its own."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


def layout(config: ModelConfig, experts: ExpertNames | None = None) -> Layout:
    """Pieces and shapes of a decoder without sinks and shared experts."""
    shapes = own_shapes(config)
    pieces, hf_shapes, zeros = [], {}, []
    for name, shape in shapes.items():
        if name.endswith("router.selection_bias"):
            zeros.append(name)
        for piece, hf_shape in _pieces(name, shape, experts or ExpertNames()):
            pieces.append(piece)
            hf_shapes[piece.hf_name] = hf_shape
    copies = {"model.embed_tokens.weight": ("lm_head.weight",)} if config.tied_embeddings else {}
    return Layout(shapes, hf_shapes, tuple(pieces), tuple(zeros), copies, computed=r"\.rotary_emb\.inv_freq$")


def _pieces(name: str, shape: Shape, experts: ExpertNames) -> Iterator[tuple[Piece, Shape]]:
    module, _, leaf = name.rpartition(".")
    if module in _AROUND:
        yield Piece(name, f"{_AROUND[module]}.{leaf}"), shape
        return
    _, layer, inner = module.split(".", 2)
    prefix = f"model.layers.{layer}."
    if inner == "mlp.router":
        if leaf == "weight":
            yield Piece(name, f"{prefix}{experts.router}.weight"), shape
    elif inner == "mlp.experts":
        yield from _expert_pieces(name, leaf, shape, prefix, experts)
    elif inner == "mlp.gate_up":
        half = shape[0] // 2
        for part, at in (("gate_proj", slice(0, half)), ("up_proj", slice(half, 2 * half))):
            yield Piece(name, f"{prefix}mlp.{part}.{leaf}", at=(at,)), (half, *shape[1:])
    else:
        yield Piece(name, f"{prefix}{_MODULES[inner]}.{leaf}"), shape


def _expert_pieces(
    name: str, leaf: str, shape: Shape, prefix: str, names: ExpertNames
) -> Iterator[tuple[Piece, Shape]]:
    """Ours are (E, in, out), used as x @ w; theirs (out, in), an expert each."""
    E, rows, columns = shape
    half = columns // 2
    halves = ((names.gate, slice(0, half)), (names.up, slice(half, columns)))
    parts = halves if leaf == "w_gate_up" else ((names.down, slice(0, columns)),)
    for expert in range(E):
        for part, at in parts:
            hf_name = f"{prefix}{names.experts}.{expert}.{part}.weight"
            index = (expert, slice(None), at)
            yield Piece(name, hf_name, at=index, to_hf=transposed, from_hf=transposed), (at.stop - at.start, rows)


def common_to_hf(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The settings that all of these families have, each in every spelling that a version of transformers reads."""
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": config.vocab_size,
        "num_hidden_layers": config.layers,
        "hidden_size": config.width,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.attention_head_width,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied_embeddings,
        "initializer_range": config.initializer_range,
        "use_cache": True,
        **rope_to_hf(config),
    }


def common_from_hf(
    config: dict[str, Any], theta: float = 10000.0, context: int = 2048, eps: float = 1e-6
) -> dict[str, Any]:
    """Fields of ModelConfig that all of these families fill alike; defaults are those of transformers' config classes."""
    refuse_unsupported(config, hidden_act="silu")
    width, heads = config["hidden_size"], config["num_attention_heads"]
    head_width = config.get("head_dim") or width // heads
    return {
        "vocab_size": config["vocab_size"],
        "layers": config["num_hidden_layers"],
        "width": width,
        "heads": heads,
        "kv_heads": config.get("num_key_value_heads") or heads,
        "head_width": None if head_width * heads == width else head_width,
        "attention_bias": bool(config.get("attention_bias", False)),
        "sinks": False,
        "window": None,
        "window_layers": "none",
        "mlp_bias": False,
        "router_bias": False,
        "swiglu_alpha": None,
        "swiglu_limit": None,
        "norm_eps": config.get("rms_norm_eps", eps),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "initializer_range": config.get("initializer_range", 0.02),
        **rope_from_hf(config, theta, context),
    }


def refuse_unsupported(config: dict[str, Any], **expected: Any) -> None:
    """Raises ValueError for weights that are quantized in a way that is not read, and for settings that are given with
    another value than expected."""
    schemes_of(config.get("quantization_config"))
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ValueError(f"config.json has {key} {config[key]!r}, but only {value!r} is supported")


def common_needs(config: ModelConfig, state: Mapping[str, Tensor] | None) -> dict[str, bool]:
    """What all of these families need: requirement -> whether it is met."""
    return {
        "no attention sinks": not config.sinks,
        "rotary positions": config.positions == "rotary",
        "RMSNorm": config.norm == "rms",
        "no logit_softcap": config.logit_softcap is None,
        "the plain SiLU gate": config.activation == "swiglu"
        and config.swiglu_alpha is None
        and config.swiglu_limit is None,
        rope_misfit(config) or "": rope_misfit(config) is None,
        "no selection bias in use": not selection_bias_used(config, state),
    }


def expert_needs(config: ModelConfig) -> dict[str, bool]:
    """What the families with experts need besides."""
    return {
        "experts > 0": config.experts > 0,
        "no biases in experts (mlp_bias)": not config.mlp_bias,
        "no router bias": not config.router_bias,
        "no shared expert": not config.shared_expert_width,
    }


def selection_bias_used(config: ModelConfig, state: Mapping[str, Tensor] | None) -> bool:
    """A selection bias fits a family without one only while it is all zeros, which a config alone does not tell."""
    if not (config.experts and config.balance == "bias"):
        return False
    biases = [] if state is None else [x for name, x in state.items() if name.endswith("router.selection_bias")]
    return state is None or any(bool(bias.any()) for bias in biases)


def unmet(family: str, needs: dict[str, bool]) -> str | None:
    """The sentence of a misfit, or None."""
    missing = [need for need, met in needs.items() if not met]
    return f"{family} has {', '.join(missing)}" if missing else None


def slides_everywhere(config: ModelConfig) -> bool:
    """Whether all layers have a window, or none has one."""
    return len({config.layer_window(layer) for layer in range(config.layers)}) == 1


OWN = "gristmill"  # a section of config.json that other software passes over, for what it has no key for


def own_section(config: ModelConfig, *names: str) -> dict[str, Any]:
    return {OWN: {name: getattr(config, name) for name in names}}


def from_own_section(config: dict[str, Any], *names: str) -> dict[str, Any]:
    own = config.get(OWN) or {}
    return {name: own[name] for name in names if name in own}


ROUTER_TRAINING = ("balance", "router_z_loss_weight", "bias_update_rate")
