"""What the data benchmark reads: datasets of random ids, and texts to encode."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grist_data.atomic import canonical_json
from grist_data.finish import totals
from grist_data.manifest import write_manifest
from grist_data.prepare import tokenizer_facts
from grist_data.shard_header import DOC_HASH_BYTES, Encoding, Header
from grist_data.shard_writer import token_bytes_for, write_shard
from grist_data.shards import Shards
from grist_data.sources import SOURCES
from grist_data.tokenizer import Tokenizer

# Of 10,558 files of source code and prose, in tokens of a BPE of 50,257: many are short, most text is in long ones.
MEDIAN_DOCUMENT, MEAN_DOCUMENT = 1222, 3607
_SHARD_TOKENS = 2**27  # as `prepare` has it
_PIECE_TOKENS = 2**20


def make_dataset(directory: Path, tokenizer: Tokenizer, tokens: int, seed: int) -> Path:
    """A finished dataset of `tokens` random ids of the tokenizer, in documents of log-normal lengths; only a train split."""
    directory.mkdir(parents=True)
    source = {"name": "random ids", "seed": seed, "tokens": tokens}
    encoding = Encoding(
        token_bytes=token_bytes_for(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        bos_id=tokenizer.bos_id,
        eot_appended=False,
        tokenizer_sha256=tokenizer.sha256,
        manifest_sha256=hashlib.sha256(canonical_json(source)).hexdigest(),
    )
    random = np.random.default_rng(seed)
    sizes = [min(_SHARD_TOKENS, tokens - begun) for begun in range(0, tokens, _SHARD_TOKENS)]
    shards = []
    for number, size in enumerate(sizes):
        path = directory / f"train-{number:05d}-of-{len(sizes):05d}.tok"
        header = _write_random(path, encoding, size, random, number, len(sizes))
        counts = {"tokens": header.n_tokens, "documents": header.n_docs, "text_bytes": 0}
        shards.append({"file": path.name, **counts, "root": f"{header.root:016x}"})
    tokenizer.save(directory)
    train = {**totals(shards), "token_dtype": encoding.dtype.name, "shards": shards}
    write_manifest(directory, {"train": train}, tokenizer_facts(tokenizer), {"source": source, "settings": {}})
    return directory


def _write_random(
    path: Path, encoding: Encoding, tokens: int, random: np.random.Generator, number: int, count: int
) -> Header:
    ends = document_ends(tokens, random)

    def ids() -> Iterator[np.ndarray]:
        for begun in range(0, tokens, _PIECE_TOKENS):
            size = min(_PIECE_TOKENS, tokens - begun)
            yield random.integers(0, encoding.vocab_size, size, dtype=encoding.dtype.type)

    hashes = random.bytes(DOC_HASH_BYTES * len(ends))  # of no text, as the ids are of none
    return write_shard(path, encoding, ids(), ends, hashes, {"split": "train", "text_bytes": 0}, number, count)


def document_ends(tokens: int, random: np.random.Generator) -> np.ndarray:
    """Where documents end, int64, rising to `tokens`: the logarithm of a length is normal, its mean log(median)."""
    sigma = math.sqrt(2 * math.log(MEAN_DOCUMENT / MEDIAN_DOCUMENT))  # mean = median exp(sigma^2 / 2)
    lengths = random.lognormal(math.log(MEDIAN_DOCUMENT), sigma, 16 + 2 * tokens // MEDIAN_DOCUMENT)
    ends = np.cumsum(np.maximum(1, lengths).astype(np.int64))
    return np.append(ends[ends < tokens], tokens)


def texts_of(paths: Sequence[str]) -> list[str]:
    """The texts of some files, or of the offline sample where no paths are given. Raises as the sources of grist_data do."""
    documents = SOURCES["files"](paths=tuple(paths)) if paths else SOURCES["shakespeare"]()
    texts = [document.text for document in documents if document.text and not document.text.isspace()]
    if not texts:
        raise ValueError(f"{', '.join(paths)}: no text in it; give files that hold some")
    return texts


def repeated(texts: Sequence[str], n_bytes: int) -> list[str]:
    """The texts, all of them as often as it takes to have n_bytes of UTF-8."""
    return [*texts] * math.ceil(n_bytes / bytes_of(texts))


def bytes_of(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def tokens_in_file(split: Shards, offset: int, n: int) -> np.ndarray:
    """Tokens [offset, offset + n) of a split, read from the file by numpy alone; they must lie in one shard."""
    begun = 0
    for shard in split.shards:
        if offset < begun + shard.header.n_tokens:
            dtype = shard.header.encoding.dtype
            begin = shard.header.sections["tokens"][0] + (offset - begun) * dtype.itemsize
            return np.fromfile(shard.path, dtype, n, offset=begin).astype(np.int64)
        begun += shard.header.n_tokens
    raise IndexError(f"token {offset} is behind the end of {split.directory}, which has {begun}")


def ends_in_file(split: Shards) -> np.ndarray:
    """Where the documents of a split end, int64, numbered through it; read from the files by numpy alone."""
    found, begun = [], 0
    for shard in split.shards:
        begin, size = shard.header.sections["doc_ends"]
        found.append(begun + np.fromfile(shard.path, "<i8", size // 8, offset=begin))
        begun += shard.header.n_tokens
    return np.concatenate(found)


def facts(split: Shards) -> dict[str, Any]:
    """What a report says of a dataset."""
    return {
        "dataset_id": split.dataset_id,
        "tokens": split.n_tokens,
        "documents": sum(shard.header.n_docs for shard in split.shards),
        "token_dtype": split.dtype.name,
        "shards": len(split.shards),
        "reads_whole": split.reads_whole,
    }
