"""What llama.cpp calls our tensors, how it lays them out, and which models of a family its architectures compute.

D model width, E experts, F expert width, H head width. ggml lists axes from the innermost; shapes here are row-major, as in
PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from grist_model.config import ModelConfig
from grist_tools.gguf_source import Source

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Architecture:
    """name: general.architecture. neighbours: rotates neighbouring columns of a head, so rows of q and k are reordered.
    shares_embedding: reads a file without output.weight as tied. rope_factors: reads rope_freqs.weight. attention_biases:
    reads them. router_weights: the one way of ours that is built in.
    """

    name: str
    neighbours: bool = False
    shares_embedding: bool = True
    rope_factors: bool = False
    attention_biases: bool = False
    router_weights: str = "chosen"


_LLAMA = Architecture("llama", neighbours=True, rope_factors=True, attention_biases=True)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mixtral": _LLAMA,
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe"),
    "olmoe": Architecture("olmoe", shares_embedding=False, router_weights="all"),
    "gpt2": Architecture("gpt2", attention_biases=True),
    "gpt_oss": Architecture("gpt-oss", shares_embedding=False, attention_biases=True),
}


@dataclass(frozen=True)
class Part:
    """The part `box` of our tensor `name`. turned: transposed, for ours are (in, out). heads: number of heads whose rows are
    reordered from halves to neighbours; 0 leaves them."""

    name: str
    box: Box
    turned: bool = False
    heads: int = 0


@dataclass(frozen=True)
class GgufTensor:
    """parts: what it is made of, one after the other along the first axis; or `fixed`, numbers that no file of ours holds."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...] = ()
    fixed: tuple[float, ...] = ()


def unfit(family: str, config: ModelConfig) -> str | None:
    """Why llama.cpp would not compute this model although it has the family, or None."""
    architecture = ARCHITECTURES[family]
    scaling = config.rope_scaling.kind if config.rope_scaling else None
    needs = {
        "no dynamic rope_scaling": scaling != "dynamic",
        "no llama3 rope_scaling": scaling != "llama3" or architecture.rope_factors,
        "no attention biases": not config.attention_bias or architecture.attention_biases,
        f"router_weights {architecture.router_weights}": not config.experts
        or config.router_weights == architecture.router_weights,
        "no windows": family == "gpt_oss" or not any(sliding_layers(config)),
    }
    if family == "gpt_oss":
        needs["swiglu_limit 7"] = config.swiglu_limit == 7.0
    if family == "olmoe":
        needs["as many key/value heads as heads"] = config.kv_heads == config.heads
    missing = [need for need, met in needs.items() if not met]
    return f"{architecture.name} in llama.cpp has {', '.join(missing)}" if missing else None


def sliding_layers(config: ModelConfig) -> list[bool]:
    """Which layers have a window that is shorter than the context."""
    windows = [config.layer_window(layer) for layer in range(config.layers)]
    return [window is not None and window < config.context_length for window in windows]


def gguf_tensors(source: Source) -> list[GgufTensor]:
    """Every tensor of the file, in its order."""
    architecture, config = ARCHITECTURES[source.family], source.config
    tensors = []
    for name, shape in source.shapes.items():
        tensors += _of_ours(name, shape, source)
    tensors = [_reordered(tensor, config) if architecture.neighbours else tensor for tensor in tensors]
    if config.tied_embeddings and not architecture.shares_embedding:
        embedding = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
        tensors.append(replace(embedding, name="output.weight"))
    if source.family == "gpt_oss" and not config.attention_bias:
        tensors += _zero_biases(config)
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        tensors.append(_rope_factors(config))
    return tensors


_AROUND = {
    "embedding": "token_embd",
    "position_embedding": "position_embd",
    "norm": "output_norm",
    "head": "output",
}
_MODULES = {
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.o": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "mlp_norm": "ffn_norm",
    "mlp.router": "ffn_gate_inp",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}


