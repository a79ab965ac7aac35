"""One face for every tokenizer: `tokenizer.json` in, ids out, and back to exactly the same text.

A text is data: a special token's name in a text (a book that says `<|endoftext|>`) is encoded as the characters it is
made of. Special ids enter a token stream only where this package puts them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from grist_data.atomic import canonical_json, read_json, write_atomically
from grist_data.patterns import KNOWN

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
END_OF_TEXT = "<|endoftext|>"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()

# A long text is encoded in pieces, for memory (about 30 bytes a token while encoding) and for a share for every thread.
_PIECE_CHARS = 1 << 16
_CUT = re.compile(r"(?<=[!-~\w]) ")  # patterns.py says why a cut there changes no id


def bytes_to_characters() -> list[str]:
    """GPT-2's alphabet: a printable character for each of the 256 bytes, so that byte strings are valid text."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def pieces_of(text: str) -> Iterator[str]:
    """The text in pieces of about 64 Ki characters, each but the first beginning at a space."""
    start = 0
    while len(text) - start > 2 * _PIECE_CHARS and (cut := _CUT.search(text, start + _PIECE_CHARS)):
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


class Tokenizer:
    """A `tokenizers` tokenizer with what training needs around it. Make one with `load`, or see tokenizer_training.py.

    eot_id: id put after every document: `<|endoftext|>` where the tokenizer has it, else its `eos_token`, else None.
    bos_id: id of `bos_token` in tokenizer_config.json, or None. special_tokens: name -> id of every special token.
    vocab_size: largest id + 1, the number of rows a model needs (o200k has unused ids in between).
    sha256: hex digest of `json_bytes`, the canonical tokenizer.json, which is also the file that `save` writes.
    definition: tokenizer.json as Python values. trained_by: package and version, where it was trained just now.
    chat_template: Jinja that conversations are written by (chat_template.py), or None; it may be set.
    """

    def __init__(
        self,
        definition: dict[str, Any],
        config: dict[str, Any] | None = None,
        trained_by: str | None = None,
        chat_template: str | None = None,
    ) -> None:
        # Files saved by other programs may carry a truncation that would silently shorten every document.
        definition = {**definition, "truncation": None, "padding": None}
        self.json_bytes = canonical_json(definition)
        self.sha256 = hashlib.sha256(self.json_bytes).hexdigest()
        self.kind = str(definition["model"].get("type", "BPE")).lower()
        self.definition = definition
        self.trained_by = trained_by
        self._engine = tokenizers.Tokenizer.from_str(self.json_bytes.decode())
        self._engine.encode_special_tokens = True  # means: encode their names as plain text
        added = self._engine.get_added_tokens_decoder()
        self.special_tokens = {token.content: id_ for id_, token in sorted(added.items()) if token.special}
        self.config = config or {}
        self._chat_template = chat_template
        self.eot_token = END_OF_TEXT if END_OF_TEXT in self.special_tokens else self._configured("eos_token")
        self.eot_id = None if self.eot_token is None else self.special_tokens[self.eot_token]
        bos_token = self._configured("bos_token")
        self.bos_id = None if bos_token is None else self.special_tokens[bos_token]

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or the one in a directory (a dataset, a Hugging Face model).

        Raises FileNotFoundError where there is none and ValueError where it is not a tokenizer.
        """
        path = Path(path)
        file = path / TOKENIZER_FILE if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"no tokenizer at {path}: expected a tokenizer.json or a directory that holds one")
        definition = read_json(file)
        if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
            raise ValueError(f"{file} is not a tokenizer.json: it has no 'model' section")
        config_file = file.with_name(CONFIG_FILE)
        config = read_json(config_file) if config_file.is_file() else None
        template_file = file.with_name(TEMPLATE_FILE)
        template = template_file.read_text(encoding="utf-8") if template_file.is_file() else None
        try:
            return cls(definition, config, chat_template=template)
        except Exception as error:  # the tokenizers library raises bare Exception for a malformed definition
            raise ValueError(f"{file} is not a usable tokenizer: {error}") from error

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json, tokenizer_config.json and, where there is one, chat_template.jinja.

        `transformers.AutoTokenizer` reads them all. Several templates by name stay in tokenizer_config.json.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        # transformers 5 calls the class TokenizersBackend, which transformers 4 does not know; both know this name.
        config = {"clean_up_tokenization_spaces": False, **self.config}
        if config.get("tokenizer_class", "TokenizersBackend") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if self.eot_token is not None:
            config = {"eos_token": self.eot_token, "pad_token": self.eot_token, **config}
        if self._chat_template is not None:
            config.pop("chat_template", None)  # another, perhaps, and the file is what counts
        write_atomically(directory / TOKENIZER_FILE, self.json_bytes)
        write_atomically(directory / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode() + b"\n")
        if self.chat_template is not None and not isinstance(config.get("chat_template"), list):
            write_atomically(directory / TEMPLATE_FILE, self.chat_template.encode())

    @property
    def chat_template(self) -> str | None:
        return _configured_template(self.config) if self._chat_template is None else self._chat_template

    @chat_template.setter
    def chat_template(self, template: str | None) -> None:
        self._chat_template = template

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @cached_property
    def _vocab_size(self) -> int:
        return max(self._engine.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without any special token. Raises ValueError for a lone surrogate, which is not text."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text as uint32 arrays, computed on all cores (TOKENIZERS_PARALLELISM=false for one)."""
        pieces = [list(pieces_of(text)) for text in texts] if self.cuts_at_spaces else [[text] for text in texts]
        flat = [piece for of_text in pieces for piece in of_text]
        try:
            encodings = self._engine.encode_batch_fast(flat, add_special_tokens=False)
        except TypeError:  # what the library makes of text that UTF-8 cannot hold
            refuse_surrogates(texts)
            raise
        arrays = [np.array(encoding.ids, np.uint32) for encoding in encodings]
        if len(arrays) == len(texts):
            return arrays
        rest = iter(arrays)
        return [np.concatenate([next(rest) for _ in of_text]) for of_text in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, special tokens by name. Bytes that are no UTF-8 and ids without a token become U+FFFD."""
        if self._byte_level:
            return self.token_bytes(ids).decode("utf-8", errors="replace")
        return self._engine.decode([int(id_) for id_ in ids], skip_special_tokens=False)

    def token_bytes(self, ids: Iterable[int]) -> bytes:
        """UTF-8 bytes that the ids stand for; cutting the ids anywhere cuts the bytes there.

        Raises ValueError for a tokenizer that is not byte-level (the bytes then depend on the neighbours).
        """
        table = self._bytes_of_id
        return b"".join(table.get(int(id_), _REPLACEMENT) for id_ in ids)

    @cached_property
    def cuts_at_spaces(self) -> bool:
        """Whether encoding a text in pieces that begin at a space gives the ids of the whole text."""
        added_as_text = any(not token["special"] for token in self.definition.get("added_tokens", []))
        if self.definition.get("normalizer") or added_as_text:
            return False
        first = _steps(self.definition.get("pre_tokenizer"), "pretokenizers")[:1]
        return any(
            (step["type"] == "ByteLevel" and step.get("use_regex", True) and not step.get("add_prefix_space"))
            or (
                step["type"] == "Split"
                and step["pattern"].get("Regex") in KNOWN
                and step["behavior"] == "Isolated"
                and not step["invert"]
            )
            for step in first
        )

    @cached_property
    def _byte_level(self) -> bool:
        return any(step["type"] == "ByteLevel" for step in _steps(self.definition.get("decoder"), "decoders"))

    @cached_property
    def _bytes_of_id(self) -> dict[int, bytes]:
        if not self._byte_level:
            raise ValueError(
                f"token bytes are defined for byte-level tokenizers; this {self.kind} one is not byte-level"
            )
        byte_of = {character: byte for byte, character in enumerate(bytes_to_characters())}
        prefix = self.definition["model"].get("continuing_subword_prefix") or ""
        literal = self._engine.get_added_tokens_decoder()
        table = {}
        for token, id_ in self._engine.get_vocab(with_added_tokens=True).items():
            own = token.removeprefix(prefix)
            is_text = id_ not in literal and all(character in byte_of for character in own)
            table[id_] = bytes(byte_of[character] for character in own) if is_text else token.encode()
        return table

    def _configured(self, key: str) -> str | None:
        value = self.config.get(key)
        name = value.get("content") if isinstance(value, dict) else value
        if name is not None and name not in self.special_tokens:
            raise ValueError(
                f"{CONFIG_FILE} names {name!r} as {key}, but the special tokens are {[*self.special_tokens]}"
            )
        return name


def stored_template(directory: Path) -> str | None:
    """The chat template beside a tokenizer.json: chat_template.jinja before tokenizer_config.json, or None."""
    if (file := directory / TEMPLATE_FILE).is_file():
        return file.read_text(encoding="utf-8")
    config = directory / CONFIG_FILE
    return _configured_template(read_json(config)) if config.is_file() else None


def _configured_template(config: dict[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    return template


def _steps(component: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """A decoder or pre-tokenizer of a tokenizer.json as a flat list."""
    if component is None:
        return []
    return [*component[key]] if component["type"] == "Sequence" else [component]


def refuse_surrogates(texts: Iterable[str]) -> None:
    """Raises ValueError for the first text that holds half of a UTF-16 pair, which UTF-8 has no bytes for."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {error.start} of the text is a lone surrogate ({text[error.start]!r}), half of a UTF-16 pair"
                " and not text: replace it, for instance with the source option errors='replace'"
            ) from error
