"""The directory of an export: written beside its place, with what belongs to a model besides weights, renamed when whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ALONG = ("LICENSE*", "NOTICE*", "*.jinja")
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "generation_config.json",
)


@contextmanager
def published_at(out: Path) -> Iterator[Path]:
    """A place to write to, which becomes `out` when the block ends well and is removed when it does not."""
    draft = out.with_name(f".{out.name}.exporting")
    if draft.exists():  # of an export that was killed
        shutil.rmtree(draft)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def copy_along(source: Path, draft: Path, dtype: str, *, tokenizer: bool = False) -> None:
    """Licenses, templates and the card, which then states the new type; with the tokenizer and generation settings as they are,
    where nothing else writes them."""
    from grist_model.model_card import FILE, with_type

    for pattern in (*_ALONG, *(_TOKENIZER if tokenizer else ())):
        for extra in source.glob(pattern):
            if extra.is_file():
                shutil.copy2(extra, draft / extra.name)
    card = source / FILE
    if card.is_file():
        (draft / FILE).write_text(with_type(card.read_text(encoding="utf-8"), dtype), encoding="utf-8")


def weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))
