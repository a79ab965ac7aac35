"""Where text comes from. A source is a function of keyword options that yields documents, always in the same order.

`prepare` reads a source several times (to count and split, to train a tokenizer, to encode) and relies on seeing the same
documents each time; it notices when it does not. A new source is one file here, one line in SOURCES, and, where it needs
options of its own, fields of PrepareConfig of the same names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from grist_data.document import Document
from grist_data.sources import conversations, files, gutenberg, huggingface, shakespeare, shakespeare_dialogues

SOURCES: dict[str, Callable[..., Iterator[Document]]] = {
    "shakespeare": shakespeare.documents,
    "gutenberg": gutenberg.documents,
    "files": files.documents,
    "huggingface": huggingface.documents,
    "conversations": conversations.documents,
    "shakespeare_dialogues": shakespeare_dialogues.documents,
}
# Their documents are messages, which a chat template turns into tokens.
CONVERSATIONS = ("conversations", "shakespeare_dialogues")

__all__ = ["CONVERSATIONS", "SOURCES", "Document"]
