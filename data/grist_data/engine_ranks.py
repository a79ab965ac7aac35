"""A tokenizer.json as ranks: the one form of byte-level BPE in which the fast engines work.

They know no list of merges. Two neighbours are merged when their bytes together are a token, lowest id first and leftmost
among equals, and a piece that is a token as a whole is taken at once. Where this gives the ids of `tokenizers` for every
text is decided here, token by token, not by trying texts.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from grist_data.engine_unicode import CHARACTERS, holds_any
from grist_data.patterns import GPT2, KNOWN
from grist_data.tokenizer import bytes_to_characters


class UnsupportedTokenizer(ValueError):
    """An engine cannot give exactly the ids of the reference for this tokenizer; the message says why."""


@dataclass(frozen=True)
class Ranks:
    """id_of: every token that text can become, by its bytes. merge_of: the merge that forms it, for those that one does.

    pattern: how text is split before merging, one of patterns.KNOWN. nfc: whether text is normalized to NFC first.
    literal: tokens that are found in a text before it is split.
    """

    id_of: dict[bytes, int]
    merge_of: dict[bytes, tuple[bytes, bytes]]
    pattern: str
    nfc: bool = False
    literal: tuple[str, ...] = ()

    def lack(self, text: str) -> bool:
        """Whether the tokenizer does with a text what ranks cannot say: it normalizes it, or finds a token in it."""
        return any(token in text for token in self.literal) or (self.nfc and not _is_surely_nfc(text))

    def dense(self) -> tuple[dict[bytes, int], np.ndarray]:
        """Ranks without gaps, the 256 bytes first and all others in the order of ids; and the id of each rank, uint32."""
        others = sorted((token for token in self.id_of if len(token) > 1), key=self.id_of.__getitem__)
        tokens = [bytes([byte]) for byte in range(256)] + others
        ids = np.array([self.id_of[token] for token in tokens], np.uint32)
        return {token: rank for rank, token in enumerate(tokens)}, ids


def ranks_of(definition: dict[str, Any]) -> Ranks:
    """Ranks that stand for the tokenizer of a tokenizer.json. Raises UnsupportedTokenizer where none do."""
    model = definition["model"]
    if model.get("type", "BPE") != "BPE":
        raise UnsupportedTokenizer(f"its model is {model['type']}, not BPE")
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(setting):
            raise UnsupportedTokenizer(f"its model has {setting} = {model[setting]!r}")
    if definition.get("normalizer") not in (None, {"type": "NFC"}):
        raise UnsupportedTokenizer(f"it normalizes text, by {definition['normalizer']}")
    pattern = _pattern_of(definition.get("pre_tokenizer"))
    byte_of = {character: byte for byte, character in enumerate(bytes_to_characters())}
    vocab = {
        bytes(byte_of[character] for character in name): id_
        for name, id_ in model["vocab"].items()
        if name and all(character in byte_of for character in name)
    }
    if missing := [byte for byte in range(256) if bytes([byte]) not in vocab]:
        raise UnsupportedTokenizer(f"its vocabulary lacks {len(missing)} of the 256 bytes, first 0x{missing[0]:02x}")
    position_of = {
        (bytes(byte_of[character] for character in left), bytes(byte_of[character] for character in right)): position
        for position, (left, right) in enumerate(map(_pair, model["merges"]))
        if all(character in byte_of for character in left + right)
    }
    id_of, merge_of = _checked(vocab, position_of, whole_pieces=model.get("ignore_merges", False))
    as_text = [token["content"] for token in definition.get("added_tokens", []) if not token["special"]]
    literal = {form for content in as_text for form in (content, unicodedata.normalize("NFC", content))}
    return Ranks(id_of, merge_of, pattern, bool(definition.get("normalizer")), tuple(sorted(literal)))


def last_merge(ranks: Mapping[bytes, int], token: bytes) -> tuple[bytes, bytes] | None:
    """The merge that forms a token where neighbours are merged by rank, or None where merging does not reach it.

    No merge crosses the borders of a token that is formed, so its inside was merged as if it stood alone: by lowest rank
    first, leftmost among equals. So the last of these merges is the only one that ever forms it.
    """
    parts = [bytes([byte]) for byte in token]
    candidates = [ranks.get(left + right, math.inf) for left, right in itertools.pairwise(parts)]
    while len(candidates) > 1:
        best = min(candidates)
        if best == math.inf:
            return None
        at = candidates.index(best)
        merged = parts[at] + parts.pop(at + 1)
        parts[at] = merged
        del candidates[at]
        if at > 0:
            candidates[at - 1] = ranks.get(parts[at - 1] + merged, math.inf)
        if at < len(candidates):
            candidates[at] = ranks.get(merged + parts[at + 1], math.inf)
    return (parts[0], parts[1]) if candidates else None


def _checked(
    vocab: dict[bytes, int], position_of: dict[tuple[bytes, bytes], int], whole_pieces: bool
) -> tuple[dict[bytes, int], dict[bytes, tuple[bytes, bytes]]]:
    """Leave out what text cannot become, and see that each token is formed by its own merge, in the order of ids.

    Then the two ways of merging go together step by step: whatever neighbours merging by rank takes next are the
    token's last merge, so they are in the list of merges, and there they come before all others that are possible.
    """
    formed = {left + right for left, right in position_of}
    id_of = {token: id_ for token, id_ in vocab.items() if len(token) == 1 or whole_pieces or token in formed}
    merge_of = {token: merge for token in id_of if (merge := last_merge(id_of, token))}
    before = -1
    for token in sorted(merge_of, key=id_of.__getitem__):
        position = position_of.get(merge_of[token])
        if position is None:
            raise UnsupportedTokenizer(f"token {id_of[token]} ({token!r}) has no merge of {merge_of[token]}")
        if position < before:
            raise UnsupportedTokenizer(f"its merges are not in the order of ids (token {id_of[token]}, {token!r})")
        before = position
    if not whole_pieces:  # a token that merging does not reach would be taken where it is a whole piece
        id_of = {token: id_ for token, id_ in id_of.items() if len(token) == 1 or token in merge_of}
    return id_of, merge_of


def _is_surely_nfc(text: str) -> bool:
    """In all versions of Unicode. What is assigned keeps its normal form for ever, so only newer characters leave a doubt."""
    return text.isascii() or (unicodedata.is_normalized("NFC", text) and not holds_any(text, _unassigned()))


@functools.cache
def _unassigned() -> np.ndarray:
    """Code points that Python's tables do not know, as `holds_any` takes them."""
    table = np.zeros(sys.maxunicode + 1, bool)
    for character in CHARACTERS:
        table[ord(character)] = unicodedata.category(character) == "Cn"
    return table


def _pattern_of(pre_tokenizer: dict[str, Any] | None) -> str:
    """The split of text into pieces. Raises UnsupportedTokenizer where it is none of patterns.KNOWN."""
    steps = _steps(pre_tokenizer)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        split, pattern = None, GPT2
    elif kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        split, pattern = steps[0], steps[0]["pattern"].get("Regex")
    else:
        raise UnsupportedTokenizer(f"its pre-tokenizer is {' and '.join(kinds) or 'none'}, in a form that is not known")
    if steps[-1].get("add_prefix_space"):
        raise UnsupportedTokenizer("its pre-tokenizer puts a space before the text")
    if pattern not in KNOWN:
        raise UnsupportedTokenizer(f"it splits text by a pattern that is not known: {pattern}")
    if split is not None and (split["behavior"] != "Isolated" or split["invert"]):
        raise UnsupportedTokenizer(f"it splits text with behavior {split['behavior']}, invert {split['invert']}")
    return pattern


def _steps(pre_tokenizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre_tokenizer is None:
        return []
    return pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]


def _pair(merge: str | list[str]) -> tuple[str, str]:
    """A merge as older and newer files write it: `"a b"` or `["a", "b"]`."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right
