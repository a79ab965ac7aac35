"""Read token shards: one file (`ShardFile`), or a split of a dataset as one long row of tokens (`Shards`).

How much is checked, `verify`: 'header' (sizes, versions, identities; microseconds), 'lazy' (every MiB when it is first
read) or 'full' (everything, when opened; gigabytes a second).
"""

from __future__ import annotations

import bisect
import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from grist_data.manifest import TRAINED, read_manifest
from grist_data.order import Windows
from grist_data.shard_header import (
    BLOCK_BYTES,
    DOC_HASH_BYTES,
    HEADER_BYTES,
    SUMMED_SECTIONS,
    Header,
    padded,
    root_of,
    sum_of,
    unpack,
)
from grist_data.tokenizer import TOKENIZER_FILE

Verify = Literal["header", "lazy", "full"]
# A split below this size is read ahead as a whole; above it, row by row as the order of reading asks for them.
_READ_WHOLE_BELOW_BYTES = 1 << 30


class ShardFile:
    """One .tok file, mapped into memory. Raises ValueError when it is not a whole, valid shard."""

    def __init__(self, path: Path, verify: Verify = "header") -> None:
        if verify not in get_args(Verify):
            raise ValueError(f"verify must be one of {', '.join(get_args(Verify))}, but got {verify!r}")
        if not path.is_file():
            raise FileNotFoundError(f"no token shard at {path}")
        self.path = path
        with open(path, "rb") as file:
            self.header: Header = unpack(file.read(HEADER_BYTES), path)
            size = file.seek(0, 2)
            if size != self.header.file_bytes:
                what = "truncated" if size < self.header.file_bytes else "too long"
                raise ValueError(f"{path} is {what}: {size:,} bytes, but its header says {self.header.file_bytes:,}")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._lazy = verify == "lazy"
        self._good = {name: np.zeros(self.header.blocks(name), bool) for name in SUMMED_SECTIONS}
        if verify == "full":
            for problem in self.problems():
                raise ValueError(problem)
        elif self._lazy:
            self._check_block_sums()
            for problem in self._padding_problems():
                raise ValueError(problem)
        n_tokens = self.header.n_tokens
        if self.header.n_docs and int(self.doc_ends[-1]) != n_tokens:
            raise ValueError(
                f"{path}: the last document ends at {int(self.doc_ends[-1])}, but there are {n_tokens} tokens"
            )

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) as a view of the file, uint16 or uint32."""
        if self._lazy:
            width = self.header.encoding.token_bytes
            self._check_blocks("tokens", start * width, stop * width)
        return self._tokens[start:stop]

    def trained(self, start: int, stop: int) -> np.ndarray:
        """Which of the tokens [start, stop) count as targets: (stop - start,) bool. All of them where there is no loss mask."""
        if not self.header.has_loss_mask:
            return np.ones(stop - start, bool)
        first, last = start // 8, -(-stop // 8)
        if self._lazy:
            self._check_blocks("loss_mask", first, last)
        bits = np.unpackbits(self._loss_mask[first:last], bitorder="little")
        return bits[start - 8 * first : stop - 8 * first].view(bool)

    @cached_property
    def _loss_mask(self) -> np.ndarray:
        offset, size = self.header.sections["loss_mask"]
        return np.frombuffer(self._map, np.uint8, size, offset)

    @cached_property
    def doc_ends(self) -> np.ndarray:
        """(n_docs,) int64: where each document ends (exclusive). The only truth about boundaries.

        Unsigned in the file; as uint64, every search with a signed number would convert the whole array.
        """
        return self._section("doc_ends", "<i8")

    @cached_property
    def doc_hashes(self) -> np.ndarray:
        """(n_docs, 16) uint8: xxh3_128 of each document's UTF-8 text."""
        return self._section("doc_hash", "u1").reshape(-1, DOC_HASH_BYTES)

    @cached_property
    def metadata(self) -> dict[str, Any]:
        return json.loads(self._section("json", "u1").tobytes())

    def problems(self) -> Iterator[str]:
        """Check every byte of the file against its sums; one message for each block that is wrong."""
        try:
            self._check_block_sums()
        except ValueError as error:
            yield str(error)
            return
        for name in SUMMED_SECTIONS:
            for block in range(self.header.blocks(name)):
                if problem := self._block_problem(name, block):
                    yield problem
        yield from self._padding_problems()

    def will_need(self, start: int, stop: int) -> None:
        """Ask the system to read tokens [start, stop) soon. Does nothing where the platform cannot."""
        width = self.header.encoding.token_bytes
        offset = self.header.sections["tokens"][0]
        first = (offset + start * width) // mmap.PAGESIZE * mmap.PAGESIZE
        _advise(self._map, "MADV_WILLNEED", first, offset + stop * width - first)

    def expect(self, pattern: Literal["random", "sequential"]) -> None:
        """Tell the system how the file will be read: random rows must not drag their neighbours in."""
        _advise(self._map, "MADV_RANDOM" if pattern == "random" else "MADV_SEQUENTIAL", 0, len(self._map))

    @cached_property
    def _tokens(self) -> np.ndarray:
        offset, _ = self.header.sections["tokens"]
        return np.frombuffer(self._map, self.header.encoding.dtype, self.header.n_tokens, offset)

    def _section(self, name: str, dtype: str) -> np.ndarray:
        offset, size = self.header.sections[name]
        if self._lazy:
            self._check_blocks(name, 0, size)
        return np.frombuffer(self._map, dtype, size // np.dtype(dtype).itemsize, offset)

    @cached_property
    def _block_sums(self) -> dict[str, np.ndarray]:
        offset, size = self.header.sections["block_sums"]
        all_sums = np.frombuffer(self._map, "<u8", size // 8, offset)
        ends = np.cumsum([self.header.blocks(name) for name in SUMMED_SECTIONS])
        return dict(zip(SUMMED_SECTIONS, np.split(all_sums, ends[:-1]), strict=True))

    def _check_block_sums(self) -> None:
        if root_of(self._block_sums) != self.header.root:
            offset, size = self.header.sections["block_sums"]
            raise ValueError(
                f"{self.path}: section block_sums (bytes {offset} to {offset + size - 1}) does not match the root in the"
                " header; the file is damaged"
            )

    def _padding_problems(self) -> Iterator[str]:
        for name, (offset, size) in self.header.sections.items():
            padding = self._map[offset + size : offset + padded(size)]
            if damaged := padding.strip(b"\0"):
                at = offset + size + padding.index(damaged)
                yield f"{self.path}: the padding after section {name} is not zero at byte {at}"

    def _check_blocks(self, name: str, start: int, stop: int) -> None:
        for block in range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)):
            if not self._good[name][block]:
                if problem := self._block_problem(name, block):
                    raise ValueError(problem)
                self._good[name][block] = True

    def _block_problem(self, name: str, block: int) -> str | None:
        offset, size = self.header.sections[name]
        start, stop = offset + block * BLOCK_BYTES, offset + min(size, (block + 1) * BLOCK_BYTES)
        with memoryview(self._map) as view, view[start:stop] as data:
            if sum_of(data) == int(self._block_sums[name][block]):
                return None
        return (
            f"{self.path}: block {block} of section {name} (bytes {start} to {stop - 1}) does not match its checksum; copy"
            " the file again or prepare the dataset again"
        )


