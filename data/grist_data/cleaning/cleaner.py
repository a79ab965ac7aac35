"""The rules in their order, cheapest first: the first that a document breaks is the reason why it is left out."""

from __future__ import annotations

import importlib.metadata

import numpy as np

from grist_data.cleaning.c4 import c4_reason
from grist_data.cleaning.gopher import quality_reason
from grist_data.cleaning.language import load_model
from grist_data.cleaning.near_duplicates import signature
from grist_data.cleaning.repetition import repetition_reason
from grist_data.cleaning.settings import CleanConfig
from grist_data.cleaning.words import WordHashes, is_spaceless


class Cleaner:
    """Judges one document at a time; what it says depends on text and settings alone.

    It is made once in each process, since it holds a language model. Raises ImportError for a package that the settings
    need, ValueError for a language that py3langid does not know.
    """

    def __init__(self, config: CleanConfig) -> None:
        self.config = config
        self._hashes = WordHashes()
        if config.languages and (unknown := sorted(set(config.languages) - set(load_model().labels))):
            raise ValueError(
                f"languages has {', '.join(unknown)}, which py3langid does not know; it knows"
                f" {', '.join(sorted(load_model().labels))}"
            )
        if config.near_duplicates:
            try:
                import rensa  # noqa: F401  # pyright: ignore[reportMissingImports]
            except ImportError as error:
                raise ImportError("near_duplicates needs rensa: pip install gristmill[clean]") from error

    def reason(self, text: str) -> str | None:
        """Why the text is to be left out, a name of REASONS; None where it stays."""
        config = self.config
        if len(text) < config.min_chars:
            return "too_short"
        if config.max_chars is not None and len(text) > config.max_chars:
            return "too_long"
        return self._prose_reason(text) or (self._language_reason(text) if config.languages else None)

    def signature(self, text: str) -> np.ndarray | None:
        """(num_perm,) uint32 for `near_duplicates`; None where these are not asked for."""
        return signature(text, self.config, self._hashes) if self.config.near_duplicates else None

    def versions(self) -> dict[str, str]:
        """Packages that decide about documents -> their versions: with others the same settings may keep other ones."""
        used = {"py3langid": bool(self.config.languages), "rensa": self.config.near_duplicates}
        return {name: importlib.metadata.version(name) for name, needed in used.items() if needed}

    def _prose_reason(self, text: str) -> str | None:
        config = self.config
        if config.quality == "none" and not config.repetition:
            return None
        spaceless, words = is_spaceless(text), text.split()
        reason = quality_reason(text, words, spaceless, config) if config.gopher else None
        if reason is None and config.c4:
            reason = c4_reason(text, spaceless, config)
        if reason is None and config.repetition:
            reason = repetition_reason(text, words, spaceless, config, self._hashes)
        return reason

    def _language_reason(self, text: str) -> str | None:
        language, score = load_model().identify(text)
        if language not in self.config.languages:
            return "other_language"
        return "uncertain_language" if score < self.config.min_language_score else None
