"""Rules of C4 for whole documents: Raffel et al. 2020, JMLR 21:140, section 2.2.

C4 also removes single lines. Here a document stays as it is or goes, and the lines that C4 would remove only do not
count: those without an end mark, with fewer than five words, or about JavaScript, cookies and terms of use. Its list of
offensive words and its removal of repeated sentences between documents are not applied.

C4 is English; the end marks of other scripts count here too. Text without spaces between words has to pass the first two
rules only, because Thai, for one, marks no ends of sentences.
"""

from __future__ import annotations

import re

from grist_data.cleaning.settings import CleanConfig

_MIN_WORDS_PER_LINE = 5
_MARKS = ".!?。！？؟۔।॥።։"
_QUOTES = "\"”»'’"
_END = re.compile(rf"[{_MARKS}]+[{_QUOTES})\]]*(?=\s|$)")
_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_BOILERPLATE = re.compile(
    r"javascript|terms of use|privacy policy|cookie policy|uses cookies|use of cookies|use cookies", re.IGNORECASE
)


def c4_reason(text: str, spaceless: bool, config: CleanConfig) -> str | None:
    """The first rule that the text breaks."""
    if "lorem ipsum" in text.lower():
        return "lorem_ipsum"
    if "{" in text:
        return "curly_bracket"
    if not spaceless and not _has_sentences(text, config.min_sentences):
        return "few_sentences"
    return None


def _has_sentences(text: str, enough: int) -> bool:
    found = 0
    for line in text.splitlines():
        if found >= enough:
            return True
        found += _sentences(line.strip())
    return found >= enough


def _sentences(line: str) -> int:
    """Sentences of a line that C4 keeps, by their end marks; 0 for one that it removes."""
    line = _CITATION.sub("", line)
    if not line.endswith((*_MARKS, '"', "”", "»")) or line.endswith("..."):
        return 0
    if len(line.split()) < _MIN_WORDS_PER_LINE or _BOILERPLATE.search(line):
        return 0
    return max(1, len(_END.findall(line)))
