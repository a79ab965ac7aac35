"""A small corpus of awkward words, the same everywhere."""

from __future__ import annotations

import json
import random
from pathlib import Path

WORDS = "grain mill flour stone river wheel water sack baker loaf oven naïve 小麦 🌾 don't 1789 --".split()


def corpus_texts(documents: int = 60, words: int = 120, seed: int = 1) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=words // 2 + draw.randrange(words))) + f" {i}\n" for i in range(documents)]


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path
