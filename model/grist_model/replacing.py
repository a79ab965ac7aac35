"""A directory of a model in the place of an older one, whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from grist_model.model_card import is_generated

# What describes a tokenizer, and would describe the wrong one beside another tokenizer.json.
_OF_TOKENIZER = ("tokenizer*", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its place when the block ends well and disappears when it does not.

    A directory cannot be exchanged in one step everywhere, so the old one is renamed away first. If the process dies
    between the two renames, it waits as .NAME.replaced and the next save puts it back before it begins.
    """
    draft, replaced = target.parent / f".{target.name}.saving", target.parent / f".{target.name}.replaced"
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").exists())):
        raise FileExistsError(f"{target} exists and holds no model (no config.json): choose another directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (draft, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    draft.mkdir()
    try:
        yield draft
        _sync(draft)
        if target.exists():
            target.rename(replaced)
            try:
                draft.rename(target)
            except BaseException:
                replaced.rename(target)
                raise
            carry_over(replaced, target)
            shutil.rmtree(replaced)
        else:
            draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def carry_over(old: Path, new: Path) -> None:
    """Move what is no part of a model (notes, a card of one's own; the tokenizer when none was given) from old to new."""
    another_tokenizer = _differs(old / "tokenizer.json", new / "tokenizer.json")
    for entry in old.iterdir():
        is_weights = entry.name.startswith("model") and entry.name.endswith((".safetensors", ".safetensors.index.json"))
        of_tokenizer = another_tokenizer and any(fnmatch(entry.name, pattern) for pattern in _OF_TOKENIZER)
        outdated = is_weights or of_tokenizer or is_generated(entry)
        if not outdated and not (new / entry.name).exists():
            entry.rename(new / entry.name)


def _differs(old: Path, new: Path) -> bool:
    return new.is_file() and (not old.is_file() or old.read_bytes() != new.read_bytes())


def _sync(directory: Path) -> None:
    """Have the disk hold every file before any of them becomes the model."""
    for path in directory.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
