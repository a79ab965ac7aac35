"""Held-out loss as bits per byte of text: the one number that compares models with different tokenizers.

Shape letters: B batch, T time, D model width, V vocabulary, S scored tokens of one micro-batch, N documents.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from grist_eval.document_figures import intervals, report, together

if TYPE_CHECKING:
    import torch
    from tqdm import tqdm

    from grist_data import Shards, Tokenizer
    from grist_data.batches import Batch
    from grist_eval.document_sums import SpelledBytes

__all__ = ["bits_per_byte", "evaluating", "score", "spelled_bytes", "together"]

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
    group: Any = None,
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

    All ranks must call this together when `world_size` > 1: batches are the same on any number of ranks and the sums of
    documents are gathered in order, so the numbers are the same bits. A model under FSDP2 must have `hidden` registered as
    a forward method (`torch.distributed.fsdp.register_fsdp_forward_method(model, "hidden")`), so that its parameters are
    gathered.

    Args:
        model: `model.hidden(ids_BT) -> hidden_BTD`, `model.unembedding` (V, D), `model.config`; mode is restored after.
        sequence_length: window in tokens; the model's context length when not given.
        stride: tokens between window starts; `sequence_length` (no overlap) when not given.
        batch_size: windows a rank runs at once.
        group: of the ranks that exchange sums on the host; the default one when not given.
        max_tokens: score only this many tokens, for a quick look during training.
        tokenizer: counts the bytes of documents; the dataset's own is loaded when not given.
        documents: keep attention and positions inside documents, as a model trained with document masks expects.
        progress: draw a bar on stderr (on rank 0).

    Returns:
        `bits_per_byte`; `perplexity` per token; `loss` in nats per token; `tokens` scored; `bytes` of their text. Of a split
        with a loss mask `loss`, `perplexity` and `tokens`. Of others also what `document_figures.intervals` says of their
        documents.

    Raises:
        ValueError: the split holds fewer than two tokens, `max_tokens` is below 1 or leaves no trained token, or the
            dataset's ids do not fit the model's vocabulary.
    """
    import torch

    from grist_data import evaluation_batches
    from grist_eval.document_sums import DocumentSums
    from grist_eval.questions import Ranks

    _check(model, shards, max_tokens)
    length = sequence_length or model.config.context_length
    n_targets = min(shards.n_tokens - 1, max_tokens or shards.n_tokens)
    batches = evaluation_batches(
        shards,
        length,
        batch_size,
        stride=stride,
        rank=rank,
        world_size=world_size,
        device=torch.device(device),
        max_tokens=max_tokens,
        documents=documents,
    )
    spelled = None if shards.has_loss_mask else _spelled(shards, tokenizer, model.config.vocab_size)
    sums = DocumentSums(shards, length, stride or length, batch_size, n_targets, spelled)
    with evaluating(model) as weight_VD, _bar(shards, max_tokens, enabled=progress and rank == 0) as bar:
        for i, batch in enumerate(batches):
            nll_S, targets_S = score(model, batch, weight_VD)
            sums.add(i * world_size + rank, nll_S.cpu().numpy(), targets_S.cpu().numpy())
            bar.update(targets_S.numel() * world_size)
    nats_N, tokens_N, bytes_N = sums.totals(Ranks(rank, world_size, group))
    tokens = int(tokens_N.sum())
    if not tokens:
        raise ValueError(
            f"of the {shards.split} split of {shards.directory} no scored token is trained: score more of it"
        )
    scored_N = tokens_N > 0
    nll_nats = math.fsum(nats_N[scored_N].tolist())
    if shards.has_loss_mask:
        return report(nll_nats, tokens, None)
    if spelled is None:  # the split's average stands for the bytes of each token
        bytes_N = tokens_N * (shards.n_bytes / shards.n_tokens)
    n_bytes = shards.n_bytes if n_targets == shards.n_tokens - 1 else round(bytes_N.sum())
    found = intervals(nats_N[scored_N], tokens_N[scored_N], bytes_N[scored_N])
    return {**report(nll_nats, tokens, n_bytes), **found}


@contextlib.contextmanager
def evaluating(model) -> Iterator[torch.Tensor]:
    """-> the unembedding (V, D), whole. Inside, the model is in evaluation mode and keeps nothing for a backward; after it, it
    is as it was found. All ranks of a sharded model enter together."""
    import torch

    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield _whole(model.unembedding)
    finally:
        model.train(was_training)
        _reshard(model)


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


def _spelled(shards: Shards, tokenizer: Tokenizer | None, vocab_size: int) -> SpelledBytes | None:
    """None where the tokenizer, by default the dataset's own, is not byte-level: its tokens spell no bytes of their own."""
    from grist_data import Tokenizer
    from grist_eval.document_sums import SpelledBytes

    tokenizer = tokenizer or Tokenizer.load(shards.directory)
    try:
        tokenizer.token_bytes([])
    except ValueError:  # what token_bytes raises for exactly this reason
        return None
    return SpelledBytes(tokenizer, vocab_size)


def _bar(shards: Shards, max_tokens: int | None, *, enabled: bool) -> tqdm:
    """A bar over the tokens to score; without a terminal, or not enabled, it is silent."""
    from tqdm import tqdm

    total = shards.n_tokens - 1
    total = total if max_tokens is None else min(total, max_tokens)
    return tqdm(
        total=total, desc="evaluate", unit="tok", unit_scale=True, leave=False, disable=None if enabled else True
    )
