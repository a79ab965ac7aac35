"""Text to ids and to shards in the data benchmark, beside the same tokenizer called with nothing around it."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import tokenizers

from grist_data import PrepareConfig, Shards, Tokenizer, prepare
from grist_data.engine_ranks import ranks_of
from grist_data.engines import ENGINES, Engine, open_engine
from grist_data.tokenizer import TOKENIZER_FILE
from grist_tools.bench_data_sets import bytes_of
from grist_tools.bench_data_turns import Row, judged

WITHIN = 0.9  # of the rate of the tokenizer alone
TARGETS = {"tiktoken": 30.0, "gigatoken": 200.0}  # MB/s on two cores
# `prepare` with a fast engine gets the texts so many times over: its processes take a second or two to start.
TIMES = {"tiktoken": 4, "gigatoken": 16}

# Makes ready, which is not timed, and returns what is.
Work = Callable[[], Callable[[], object]]


def text_rows(texts: Sequence[str], tokenizer: Tokenizer, folder: Path, rounds: int) -> dict[str, Row]:
    """MB of UTF-8 a second, by name: ours with each engine, our engines, and the packages alone.

    Ours is all of `prepare`: read a .jsonl twice, hash, encode, write parts and shards with their sums, flush to the disk, and
    end with a dataset. The others have the texts in memory and end with one array of ids. `prepare` and tokenizers alone load
    the tokenizer first; fast engines are opened anew each time, untimed. So all begin with an empty cache of words.
    """
    folder.mkdir()
    out, content = folder / "dataset", "".join(json.dumps({"text": text}) + "\n" for text in texts)
    tokenizer.save(folder / "tokenizer")
    file = folder / "tokenizer" / TOKENIZER_FILE
    found = _encoded(texts, file)
    ours = _prepare_work(folder / "texts.jsonl", content, file, out, "tokenizers")
    ours()()
    if problem := _problem(Shards.open(out), found, tokenizer):
        return {"grist_data.prepare": {"ok": False, "wrong": problem}}
    works: dict[str, Work] = {
        "grist_data.prepare": ours,
        "tokenizers alone": lambda: lambda: np.concatenate(_encoded(texts, file)),
        "tiktoken alone": lambda: _tiktoken_alone(texts, tokenizer),
    }
    not_timed: dict[str, Row] = {}
    for name in ENGINES[1:]:
        try:
            engine = open_engine(tokenizer, name)
        except ImportError as error:
            missing: Row = {"ok": True, "unit": "MB/s", "value": None, "why": str(error)}
            not_timed |= dict.fromkeys([_row_of(name), _ours_with(name)], missing)
            continue
        if not all(map(np.array_equal, engine.encode_batch(texts), found)):
            not_timed[_row_of(name)] = {"ok": False, "wrong": f"{name} gives other ids than tokenizers"}
        else:
            works[_row_of(name)] = functools.partial(_engine_work, texts, tokenizer, name)
            if name in TIMES:
                corpus = folder / f"texts-{name}.jsonl"
                works[_ours_with(name)] = _prepare_work(corpus, content * TIMES[name], file, out, name)
    times = {_ours_with(name): n for name, n in TIMES.items()}
    timed = _in_turns(works, rounds)
    rows = {name: _rate(bytes_of(texts) * times.get(name, 1), seconds) for name, seconds in timed.items()}
    alone = rows["tokenizers alone"]["value"]
    targets = {"grist_data.prepare": WITHIN * alone, _row_of("tokenizers"): WITHIN * alone}
    for name, target in TARGETS.items():
        targets |= {_row_of(name): target, _ours_with(name): target}
    return {name: judged(row, targets[name]) if name in targets else row for name, row in rows.items()} | not_timed


def _row_of(engine: str) -> str:
    return f"grist_data engine {engine}"


def _ours_with(engine: str) -> str:
    return f"grist_data.prepare, {engine}"


def _prepare_work(corpus: Path, content: str, tokenizer: Path, out: Path, engine: Any) -> Work:
    """engine: one of ENGINES."""
    corpus.write_text(content, encoding="utf-8")
    config = PrepareConfig(
        source="files", paths=(str(corpus),), tokenizer=str(tokenizer), val_fraction=0.0, engine=engine, out=str(out)
    )

    def ours() -> None:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress, over and over
            prepare(config)

    def without_dataset() -> Callable[[], object]:
        shutil.rmtree(out, ignore_errors=True)
        return ours

    return without_dataset


def _encoded(texts: Sequence[str], file: Path) -> list[np.ndarray]:
    """Ids of each text by the package tokenizers, special tokens' names taken as text."""
    engine = tokenizers.Tokenizer.from_file(str(file))
    engine.encode_special_tokens = True
    return [np.array(found.ids, np.uint32) for found in engine.encode_batch_fast([*texts], add_special_tokens=False)]


def _tiktoken_alone(texts: Sequence[str], tokenizer: Tokenizer) -> Callable[[], object]:
    """One document after the other, in one thread."""
    import tiktoken

    ranks = ranks_of(tokenizer.definition)
    special = {"<|endoftext|>": max(ranks.id_of.values()) + 1}  # without any it is slower
    encoding = tiktoken.Encoding("alone", pat_str=ranks.pattern, mergeable_ranks=ranks.id_of, special_tokens=special)
    return lambda: np.concatenate([encoding.encode_to_numpy(text, disallowed_special=()) for text in texts])


def _engine_work(texts: Sequence[str], tokenizer: Tokenizer, name: str) -> Callable[[], object]:
    again = Tokenizer(tokenizer.definition, tokenizer.config)
    engine: Engine = open_engine(again, name)
    return lambda: np.concatenate(engine.encode_batch(texts))


def _problem(split: Shards, ids: Sequence[np.ndarray], tokenizer: Tokenizer) -> str | None:
    """What differs between the dataset and the ids with end-of-text after every document, or None."""
    assert tokenizer.eot_id is not None, "trained with one"
    expected = np.concatenate([np.append(of_text, np.uint32(tokenizer.eot_id)) for of_text in ids])
    if split.n_tokens != len(expected):
        return f"the dataset has {split.n_tokens} tokens, but the texts have {len(expected)}"
    different = np.flatnonzero(split.read(0, split.n_tokens) != expected)
    return f"token {different[0]} is not the one that tokenizers gives" if len(different) else None


def _in_turns(works: dict[str, Work], rounds: int) -> dict[str, list[float]]:
    """Seconds of each repetition."""
    names = list(works)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            work = works[name]()
            start = time.perf_counter()
            work()
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
