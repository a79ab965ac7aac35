"""Engines that encode text with the ids of one and the same tokenizer, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import tokenizers
from tokenizers import normalizers

from grist_data.engine_base import Engine
from grist_data.engine_gigatoken import open_gigatoken
from grist_data.engine_ranks import UnsupportedTokenizer
from grist_data.engine_tiktoken import open_tiktoken
from grist_data.engine_unicode import version_of
from grist_data.tokenizer import Tokenizer

__all__ = ["ENGINES", "Engine", "UnsupportedTokenizer", "encode_checked", "open_engine"]

ENGINES = ("auto", "tokenizers", "tiktoken", "gigatoken")
SMALLEST_SHARE = 0.001
# In NFC, of old characters: what an engine itself has to get right, whatever it leaves to the reference.
_PROVED_ON = (
    "",
    "The miller's 12345 sacks\n\n  weren't  FULL!!!\t\r\n/ I'LL grind\u00a0on ...   ",
    "naïve Straße über 小麦粉 мельница طحين x\u0301 🌾👩‍🌾 ½\u3000\x00\x7f",
    "<|endoftext|> 'S '\u017f x" + "y" * 300 + "0" * 50,
)


def _open_tokenizers(tokenizer: Tokenizer) -> Engine:
    without_letters = normalizers.Replace(tokenizers.Regex(r"\p{L}"), "").normalize_str
    return Engine(
        name="tokenizers",
        version=tokenizers.__version__,
        unicode_version=version_of(lambda code_point: not without_letters(chr(code_point))),
        reference=tokenizer,
        encode=tokenizer.encode_batch,
        is_hard=lambda text: False,
    )


_OPEN: dict[str, Callable[[Tokenizer], Engine]] = {
    "gigatoken": open_gigatoken,
    "tiktoken": open_tiktoken,
    "tokenizers": _open_tokenizers,
}
_TO_INSTALL = {"gigatoken": "gristmill[fast]", "tiktoken": "gristmill[hub]"}


def open_engine(tokenizer: Tokenizer, name: str) -> Engine:
    """The engine of that name for a tokenizer; "auto" is the fastest that is installed and gives exactly its ids.

    Raises ValueError for an unknown name, UnsupportedTokenizer (a ValueError) when the engine cannot give the ids of this
    tokenizer, and ImportError when it is not installed. "auto" raises none of the last two: `tokenizers` can do all.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}: expected one of {', '.join(ENGINES)}")
    if name != "auto":
        return _proved(name, tokenizer)
    for candidate in _OPEN:
        try:
            return _proved(candidate, tokenizer)
        except (ImportError, UnsupportedTokenizer):
            continue
    raise AssertionError("the reference opens any tokenizer")


def _proved(name: str, tokenizer: Tokenizer) -> Engine:
    """An engine that gives the ids of the reference for a few awkward texts."""
    try:
        engine = _OPEN[name](tokenizer)
    except ImportError as error:
        raise ImportError(
            f"the engine {name} is not installed ({error}): pip install -U {_TO_INSTALL[name]}, or choose 'auto'"
        ) from error
    except UnsupportedTokenizer as error:
        raise UnsupportedTokenizer(
            f"the engine {name} cannot encode for this tokenizer: {error}; choose 'tokenizers' or 'auto'"
        ) from error
    try:
        found = engine.encode(_PROVED_ON)
    except (AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UnsupportedTokenizer(
            f"the engine {name} {engine.version} does not work as it did when this was written: {error!r}; choose 'tokenizers'"
            " or 'auto'"
        ) from error
    for text, ids, expected in zip(_PROVED_ON, found, tokenizer.encode_batch(_PROVED_ON), strict=True):
        if not np.array_equal(ids, expected):
            raise UnsupportedTokenizer(
                f"the engine {name} {engine.version} gives other ids than tokenizers for {text!r}; choose 'tokenizers' or"
                " 'auto'"
            )
    return engine


def encode_checked(
    engine: Engine, tokenizer: Tokenizer, texts: Sequence[str], hashes: Sequence[bytes], share: float
) -> tuple[list[np.ndarray], int, int]:
    """Ids of each text (uint32), documents that the reference encoded again, and how many of these differed.

    hashes: 16 bytes of each text, which choose the sample; share: expected part of the documents in it, 0.001 to 1. When one
    differs, all of the batch is encoded by the reference: what comes out depends on the texts alone.
    Raises ValueError for a share out of range and for a lone surrogate.
    """
    if not SMALLEST_SHARE <= share <= 1:
        raise ValueError(f"share must be from {SMALLEST_SHARE} to 1, but got {share}")
    if len(hashes) != len(texts):
        raise ValueError(f"expected a hash for each of the {len(texts)} texts, but got {len(hashes)}")
    encoded = engine.encode_batch(texts)
    if engine.name == "tokenizers":
        return encoded, 0, 0
    chosen = [k for k, digest in enumerate(hashes) if int.from_bytes(digest[:8], "big") < share * 2**64]
    expected = tokenizer.encode_batch([texts[k] for k in chosen])
    wrong = sum(not np.array_equal(encoded[k], ids) for k, ids in zip(chosen, expected, strict=True))
    return (tokenizer.encode_batch(texts) if wrong else encoded), len(chosen), wrong
