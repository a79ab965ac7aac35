"""Contestants of the generation benchmark: one random model in transformers and, from the same files, in grist_model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from grist_model import Transformer

OURS = "grist_model"
BASE = "transformers, static cache"
SPREAD = (
    2.0  # on transformers' initial weights: logits that differ, so that the greedy text is not one id over and over
)


class Text(NamedTuple):
    """Ids of one run, and the host's clock when each was there, in seconds from the start of the call."""

    ids: list[int]
    seconds: list[float]

    @property
    def first_ms(self) -> float:
        return 1e3 * self.seconds[0]

    @property
    def between_ms(self) -> float:
        """From one id to the next, on average."""
        return 1e3 * (self.seconds[-1] - self.seconds[0]) / (len(self.seconds) - 1)


# Prompt and number of ids to greedy text.
Contestant = Callable[[list[int], int], Text]


def contestants(kind: str, layers: int, width: int, vocab_size: int, context: int) -> dict[str, Contestant]:
    """By name. kind: `dense`, a Llama, or `moe`, a Qwen3-MoE of 32 experts, 4 of them active. float32, on the CPU.

    Raises ImportError without transformers.
    """
    theirs = _transformers_model(kind, layers, width, vocab_size, context)
    return {
        OURS: of_model(_same_model(theirs)),
        BASE: of_transformers(theirs, "static"),
        "transformers, dynamic cache": of_transformers(theirs, "dynamic"),
    }


def _transformers_model(kind: str, layers: int, width: int, vocab_size: int, context: int) -> Any:
    import torch

    try:
        import transformers
    except ImportError as error:
        raise ImportError("the benchmark runs beside transformers: pip install 'gristmill[export]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    heads = max(1, width // 64)
    common = {
        "vocab_size": vocab_size, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": heads, "max_position_embeddings": context, "bos_token_id": None, "eos_token_id": None,
        "pad_token_id": 0,
    }  # fmt: skip
    if kind == "dense":
        config = transformers.LlamaConfig(intermediate_size=width * 11 // 4, **common)
    else:
        experts = {
            "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": width // 2, "norm_topk_prob": True,
            "head_dim": width // heads,
        }  # fmt: skip
        config = transformers.Qwen3MoeConfig(**common, **experts)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(SPREAD)
    return model


def _same_model(theirs: Any) -> Transformer:
    from grist_model import load

    with tempfile.TemporaryDirectory(prefix="grist-bench-generation-") as folder:
        theirs.save_pretrained(folder)
        return load(folder)


def of_model(model: Transformer) -> Contestant:
    from grist_model import generate

    def run(prompt: list[int], count: int) -> Text:
        seconds: list[float] = []
        start = time.perf_counter()
        ids = generate(
            model,
            prompt,
            max_new_tokens=count,
            temperature=0,
            on_token=lambda *_: seconds.append(time.perf_counter() - start),
        )
        return Text(ids, seconds)

    return run


class _Listener:
    """What transformers calls a streamer: it hears the prompt, then every id."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds: list[float] = []

    def put(self, ids: torch.Tensor) -> None:
        self.seconds.append(time.perf_counter() - self.start)

    def end(self) -> None:
        self.seconds = self.seconds[1:]


def of_transformers(model: Any, cache: str) -> Contestant:
    import torch

    def run(prompt: list[int], count: int) -> Text:
        ids = torch.tensor([prompt])
        listener = _Listener()
        text = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, streamer=listener,
            cache_implementation=cache,
        )  # fmt: skip
        return Text(text[0, len(prompt) :].tolist(), listener.seconds)

    return run
