"""Texts back from ids: their hashes and sizes, as prepare.py records them for the texts themselves."""

from __future__ import annotations

import array
from collections.abc import Callable

import numpy as np
import xxhash
from tqdm import tqdm

from grist_data.foreign.stream import Stream
from grist_data.tokenizer import Tokenizer

# Takes ids of a document in pieces; with None, ends it and returns (xxh3_128 of its UTF-8 text, bytes of that).
TextSum = Callable[[np.ndarray | None], tuple[bytes, int]]


def describe(stream: Stream, start: int, stop: int, tokenizer: Tokenizer, bar: tqdm) -> tuple[np.ndarray, bytes, int]:
    """Documents of ids [start, stop): (ends counted from start, 16 bytes of hash each, bytes of all texts).

    Special ids are no text. `stop` ends a document.
    """
    take = _text_sum(tokenizer)
    # Eight bytes an end: a list would take forty, and a shard may have millions of short documents.
    ends, hashes, text_bytes, last = array.array("q"), bytearray(), 0, start

    def end_at(place: int) -> None:
        nonlocal text_bytes, last
        digest, size = take(None)
        hashes.extend(digest)
        text_bytes += size
        ends.append(place - start)
        last = place

    for position, ids, found in stream.pieces(start, stop):
        at = 0
        for place in found[(found > last) & (found < stop)].tolist():
            take(ids[at : place - position])
            at = place - position
            end_at(place)
        take(ids[at:])
        bar.update(len(ids))
    end_at(stop)
    return np.frombuffer(ends, np.int64), bytes(hashes), text_bytes


def _text_sum(tokenizer: Tokenizer) -> TextSum:
    specials = np.array(sorted(tokenizer.special_tokens.values()), np.int64)
    try:
        tokenizer.token_bytes([])
    except ValueError:  # not byte-level: what a token stands for depends on its neighbours
        return _of_whole_documents(tokenizer, specials)
    return _of_bytes(tokenizer, set(specials.tolist()))


def _of_bytes(tokenizer: Tokenizer, specials: set[int]) -> TextSum:
    table = [b"" if id_ in specials else tokenizer.token_bytes([id_]) for id_ in range(tokenizer.vocab_size)]
    digest, size = xxhash.xxh3_128(), 0

    def take(ids: np.ndarray | None) -> tuple[bytes, int]:
        nonlocal size
        if ids is not None:
            text = b"".join(map(table.__getitem__, ids.tolist()))
            digest.update(text)
            size += len(text)
            return b"", 0
        result = digest.digest(), size
        digest.reset()
        size = 0
        return result

    return take


def _of_whole_documents(tokenizer: Tokenizer, specials: np.ndarray) -> TextSum:
    """A document's ids are held until it ends."""
    parts: list[np.ndarray] = []

    def take(ids: np.ndarray | None) -> tuple[bytes, int]:
        if ids is not None:
            parts.append(ids[~np.isin(ids, specials)])
            return b"", 0
        text = tokenizer.decode(np.concatenate(parts).tolist()).encode()
        parts.clear()
        return xxhash.xxh3_128_digest(text), len(text)

    return take
