"""Bits per byte of texts one by one, with any tokenizer: each is predicted from its own beginning alone.

Windows of all documents are laid end to end in streams without padding, attention kept inside each window, and the streams are
dealt to the ranks. What is in a stream depends on the texts alone, so figures are the same bits on any number of ranks, and
when a run goes on where another stopped. At any time the texts of a few streams are in memory, and three numbers a document.
"""

from __future__ import annotations

import contextlib
import itertools
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_eval.document_figures import figures
from grist_eval.document_streams import Figures, How, OpenDocument, Window, batch_of_windows, opened, streams_of
from grist_eval.result_cache import ResultCache
from grist_eval.text_documents import TextDocument

if TYPE_CHECKING:
    import torch

    from grist_data import Tokenizer
    from grist_eval.questions import Ranks

BATCH_TOKENS = 4096
CACHE_NAME = "bits_per_byte"
_STREAMS_A_RANK = 4  # between two meetings of the ranks


def bits_per_byte_of_documents(
    model,
    tokenizer: Tokenizer,
    documents: Iterable[TextDocument],
    *,
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
    rank: int = 0,
    world_size: int = 1,
    group: Any = None,
    cache: str | Path | None = None,
    model_key: str | None = None,
    done: Callable[[TextDocument, Figures], Any] | None = None,
    total: int | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Negative log likelihood of every token of every document, after the token that documents begin with.

    That is the tokenizer's begin-of-text token, or else its end-of-text token, which is not scored; nor is the end of a
    document, so that tokenizers which mark it differently compare, as in lm_eval's rolling log-likelihood. Window k of a
    document reads `sequence_length` tokens from k * stride on and scores those that no earlier window scored.

    With world_size > 1 all ranks call this together with the same documents, and each returns the same. A model under FSDP2
    works as in `bits_per_byte`.

    Args:
        sequence_length: of windows; the model's context length when not given. stride: `sequence_length` when not given.
        batch_tokens: ids of a stream, about; at least one window.
        group: of the ranks that exchange sums on the host; the default one when not given.
        cache: directory of documents that are known; model_key tells models apart in it, and is needed with it.
        done: is told each document and its figures, in order (on every rank).
        total: how many documents there are, for the bar that `progress` draws on stderr (on rank 0).

    Returns:
        `bits_per_byte`, `perplexity`, `loss`, `tokens`, `bytes`, `documents` and the intervals of `document_figures`, of all
        documents, and under `domains` of those of each domain.

    Raises:
        ValueError: no documents; one without a token, or with ids outside the model's vocabulary; a stride outside 1 to
            sequence_length; a tokenizer with neither begin- nor end-of-text token; windows beyond the original context of
            "dynamic" rotary scaling, whose angles would depend on what else is in a stream; a cache without a model_key.
    """
    from grist_eval.bits_per_byte import evaluating
    from grist_eval.encoding import start_id
    from grist_eval.questions import Ranks

    length = sequence_length or model.config.context_length
    stride = stride or length
    _check(model, length, stride, batch_tokens)
    if cache is not None and model_key is None:
        raise ValueError("a cache needs model_key, which tells the results of this model from those of others")
    how = How(start_id(tokenizer), length, stride, batch_tokens, cache is not None)
    ranks, totals = Ranks(rank, world_size, group), _Totals()
    store = None if cache is None else ResultCache(cache, str(model_key), CACHE_NAME)
    with (
        contextlib.closing(store) if store else contextlib.nullcontext(),
        evaluating(model) as weight_VD,
        _bar(total, enabled=progress and rank == 0) as bar,
    ):
        known = ranks.same({} if store is None or rank else store.known())
        waiting: deque[OpenDocument] = deque()
        streams = streams_of(opened(model, tokenizer, documents, how, known), how, waiting)
        while some := list(itertools.islice(streams, world_size * _STREAMS_A_RANK)):
            _score(model, weight_VD, some, ranks)
            finished = list(_finished(waiting))
            if store is not None and rank == 0:
                store.add({of.key: of.figures for of in finished if of.known is None})
            for of in finished:
                totals.add(of.document.domain, of.figures)
                if done is not None:
                    done(of.document, of.figures)
            bar.update(len(finished))
    return totals.report()


def _check(model, length: int, stride: int, batch_tokens: int) -> None:
    if not 1 <= stride <= length:
        raise ValueError(f"stride must lie in 1 to sequence_length ({length}), but is {stride}")
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens must be at least 1, but is {batch_tokens}")
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic" and length > scaling.original_context:
        raise ValueError(
            f'sequence_length {length} exceeds the original context of {scaling.original_context}, and with "dynamic" rotary '
            "scaling angles would depend on what else is in a stream: set it to that or less"
        )


def _score(model, weight_VD: torch.Tensor, streams: Sequence[list[Window]], ranks: Ranks) -> None:
    """Give every document of the streams what its windows there come to. Streams of which all is known are not run; the others
    are run whole."""
    needed = [stream for stream in streams if any(window.of.known is None for window in stream)]
    mine = []
    for first in range(0, len(needed), ranks.world_size):
        # A rank without a stream of its own runs another's: a sharded model needs all ranks in every forward.
        mine.append(_nats(model, weight_VD, needed[min(first + ranks.rank, len(needed) - 1)]))
    of_rank = ranks.gathered(mine)
    for number, stream in enumerate(needed):
        nats = of_rank[number % ranks.world_size][number // ranks.world_size]
        for window, of_window in zip(stream, nats, strict=True):
            window.of.nats.append(of_window)
    for window in itertools.chain.from_iterable(streams):
        window.of.left -= 1


def _nats(model, weight_VD: torch.Tensor, stream: list[Window]) -> list[float]:
    """Of each window, the nats of its scored tokens: one forward, sums in float64."""
    import numpy as np

    from grist_eval.bits_per_byte import score

    nll_S, _ = score(model, batch_of_windows(stream).to(weight_VD.device), weight_VD)
    ends = np.cumsum([window.scored for window in stream])
    return [float(part.sum()) for part in np.split(nll_S.cpu().double().numpy(), ends[:-1])]


def _finished(waiting: deque[OpenDocument]) -> Iterator[OpenDocument]:
    while waiting and waiting[0].left == 0:
        yield waiting.popleft()


class _Totals:
    """Figures of all documents so far, 28 bytes each."""

    def __init__(self) -> None:
        self._nats, self._tokens, self._bytes, self._domain = array("d"), array("q"), array("q"), array("l")
        self._domains: dict[str, int] = {}

    def add(self, domain: str, found: Figures) -> None:
        self._nats.append(found.nats)
        self._tokens.append(found.tokens)
        self._bytes.append(found.n_bytes)
        self._domain.append(self._domains.setdefault(domain, len(self._domains)))

    def report(self) -> dict[str, Any]:
        import numpy as np

        if not self._nats:
            raise ValueError("no documents to measure")
        sums = [np.array(each) for each in (self._nats, self._tokens, self._bytes)]
        domain_D = np.array(self._domain)
        of_domain = {
            name: figures(*(each[domain_D == number] for each in sums)) for name, number in self._domains.items()
        }
        return {**figures(*sums), "domains": of_domain}


@contextlib.contextmanager
def _bar(total: int | None, *, enabled: bool) -> Iterator[Any]:
    from tqdm import tqdm

    silent = None if enabled else True  # None: silent without a terminal
    with tqdm(total=total, desc="documents", unit="doc", leave=False, disable=silent) as bar:
        yield bar
