"""Why a document is left out, as names for people and as codes for files."""

from __future__ import annotations

# Codes fit a uint8 and never change their meaning, so that they may be stored. Cleaning uses 1 to 99; 0 stays.
REASONS: dict[str, int] = {
    "kept": 0,
    "too_short": 1,
    "too_long": 2,
    "few_words": 10,
    "many_words": 11,
    "short_words": 12,
    "long_words": 13,
    "hash_symbols": 14,
    "ellipses": 15,
    "bullet_lines": 16,
    "ellipsis_lines": 17,
    "few_alphabetic_words": 18,
    "few_stop_words": 19,
    "lorem_ipsum": 30,
    "curly_bracket": 31,
    "few_sentences": 32,
    "duplicate_paragraphs": 40,
    "duplicate_paragraph_chars": 41,
    "duplicate_lines": 42,
    "duplicate_line_chars": 43,
    "top_2_grams": 44,
    "top_3_grams": 45,
    "top_4_grams": 46,
    "duplicate_5_grams": 47,
    "duplicate_6_grams": 48,
    "duplicate_7_grams": 49,
    "duplicate_8_grams": 50,
    "duplicate_9_grams": 51,
    "duplicate_10_grams": 52,
    "other_language": 60,
    "uncertain_language": 61,
    "near_duplicate": 70,
}
