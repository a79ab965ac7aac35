"""The keys of a GGUF file that hold a tokenizer: byte-level BPE, which llama.cpp calls "gpt2" whatever its vocabulary is.

The file names the regex that splits text before merging instead of holding it, so only those that llama.cpp knows by a name can
be written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_data.patterns import GPT2, LLAMA3, O200K, QWEN2

if TYPE_CHECKING:
    from grist_data import Tokenizer

_DIGITS_THEN_GPT2 = rf"\p{{N}}, then {GPT2}"
# (regex, whether a piece that is a token is never split) -> tokenizer.ggml.pre. llama-bpe has the second built in; dbrx is the
# same regex without it.
PRE_TOKENIZERS = {
    (GPT2, False): "gpt-2",
    (_DIGITS_THEN_GPT2, False): "smollm",
    (LLAMA3, True): "llama-bpe",
    (LLAMA3, False): "dbrx",
    (QWEN2, False): "qwen2",
    (O200K, False): "gpt-4o",
}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType


def tokenizer_metadata(
    directory: Path, vocab_size: int, pre_tokenizer: str | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Keys and warnings. pre_tokenizer: a name that counts instead of what the regex says.

    Raises FileNotFoundError for a directory without tokenizer.json, ValueError for one that llama.cpp cannot express.
    """
    from grist_data import Tokenizer

    tokenizer = Tokenizer.load(directory)
    _require_byte_level_bpe(tokenizer)
    warnings = []
    pre = pre_tokenizer or pre_tokenizer_of(tokenizer.definition)
    if pre_tokenizer is not None:
        warnings.append(f"text is split as {pre!r} because you said so: compare ids before relying on it")
    elif pre == "gpt-4o":
        warnings.append("llama.cpp splits about one in a hundred random Unicode texts otherwise than o200k's own regex")
    normalizer = tokenizer.definition.get("normalizer")
    if normalizer is not None:
        if normalizer.get("type") != "NFC":
            raise ValueError(f"llama.cpp has no normalizer, but tokenizer.json has {json.dumps(normalizer)}")
        warnings.append("llama.cpp does not bring text to Unicode's form NFC, as tokenizer.json says: do so before")
    found: dict[str, Any] = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
    found |= _vocabulary(tokenizer, vocab_size)
    found |= _special_ids(tokenizer, directory, warnings)
    if tokenizer.chat_template:
        found["tokenizer.chat_template"] = tokenizer.chat_template
    return found, warnings


def pre_tokenizer_of(definition: dict[str, Any]) -> str:
    """llama.cpp's name of the way that a tokenizer.json splits text. Raises ValueError where there is none."""
    regex = _regex(definition.get("pre_tokenizer"))
    whole = bool(definition["model"].get("ignore_merges"))
    if regex is None or (regex, whole) not in PRE_TOKENIZERS:
        raise ValueError(
            "llama.cpp has no name for the way tokenizer.json splits text: pre_tokenizer "
            f"{json.dumps(definition.get('pre_tokenizer'))}, ignore_merges {whole}. Known are "
            f"{', '.join(PRE_TOKENIZERS.values())}; name one of llama.cpp's to force it (pre_tokenizer)"
        )
    return PRE_TOKENIZERS[regex, whole]


def _regex(pre_tokenizer: dict[str, Any] | None) -> str | None:
    steps = [pre_tokenizer] if pre_tokenizer is not None else []
    if pre_tokenizer is not None and pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    *before, last = steps or [{"type": None}]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        return None
    if last.get("use_regex", True):
        if not before:
            return GPT2
        return _DIGITS_THEN_GPT2 if before == [{"type": "Digits", "individual_digits": True}] else None
    if len(before) != 1 or before[0]["type"] != "Split":
        return None
    split = before[0]
    return split["pattern"].get("Regex") if split["behavior"] == "Isolated" and not split["invert"] else None


def _require_byte_level_bpe(tokenizer: Tokenizer) -> None:
    model = tokenizer.definition["model"]
    decoder = json.dumps(tokenizer.definition.get("decoder"))
    marks = [key for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback") if model.get(key)]
    if tokenizer.kind != "bpe" or '"ByteLevel"' not in decoder or marks:
        raise ValueError(
            f"only byte-level BPE can be written as GGUF here, but tokenizer.json is {tokenizer.kind} with decoder {decoder}"
            f"{' and ' + ', '.join(marks) if marks else ''}"
        )


def _vocabulary(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """A token for each row of the embedding: rows that the tokenizer has no token for are unused ones."""
    model = tokenizer.definition["model"]
    tokens = {id_: (text, _NORMAL) for text, id_ in model["vocab"].items()}
    for added in tokenizer.definition.get("added_tokens", []):
        tokens[added["id"]] = (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
    if max(tokens) >= vocab_size:
        raise ValueError(f"the tokenizer has an id {max(tokens)}, but the model's vocab_size is {vocab_size}")
    listed = [tokens.get(id_, (f"[PAD{id_}]", _UNUSED)) for id_ in range(vocab_size)]
    return {
        "tokenizer.ggml.tokens": [text for text, _ in listed],
        "tokenizer.ggml.token_type": [kind for _, kind in listed],
        "tokenizer.ggml.merges": [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
    }


def _special_ids(tokenizer: Tokenizer, directory: Path, warnings: list[str]) -> dict[str, Any]:
    """llama.cpp has places for three ids that end a text, and takes id 11 for bos and eos where the file names none."""
    ends = _ends(tokenizer, directory)
    if not ends:
        raise ValueError(
            f"{directory} names no id that ends a text, and llama.cpp would take token 11 for one: give the tokenizer a special"
            " token <|endoftext|>, or generation_config.json an eos_token_id"
        )
    if ends[3:]:
        warnings.append(f"GGUF has room for three ids that end a text: {ends[3:]} are left out")
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    found: dict[str, Any] = {f"tokenizer.ggml.{name}": id_ for name, id_ in zip(names, ends, strict=False)}
    bos = tokenizer.bos_id
    found["tokenizer.ggml.bos_token_id"] = ends[0] if bos is None else bos
    found["tokenizer.ggml.padding_token_id"] = ends[0]
    found["tokenizer.ggml.add_bos_token"] = bos is not None and _adds_bos(tokenizer)
    found["tokenizer.ggml.add_eos_token"] = False
    return found


def _ends(tokenizer: Tokenizer, directory: Path) -> list[int]:
    """The end of a document first, then what else generation_config.json stops at."""
    from grist_data.atomic import read_json

    file = directory / "generation_config.json"
    listed = read_json(file).get("eos_token_id") if file.is_file() else None
    ids = listed if isinstance(listed, list) else [listed]
    return [*dict.fromkeys(id_ for id_ in (tokenizer.eot_id, *ids) if id_ is not None)]


def _adds_bos(tokenizer: Tokenizer) -> bool:
    """As tokenizer_config.json says, else as the post-processor of tokenizer.json does."""
    configured = tokenizer.config.get("add_bos_token")
    if isinstance(configured, bool):
        return configured
    last = tokenizer.definition.get("post_processor") or {}
    steps = last.get("processors", []) if last.get("type") == "Sequence" else [last]
    first = [step["single"][0] for step in steps if step.get("type") == "TemplateProcessing" and step["single"]]
    return any("SpecialToken" in each for each in first)
