"""What cleaning does: everything is off until it is asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_CODE = re.compile(r"[a-z]{2,3}")
_SHARES = (
    "min_language_score",
    "max_bullet_lines",
    "max_ellipsis_lines",
    "min_alphabetic_words",
    "max_duplicate_paragraphs",
    "max_duplicate_paragraph_chars",
    "max_duplicate_lines",
    "max_duplicate_line_chars",
    "max_top_ngram_chars",
    "max_duplicate_ngram_chars",
)
_RANGES = (("min_chars", "max_chars"), ("min_words", "max_words"), ("min_mean_word_chars", "max_mean_word_chars"))


@dataclass(frozen=True)
class CleanConfig:
    """Rules for leaving documents out. A bound is inclusive: a document exactly at it stays.

    The thresholds of quality=gopher are those of Rae et al. 2021 (arXiv:2112.11446), appendix A1.1, "Quality Filtering"; of
    repetition, its Table A1; of quality=c4, Raffel et al. 2020 (JMLR 21:140), section 2.2.

    Attributes:
        min_chars: leave out documents of fewer characters.
        max_chars: leave out documents of more characters.
        languages: keep documents in these languages only (codes of py3langid, such as en, de, zh).
        min_language_score: keep only documents whose language is at least this probable.
        quality: rules for the quality of prose: none, gopher, c4, or both.
        min_words: (gopher) words of a document, at least.
        max_words: (gopher) words of a document, at most.
        min_mean_word_chars: (gopher) mean length of the words, at least.
        max_mean_word_chars: (gopher) mean length of the words, at most.
        max_symbols_per_word: (gopher) number signs, or ellipses, for each word, at most.
        max_bullet_lines: (gopher) share of the lines that begin with a bullet, at most.
        max_ellipsis_lines: (gopher) share of the lines that end with an ellipsis, at most.
        min_alphabetic_words: (gopher) share of the words that have a letter, at least.
        min_stop_words: (gopher) how many of the stop words must occur; 0 switches the rule off.
        stop_words: (gopher) frequent words of the language, in lower case; the default is English.
        min_sentences: (c4) sentences in the lines that C4 would keep, at least.
        repetition: leave out documents that repeat themselves.
        max_duplicate_paragraphs: (repetition) share of paragraphs that came before in the document, at most.
        max_duplicate_paragraph_chars: (repetition) share of characters in such paragraphs, at most.
        max_duplicate_lines: (repetition) share of lines that came before in the document, at most.
        max_duplicate_line_chars: (repetition) share of characters in such lines, at most.
        max_top_ngram_chars: (repetition) share of characters in the most frequent sequence of 2, 3 and 4 words, at most.
        max_duplicate_ngram_chars: (repetition) share of characters in sequences of 5, 6, 7, 8, 9 and 10 words that came
            before in the document, at most.
        near_duplicates: leave out documents that resemble an earlier one.
        threshold: (near_duplicates) estimated Jaccard similarity from which on two documents are near-duplicates.
        num_perm: (near_duplicates) numbers in a signature: more make the estimate finer and cost 4 bytes each.
        shingle: (near_duplicates) compare by sequences of this many words.
        minhash_seed: (near_duplicates) seed of the hash functions.
    """

    min_chars: int = 0
    max_chars: int | None = None
    languages: tuple[str, ...] = ()
    min_language_score: float = 0.5
    quality: Literal["none", "gopher", "c4", "gopher+c4"] = "none"
    min_words: int = 50
    max_words: int = 100_000
    min_mean_word_chars: float = 3.0
    max_mean_word_chars: float = 10.0
    max_symbols_per_word: float = 0.1
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_alphabetic_words: float = 0.8
    min_stop_words: int = 2
    stop_words: tuple[str, ...] = STOP_WORDS
    min_sentences: int = 3
    repetition: bool = False
    max_duplicate_paragraphs: float = 0.3
    max_duplicate_paragraph_chars: float = 0.2
    max_duplicate_lines: float = 0.3
    max_duplicate_line_chars: float = 0.2
    max_top_ngram_chars: tuple[float, ...] = (0.20, 0.18, 0.16)
    max_duplicate_ngram_chars: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)
    near_duplicates: bool = False
    threshold: float = 0.8
    num_perm: int = 128
    shingle: int = 5
    minhash_seed: int = 0

    def __post_init__(self) -> None:
        for name in ("languages", "stop_words", "max_top_ngram_chars", "max_duplicate_ngram_chars"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists, as YAML and JSON give them
        self._check_numbers()
        self._check_words()

    @property
    def enabled(self) -> bool:
        """Whether any document may be left out."""
        lengths = self.min_chars > 0 or self.max_chars is not None
        return lengths or bool(self.languages) or self.quality != "none" or self.repetition or self.near_duplicates

    @property
    def gopher(self) -> bool:
        return self.quality in ("gopher", "gopher+c4")

    @property
    def c4(self) -> bool:
        return self.quality in ("c4", "gopher+c4")

    def _check_numbers(self) -> None:
        for name, length, n in (("max_top_ngram_chars", 3, "2 to 4"), ("max_duplicate_ngram_chars", 6, "5 to 10")):
            if len(getattr(self, name)) != length:
                raise ValueError(
                    f"{name} needs {length} shares, for sequences of {n} words, but has {len(getattr(self, name))}"
                )
        for name in _SHARES:
            values = getattr(self, name)
            for value in values if isinstance(values, tuple) else (values,):
                if not 0 <= value <= 1:
                    raise ValueError(f"{name} is a share from 0 to 1, but is {value}")
        for low, high in _RANGES:
            if getattr(self, low) < 0:
                raise ValueError(f"{low} must be at least 0, but is {getattr(self, low)}")
            if getattr(self, high) is not None and getattr(self, high) < getattr(self, low):
                raise ValueError(f"{high} must be at least {low}, {getattr(self, low)}, but is {getattr(self, high)}")
        for name in ("max_symbols_per_word", "min_stop_words", "min_sentences"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, but is {getattr(self, name)}")
        for name, low, high in (("threshold", 0.3, 1), ("num_perm", 16, 1024), ("shingle", 1, 100)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} must be from {low} to {high}, but is {getattr(self, name)}")
        if not 0 <= self.minhash_seed < 2**64:
            raise ValueError(f"minhash_seed must be from 0 to 2**64 - 1, but is {self.minhash_seed}")

    def _check_words(self) -> None:
        if self.quality not in ("none", "gopher", "c4", "gopher+c4"):
            raise ValueError(f"quality must be none, gopher, c4 or gopher+c4, but is {self.quality!r}")
        if wrong := [code for code in self.languages if not _CODE.fullmatch(code)]:
            raise ValueError(f"languages are codes of two or three letters, such as en, but got {wrong[0]!r}")
        if not self.gopher or not self.min_stop_words:
            return
        if wrong := [word for word in self.stop_words if word != word.lower() or word.split() != [word]]:
            raise ValueError(f"stop_words are single words in lower case, but one is {wrong[0]!r}")
        if len(set(self.stop_words)) < self.min_stop_words:
            raise ValueError(f"min_stop_words is {self.min_stop_words}, but stop_words are {len(set(self.stop_words))}")
        # The English list would throw away, as bad prose, the very languages that were asked for.
        if self.stop_words == STOP_WORDS and (others := [code for code in self.languages if code != "en"]):
            raise ValueError(
                f"stop_words are English, but languages has {', '.join(others)}: give stop_words of all languages, or set"
                " min_stop_words to 0"
            )
