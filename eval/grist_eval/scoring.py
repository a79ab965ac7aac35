"""Log-likelihood of continuations: batches that are the same on any number of ranks, one forward of the model each.

Requests come in groups, such as the choices of a question. Groups are sorted by length and cut into batches, the batches are
dealt to the ranks in turn, and a batch is one stream of tokens in which whatever its sequences begin with in common is
computed once (`grist_model.token_tree`). So no token is padding, and scores do not depend on how many ranks there are.

V vocabulary, R scored tokens of a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from grist_eval.encoding import Encoded

if TYPE_CHECKING:
    import torch

# Unique tokens of a batch, about: enough for matrix products to be efficient, few enough for a CPU's memory.
BATCH_TOKENS = 4096
# float32 logits of a batch.
LOGITS_BUDGET_BYTES = 512 * 2**20
# Of logits at a time: what stays in a CPU's cache over the passes of logsumexp (1 MiB takes a third of the time of 32); on a
# GPU a chunk only bounds the memory.
_CHUNK_BYTES = {"cpu": 2**20}
_LARGE_CHUNK_BYTES = 32 * 2**20


class Score(NamedTuple):
    """Of a continuation: sum of its tokens' log-probabilities in nats, whether each was the likeliest, how many there are."""

    log_likelihood: float
    greedy: bool
    tokens: int


def plan(groups: Sequence[Sequence[Encoded]], vocab_size: int, batch_tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of the groups of each batch, long groups first, so that a batch too large for the memory fails at once.

    Raises:
        ValueError: batch_tokens is below 1.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, but is {batch_tokens}")
    sizes = [_unique_tokens(group) for group in groups]
    most_scored = max(1, LOGITS_BUDGET_BYTES // (4 * vocab_size))
    batches: list[list[int]] = []
    tokens = scored = 0
    for i in sorted(range(len(groups)), key=lambda i: -sizes[i]):
        of_group = sum(request.scored for request in groups[i])
        if not batches or tokens + sizes[i] > batch_tokens or scored + of_group > most_scored:
            batches.append([])
            tokens = scored = 0
        batches[-1].append(i)
        tokens, scored = tokens + sizes[i], scored + of_group
    return batches


def _unique_tokens(group: Sequence[Encoded]) -> int:
    from grist_model.token_tree import shared_length

    ordered = sorted(request.ids[:-1] for request in group)
    repeated = sum(shared_length(a, b) for a, b in itertools.pairwise(ordered))
    return sum(map(len, ordered)) - repeated


def score_groups(
    model: Any,
    groups: Sequence[Sequence[Encoded]],
    batches: Sequence[Sequence[int]],
    *,
    rank: int = 0,
    world_size: int = 1,
    done: Callable[[int, list[Score]], None],
) -> None:
    """Score this rank's share of the batches, every world_size-th, and call done(index of a group, its scores) for each group.

    All ranks call this together where the model is sharded: every one runs the same number of forwards.

    Raises:
        ValueError: "dynamic" rotary scaling and a sequence beyond its original context, where angles depend on the batch; ids
            outside the model's vocabulary.
    """
    _check(model, groups)
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(batches), world_size):
            mine = first + rank
            # A rank without a batch of its own runs another's: a sharded model needs all ranks in every forward.
            batch = batches[min(mine, len(batches) - 1)]
            scores = iter(score_batch(model, [request for i in batch for request in groups[i]]))
            for i in batch if mine < len(batches) else ():
                done(i, [next(scores) for _ in groups[i]])
    finally:
        model.train(was_training)
        _reshard(model)


def score_batch(model: Any, requests: Sequence[Encoded]) -> list[Score]:
    """The scores of some requests by one forward of the model."""
    import numpy as np
    import torch

    from grist_model.token_tree import TokenTree

    tree = TokenTree([request.ids[:-1] for request in requests], [request.scored for request in requests])
    # no_grad, not inference_mode, whose tensors FSDP would keep and later fail to train on.
    with torch.no_grad():
        logits_RV = tree.logits(model)
    first = len(tree.ids) - tree.n_wanted
    rows = np.concatenate([path[-request.scored :] - first for path, request in zip(tree.paths, requests, strict=True)])
    targets = np.concatenate([request.ids[-request.scored :] for request in requests])
    row, target = (torch.from_numpy(each).to(logits_RV.device) for each in (rows, targets))
    log_sum_R, best_R = _log_sums(logits_RV)
    # Summed in float64 on the host, so that the order of requests in a batch does not matter.
    log_likelihood = (logits_RV[row, target].float() - log_sum_R[row]).double().cpu().numpy()
    greedy = (best_R[row] == target).cpu().numpy()
    ends = np.cumsum([request.scored for request in requests])
    return [
        Score(float(log_likelihood[end - n : end].sum()), bool(greedy[end - n : end].all()), n)
        for end, n in zip(ends.tolist(), (request.scored for request in requests), strict=True)
    ]


def _log_sums(logits_RV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithm of the softmax denominator in float32, and the likeliest id, of every row: two (R,)."""
    import torch

    chunk_bytes = _CHUNK_BYTES.get(logits_RV.device.type, _LARGE_CHUNK_BYTES)
    chunk = max(1, chunk_bytes // (4 * logits_RV.shape[1]))
    parts = [(part.float().logsumexp(-1), part.argmax(-1)) for part in logits_RV.split(chunk)]
    return torch.cat([log_sum for log_sum, _ in parts]), torch.cat([best for _, best in parts])


def _check(model: Any, groups: Sequence[Sequence[Encoded]]) -> None:
    config = model.config
    longest = max((len(request.ids) - 1 for group in groups for request in group), default=0)
    largest = max((max(request.ids) for group in groups for request in group), default=0)
    if largest >= config.vocab_size:
        raise ValueError(
            f"id {largest} is outside the model's vocabulary of {config.vocab_size}: is this its tokenizer?"
        )
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and longest > scaling.original_context:
        raise ValueError(
            f'a sequence of {longest} tokens exceeds the original context of {scaling.original_context}, and with "dynamic" '
            "rotary scaling its angles would depend on the batch: score shorter texts or fewer examples"
        )


def _reshard(model: Any) -> None:
    """Leave an FSDP2 model as it was found: its root stays gathered after a forward that no backward follows."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.reshard()