class Shards:
    """A split of a dataset: its shards, read as one row of tokens numbered from 0. Open with `Shards.open`.

    n_tokens, n_docs: counts, end-of-text tokens included. n_bytes: UTF-8 bytes of the texts, without them.
    has_loss_mask: whether some tokens do not count as targets. n_trained_tokens: those that do.
    dataset_id, tokenizer_sha256: hex digests. vocab_size: rows a model needs. eot_id: id after each document, or None.
    shards: the files. directory, split: what was opened.
    Pickled, it is the names: another process opens the files again. One that was forked off shares the mapped files.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        manifest: dict[str, Any],
        shards: list[ShardFile],
        verify: Verify = "header",
    ) -> None:
        self._verify: Verify = verify
        self.directory, self.split, self.shards = directory, split, shards
        facts = manifest["splits"][split]
        self.n_tokens: int = facts["tokens"]
        self.n_docs: int = facts["documents"]
        self.n_bytes: int = facts["text_bytes"]
        self.dataset_id: str = manifest["dataset_id"]
        self.tokenizer_sha256: str = manifest["tokenizer"]["sha256"]
        self.vocab_size: int = manifest["tokenizer"]["vocab_size"]
        self.eot_id: int | None = manifest["tokenizer"]["eot_id"]
        self.has_loss_mask = TRAINED in facts
        self.n_trained_tokens: int = facts.get(TRAINED, self.n_tokens)
        self._starts = [0, *np.cumsum([shard.header.n_tokens for shard in shards]).tolist()]
        self.reads_whole = sum(shard.header.file_bytes for shard in shards) < _READ_WHOLE_BELOW_BYTES
        if self.reads_whole:
            self.will_need(np.array(self._starts[:-1]), None)

    @classmethod
    def open(
        cls,
        directory: str | Path,
        split: str = "train",
        verify: Verify = "header",
        tokenizer_sha256: str | None = None,
    ) -> Shards:
        """Open a split of a finished dataset.

        tokenizer_sha256: refuse a dataset made with another tokenizer than this (`Tokenizer.sha256`).
        Raises FileNotFoundError for no dataset, ValueError for one that is unfinished, damaged, mixed from several or
        without that split.
        """
        directory = Path(directory)
        manifest = read_manifest(directory)
        own_sha256 = manifest["tokenizer"]["sha256"]
        if tokenizer_sha256 is not None and tokenizer_sha256 != own_sha256:
            raise ValueError(
                f"the dataset in {directory} was made with another tokenizer: it has sha256 {own_sha256}, but"
                f" {tokenizer_sha256} was expected; prepare the text again with that tokenizer"
            )
        if not (directory / TOKENIZER_FILE).is_file():
            raise FileNotFoundError(
                f"{directory / TOKENIZER_FILE} is missing: the dataset is not complete, copy it again"
            )
        on_disk = hashlib.sha256((directory / TOKENIZER_FILE).read_bytes()).hexdigest()
        if on_disk != own_sha256:
            raise ValueError(
                f"{directory / TOKENIZER_FILE} is not the tokenizer that this dataset was made with: its sha256 is {on_disk},"
                f" expected {own_sha256}"
            )
        if split not in manifest["splits"]:
            raise ValueError(
                f"the dataset in {directory} has no split {split!r}; it has {', '.join(manifest['splits'])}"
            )
        shards = []
        for facts in manifest["splits"][split]["shards"]:
            shard = ShardFile(directory / facts["file"], verify)
            _check_belongs(shard, facts, own_sha256)
            shards.append(shard)
        return cls(directory, split, manifest, shards, verify)

    def __reduce__(self) -> tuple[Any, ...]:
        verify = "lazy" if self._verify == "lazy" else "header"  # what was verified in full need not be again
        return _open_again, (self.directory, self.split, verify, self.dataset_id)

    def read(self, offset: int, n: int) -> np.ndarray:
        """Tokens [offset, offset + n) as uint16 or uint32, across shard borders. Raises IndexError outside the split."""
        if not 0 <= offset <= offset + n <= self.n_tokens:
            raise IndexError(f"tokens {offset} to {offset + n} are outside the split's {self.n_tokens:,}")
        parts = [self.shards[k].tokens(start, stop) for k, start, stop in self._spans(offset, n)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, self.dtype)])

    def trained(self, offset: int, n: int) -> np.ndarray:
        """Which of the tokens [offset, offset + n) count as targets: (n,) bool."""
        parts = [self.shards[k].trained(start, stop) for k, start, stop in self._spans(offset, n)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.zeros(0, bool)])

    def document_ends(self, offset: int, n: int) -> np.ndarray:
        """Where documents end inside the window [offset, offset + n): int64, relative to offset, in 1 to n - 1."""
        found = []
        for k, start, stop in self._spans(offset, n):
            ends = self.shards[k].doc_ends
            first, last = ends.searchsorted((start + 1, stop + 1)).tolist()
            found.append(ends[first:last] + (self._starts[k] - offset))
        ends = found[0] if len(found) == 1 else np.concatenate(found or [np.zeros(0, np.int64)])
        return ends[: ends.searchsorted(n)]

    def gather(self, offsets: np.ndarray, out: np.ndarray) -> None:
        """Copy len(out) windows of out.shape[1] tokens into the rows of `out`; none may cross a shard border."""
        n = out.shape[1]
        for row, offset in enumerate(offsets.tolist()):
            k = bisect.bisect_right(self._starts, offset) - 1
            start = offset - self._starts[k]
            out[row] = self.shards[k].tokens(start, start + n)

    def untrained(self, offsets: np.ndarray, out: np.ndarray) -> None:
        """Which targets of the windows at `offsets` do not count for the loss mask: (rows, T) bool, written to `out`.

        The targets of a window are its tokens after the first.
        """
        n = out.shape[1]
        for row, offset in enumerate(offsets.tolist()):
            k = bisect.bisect_right(self._starts, offset) - 1
            start = offset + 1 - self._starts[k]
            np.logical_not(self.shards[k].trained(start, start + n), out=out[row])

    def documents(self, offsets: np.ndarray, T: int, rows: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Where documents end in the windows of T + 1 tokens at `offsets`, and the targets that belong to the next document.

        Both int64, in flat numbers of rows of T tokens, `rows` being the number of each. An end at T, which divides a row's
        last input from its target, is the beginning of the next row.
        """
        found = [np.zeros(0, np.int64)]
        for row, offset in zip(rows, offsets.tolist(), strict=True):
            k = bisect.bisect_right(self._starts, offset) - 1
            begin = offset - self._starts[k]
            ends = self.shards[k].doc_ends
            first, last = ends.searchsorted((begin + 1, begin + T + 1)).tolist()
            if first < last:
                found.append(ends[first:last] + (row * T - begin))
        borders = np.concatenate(found)
        return borders, borders - 1

    def will_need(self, offsets: np.ndarray, n: int | None) -> None:
        """Ask the system to read the windows at `offsets` soon (n None: to the end of their shard)."""
        for offset in offsets.tolist():
            k = bisect.bisect_right(self._starts, offset) - 1
            start = offset - self._starts[k]
            self.shards[k].will_need(start, self.shards[k].header.n_tokens if n is None else start + n)

    def expect(self, pattern: Literal["random", "sequential"]) -> None:
        """Tell the system how the files will be read, unless they are small enough to be read whole."""
        if not self.reads_whole:
            for shard in self.shards:
                shard.expect(pattern)

    def windows(self, sequence_length: int, stride: int | None = None, jitter: bool = True) -> Windows:
        """The samples of this split: windows of sequence_length + 1 tokens (order.py)."""
        lengths = [shard.header.n_tokens for shard in self.shards]
        return Windows(lengths, sequence_length, stride or sequence_length, jitter)

    @property
    def dtype(self) -> np.dtype:
        return self.shards[0].header.encoding.dtype

    def _spans(self, offset: int, n: int) -> Iterator[tuple[int, int, int]]:
        """(shard, start, stop) of the pieces of [offset, offset + n)."""
        stop = offset + n
        k = bisect.bisect_right(self._starts, offset) - 1
        while offset < stop:
            end = min(stop, self._starts[k + 1])
            yield k, offset - self._starts[k], end - self._starts[k]
            offset, k = end, k + 1


