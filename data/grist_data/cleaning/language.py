"""The language of a text, by py3langid, whose model of 139 languages (and `zxx`, no language) comes in its wheel.

The classifier is naive Bayes over sequences of bytes: Lui and Baldwin 2011, "Cross-domain Feature Selection for Language
Identification". Scores are computed here from its tables in float64: py3langid's own product in float32 depends in the
last digits on the BLAS of the machine, and a document at the threshold would stay on one machine and go on another.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier  # pyright: ignore[reportMissingImports]

UNKNOWN = "und"
# The walk over the bytes is Python, so long texts are judged by three pieces: beginning, middle and end.
_PIECES, _PIECE_CHARS = 3, 300


@dataclass(frozen=True)
class LanguageModel:
    """py3langid's tables, and the labels that its columns belong to (scripts of a language share one)."""

    tables: LanguageIdentifier
    labels: tuple[str, ...]
    label_of_column: np.ndarray
    row_offsets: list[int]

    def identify(self, text: str) -> tuple[str, float]:
        """Most probable language and its probability; ('und', 0.0) where nothing speaks for any."""
        from py3langid.langid import visit_counts  # pyright: ignore[reportMissingImports]

        sample = unicodedata.normalize("NFC", excerpt(text))
        data = (sample.lower() if sample.isupper() else sample).encode("utf-8", "surrogatepass")
        tables = self.tables
        visits = visit_counts(tables.tk_nextmove, self.row_offsets, tables.tk_output, data)
        if not visits:
            return UNKNOWN, 0.0
        weights = np.log1p(np.fromiter(visits.values(), np.float64, len(visits)))
        rows = tables.nb_ptc[np.fromiter(visits, np.intp, len(visits))].astype(np.float64)
        scores = (weights[:, None] * rows).sum(axis=0) + tables.nb_pc
        scores /= math.sqrt(len(data))  # py3langid's temperature: it keeps long texts from being all but certain
        odds = np.exp(scores - scores.max())
        probabilities = np.bincount(self.label_of_column, odds / odds.sum())
        best = int(probabilities.argmax())
        return self.labels[best], float(probabilities[best])


@functools.cache
def load_model() -> LanguageModel:
    """About 0.6 s and 100 MB, once in a process. Raises ImportError that says what to install."""
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("languages needs py3langid: pip install gristmill[clean]") from error
    tables = LanguageIdentifier.from_model_file(MODEL_FILE)
    labels = tuple(tables.labels)
    columns = np.array([labels.index(label) for label in tables.nb_classes])
    return LanguageModel(tables, labels, columns, [row << 8 for row in tables.tk_row])


def excerpt(text: str) -> str:
    """The text, or three pieces of 300 characters of a longer one."""
    if len(text) <= _PIECES * _PIECE_CHARS:
        return text
    begins = [(len(text) - _PIECE_CHARS) * piece // (_PIECES - 1) for piece in range(_PIECES)]
    return "\n".join(text[begin : begin + _PIECE_CHARS] for begin in begins)
