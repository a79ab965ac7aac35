"""The shape of a model: one frozen dataclass, checked when made. Imports no torch, so command lines start fast."""

from __future__ import annotations

from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


@dataclass(frozen=True)
class YarnConfig:
    """YaRN context extension (Peng et al., 2023): positions stretched by `factor` beyond `original_context` tokens.

    Frequencies that turn more than `beta_fast` times within the original context are kept, those that turn less than
    `beta_slow` times are divided by `factor`, and a ramp joins them. `truncate` rounds the ends of the ramp to whole
    frequencies; GPT-OSS does not.
    """

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = False

    def __post_init__(self) -> None:
        _require(self.factor >= 1, f"yarn.factor must be at least 1, but is {self.factor}")
        _require(
            self.original_context >= 1, f"yarn.original_context must be at least 1, but is {self.original_context}"
        )
        _require(
            0 < self.beta_slow < self.beta_fast,
            f"yarn needs 0 < beta_slow < beta_fast, but they are {self.beta_slow} and {self.beta_fast}",
        )


@dataclass(frozen=True)
class RopeScaling:
    """Context extension by slower rotation, without YaRN's change of magnitude.

    "linear" (Chen et al., "Extending Context Window via Positional Interpolation", 2023) divides every frequency by
    `factor`. "llama3" (Llama 3.1) divides those whose wavelength exceeds original_context / low_frequency_factor, keeps
    those below original_context / high_frequency_factor, and interpolates between. "dynamic" (NTK-aware, by bloc97 and
    emozilla, 2023) changes nothing within original_context; for a longer call, of S tokens, theta is multiplied by
    (factor * S / original_context - factor + 1)^(H / (H - 2)).
    """

    kind: Literal["linear", "llama3", "dynamic"]
    factor: float
    original_context: int = 8192
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0

    def __post_init__(self) -> None:
        kinds = ("linear", "llama3", "dynamic")
        _require(self.kind in kinds, f"rope_scaling.kind must be one of {', '.join(kinds)}, but is {self.kind!r}")
        _require(self.factor >= 1, f"rope_scaling.factor must be at least 1, but is {self.factor}")
        _require(
            self.original_context >= 1,
            f"rope_scaling.original_context must be at least 1, but is {self.original_context}",
        )
        _require(
            0 < self.low_frequency_factor < self.high_frequency_factor,
            "rope_scaling needs 0 < low_frequency_factor < high_frequency_factor, "
            f"but they are {self.low_frequency_factor} and {self.high_frequency_factor}",
        )


# Annotation of a field -> what its values are. numbers.Integral: NumPy's integers too.
_KINDS = {"int": ("a whole number", Integral), "float": ("a number", Real), "bool": ("True or False", bool)}
_CHOICES = {
    "window_layers": ("alternate", "all", "none"),
    "qk_norm": ("none", "head", "width"),
    "router_weights": ("chosen", "all"),
    "activation": ("swiglu", "gelu", "gelu_tanh"),
    "positions": ("rotary", "learned"),
    "norm": ("rms", "layer"),
    "balance": ("aux", "bias", "none"),
}


