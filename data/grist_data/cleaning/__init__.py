"""Which documents to leave out: by length, quality, repetition, language, and likeness to an earlier document."""

from __future__ import annotations

from grist_data.cleaning.cleaner import Cleaner
from grist_data.cleaning.near_duplicates import near_duplicates
from grist_data.cleaning.reasons import REASONS
from grist_data.cleaning.settings import CleanConfig

__all__ = ["REASONS", "CleanConfig", "Cleaner", "near_duplicates"]
