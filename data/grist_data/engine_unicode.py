"""Where two engines disagree about a character, found by asking both.

Engines carry tables of different Unicode versions: what is a letter in one may be unassigned in another, and texts are then
split at other places. So every code point that may be assigned is given to both. A text that holds one about which they
differ is encoded by the reference.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import numpy as np
import tokenizers
from tokenizers import normalizers

# Planes 0 to 3 and 14: the others are unassigned in all versions, or private use. All engines know ASCII.
_CODE_POINTS = np.r_[0x80:0xD800, 0xE000:0x40000, 0xE0000:0xF0000].astype(np.uint32)
CHARACTERS = _CODE_POINTS.astype("<u4").tobytes().decode("utf-32-le")
# What the patterns of patterns.py tell apart outside ASCII.
CLASSES = (r"\p{L}", r"\p{N}", r"\s", r"[\p{Lu}\p{Lt}]", r"\p{Ll}", r"\p{M}")
_BLOCK_CHARACTERS = 1 << 20
# A letter, small or without case, that is new in each version of Unicode.
_NEW_LETTER = {
    "12": 0x10FE0,
    "13": 0x10E80,
    "14": 0x10597,
    "15": 0x11F04,
    "15.1": 0x2EBF0,
    "16": 0x105C0,
    "17": 0x16EBB,
}


def classes_of(kept: Callable[[str], str]) -> np.ndarray:
    """Bits of the CLASSES that each of CHARACTERS is in, (n,) uint8. kept: what of CHARACTERS matches a regex."""
    bits = np.zeros(len(_CODE_POINTS), np.uint8)
    for bit, pattern in enumerate(CLASSES):
        bits[np.isin(_CODE_POINTS, _code_points(kept(f"{pattern}+")), assume_unique=True)] |= 1 << bit
    return bits


@functools.cache
def reference_classes() -> np.ndarray:
    """`classes_of` the package tokenizers."""

    def kept(pattern: str) -> str:
        rest = normalizers.Replace(tokenizers.Regex(pattern), "").normalize_str(CHARACTERS)
        return _characters(np.setdiff1d(_CODE_POINTS, _code_points(rest), assume_unique=True))

    return classes_of(kept)


def disputed(behaviour: np.ndarray) -> np.ndarray:
    """Characters that an engine takes differently than the reference: bool, for every code point.

    behaviour: (n,) integers of whatever meaning, equal where the engine treats two of CHARACTERS alike. Characters of one
    class in the reference must be alike here as well; those that differ from most of their class are disputed.
    """
    classes = reference_classes()
    different = np.zeros(len(classes), bool)
    for value in np.unique(classes):
        members = classes == value
        values, counts = np.unique(behaviour[members], return_counts=True)
        different |= members & (behaviour != values[counts.argmax()])
    table = np.zeros(sys.maxunicode + 1, bool)
    table[_CODE_POINTS] = different
    return table


def holds_any(text: str, table: np.ndarray) -> bool:
    """Whether a text holds one of the characters of a table. table: bool, for every code point, none of them ASCII."""
    if text.isascii():
        return False
    blocks = (text[start : start + _BLOCK_CHARACTERS] for start in range(0, len(text), _BLOCK_CHARACTERS))
    return any(table[_code_points(block)].any() for block in blocks)


def version_of(is_letter: Callable[[int], bool]) -> str:
    """The newest version of Unicode, from 12 on, whose letters an engine knows."""
    known = [version for version, code_point in _NEW_LETTER.items() if is_letter(code_point)]
    return known[-1] if known else "before 12"


def index_of(code_point: int) -> int:
    """Where a code point stands in CHARACTERS."""
    return int(np.searchsorted(_CODE_POINTS, code_point))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _characters(code_points: np.ndarray) -> str:
    return code_points.astype("<u4").tobytes().decode("utf-32-le")
