"""Parameters, FLOPs and cache bytes of a model, from its config alone.

D model width, N query heads, K key/value heads, H head width, E experts, A active experts, F expert width, V
vocabulary.
"""

from __future__ import annotations

from grist_model.config import ModelConfig


def parameters(config: ModelConfig) -> int:
    """All trained values: what `sum(p.numel() for p in model.parameters())` gives."""
    embeddings = config.vocab_size * config.width * (1 if config.tied_embeddings else 2)
    if config.positions == "learned":
        embeddings += config.context_length * config.width
    return embeddings + config.layers * _layer(config, config.experts) + _norm(config)


def active_parameters(config: ModelConfig) -> int:
    """The values one token uses: A of the E experts, and of the embeddings only the output matrix.

    The count of the GPT-OSS model card: looking up an embedding is no arithmetic, so an untied input table is left out, and
    one of positions.
    """
    return config.vocab_size * config.width + config.layers * _layer(config, config.active_experts) + _norm(config)


def flops_per_token(config: ModelConfig, context_length: int) -> float:
    """Training FLOPs per token, forward and backward, averaged over sequences of context_length tokens.

        6 * M + sum over layers of 12 * N * H * visible(layer)

    M counts the weights of the matrix products a token goes through (attention, router, A experts, shared expert,
    output matrix; no biases, norms or input embedding): 2 FLOPs forward and 4 backward each. A visible key costs 2 * H
    FLOPs per head for its score and as many for its value, times 3 with the backward pass. visible is the mean number
    of keys a query sees under the causal mask and the layer's window W: sum over i = 1..T of min(i, W), divided by T.
    Recomputation is not counted: this is the numerator of model FLOPs utilisation, causal- and window-exact.
    """
    D, NH = config.width, config.heads * config.attention_head_width
    KH = config.kv_heads * config.attention_head_width
    attention = 2 * D * NH + 2 * D * KH
    feed_forward = _matrices(config) * D * config.expert_width
    if config.experts:
        feed_forward = feed_forward * config.active_experts + 3 * D * config.shared_expert_width + D * config.experts
    weights = config.vocab_size * D + config.layers * (attention + feed_forward)
    visible = sum(mean_visible_keys(context_length, config.layer_window(layer)) for layer in range(config.layers))
    return 6.0 * weights + 12.0 * NH * visible


def mean_visible_keys(context_length: int, window: int | None) -> float:
    """How many keys a query sees on average, itself included, in a causal sequence of context_length tokens."""
    if context_length < 1:
        raise ValueError(f"context_length must be at least 1, but is {context_length}")
    full = min(context_length, window or context_length)
    return (full * (full + 1) / 2 + (context_length - full) * full) / context_length


def kv_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2) -> int:
    """Key/value cache bytes one token takes over all layers (bytes_per_value: 2 for bfloat16).

    Layers with a window count in full, as in a `KVCache` without `rollback`; generation keeps only their window.
    """
    return 2 * config.layers * config.kv_heads * config.attention_head_width * bytes_per_value


def _layer(config: ModelConfig, experts: int) -> int:
    return _attention(config) + _feed_forward(config, experts) + 2 * _norm(config)


def _norm(config: ModelConfig) -> int:
    return config.width * (1 if config.norm == "rms" else 2)


def _attention(config: ModelConfig) -> int:
    D, H = config.width, config.attention_head_width
    weights = 2 * D * config.heads * H + 2 * D * config.kv_heads * H
    biases = (config.heads + 2 * config.kv_heads) * H + D if config.attention_bias else 0
    of_heads = {"none": 0, "head": 2, "width": config.heads + config.kv_heads}[config.qk_norm]
    return weights + biases + of_heads * H + (config.heads if config.sinks else 0)


def _feed_forward(config: ModelConfig, experts: int) -> int:
    """Of one layer, with `experts` of its experts counted."""
    if not config.experts:
        return _mlp(config, config.expert_width)
    router = config.width * config.experts + (config.experts if config.router_bias else 0)
    shared = _mlp(config, config.shared_expert_width) if config.shared_expert_width else 0
    return router + experts * _mlp(config, config.expert_width) + shared


def _mlp(config: ModelConfig, width: int) -> int:
    matrices = _matrices(config)
    return matrices * config.width * width + ((matrices - 1) * width + config.width if config.mlp_bias else 0)


def _matrices(config: ModelConfig) -> int:
    """Of a feed-forward layer: gate, up and down, or up and down."""
    return 3 if config.activation == "swiglu" else 2