def _of_ours(name: str, shape: tuple[int, ...], source: Source) -> Iterator[GgufTensor]:
    module, _, leaf = name.rpartition(".")
    if module in _AROUND:
        yield _whole(f"{_AROUND[module]}.{leaf}", name, shape)
        return
    _, layer, inner = module.split(".", 2)
    block = f"blk.{layer}."
    if source.family == "gpt2" and inner in ("attention.q", "attention.k", "attention.v"):
        if inner == "attention.q":
            parts = [replace(_all(name, shape), name=name.replace("attention.q", f"attention.{x}")) for x in "qkv"]
            yield GgufTensor(f"{block}attn_qkv.{leaf}", (3 * shape[0], *shape[1:]), tuple(parts))
    elif inner == "mlp.gate_up":
        half = shape[0] // 2
        for part, rows in (("ffn_gate", (0, half)), ("ffn_up", (half, 2 * half))):
            box = (rows, *((0, length) for length in shape[1:]))
            yield GgufTensor(f"{block}{part}.{leaf}", (half, *shape[1:]), (Part(name, box),))
    elif inner == "mlp.experts":
        yield from _of_experts(block, leaf, name, shape)
    elif leaf == "sinks":
        yield _whole(f"{block}attn_sinks.weight", name, shape)
    elif source.family == "gpt_oss" and inner == "mlp_norm":
        yield _whole(f"{block}post_attention_norm.{leaf}", name, shape)
    else:
        yield _whole(f"{block}{_MODULES[inner]}.{leaf}", name, shape)


def _of_experts(block: str, leaf: str, name: str, shape: tuple[int, ...]) -> Iterator[GgufTensor]:
    """w_gate_up (E, D, 2F) and w_down (E, F, D), used as x @ w, to (E, out, in); biases (E, out)."""
    E, out = shape[0], shape[-1]
    halves = (("gate", (0, out // 2)), ("up", (out // 2, out)))
    for which, columns in halves if leaf.endswith("gate_up") else (("down", (0, out)),):
        rows = columns[1] - columns[0]
        gguf_name = f"{block}ffn_{which}_exps"
        if leaf.startswith("b_"):
            yield GgufTensor(f"{gguf_name}.bias", (E, rows), (Part(name, ((0, E), columns)),))
        else:
            each = tuple(Part(name, ((e, e + 1), (0, shape[1]), columns), turned=True) for e in range(E))
            yield GgufTensor(f"{gguf_name}.weight", (E, rows, shape[1]), each)


def _all(name: str, shape: tuple[int, ...]) -> Part:
    return Part(name, tuple((0, length) for length in shape))


def _whole(gguf_name: str, name: str, shape: tuple[int, ...]) -> GgufTensor:
    return GgufTensor(gguf_name, shape, (_all(name, shape),))


def _reordered(tensor: GgufTensor, config: ModelConfig) -> GgufTensor:
    heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(tensor.name.split(".")[-2])
    return tensor if heads is None else replace(tensor, parts=(replace(tensor.parts[0], heads=heads),))


def _zero_biases(config: ModelConfig) -> Iterator[GgufTensor]:
    """llama.cpp's GPT-OSS does not load without them."""
    q, kv = (n * config.attention_head_width for n in (config.heads, config.kv_heads))
    sizes = {"attn_q": q, "attn_k": kv, "attn_v": kv, "attn_output": config.width}
    for layer in range(config.layers):
        for name, size in sizes.items():
            yield GgufTensor(f"blk.{layer}.{name}.bias", (size,), fixed=(0.0,) * size)


def _rope_factors(config: ModelConfig) -> GgufTensor:
    """What llama.cpp divides each frequency of a head by."""
    from grist_model.rope import frequencies

    H, theta = config.attention_head_width, config.rope_theta
    factors = frequencies(H, theta, None) / frequencies(H, theta, config.rope_scaling)
    return GgufTensor("rope_freqs.weight", (H // 2,), fixed=tuple(factors.tolist()))