def _open_again(directory: Path, split: str, verify: Verify, dataset_id: str) -> Shards:
    shards = Shards.open(directory, split, verify)
    if shards.dataset_id != dataset_id:
        raise ValueError(
            f"the dataset in {directory} was {dataset_id} when it was opened, but is {shards.dataset_id} now: it was prepared"
            " again meanwhile"
        )
    return shards


def _check_belongs(shard: ShardFile, facts: dict[str, Any], tokenizer_sha256: str) -> None:
    own = shard.header.encoding.tokenizer_sha256
    if own != tokenizer_sha256:
        raise ValueError(
            f"{shard.path} was made with another tokenizer than its dataset: {own}, expected {tokenizer_sha256}"
        )
    if shard.header.has_loss_mask != (TRAINED in facts):
        raise ValueError(f"{shard.path} and dataset.json disagree about whether there is a loss mask")
    if f"{shard.header.root:016x}" != facts["root"] or shard.header.n_tokens != facts["tokens"]:
        raise ValueError(
            f"{shard.path} is not the shard that dataset.json lists: root {shard.header.root:016x}, expected"
            f" {facts['root']}; the directory holds files of several datasets"
        )


def _advise(mapping: mmap.mmap, advice: str, start: int, length: int) -> None:
    """madvise, on the platforms that have it: advice changes speed only."""
    if hasattr(mmap, advice) and length > 0:
        mapping.madvise(getattr(mmap, advice), start, length)
