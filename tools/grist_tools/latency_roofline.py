"""How near decoding comes to reading memory at full speed, and prefill to multiplying matrices at full speed.

K key/value heads, H head width, E experts, A active experts per token.
"""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from grist_tools.latency import Shape

if TYPE_CHECKING:
    from grist_tools.timing import Ceilings


def step_bytes(model, shape: Shape) -> float:
    """Bytes that one decoding step has to read, on average over the steps of an answer.

        weights + batch * sum over layers of 2 * K * H * visible(layer) * bytes of a cached value

    weights: every parameter and buffer as it lies in memory, packed or not, once, but for two: of a table that is only looked
    up in (an untied input embedding, learned positions) rows too few to count; of the experts the share that `batch` tokens
    touch if each token's A of E are drawn independently, 1 - (1 - A/E)^batch: exact for one sequence, an expectation for
    several. visible: the keys that a new token sees, min(prompt + t, window) at step t.
    """
    config = model.config
    touched = 1 - (1 - config.active_experts / config.experts) ** shape.batch if config.experts else 1.0
    looked_up = () if config.tied_embeddings else ("embedding.",)
    weights = 0.0
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not name.startswith((*looked_up, "position_embedding.")):
            weights += tensor.nbytes * (touched if ".experts." in name else 1.0)
    value_bytes = model.embedding.weight.element_size()
    of_layer = 2 * config.kv_heads * config.attention_head_width * value_bytes
    cached = sum(
        of_layer * fmean(_visible(shape, step, config.layer_window(layer)) for step in range(1, max(2, shape.output)))
        for layer in range(config.layers)
    )
    return weights + shape.batch * cached


def _visible(shape: Shape, step: int, window: int | None) -> int:
    keys = shape.prompt + step
    return keys if window is None else min(keys, window)


def prefill_flops(model, shape: Shape) -> float:
    """Of the forward pass over the prompts: a third of what training on them takes, less the output matrix at all but each
    prompt's last position. `grist_model.accounting.flops_per_token` has the formula."""
    from grist_model import accounting

    config = model.config
    whole = shape.batch * shape.prompt * accounting.flops_per_token(config, shape.prompt) / 3
    return whole - 2.0 * shape.batch * (shape.prompt - 1) * config.vocab_size * config.width


def shares(row: dict[str, Any], n_bytes: float, flops: float, best: Ceilings) -> dict[str, float]:
    """What a row reached, and its share of what this device reached just before by `timing.ceilings`, where a copied byte
    counts twice, once read and once written."""
    flops_per_second = flops / (row["first_token_ms"] / 1e3)
    found = {
        "prefill_flops_per_second": flops_per_second,
        "prefill_share_of_matmul": flops_per_second / best.matmul_flops_per_second,
    }
    if "decode_step_ms" in row:
        bytes_per_second = n_bytes / (row["decode_step_ms"] / 1e3)
        found |= {
            "decode_step_bytes": n_bytes,
            "decode_bytes_per_second": bytes_per_second,
            "decode_share_of_copy": bytes_per_second / best.copy_bytes_per_second,
        }
    return found
