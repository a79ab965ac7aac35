"""Preference pairs out of conversations: the answer that was given, against one that was given to something else.

For want of better pairs, and to try preference training without a network: a model learns from them to stay with what it was
asked. Pairs that people or models have judged are read by preferences.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from grist_data.document import Document
from grist_data.permutation import Feistel


def contrasting_rows(documents: Iterable[Document], seed: int = 0) -> Iterator[tuple[str, dict[str, Any]]]:
    """-> (where a conversation is from, {"prompt", "chosen", "rejected"}) for each of them, in order.

    documents: conversations; of each, the last answer is the chosen one, and what stands before it the prompt. seed: decides
    whose answer is the rejected one. It is another conversation's, and another text.
    Raises ValueError for a text without messages, and where fewer than two different answers are there.
    """
    prompts, answers, places = [], [], []
    for document in documents:
        if document.messages is None:
            raise ValueError(f"{document.id}: preference pairs are made of conversations, but this is a text")
        last = max((i for i, message in enumerate(document.messages) if message["role"] == "assistant"), default=0)
        if not last:
            raise ValueError(f"{document.id}: no answer follows a message")
        prompts.append(list(document.messages[:last]))
        answers.append(document.messages[last])
        places.append(document.id)
    if len({answer["content"] for answer in answers}) < 2:
        raise ValueError(f"{len(answers):,} conversations with fewer than two different answers: nothing to tell apart")
    order = Feistel(len(answers), (seed, "contrast"))
    for i, (prompt, chosen) in enumerate(zip(prompts, answers, strict=True)):
        place = order.inverse(i)
        others = (answers[order((place + k) % len(answers))] for k in range(1, len(answers)))
        rejected = next(other for other in others if other["content"] != chosen["content"])
        yield places[i], {"prompt": prompt, "chosen": [chosen], "rejected": [rejected]}
