"""Token files of other programs as a dataset: nanoGPT, Megatron-LM, llm.c and modded-nanogpt, packed Parquet.

    python -m grist_data.import nanogpt --train train.bin --val val.bin --end_of_document 50256 --tokenizer gpt2.json --out d
    python -m grist_data.import megatron --train corpus_text_document --tokenizer tokenizer.json --out d
    python -m grist_data.import llmc --train fineweb_train_*.bin --val fineweb_val_*.bin --begin_of_document '<|endoftext|>' ...
    python -m grist_data.import parquet --train packed/*.parquet --column input_ids --tokenizer tokenizer.json --out d

The files are read as they are and checked as a whole before anything is written; texts are decoded to record their hashes. The
directory appears when it is complete and every byte of it was read back.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_data.run_command import parser_for, run_command

if TYPE_CHECKING:
    from grist_data.foreign.stream import Boundaries, Stream, Survey
    from grist_data.foreign.token_file import TokenFile
    from grist_data.shard_header import Encoding
    from grist_data.tokenizer import Tokenizer

FORMATS = ("nanogpt", "megatron", "llmc", "parquet")


@dataclass(frozen=True)
class ImportConfig:
    """What is imported, and how its documents are found.

    Attributes:
        format: one of FORMATS.
        train, val: the files of each split, in their order.
        tokenizer: path of the tokenizer.json that the ids mean.
        out: directory of the dataset, which must not exist.
        end_of_document: id, or name of the special token, after every document (nanoGPT).
        begin_of_document: the same, before every document (llm.c).
        document_per_file: every file is one document.
        dtype: (nanogpt) of the ids.
        column: (parquet) of the lists of ids.
        shard_tokens: tokens of a shard, at least.
    """

    format: str
    train: tuple[str, ...]
    val: tuple[str, ...] = ()
    tokenizer: str = ""
    out: str = ""
    end_of_document: str | int | None = None
    begin_of_document: str | int | None = None
    document_per_file: bool = False
    dtype: str = "uint16"
    column: str = "input_ids"
    shard_tokens: int = 2**27

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r}: expected one of {', '.join(FORMATS)}")
        for name in ("train", "tokenizer", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty: give it")
        for name, format_ in (("dtype", "nanogpt"), ("column", "parquet")):
            default = type(self).__dataclass_fields__[name].default
            if self.format != format_ and getattr(self, name) != default:
                raise ValueError(f"{name} is an option of {format_}, not of {self.format}")
        ways = [self.end_of_document is not None, self.begin_of_document is not None, self.document_per_file]
        if sum(ways) > 1:
            raise ValueError("give one of end_of_document, begin_of_document and document_per_file")
        if self.format == "megatron" and any(ways):
            raise ValueError("Megatron's .idx says where documents end: leave out end_of_document and the like")
        if self.format in ("nanogpt", "llmc") and not any(ways):
            raise ValueError(
                f"files of {self.format} do not say where documents end: give end_of_document (the id after every document, as"
                " nanoGPT's scripts put it), begin_of_document (before every document, as llm.c's do) or document_per_file"
            )
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens must be at least 1, but is {self.shard_tokens}")


def import_tokens(config: ImportConfig) -> Path:
    """Make the dataset and return its directory.

    Raises FileNotFoundError for a missing file, FileExistsError for an `out` that is there, ValueError for files that are
    damaged, of another kind than said, or not of this tokenizer.
    """
    from grist_data.finish import finish, summary
    from grist_data.foreign.stream import Stream, survey
    from grist_data.new_directory import new_directory
    from grist_data.prepare import tokenizer_facts
    from grist_data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(config.tokenizer)
    boundaries = _boundaries(config, tokenizer)
    with new_directory(Path(config.out)) as directory:
        named = {"train": config.train, "val": config.val}
        streams = {
            split: Stream([_opener(config)(Path(file)) for file in files], boundaries)
            for split, files in named.items()
            if files
        }
        surveys = {
            split: survey(stream, tokenizer.vocab_size, tokenizer.eot_id, config.shard_tokens)
            for split, stream in streams.items()
        }
        source = _source(config, streams, surveys)
        encoding = _encoding(tokenizer, surveys, source["manifest_sha256"])
        splits = {
            split: _write_split(directory, split, stream, surveys[split], tokenizer, encoding)
            for split, stream in streams.items()
        }
        tokenizer.save(directory)
        source |= {key: sum(facts[key] for facts in splits.values()) for key in ("documents", "text_bytes")}
        engine = {"engine": f"unknown, imported from {config.format}"}
        finish(
            directory, splits, tokenizer_facts(tokenizer) | engine, {"source": source, "settings": _settings(config)}
        )
    print(f"{config.out}: {summary(splits)}", file=sys.stderr)
    return Path(config.out)


def _opener(config: ImportConfig) -> Callable[[Path], TokenFile]:
    from grist_data.foreign import llmc, megatron, nanogpt, parquet

    openers: dict[str, Callable[[Path], TokenFile]] = {
        "nanogpt": lambda path: nanogpt.read(path, config.dtype),
        "megatron": megatron.read,
        "llmc": llmc.read,
        "parquet": lambda path: parquet.read(path, config.column),
    }
    return openers[config.format]


def _boundaries(config: ImportConfig, tokenizer: Tokenizer) -> Boundaries:
    from grist_data.foreign.stream import Boundaries

    if config.end_of_document is not None:
        return Boundaries("after", _id_of(config.end_of_document, tokenizer))
    if config.begin_of_document is not None:
        return Boundaries("before", _id_of(config.begin_of_document, tokenizer))
    return Boundaries("file" if config.document_per_file else "stored")


def _id_of(marker: str | int, tokenizer: Tokenizer) -> int:
    """The id that a number, or the name of a special token, stands for."""
    if isinstance(marker, str) and marker in tokenizer.special_tokens:
        return tokenizer.special_tokens[marker]
    if not str(marker).isdecimal() or int(marker) >= tokenizer.vocab_size:
        raise ValueError(
            f"{marker!r} is neither an id below {tokenizer.vocab_size:,} nor a special token of the tokenizer, which has"
            f" {', '.join(tokenizer.special_tokens) or 'none'}"
        )
    return int(marker)


def _settings(config: ImportConfig) -> dict[str, Any]:
    """What decided the dataset; not where files lie."""
    settings = dataclasses.asdict(config)
    return {key: value for key, value in settings.items() if key not in ("train", "val", "tokenizer", "out")}


def _source(config: ImportConfig, streams: dict[str, Stream], surveys: dict[str, Survey]) -> dict[str, Any]:
    import hashlib

    from grist_data.atomic import canonical_json

    files = {
        split: [{"name": file.path.name, "tokens": file.n_tokens, "dtype": file.dtype.name} for file in stream.files]
        for split, stream in streams.items()
    }
    digests = {split: of_split.digest for split, of_split in surveys.items()}
    return {
        "name": f"import from {config.format}",
        "files": files,
        "xxh3_64_of_ids_and_ends": digests,
        "manifest_sha256": hashlib.sha256(canonical_json(digests)).hexdigest(),
    }


def _encoding(tokenizer: Tokenizer, surveys: dict[str, Survey], manifest_sha256: str) -> Encoding:
    from grist_data.shard_header import Encoding
    from grist_data.shard_writer import token_bytes_for

    return Encoding(
        token_bytes=token_bytes_for(tokenizer.vocab_size),
        vocab_size=tokenizer.vocab_size,
        eot_id=tokenizer.eot_id,
        bos_id=tokenizer.bos_id,
        eot_appended=all(of_split.eot_after_all for of_split in surveys.values()),
        tokenizer_sha256=tokenizer.sha256,
        manifest_sha256=manifest_sha256,
    )


def _write_split(
    directory: Path, split: str, stream: Stream, survey: Survey, tokenizer: Tokenizer, encoding: Encoding
) -> dict[str, Any]:
    """Write the shards of a split; its entry in dataset.json."""
    from tqdm import tqdm

    from grist_data.finish import totals
    from grist_data.foreign.texts import describe
    from grist_data.shard_writer import write_shard

    shards, start, n_shards = [], 0, len(survey.cuts)
    with tqdm(total=stream.n_tokens, desc=f"importing {split}", unit=" tokens", unit_scale=True, disable=None) as bar:
        for index, stop in enumerate(survey.cuts):
            ends, hashes, text_bytes = describe(stream, start, stop, tokenizer, bar)
            path = directory / f"{split}-{index:05d}-of-{n_shards:05d}.tok"
            metadata = {"split": split, "text_bytes": text_bytes}
            ids = (ids for _, ids, _ in stream.pieces(start, stop))
            header = write_shard(path, encoding, ids, ends, hashes, metadata, index, n_shards)
            counts = {"tokens": header.n_tokens, "documents": header.n_docs, "text_bytes": text_bytes}
            shards.append({"file": path.name, **counts, "root": f"{header.root:016x}"})
            start = stop
    return {**totals(shards), "token_dtype": encoding.dtype.name, "shards": shards}


def parser() -> argparse.ArgumentParser:
    parser = parser_for("import", __doc__)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("--train", nargs="+", required=True, metavar="FILE", help="files of the split, in their order")
    parser.add_argument("--val", nargs="+", default=(), metavar="FILE", help="files held out for validation")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="the tokenizer.json that the ids mean")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory of the dataset; must not exist")
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--end_of_document", metavar="ID", help="id, or special token, after every document")
    ways.add_argument("--begin_of_document", metavar="ID", help="id, or special token, before every document")
    ways.add_argument("--document_per_file", action="store_true", help="every file is one document")
    parser.add_argument("--dtype", default="uint16", help="(nanogpt) type of the ids [%(default)s]")
    parser.add_argument("--column", default="input_ids", help="(parquet) column of the lists of ids [%(default)s]")
    parser.add_argument("--shard_tokens", type=int, default=2**27, help="tokens of a shard, at least [%(default)s]")
    return parser


def main(arguments: list[str] | None = None) -> int:
    values = vars(parser().parse_args(arguments))
    values |= {"train": tuple(values["train"]), "val": tuple(values["val"])}

    def action() -> int:
        import_tokens(ImportConfig(**values))
        return 0

    return run_command(action)