@dataclass(frozen=True)
class ModelConfig:
    """A decoder, by default in the style of GPT-OSS. ValueError names the field that does not fit.

    head_width None means width // heads. Layers with a window see the last `window` tokens, the token itself included;
    "alternate" gives it to layers 0, 2, 4, ..., a list to those it names. qk_norm: RMSNorm of queries and keys before rotation,
    of each head (Qwen3) or over the whole width (OLMoE). experts=0 makes every feed-forward layer dense, of width expert_width.
    shared_expert_width > 0 adds a dense expert that sees every token. swiglu_alpha None is the plain SiLU gate.
    activation gelu (by erf) or gelu_tanh: up, GELU, down, without a gate (GPT-2), for dense layers. router_weights: the softmax
    over the chosen experts, or the chosen ones' part of the softmax over all. logit_softcap c: logits become
    c * tanh(logits / c) (Gemma 2). norm: RMSNorm, or LayerNorm with a bias. positions: rotary, or a learned vector for each.
    yarn and rope_scaling are two ways to extend the context; at most one of them is set.
    balance: "aux" is the auxiliary loss, "bias" the loss-free selection bias of DeepSeek-V3, "none" neither.
    """

    vocab_size: int = 2048
    context_length: int = 512
    layers: int = 4
    width: int = 256
    heads: int = 4
    kv_heads: int = 2
    head_width: int | None = None
    attention_bias: bool = True
    sinks: bool = True
    window: int | None = 128
    window_layers: Literal["alternate", "all", "none"] | tuple[int, ...] = "alternate"
    qk_norm: Literal["none", "head", "width"] = "none"
    experts: int = 8
    active_experts: int = 2
    expert_width: int = 256
    shared_expert_width: int = 0
    mlp_bias: bool = True
    router_bias: bool = True
    router_weights: Literal["chosen", "all"] = "chosen"
    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    swiglu_alpha: float | None = 1.702
    swiglu_limit: float | None = 7.0
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 150000.0
    yarn: YarnConfig | None = None
    rope_scaling: RopeScaling | None = None
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    logit_softcap: float | None = None
    tied_embeddings: bool = False
    initializer_range: float = 0.02
    balance: Literal["aux", "bias", "none"] = "aux"
    aux_loss_weight: float = 0.01
    router_z_loss_weight: float = 0.001
    bias_update_rate: float = 0.001

    def __post_init__(self) -> None:
        self._check_kinds()
        self._check_sizes()
        self._check_choices()
        self._check_numbers()

    @property
    def attention_head_width(self) -> int:
        """H: head_width, or width // heads where that is None."""
        return self.width // self.heads if self.head_width is None else self.head_width

    def layer_window(self, layer: int) -> int | None:
        """The sliding window of a layer (counted from 0) in tokens, or None where it sees everything before it."""
        if isinstance(self.window_layers, tuple):
            slides = layer in self.window_layers
        else:
            slides = self.window_layers == "all" or (self.window_layers == "alternate" and layer % 2 == 0)
        return self.window if slides else None

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """The ModelConfig of a Hugging Face config.json, read by the family its model_type names.

        Raises ValueError for an unknown model_type or for a setting that the family cannot express.
        """
        from grist_model.families import family_of_hf

        return family_of_hf(config).config_from_hf(config)

    def to_hf(self) -> dict[str, Any]:
        """The config.json of the first family that can express this config; `from_hf` reads it back."""
        from grist_model.families import family_for

        return family_for(self).config_to_hf(self)

    def _check_kinds(self) -> None:
        """Whole numbers, numbers and booleans as the annotations say; choices and parts have checks of their own."""
        for field in fields(self):
            annotation, value = str(field.type), getattr(self, field.name)
            optional = annotation.endswith(" | None")
            kind = _KINDS.get(annotation.removesuffix(" | None"))
            if kind is None or (optional and value is None):
                continue
            name, type_ = kind
            fits = isinstance(value, type_) and (type_ is bool or not isinstance(value, bool))
            _require(fits, f"{field.name} must be {name}{' or None' if optional else ''}, but is {value!r}")

    def _check_sizes(self) -> None:
        for name in ("vocab_size", "context_length", "layers", "width", "heads", "kv_heads", "expert_width"):
            value = getattr(self, name)
            _require(value >= 1, f"{name} must be at least 1, but is {value}")
        if self.head_width is None:
            _require(
                self.width % self.heads == 0,
                f"width {self.width} is not divisible by heads {self.heads}: change one, or set head_width",
            )
        H = self.attention_head_width
        _require(H >= 2 and H % 2 == 0, f"head_width must be even, as rotary embedding turns pairs, but is {H}")
        if isinstance(self.window_layers, tuple):
            strays = [layer for layer in self.window_layers if not 0 <= layer < self.layers]
            _require(not strays, f"window_layers names layers {strays}, but there are {self.layers}, counted from 0")
        _require(
            self.heads % self.kv_heads == 0,
            f"heads must be a multiple of kv_heads, but {self.heads} is not a multiple of {self.kv_heads}",
        )
        _require(
            self.window is None or self.window >= 1,
            f"window counts the token itself, so it must be at least 1 (or None), but is {self.window}",
        )
        _require(self.experts >= 0, f"experts must be 0 (dense) or more, but is {self.experts}")
        if self.experts:
            _require(
                1 <= self.active_experts <= self.experts,
                f"active_experts must be between 1 and experts ({self.experts}), but is {self.active_experts}",
            )
        _require(
            self.shared_expert_width >= 0,
            f"shared_expert_width must be 0 (none) or more, but is {self.shared_expert_width}",
        )
        _require(
            bool(self.experts) or not self.shared_expert_width,
            "shared_expert_width needs experts > 0: a dense layer is one shared expert already, widen expert_width",
        )

    def _check_choices(self) -> None:
        _require(
            self.yarn is None or self.rope_scaling is None,
            "yarn and rope_scaling cannot both be set: choose one of them",
        )
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            allowed = value in choices or (name == "window_layers" and isinstance(value, tuple))
            _require(allowed, f"{name} must be one of {', '.join(choices)}, but is {value!r}")
        _require(
            self.activation == "swiglu" or not self.experts,
            f"activation {self.activation} is for dense layers: experts are gated, so set experts to 0 or use swiglu",
        )
        _require(
            self.positions == "rotary" or (self.yarn is None and self.rope_scaling is None),
            "yarn and rope_scaling are for rotary positions, but positions are learned",
        )

    def _check_numbers(self) -> None:
        for name in ("rope_theta", "norm_eps", "initializer_range"):
            value = getattr(self, name)
            _require(value > 0, f"{name} must be greater than 0, but is {value}")
        for name in ("swiglu_alpha", "swiglu_limit", "logit_softcap"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"{name} must be greater than 0 (or None), but is {value}")
        for name in ("aux_loss_weight", "router_z_loss_weight", "bias_update_rate"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} must be 0 or more, but is {value}")
