"""Streams of windows: texts become ids, ids windows, and windows rows of tokens without padding.

N ids of a stream.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from grist_eval.result_cache import key_of
from grist_eval.text_documents import TextDocument

if TYPE_CHECKING:
    import numpy as np

    from grist_data import Tokenizer
    from grist_data.batches import Batch

# Texts are encoded together up to these, on all cores.
_ENCODED_CHARS, _ENCODED_DOCUMENTS = 2**20, 1024


class Figures(NamedTuple):
    """Sums of a document: nats of its tokens, their number, and the UTF-8 bytes of its text."""

    nats: float
    tokens: int
    n_bytes: int


@dataclass
class OpenDocument:
    """A document between its encoding and its figures. left: windows that are not scored yet; nats: of those that are."""

    document: TextDocument
    key: str
    tokens: int
    known: Figures | None
    left: int = 0
    nats: list[float] = field(default_factory=list)

    @property
    def figures(self) -> Figures:
        return self.known or Figures(math.fsum(self.nats), self.tokens, len(self.document.text.encode()))


class Window(NamedTuple):
    """ids (n + 1,): inputs and, one further on, targets, of which the last `scored` count."""

    of: OpenDocument
    ids: np.ndarray
    scored: int


class How(NamedTuple):
    """start: the id in front of every document. length, stride: of windows. keyed: documents are looked up in a cache."""

    start: int
    length: int
    stride: int
    batch_tokens: int
    keyed: bool


def opened(
    model, tokenizer: Tokenizer, documents: Iterable[TextDocument], how: How, known: Mapping[str, Any]
) -> Iterator[tuple[OpenDocument, np.ndarray]]:
    """Documents with their ids, the start in front: (tokens + 1,) int64."""
    import numpy as np

    for some in _together(documents):
        for document, ids in zip(some, tokenizer.encode_batch([each.text for each in some]), strict=True):
            largest = int(ids.max(initial=0))
            if not len(ids) or largest >= model.config.vocab_size:
                what = f"id {largest} is outside the model's vocabulary of {model.config.vocab_size}"
                raise ValueError(
                    f"{document.where}: {what if len(ids) else 'the tokenizer makes no token of the text'}"
                )
            key = key_of(["document", how.start, how.length, how.stride, document.text]) if how.keyed else ""
            of = OpenDocument(document, key, len(ids), Figures(*known[key]) if key in known else None)
            yield of, np.concatenate([[how.start], ids]).astype(np.int64)


def _together(documents: Iterable[TextDocument]) -> Iterator[list[TextDocument]]:
    some: list[TextDocument] = []
    chars = 0
    for document in documents:
        some.append(document)
        chars += len(document.text)
        if chars >= _ENCODED_CHARS or len(some) == _ENCODED_DOCUMENTS:
            yield some
            some, chars = [], 0
    if some:
        yield some


def streams_of(
    opened: Iterable[tuple[OpenDocument, np.ndarray]], how: How, waiting: deque[OpenDocument]
) -> Iterator[list[Window]]:
    """Windows in the order of the documents, as many as fit in a stream; documents are put into `waiting`, whole."""
    stream: list[Window] = []
    size = 0
    for of, ids in opened:
        of.left = 1 + -(-max(0, len(ids) - 1 - how.length) // how.stride)
        waiting.append(of)
        for number in range(of.left):
            begin = number * how.stride
            piece = ids[begin : begin + how.length + 1]
            scored = len(piece) - 1 - (how.length - how.stride if number else 0)
            if stream and size + len(piece) - 1 > how.batch_tokens:
                yield stream
                stream, size = [], 0
            stream.append(Window(of, piece, scored))
            size += len(piece) - 1
    if stream:
        yield stream


def batch_of_windows(stream: list[Window]) -> Batch:
    """Windows as one row of (1, N) in which each is a document of its own."""
    import numpy as np
    import torch

    from grist_data.batch import IGNORE, batch_of

    ids_N = np.concatenate([window.ids[:-1] for window in stream])
    targets_N = np.concatenate([window.ids[1:] for window in stream])
    ends = np.cumsum([len(window.ids) - 1 for window in stream])
    for window, end in zip(stream, ends.tolist(), strict=True):
        targets_N[end - len(window.ids) + 1 : end - window.scored] = IGNORE
    counted = sum(window.scored for window in stream)
    return batch_of(torch.from_numpy(ids_N)[None], torch.from_numpy(targets_N)[None], ends[:-1], counted)
