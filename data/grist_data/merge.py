"""Several datasets of one tokenizer as one: their documents one after the other, nothing encoded again.

    python -m grist_data.merge datasets/books datasets/stories --out datasets/all

Splits of one name are joined. What each dataset was made from stays in dataset.json, under "source".
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_data.run_command import parser_for, run_command

if TYPE_CHECKING:
    from grist_data.shard_header import Encoding
    from grist_data.shards import ShardFile, Shards


def merge(datasets: Sequence[str | Path], out: str | Path, shard_tokens: int = 2**27) -> Path:
    """Write the joined dataset, in the order given, and return its directory.

    Every shard is of whole shards of the given datasets, at least `shard_tokens` tokens (but for the last); every MiB is
    checked as it is read. Raises ValueError for datasets of different tokenizers, of which only some end documents with the
    end-of-text id, or that are damaged; FileExistsError for an `out` that is there.
    """
    from grist_data.finish import finish, summary
    from grist_data.manifest import read_manifest
    from grist_data.new_directory import new_directory
    from grist_data.shards import Shards
    from grist_data.tokenizer import Tokenizer

    directories = [Path(directory) for directory in datasets]
    if len(directories) < 2:
        raise ValueError(f"give at least two datasets to merge, not {len(directories)}")
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, but is {shard_tokens}")
    manifests = [read_manifest(directory) for directory in directories]
    _check_tokenizers(directories, manifests)
    template = _template_of(directories, manifests)
    names = list(dict.fromkeys(split for manifest in manifests for split in manifest["splits"]))
    opened = {
        split: [
            Shards.open(directory, split, verify="lazy")
            for directory, manifest in zip(directories, manifests, strict=True)
            if split in manifest["splits"]
        ]
        for split in names
    }
    source = _source(directories, manifests, _leaks(opened))
    encoding = _encoding(opened, source["manifest_sha256"])
    settings = {"merge": [manifest["dataset_id"] for manifest in manifests], "shard_tokens": shard_tokens}
    with new_directory(Path(out)) as directory:
        splits = {
            split: _write_split(directory, split, parts, encoding, shard_tokens, template is not None)
            for split, parts in opened.items()
        }
        Tokenizer.load(template or directories[0]).save(directory)
        facts = {} if template is None else {"conversations": manifests[directories.index(template)]["conversations"]}
        finish(directory, splits, manifests[0]["tokenizer"], {"source": source, **facts, "settings": settings})
    print(f"{out}: {summary(splits)}", file=sys.stderr)
    return Path(out)


def _check_tokenizers(directories: list[Path], manifests: list[dict[str, Any]]) -> None:
    first = manifests[0]["tokenizer"]["sha256"]
    for directory, manifest in zip(directories, manifests, strict=True):
        if (found := manifest["tokenizer"]["sha256"]) != first:
            raise ValueError(
                f"{directory} was made with another tokenizer than {directories[0]}: sha256 {found}, expected {first}; prepare"
                f" its text again with --tokenizer {directories[0]}"
            )


def _template_of(directories: list[Path], manifests: list[dict[str, Any]]) -> Path | None:
    """The first dataset of conversations; None where all are plain text."""
    chats = {
        directory: manifest["conversations"]
        for directory, manifest in zip(directories, manifests, strict=True)
        if "conversations" in manifest
    }
    for directory, facts in chats.items():
        first = next(iter(chats))
        if facts["chat_template_sha256"] != chats[first]["chat_template_sha256"]:
            raise ValueError(
                f"{directory} was made with another chat template than {first}: a model carries one; prepare both alike"
            )
    return next(iter(chats), None)


def _leaks(opened: dict[str, list[Shards]]) -> int:
    """How many held-out documents are training documents as well, of any of the datasets; says so when there are any."""
    from grist_data.document_index import DocumentIndex, common_documents

    leaks = sum(
        common_documents(DocumentIndex(held_out), DocumentIndex(train))
        for held_out in opened.get("val", [])
        for train in opened.get("train", [])
    )
    if leaks:
        print(
            f"{leaks:,} held-out documents are trained on as well: evaluation will flatter; datasets prepared with one seed and"
            " val_fraction never hold out what another trains on",
            file=sys.stderr,
        )
    return leaks


def _source(directories: list[Path], manifests: list[dict[str, Any]], leaks: int) -> dict[str, Any]:
    import hashlib

    from grist_data.atomic import canonical_json
    from grist_data.finish import totals

    parts = []
    for directory, manifest in zip(directories, manifests, strict=True):
        kept = {key: manifest[key] for key in ("dataset_id", "source", "settings", "held_out") if key in manifest}
        parts.append({"name": directory.resolve().name, **totals([*manifest["splits"].values()]), **kept})
    ids = [manifest["dataset_id"] for manifest in manifests]
    counts = totals(parts)
    return {
        "name": "merge",
        "documents": counts["documents"],
        "text_bytes": counts["text_bytes"],
        "manifest_sha256": hashlib.sha256(canonical_json(ids)).hexdigest(),
        "held_out_but_trained_on": leaks,
        "datasets": parts,
    }


def _encoding(opened: dict[str, list[Shards]], manifest_sha256: str) -> Encoding:
    """What the new shards have in common."""
    found = [(split, split.shards[0].header.encoding) for parts in opened.values() for split in parts]
    for split, encoding in found:
        if encoding.eot_appended != found[0][1].eot_appended:
            raise ValueError(
                f"{split.directory} and {found[0][0].directory} differ in append_eot, whether every document ends with the"
                " end-of-text id: prepare both alike"
            )
    widest = max((encoding for _, encoding in found), key=lambda encoding: encoding.token_bytes)
    return dataclasses.replace(widest, manifest_sha256=manifest_sha256)


def _write_split(
    directory: Path, split: str, parts: list[Shards], encoding: Encoding, shard_tokens: int, masked: bool
) -> dict[str, Any]:
    from tqdm import tqdm

    from grist_data.finish import totals

    groups = _grouped([shard for part in parts for shard in part.shards], shard_tokens)
    shards = []
    n_tokens = sum(part.n_tokens for part in parts)
    with tqdm(total=n_tokens, desc=f"merging {split}", unit=" tokens", unit_scale=True, disable=None) as bar:
        for index, group in enumerate(groups):
            path = directory / f"{split}-{index:05d}-of-{len(groups):05d}.tok"
            shards.append(_write_shard(path, split, group, encoding, index, len(groups), bar, masked))
    return {**totals(shards), "token_dtype": encoding.dtype.name, "shards": shards}


def _grouped(shards: list[ShardFile], shard_tokens: int) -> list[list[ShardFile]]:
    groups: list[list[ShardFile]] = [[]]
    for shard in shards:
        if sum(other.header.n_tokens for other in groups[-1]) >= shard_tokens:
            groups.append([])
        groups[-1].append(shard)
    return groups


def _write_shard(
    path: Path,
    split: str,
    group: list[ShardFile],
    encoding: Encoding,
    index: int,
    n_shards: int,
    bar: Any,
    masked: bool,
) -> dict[str, Any]:
    """Join shards into one; its entry in dataset.json. masked: with a loss mask, in which all of a plain text counts."""
    import numpy as np

    from grist_data.manifest import TRAINED
    from grist_data.shard_writer import write_shard

    piece = 1 << 22

    def ids():
        for shard in group:
            for start in range(0, shard.header.n_tokens, piece):
                found = shard.tokens(start, min(shard.header.n_tokens, start + piece))
                yield found
                bar.update(len(found))

    trained = 0

    def mask():
        nonlocal trained
        for shard in group:
            for start in range(0, shard.header.n_tokens, piece):
                found = shard.trained(start, min(shard.header.n_tokens, start + piece))
                trained += int(np.count_nonzero(found))
                yield found

    begins = np.cumsum([0] + [shard.header.n_tokens for shard in group]).tolist()
    text_bytes = sum(shard.metadata["text_bytes"] for shard in group)
    header = write_shard(
        path,
        encoding,
        ids(),
        np.concatenate([shard.doc_ends + begin for shard, begin in zip(group, begins, strict=False)]),
        b"".join(shard.doc_hashes.tobytes() for shard in group),
        {"split": split, "text_bytes": text_bytes},
        index,
        n_shards,
        mask() if masked else None,
    )
    counts = {"tokens": header.n_tokens, "documents": header.n_docs, "text_bytes": text_bytes}
    counts |= {TRAINED: trained} if masked else {}
    return {"file": path.name, **counts, "root": f"{header.root:016x}"}


def main(arguments: list[str] | None = None) -> int:
    parser = parser_for("merge", __doc__)
    parser.add_argument("datasets", nargs="+", metavar="DATASET")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory of the dataset; must not exist")
    parser.add_argument("--shard_tokens", type=int, default=2**27, help="tokens of a shard, at least [%(default)s]")
    options = parser.parse_args(arguments)

    def action() -> int:
        merge(options.datasets, options.out, options.shard_tokens)
        return 0

    return run_command(action)


if __name__ == "__main__":
    sys.exit(main())
