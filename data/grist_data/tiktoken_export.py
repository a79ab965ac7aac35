"""tiktoken's vocabularies as a tokenizer.json with identical ids: `gpt2`, `o200k_base`, `o200k_harmony` (GPT-OSS's).

tiktoken stores ranks, `tokenizers` wants merges; engine_ranks.py, which goes the other way, says why each token has one at
most. A token that merging does not reach is used only where it is a whole pre-token (`ignore_merges`), as in tiktoken.
"""

from __future__ import annotations

import base64
from pathlib import Path

from grist_data.engine_ranks import last_merge
from grist_data.patterns import GPT2, O200K
from grist_data.tokenizer import END_OF_TEXT, Tokenizer, bytes_to_characters

_PATTERN_OF = {"gpt2": GPT2, "o200k_base": O200K, "o200k_harmony": O200K}
_HARMONY_NAMED = {
    "<|startoftext|>": 199998,
    END_OF_TEXT: 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
    "<|endofprompt|>": 200018,
}
# tiktoken gives 200018 two names, endofprompt and reserved; a token of a tokenizer.json has one, so the role wins.
_HARMONY_RESERVED = {f"<|reserved_{id_}|>": id_ for id_ in range(200000, 201088) if id_ not in _HARMONY_NAMED.values()}
_SPECIAL_TOKENS_OF = {
    "gpt2": {END_OF_TEXT: 50256},
    "o200k_base": {END_OF_TEXT: 199999, "<|endofprompt|>": 200018},
    "o200k_harmony": _HARMONY_NAMED | _HARMONY_RESERVED,
}
ENCODINGS = tuple(_PATTERN_OF)


def from_tiktoken(name: str, ranks_file: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a tiktoken encoding.

    ranks_file: a local `.tiktoken` file; without it tiktoken reads $TIKTOKEN_CACHE_DIR or downloads.
    Raises ValueError for an unknown name or a malformed file, ImportError when tiktoken is needed and missing.
    """
    if name not in ENCODINGS:
        raise ValueError(f"unknown tiktoken encoding {name!r}: expected one of {', '.join(ENCODINGS)}")
    ranks = _installed_ranks(name) if ranks_file is None else read_ranks(Path(ranks_file))
    return from_ranks(ranks, _SPECIAL_TOKENS_OF[name], _PATTERN_OF[name])


def read_ranks(file: Path) -> dict[bytes, int]:
    """Parse a `.tiktoken` file: a token in base64 and its rank on each line."""
    if not file.is_file():
        raise FileNotFoundError(f"no tiktoken ranks at {file}")
    ranks = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: expected 'base64-token rank', but got {line[:60]!r}") from error
    return ranks


def from_ranks(ranks: dict[bytes, int], special_tokens: dict[str, int], pattern: str) -> Tokenizer:
    """Tokenizer with the ids of `tiktoken.Encoding(mergeable_ranks=ranks, special_tokens=..., pat_str=...)`.

    pattern: pat_str in the dialect of `tokenizers` (patterns.py). The 256 single bytes must have ranks.
    """
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise ValueError(f"the ranks lack {len(missing)} of the 256 single bytes, first 0x{missing[0]:02x}")
    characters = bytes_to_characters()

    def spelled(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = [
        [spelled(merge[0]), spelled(merge[1])]
        for token in sorted(ranks, key=ranks.__getitem__)
        if (merge := last_merge(ranks, token))
    ]
    # Special tokens stand in the vocabulary as well: only there can they have any id, with gaps between.
    vocab = {spelled(token): rank for token, rank in ranks.items()} | special_tokens
    return Tokenizer(
        {
            "version": "1.0",
            "added_tokens": [
                {"id": id_, "content": name, "special": True}
                | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
                for name, id_ in sorted(special_tokens.items(), key=lambda item: item[1])
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
                ],
            },
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "vocab": vocab, "merges": merges, "ignore_merges": True},
        }
    )


def _installed_ranks(name: str) -> dict[bytes, int]:
    try:
        import tiktoken
    except ImportError as error:
        raise ImportError(f"the {name} tokenizer needs tiktoken: pip install gristmill[hub]") from error
    # Harmony is o200k_base with more special tokens. tiktoken's README names this attribute for extending encodings.
    return tiktoken.get_encoding(name)._mergeable_ranks
