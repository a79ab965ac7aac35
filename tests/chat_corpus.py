"""Conversations of random words, the same everywhere, as a file of chat JSON lines."""

from __future__ import annotations

import json
import random
from pathlib import Path

from text_corpus import WORDS

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def conversations(n: int = 60, seed: int = 5) -> list[list[dict[str, str]]]:
    """Of one to four turns, some with a system message, some far longer than others."""
    draw = random.Random(seed)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    found = []
    for number in range(n):
        messages = [{"role": "system", "content": f"You are miller {number}."}] if draw.random() < 0.4 else []
        for _ in range(draw.randint(1, 4)):
            messages.append({"role": "user", "content": words(20)})
            messages.append({"role": "assistant", "content": words(200 if draw.random() < 0.1 else 25)})
        found.append(messages)
    return found


def write_conversations(path: Path, found: list[list[dict[str, str]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in found), encoding="utf-8")
    return path
