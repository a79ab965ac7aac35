"""Quality rules of Gopher: Rae et al. 2021, arXiv:2112.11446, appendix A1.1, "Quality Filtering".

A word is what stands between white space. Lines are those with a visible character. The paper is about English; in text
without spaces between words (Chinese, Japanese, Thai, ...) only the two rules about lines apply.
"""

from __future__ import annotations

import re

from grist_data.cleaning.settings import CleanConfig

_LETTER = re.compile(r"[^\W\d_]")
_BULLETS = ("•", "‣", "◦", "▪", "-", "*", "–")
_ELLIPSES = ("...", "…")
_NOT_IN_A_WORD = ".,;:!?\"'()[]“”‘’«»¿¡-–—_*"


def quality_reason(text: str, words: list[str], spaceless: bool, config: CleanConfig) -> str | None:
    """The first rule that the text breaks. words: `text.split()`."""
    return (None if spaceless else _word_reason(text, words, config)) or _line_reason(text, config)


def _word_reason(text: str, words: list[str], config: CleanConfig) -> str | None:
    # 50 to 100,000 words, of 3 to 10 characters on average.
    if len(words) < config.min_words:
        return "few_words"
    if len(words) > config.max_words:
        return "many_words"
    if not words:
        return None
    mean_chars = sum(map(len, words)) / len(words)
    if mean_chars < config.min_mean_word_chars:
        return "short_words"
    if mean_chars > config.max_mean_word_chars:
        return "long_words"
    # At most 0.1 for each word of number signs, and as many ellipses.
    if text.count("#") / len(words) > config.max_symbols_per_word:
        return "hash_symbols"
    if sum(map(text.count, _ELLIPSES)) / len(words) > config.max_symbols_per_word:
        return "ellipses"
    # A letter in at least 80% of the words.
    if _alphabetic(words) / len(words) < config.min_alphabetic_words:
        return "few_alphabetic_words"
    # At least two of: the, be, to, of, and, that, have, with.
    if config.min_stop_words and _stop_words(words, config) < config.min_stop_words:
        return "few_stop_words"
    return None


def _alphabetic(words: list[str]) -> int:
    """How many words have a letter. Most are letters only, which costs far less to find out."""
    others = [word for word in words if not word.isalpha()]
    return len(words) - len(others) + sum(1 for word in others if _LETTER.search(word))


def _stop_words(words: list[str], config: CleanConfig) -> int:
    """How many different stop words occur, whatever their case and the punctuation around them."""
    distinct = set(words)
    found = sum(word in distinct for word in config.stop_words)
    if found >= config.min_stop_words:
        return found
    return len({word.strip(_NOT_IN_A_WORD).lower() for word in distinct}.intersection(config.stop_words))


def _line_reason(text: str, config: CleanConfig) -> str | None:
    # At most 90% of the lines begin with a bullet, and at most 30% end with an ellipsis.
    lines = [line for line in map(str.strip, text.splitlines()) if line]
    if not lines:
        return None
    if sum(line.startswith(_BULLETS) for line in lines) / len(lines) > config.max_bullet_lines:
        return "bullet_lines"
    if sum(line.endswith(_ELLIPSES) for line in lines) / len(lines) > config.max_ellipsis_lines:
        return "ellipsis_lines"
    return None
