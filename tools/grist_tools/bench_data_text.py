"""Text to shards in the data benchmark, beside the same tokenizer called with nothing around it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import tokenizers

from grist_data import PrepareConfig, Shards, Tokenizer, prepare
from grist_data.tokenizer import TOKENIZER_FILE
from grist_tools.bench_data_sets import bytes_of
from grist_tools.bench_data_turns import Row, judged

WITHIN = 0.9  # of the rate of the tokenizer alone


def text_rows(texts: Sequence[str], tokenizer: Tokenizer, folder: Path, rounds: int) -> dict[str, Row]:
    """MB of UTF-8 a second, by name: ours, and the tokenizer alone.

    Ours is all of `prepare`: read a .jsonl twice, hash, encode, write parts and shards with their sums, flush to the disk, and
    end with a dataset. The other has the texts in memory and ends with one array of ids. Both load the tokenizer first, so
    that both begin with an empty cache of words.
    """
    folder.mkdir()
    corpus, out = folder / "texts.jsonl", folder / "dataset"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    tokenizer.save(folder / "tokenizer")
    file = folder / "tokenizer" / TOKENIZER_FILE
    config = PrepareConfig(source="files", paths=(str(corpus),), tokenizer=str(file), val_fraction=0.0, out=str(out))

    def ours() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress, over and over
            prepare(config)

    found = _encoded(texts, file)
    ours()
    if problem := _problem(Shards.open(out), found, tokenizer):
        return {"grist_data.prepare": {"ok": False, "wrong": problem}}
    times = _in_turns(
        {"grist_data.prepare": ours, "tokenizers alone": lambda: np.concatenate(_encoded(texts, file))},
        lambda: shutil.rmtree(out, ignore_errors=True),
        rounds,
    )
    rows = {name: _rate(bytes_of(texts), seconds) for name, seconds in times.items()}
    alone = rows["tokenizers alone"]["value"]
    rows["grist_data.prepare"] = judged(rows["grist_data.prepare"], WITHIN * alone)
    return rows


def _encoded(texts: Sequence[str], file: Path) -> list[np.ndarray]:
    """Ids of each text by the package tokenizers, special tokens' names taken as text."""
    engine = tokenizers.Tokenizer.from_file(str(file))
    engine.encode_special_tokens = True
    return [np.array(found.ids, np.uint32) for found in engine.encode_batch_fast([*texts], add_special_tokens=False)]


def _problem(split: Shards, ids: Sequence[np.ndarray], tokenizer: Tokenizer) -> str | None:
    """What differs between the dataset and the ids with end-of-text after every document, or None."""
    assert tokenizer.eot_id is not None, "trained with one"
    expected = np.concatenate([np.append(of_text, np.uint32(tokenizer.eot_id)) for of_text in ids])
    if split.n_tokens != len(expected):
        return f"the dataset has {split.n_tokens} tokens, but the texts have {len(expected)}"
    different = np.flatnonzero(split.read(0, split.n_tokens) != expected)
    return f"token {different[0]} is not the one that tokenizers gives" if len(different) else None


def _in_turns(
    works: dict[str, Callable[[], object]], before: Callable[[], object], rounds: int
) -> dict[str, list[float]]:
    """Seconds of each repetition; what `before` does, before each, is not timed."""
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            before()
            start = time.perf_counter()
            works[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _rate(n_bytes: int, seconds: Sequence[float]) -> Row:
    each = [n_bytes / 1e6 / second for second in seconds]
    return {
        "ok": True,
        "unit": "MB/s",
        "value": median(each),
        "lowest": min(each),
        "highest": max(each),
        "repetitions": len(each),
        "text_bytes": n_bytes,
    }
