"""Every engine gives the ids of the reference, for any text, and a batch in which one is wrong is encoded by the reference."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import random
import sys
from collections.abc import Callable

import numpy as np
import pytest
import xxhash
from text_corpus import corpus_texts

from grist_data import engine_base, engine_gigatoken, engine_tiktoken, engines
from grist_data.engines import ENGINES, UnsupportedTokenizer, encode_checked, open_engine
from grist_data.patterns import GPT2, LLAMA3, O200K, QWEN2
from grist_data.tiktoken_export import from_ranks
from grist_data.tokenizer import Tokenizer, bytes_to_characters
from grist_data.tokenizer_training import train_bpe, train_wordpiece

NAMES = ("tokenizers", "tiktoken", "gigatoken")
OPTIONAL = {"gigatoken"}
SPECIAL = ("<|endoftext|>", "<|user|>")
N_DOCUMENTS = 10_000


def _characters(*ranges: tuple[int, int]) -> Callable[[random.Random], str]:
    def draw_from(draw: random.Random) -> str:
        return "".join(chr(draw.randint(*draw.choice(ranges))) for _ in range(draw.randint(1, 8)))

    return draw_from


def _one_of(*texts: str, most: int = 4) -> Callable[[random.Random], str]:
    return lambda draw: "".join(draw.choices(texts, k=draw.randint(1, most)))


def _repeated(*texts: str, most: int) -> Callable[[random.Random], str]:
    return lambda draw: draw.choice(texts) * int(most ** draw.random())


KINDS: dict[str, Callable[[random.Random], str]] = {
    "words": _one_of(*"grain mill's the DON'T I'LL we'Re it'\u017f naïve Mühle McGee iPhone".split(), " ", most=8),
    "controls": _characters((0, 0x1F), (0x7F, 0x9F)),
    "nul": _repeated("\x00", most=5),
    "replaced surrogates": lambda draw: (
        ("a" + chr(draw.randint(0xD800, 0xDFFF)) + "b").encode("utf-8", "replace").decode()
    ),
    "right to left": _characters((0x5D0, 0x5EA), (0x620, 0x64A), (0x200E, 0x200F), (0x202A, 0x202E), (0x660, 0x669)),
    "emoji": _one_of("🌾", "👩‍🌾", "👨‍👩‍👧", "🏳️‍🌈", "\u200d", "\ufe0f", "🇫🇷", "👍🏽", "#️⃣"),
    "special tokens": _one_of(*SPECIAL, "<|endoftext", "|>", "<|end|>", "<s>", "[PAD]"),
    "digits": lambda draw: str(draw.getrandbits(draw.randint(1, 200))),
    "other numbers": _characters((0xB2, 0xB3), (0x2160, 0x2188), (0xBC, 0xBE), (0x966, 0x96F), (0x1D7CE, 0x1D7FF)),
    "combining": _characters((0x300, 0x36F), (0x61, 0x66), (0x903, 0x94D), (0x483, 0x489)),
    "case": _characters(
        (0x1C4, 0x1CC), (0x2B0, 0x2B8), (0x10A0, 0x10FF), (0x1E00, 0x1EFF), (0x13A0, 0x13F5), (0x41, 0x5A)
    ),
    "east asian": _characters((0x4E00, 0x9FFF), (0x3040, 0x30FF), (0xAC00, 0xD7A3), (0x3000, 0x303F)),
    "any plane": _characters((0x80, 0xD7FF), (0xE000, 0x10FFFF), (0x10000, 0x1FFFF)),
    "new in Unicode 16 and 17": _characters(
        (0x105C0, 0x105F3), (0x16EA0, 0x16ED3), (0x1C80, 0x1C8A), (0x323B0, 0x323FF)
    ),
    "long words": _repeated("x", "ab", "é", "小", "=", "!?", most=400),
    "white space": _one_of(" ", "  ", "\n", "\r\n", "\t", "\u3000", "\u00a0", "\u0085", "\u2028", "\u180e", most=9),
    "punctuation": _one_of(*"! ? ... -- ' '' \" / // /\n \\ _ # $ + « » — ’".split(" "), "/\r\n"),
}


@pytest.fixture(scope="module")
def documents() -> list[str]:
    draw = random.Random(20)
    kinds = list(KINDS.values())
    return [""] + ["".join(kind(draw) for kind in draw.choices(kinds, k=1 + i % 7)) for i in range(1, N_DOCUMENTS)]


@pytest.fixture(scope="module")
def tokenizers_by_name(documents) -> dict[str, Tokenizer]:
    """One for each way that text is split, with merges that go over as many kinds of text as there are."""
    trained = train_bpe([*documents[:2000], *corpus_texts(20)], 3000, SPECIAL, trainer="tokenizers")
    byte_of = {character: byte for byte, character in enumerate(bytes_to_characters())}
    names = json.loads(trained.json_bytes)["model"]["vocab"]
    ranks = {
        bytes(byte_of[character] for character in name): id_ + 3 * (id_ > 900)
        for name, id_ in names.items()
        if name not in SPECIAL
    }
    for token in (b"unreachable", "小麦粉".encode(), b" DON'T", b"12345", b"xxxxxxxxxxxxxxxxxxxxxxxx"):
        ranks.setdefault(token, max(ranks.values()) + 2)
    special = {"<|endoftext|>": 0, "<|user|>": 1}
    by_pattern = {"o200k": O200K, "llama3": LLAMA3, "qwen2": QWEN2, "gpt2 ranks": GPT2}
    of_ranks = {name: from_ranks(ranks, special, pattern) for name, pattern in by_pattern.items()}
    like_qwen = json.loads(of_ranks["qwen2"].json_bytes)
    like_qwen["normalizer"] = {"type": "NFC"}
    like_qwen["added_tokens"].append(
        like_qwen["added_tokens"][0] | {"id": 9000, "content": "<|end|>", "special": False}
    )
    return {"trained": trained, "like qwen": Tokenizer(like_qwen)} | of_ranks


def opened(tokenizer: Tokenizer, name: str) -> engines.Engine:
    if name in OPTIONAL and importlib.util.find_spec(name) is None:
        pytest.skip(f"the engine {name} is not installed")
    return open_engine(tokenizer, name)


def hashes(texts) -> list[bytes]:
    return [xxhash.xxh3_128_digest(text.encode()) for text in texts]


@pytest.fixture(scope="module")
def reference_ids(tokenizers_by_name, documents) -> Callable[[str], list[np.ndarray]]:
    known: dict[str, list[np.ndarray]] = {}

    def ids_of(kind: str) -> list[np.ndarray]:
        if kind not in known:
            known[kind] = tokenizers_by_name[kind].encode_batch(documents)
        return known[kind]

    return ids_of


@pytest.mark.parametrize("kind", ["trained", "o200k", "llama3", "qwen2", "gpt2 ranks", "like qwen"])
@pytest.mark.parametrize("name", NAMES)
def test_random_documents_get_the_ids_of_the_reference_and_come_back(
    name, kind, tokenizers_by_name, documents, reference_ids
):
    tokenizer = tokenizers_by_name[kind]
    documents = documents if kind in ("trained", "o200k") else documents[:3000]
    found = opened(tokenizer, name).encode_batch(documents)
    assert all(ids.dtype == np.uint32 for ids in found)
    different = [
        k for k, (ids, expected) in enumerate(zip(found, reference_ids(kind), strict=False)) if [*ids] != [*expected]
    ]
    assert not different, f"{len(different)} differ, first {documents[different[0]]!r}"
    assert not {0, 1} & set(np.concatenate(found).tolist()), "the ids of the special tokens"
    if name == "tokenizers" and kind != "like qwen":  # the others have the same ids; Qwen normalizes
        assert [tokenizer.decode(ids) for ids in found] == documents


@pytest.mark.parametrize("name", NAMES)
def test_long_documents_get_the_ids_of_the_reference(name, tokenizers_by_name, documents):
    texts = [
        " ".join(documents[:2500]),
        " " * 300_000 + "x",
        "x" + "\n" * 200_000,
        "ab" * 100_000,
        "1" * 100_000,
        "!" * 70_000,
    ]
    for kind in ("trained", "o200k"):
        tokenizer = tokenizers_by_name[kind]
        for ids, expected in zip(
            opened(tokenizer, name).encode_batch(texts), tokenizer.encode_batch(texts), strict=True
        ):
            np.testing.assert_array_equal(ids, expected)


@pytest.mark.parametrize("name", NAMES)
def test_worker_processes_and_single_threads_get_the_same(
    name, tokenizers_by_name, documents, monkeypatch, reference_ids
):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    assert engine_base.threads() == 1
    found = opened(tokenizers_by_name["o200k"], name).encode_batch(documents[:500])
    assert all(map(np.array_equal, found, reference_ids("o200k")))


@pytest.mark.parametrize("name", NAMES)
def test_empty_batches_and_lone_surrogates(name, tokenizers_by_name):
    engine = opened(tokenizers_by_name["trained"], name)
    assert engine.encode_batch([]) == []
    assert [ids.tolist() for ids in engine.encode_batch(["", ""])] == [[], []]
    with pytest.raises(ValueError, match=r"character 2 of the text is a lone surrogate \('\\ud800'\)"):
        engine.encode_batch(["fine", "ab\ud800"])


def test_the_special_token_of_tiktoken_is_text(tokenizers_by_name):
    tokenizer, text = tokenizers_by_name["trained"], f"a{engine_tiktoken._UNUSED}{engine_tiktoken._UNUSED} b"
    assert open_engine(tokenizer, "tiktoken").encode_batch([text])[0].tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("name", NAMES)
def test_engines_say_what_they_are(name, tokenizers_by_name):
    engine = opened(tokenizers_by_name["trained"], name)
    assert engine.name == name
    assert engine.version.split(".")[0].isdigit()
    assert engine.unicode_version in {"12", "13", "14", "15", "15.1", "16", "17"}


def test_auto_is_the_fastest_that_is_installed(tokenizers_by_name, monkeypatch):
    installed = "gigatoken" if importlib.util.find_spec("gigatoken") else "tiktoken"
    assert open_engine(tokenizers_by_name["trained"], "auto").name == installed
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert open_engine(tokenizers_by_name["trained"], "auto").name == "tiktoken"
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert open_engine(tokenizers_by_name["trained"], "auto").name == "tokenizers"


def test_missing_engines_and_unknown_names_are_refused(tokenizers_by_name, monkeypatch):
    for name in ("gigatoken", "tiktoken"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(
            ImportError, match=rf"the engine {name} is not installed \(.+\): pip install -U gristmill\[\w+\]"
        ):
            open_engine(tokenizers_by_name["trained"], name)
    with pytest.raises(
        ValueError, match=r"unknown engine 'fast': expected one of auto, tokenizers, tiktoken, gigatoken"
    ):
        open_engine(tokenizers_by_name["trained"], "fast")


def test_tiktoken_that_is_too_old(tokenizers_by_name, monkeypatch):
    import tiktoken

    monkeypatch.delattr(tiktoken.Encoding, "encode_to_numpy")
    with pytest.raises(ImportError, match=r"not installed \(tiktoken [\d.]+ has no encode_to_numpy, 0.9 has\)"):
        open_engine(tokenizers_by_name["trained"], "tiktoken")


def test_a_tokenizer_that_only_the_reference_can_do():
    tokenizer = train_wordpiece(corpus_texts(10), 600)
    assert open_engine(tokenizer, "auto").name == "tokenizers"
    assert open_engine(tokenizer, "auto").encode_batch(["mill"])[0].tolist() == tokenizer.encode("mill")
    with pytest.raises(
        UnsupportedTokenizer, match=r"engine tiktoken cannot encode for this tokenizer: .*WordPiece, not BPE"
    ):
        open_engine(tokenizer, "tiktoken")


def test_an_engine_with_other_ids_is_found_out_when_it_is_opened(tokenizers_by_name, monkeypatch):
    tokenizer = tokenizers_by_name["trained"]
    wrong = dataclasses.replace(
        open_engine(tokenizer, "tiktoken"), encode=lambda texts: [np.zeros(1, np.uint32)] * len(texts)
    )
    monkeypatch.setitem(engines._OPEN, "tiktoken", lambda tokenizer: wrong)
    with pytest.raises(UnsupportedTokenizer, match=r"tiktoken [\d.]+ gives other ids than tokenizers for ''"):
        open_engine(tokenizer, "tiktoken")
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    assert open_engine(tokenizer, "auto").name == "tokenizers"


def test_an_engine_with_another_interface_is_passed_over(tokenizers_by_name, monkeypatch):
    tokenizer = tokenizers_by_name["trained"]

    def encode(texts):
        raise AttributeError("no attribute 'encode_to_numpy'")

    changed = dataclasses.replace(open_engine(tokenizer, "tiktoken"), encode=encode)
    monkeypatch.setitem(engines._OPEN, "tiktoken", lambda tokenizer: changed)
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(UnsupportedTokenizer, match=r"tiktoken [\d.]+ does not work as it did .*no attribute"):
        open_engine(tokenizer, "tiktoken")
    assert open_engine(tokenizer, "auto").name == "tokenizers"


def test_hard_texts_go_to_the_reference(tokenizers_by_name, documents, reference_ids):
    def encode(texts):
        assert not any("<" in text for text in texts)
        return tokenizers_by_name["trained"].encode_batch(texts)

    engine = open_engine(tokenizers_by_name["trained"], "tiktoken")
    engine = dataclasses.replace(engine, is_hard=lambda text: "<" in text, encode=encode)
    assert all(map(np.array_equal, engine.encode_batch(documents[:900]), reference_ids("trained")))


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "tokenizers"])
def test_checking_encodes_a_sample_again(name, tokenizers_by_name, documents, reference_ids):
    tokenizer, texts = tokenizers_by_name["o200k"], documents[:1000]
    engine = opened(tokenizer, name)
    counts = {}
    for share in (0.01, 0.2, 1.0):
        ids, counts[share], wrong = encode_checked(engine, tokenizer, texts, hashes(texts), share)
        assert all(map(np.array_equal, ids, reference_ids("o200k")))
        assert wrong == 0
    assert 1 <= counts[0.01] <= 40
    assert 140 <= counts[0.2] <= 260
    assert counts[1.0] == 1000
    halves = [encode_checked(engine, tokenizer, half, hashes(half), 0.2)[1] for half in (texts[:300], texts[300:])]
    assert sum(halves) == counts[0.2], "which documents are checked does not depend on the batch"


def test_one_wrong_document_makes_the_batch_the_references(tokenizers_by_name, documents, reference_ids):
    tokenizer, texts = tokenizers_by_name["trained"], documents[:100]
    engine = open_engine(tokenizer, "tiktoken")

    def encode(batch):
        return [
            ids + np.uint32(1) if text == texts[7] else ids
            for text, ids in zip(batch, engine.encode(batch), strict=True)
        ]

    faulty = dataclasses.replace(engine, encode=encode)
    ids, checked, wrong = encode_checked(faulty, tokenizer, texts, hashes(texts), 1.0)
    assert (checked, wrong) == (100, 1)
    assert all(map(np.array_equal, ids, reference_ids("trained")))


def test_the_reference_is_not_checked_against_itself(tokenizers_by_name, documents):
    tokenizer, texts = tokenizers_by_name["trained"], documents[:50]
    ids, checked, wrong = encode_checked(open_engine(tokenizer, "tokenizers"), tokenizer, texts, hashes(texts), 1.0)
    assert (len(ids), checked, wrong) == (50, 0, 0)


def test_shares_and_hashes_that_do_not_fit_are_refused(tokenizers_by_name):
    tokenizer = tokenizers_by_name["trained"]
    engine = open_engine(tokenizer, "tokenizers")
    for share in (0.0, 0.0009, 1.01):
        with pytest.raises(ValueError, match=f"share must be from 0.001 to 1, but got {share}"):
            encode_checked(engine, tokenizer, ["a"], [b"0" * 16], share)
    with pytest.raises(ValueError, match="a hash for each of the 1 texts, but got 2"):
        encode_checked(engine, tokenizer, ["a"], [b"0" * 16] * 2, 1.0)


def test_gigatoken_is_made_anew_after_some_text(tokenizers_by_name, documents, monkeypatch, reference_ids):
    engine = opened(tokenizers_by_name["o200k"], "gigatoken")
    made, open_it = [], engine_gigatoken._opened
    monkeypatch.setattr(engine_gigatoken, "_opened", lambda definition: made.append(definition) or open_it(definition))
    monkeypatch.setattr(engine_gigatoken, "_RENEWED_AFTER_BYTES", 1000)
    for _ in range(3):
        assert all(map(np.array_equal, engine.encode_batch(documents[1:300]), reference_ids("o200k")[1:]))
    assert len(made) == 2
