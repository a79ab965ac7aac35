"""Held-out loss as bits per byte of text: the one number that compares models with different tokenizers.

Shape letters: B batch, T time, D model width, V vocabulary, S scored tokens of one micro-batch.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from grist_data import Shards, Tokenizer
    from grist_data.batches import Batch

# Logits are made for this many bytes of float32 at a time: (S, V) whole would be gigabytes with a large vocabulary.
LOGITS_BUDGET_BYTES = 64 * 2**20


def bits_per_byte(
    model,
    shards: Shards,
    *,
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    rank: int = 0,
    world_size: int = 1,
    max_tokens: int | None = None,
    device: torch.device | str = "cpu",
    tokenizer: Tokenizer | None = None,
    documents: bool = False,
    progress: bool = False,
) -> dict[str, float | int]:
    """Negative log likelihood of a split under a model, summed in float64 and reported in four units.

    Every token of the split after the first is predicted exactly once. End-of-text tokens count in the sum (predicting
    where a text ends is part of the code length) and add no bytes. With `stride` below `sequence_length` the windows
    overlap and only the tokens that a window sees for the first time are scored, each with at least
    `sequence_length - stride` tokens before it (except in the first window): slower, and a better estimate of what
    the model can do.

    The divisor is exact in both forms. Over the whole split it is `shards.n_bytes`, the UTF-8 bytes of its text. Under
    `max_tokens` it is the bytes that the scored tokens themselves spell, by the tokenizer. Only where a tokenizer is
    not byte-level, so that its tokens spell no bytes of their own, is it the split's average times the scored tokens.

    Of a split with a loss mask (`shards.has_loss_mask`, conversations say) the trained tokens are scored, and the figure of
    merit is the loss per trained token: there is no text that is theirs alone, and so no bits per byte.

    All ranks must call this together when `world_size` > 1: the sums are all-reduced, and every rank returns the same
    numbers. A model under FSDP2 must have `hidden` registered as a forward method
    (`torch.distributed.fsdp.register_fsdp_forward_method(model, "hidden")`), so that its parameters are gathered.

    Args:
        model: `model.hidden(ids_BT) -> hidden_BTD`, `model.unembedding` (V, D), `model.config`; mode is restored after.
        sequence_length: window in tokens; the model's context length when not given.
        stride: tokens between window starts; `sequence_length` (no overlap) when not given.
        batch_size: windows a rank runs at once.
        max_tokens: score only this many tokens, for a quick look during training.
        tokenizer: needed with `max_tokens` only; the dataset's own is loaded when not given.
        documents: keep attention and positions inside documents, as a model trained with document masks expects.
        progress: draw a bar on stderr (on rank 0).

    Returns:
        `bits_per_byte`; `perplexity` per token; `loss` in nats per token; `tokens` scored; `bytes` of their text. Of a split
        with a loss mask `loss`, `perplexity` and `tokens`.

    Raises:
        ValueError: the split holds fewer than two tokens, `max_tokens` is below 1 or leaves no trained token, or the
            dataset's ids do not fit the model's vocabulary.
    """
    import torch
    import torch.distributed as dist

    from grist_data import evaluation_batches

    _check(model, shards, max_tokens)
    partial = max_tokens is not None and max_tokens < shards.n_tokens - 1
    device = torch.device(device)
    # MPS has no float64 and collectives run where the sums are, so the sums live on CUDA or on the CPU.
    totals_device = device if device.type == "cuda" else torch.device("cpu")
    nll_sum = torch.zeros((), dtype=torch.float64, device=totals_device)
    count_V = torch.zeros(model.config.vocab_size, dtype=torch.int64, device=totals_device)
    batches = evaluation_batches(
        shards,
        sequence_length or model.config.context_length,
        batch_size,
        stride=stride,
        rank=rank,
        world_size=world_size,
        device=device,
        max_tokens=max_tokens,
        documents=documents,
    )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _bar(shards, max_tokens, enabled=progress and rank == 0) as bar:
            weight_VD = _whole(model.unembedding)
            for batch in batches:
                nll_S, targets_S = score(model, batch, weight_VD)
                nll_sum += nll_S.to(totals_device).double().sum()
                count_V += torch.bincount(targets_S.to(totals_device), minlength=len(count_V))
                bar.update(targets_S.numel() * world_size)
    finally:
        model.train(was_training)
        _reshard(model)
    if world_size > 1:
        dist.all_reduce(nll_sum)
        dist.all_reduce(count_V)

    tokens = int(count_V.sum())
    if not tokens:
        raise ValueError(
            f"of the {shards.split} split of {shards.directory} no scored token is trained: score more of it"
        )
    if shards.has_loss_mask:
        return _report(float(nll_sum), tokens, None)
    n_bytes = shards.n_bytes
    if partial:
        spelled = spelled_bytes(count_V, tokenizer or _dataset_tokenizer(shards))
        n_bytes = round(shards.n_bytes * tokens / shards.n_tokens) if spelled is None else spelled
    return _report(float(nll_sum), tokens, n_bytes)


def together(results: list[dict[str, float | int]]) -> dict[str, float | int]:
    """The report on several splits as if they were one, from the reports on each; bits per byte where all have them."""
    nll_nats = sum(result["loss"] * result["tokens"] for result in results)
    n_bytes = None
    if all("bytes" in result for result in results):
        n_bytes = int(sum(result["bytes"] for result in results))
    return _report(nll_nats, int(sum(result["tokens"] for result in results)), n_bytes)


def score(model, batch: Batch, weight_VD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log likelihood (float32, nats) of each scored target of a micro-batch, and those targets: two (S,)."""
    import torch
    import torch.nn.functional as F

    from grist_model.transformer import softcapped

    hidden_BTD = model.hidden(batch.ids_BT, cu_seqlens=batch.cu_seqlens)
    scored_BT = batch.targets_BT >= 0
    hidden_SD, targets_S = hidden_BTD[scored_BT], batch.targets_BT[scored_BT]
    weight_VD = weight_VD.to(hidden_SD.dtype)
    cap = model.config.logit_softcap
    step = max(1, LOGITS_BUDGET_BYTES // (4 * weight_VD.shape[0]))
    chunks = [
        F.cross_entropy(softcapped(F.linear(hidden, weight_VD).float(), cap), targets, reduction="none")
        for hidden, targets in zip(hidden_SD.split(step), targets_S.split(step), strict=True)
    ]
    return torch.cat(chunks), targets_S


def spelled_bytes(count_V: torch.Tensor, tokenizer: Tokenizer) -> int | None:
    """UTF-8 bytes that a bag of tokens spells, `count_V[i]` of token i; special tokens are no text and spell none.

    None where the tokenizer is not byte-level.
    """
    special_ids = set(tokenizer.special_tokens.values())
    present = [i for i in count_V.nonzero().flatten().tolist() if i not in special_ids]
    try:
        return sum(len(tokenizer.token_bytes([i])) * int(count_V[i]) for i in present)
    except ValueError:  # what token_bytes raises for exactly this reason
        return None


def _report(nll_nats: float, tokens: int, n_bytes: int | None) -> dict[str, float | int]:
    loss = nll_nats / tokens
    try:
        perplexity = math.exp(loss)
    except OverflowError:  # a diverged model: above 709 nats a token
        perplexity = math.inf
    report = {"perplexity": perplexity, "loss": loss, "tokens": tokens}
    if n_bytes is None:
        return report
    return {"bits_per_byte": nll_nats / math.log(2) / n_bytes, **report, "bytes": n_bytes}


def _check(model, shards: Shards, max_tokens: int | None) -> None:
    if shards.n_tokens < 2:
        raise ValueError(
            f"the split holds {shards.n_tokens} token(s); at least 2 are needed to predict one from another"
        )
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}; leave it out to score the whole split")
    if shards.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the dataset has a vocabulary of {shards.vocab_size:,} tokens but the model one of "
            f"{model.config.vocab_size:,}: evaluate on a dataset prepared with the model's own tokenizer"
        )


def _whole(weight: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    # The weights do not change during an evaluation, so one gather serves every batch.
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def _reshard(model) -> None:
    """Leave an FSDP2 model as it was found: its root stays gathered after a forward that no backward follows."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()


def _dataset_tokenizer(shards: Shards) -> Tokenizer:
    from grist_data import Tokenizer

    return Tokenizer.load(shards.directory)


def _bar(shards: Shards, max_tokens: int | None, *, enabled: bool) -> tqdm:
    """A bar over the tokens to score; without a terminal, or not enabled, it is silent."""
    from tqdm import tqdm

    total = shards.n_tokens - 1
    total = total if max_tokens is None else min(total, max_tokens)
    return tqdm(
        total=total, desc="evaluate", unit="tok", unit_scale=True, leave=False, disable=None if enabled else True
    )
