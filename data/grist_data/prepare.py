"""Text to a dataset of token shards. Rerun after any interruption: it goes on where it was and ends the same.

    python -m grist_data.prepare --source shakespeare --out datasets/shakespeare
    python -m grist_data.prepare --source files --paths 'books/*.txt' --vocab_size 8000 --out datasets/books
    python -m grist_data.prepare --source huggingface --name roneneldan/TinyStories --tokenizer gpt2 --out datasets/stories

The order of work: survey the spans of the source, plan (units, split), obtain the tokenizer, encode unit by unit, join the
parts into shards, and last, by rename, `dataset.json`. `spread.py` does the same on many machines.
"""

from __future__ import annotations

import shutil
import sys
import time
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_data.atomic import PART_SUFFIX
from grist_data.journal import refuse_other_settings
from grist_data.lock import exclusive
from grist_data.manifest import DATASET_FILE, JOURNAL_FILE, WORK_DIRECTORIES, read_manifest
from grist_data.prepare_config import PrepareConfig

if TYPE_CHECKING:
    from typing import BinaryIO

    from grist_data.tokenizer import Tokenizer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

__all__ = ["PrepareConfig", "prepare", "tokenizer_facts"]


def prepare(config: PrepareConfig) -> Path:
    """Make the dataset, or find it finished, and return its directory.

    An interrupted preparation goes on; processes that prepare the same directory wait for each other.
    Raises ValueError for a directory with other settings (unless `overwrite`), for a source that is empty, malformed or
    changed midway; FileNotFoundError for a missing file; OSError for a full disk, or a worker that was killed.
    """
    out, settings = checked(config), config.settings()
    if not config.overwrite and is_finished(out, settings) and not _has_left_work(out):
        return out
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out) as lock:
        if config.overwrite:
            clear(out)
        elif is_finished(out, settings):
            clear_work(out)
            return out
        _make(config, out, lock)
    return out


def _has_left_work(out: Path) -> bool:
    """Whether a process was killed between the last file of a dataset and clearing up."""
    return any((out / name).exists() for name in WORK_DIRECTORIES)


def checked(config: PrepareConfig) -> Path:
    """The directory of the dataset. Raises ValueError for one that cannot be it."""
    if not config.out:
        raise ValueError("out is empty: give the directory of the dataset")
    out = Path(config.out)
    own_tokenizer = config.tokenizer_file()
    if own_tokenizer is not None and own_tokenizer.parent.resolve() == out.resolve():
        raise ValueError(
            f"tokenizer {own_tokenizer} lies in the dataset's own directory, where it would be overwritten"
        )
    return out


def is_finished(out: Path, settings: dict[str, Any]) -> bool:
    if not (out / DATASET_FILE).is_file():
        return False
    refuse_other_settings(out, "a dataset", read_manifest(out)["settings"], settings)
    return True


def clear(out: Path) -> None:
    """Remove a dataset's own files: dataset.json first, so that it is gone at once, the journal, its birth mark, last."""
    refuse_foreign(out)
    (out / DATASET_FILE).unlink(missing_ok=True)
    clear_work(out)
    for pattern in ("*.tok", f"*{PART_SUFFIX}", *TOKENIZER_FILES, JOURNAL_FILE):
        for file in out.glob(pattern):
            file.unlink()


def clear_work(out: Path) -> None:
    for name in WORK_DIRECTORIES:
        if (out / name).is_dir():
            shutil.rmtree(out / name)


def refuse_foreign(out: Path) -> None:
    """Keep out of directories that something else made, a model's for example."""
    ours = (out / JOURNAL_FILE).exists() or (out / DATASET_FILE).exists()
    if (out / "tokenizer.json").exists() and not ours:
        raise ValueError(f"{out} holds a tokenizer.json that no preparation wrote: give another directory")


def _make(config: PrepareConfig, out: Path, lock: BinaryIO) -> None:
    # Imported here so that the configuration can be read, and help shown, without them.
    from grist_data import work
    from grist_data.finish import summary
    from grist_data.preparation import Preparation
    from grist_data.workers import Workers

    began = time.monotonic()
    refuse_foreign(out)
    for unfinished in out.rglob(f"*{PART_SUFFIX}"):  # of a process that was killed
        unfinished.unlink()
    preparation = Preparation(config)
    with Workers(preparation, lock) as workers:
        work.survey(preparation, workers)
        work.plan(preparation)
        units = range(len(preparation.plan.units))
        work.encode(preparation, workers, units)
        splits = work.finish(preparation, workers, units, out)
    clear_work(out)
    print(f"{out}: {summary(splits)}; {time.monotonic() - began:.1f} s", file=sys.stderr)


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    import tokenizers

    return {
        "kind": tokenizer.kind,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "special_tokens": tokenizer.special_tokens,
        "engine": f"tokenizers {tokenizers.__version__}",
    }


class _CallableModule(types.ModuleType):
    """Importing this module binds its name in the package, in place of the function; so the module can be called too."""

    __call__ = staticmethod(prepare)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    from grist_data.command_line import main

    sys.exit(main())
