"""The first 4 KiB of a token shard, byte by byte. data/README.md draws the layout; this module is the only one to know it."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

# PNG's trick: a high bit, both newline kinds and an end-of-file sign show a copy that was treated as text or cut.
MAGIC = b"\x89TOK\r\n\x1a\n"
MAJOR, MINOR = 1, 0
HEADER_BYTES = 4096  # sections begin on multiples of this as well, so that they can be mapped page by page
BLOCK_BYTES = 1 << 20
SECTIONS = ("tokens", "doc_ends", "doc_hash", "loss_mask", "block_sums", "json")
SUMMED_SECTIONS = tuple(name for name in SECTIONS if name != "block_sums")
TOKEN_DTYPES = {2: np.dtype("<u2"), 4: np.dtype("<u4")}
DOC_HASH_BYTES = 16

_EOT_APPENDED, _HAS_LOSS_MASK, _HAS_DOC_HASH = 1, 4, 8  # 2 is "bos prepended", which no writer does yet
_NO_TOKEN = 0xFFFFFFFF
_FIELDS = struct.Struct("<8sHHI QQ BBHIII 12Q 32s32s IIQ")
_SUM = struct.Struct("<Q")
_SUM_AT = HEADER_BYTES - _SUM.size


@dataclass(frozen=True)
class Encoding:
    """What all shards of a dataset have in common.

    token_bytes: 2 or 4. eot_id, bos_id: None where the tokenizer has none. The two sha256 are hex digests: of the
    canonical tokenizer.json, and of the list of work units that the text was cut into.
    """

    token_bytes: int
    vocab_size: int
    eot_id: int | None
    bos_id: int | None
    eot_appended: bool
    tokenizer_sha256: str
    manifest_sha256: str

    @property
    def dtype(self) -> np.dtype:
        return TOKEN_DTYPES[self.token_bytes]


@dataclass(frozen=True)
class Header:
    """A shard's header. sections: name -> (offset in the file, bytes), for every name in SECTIONS."""

    n_tokens: int
    n_docs: int
    encoding: Encoding
    sections: dict[str, tuple[int, int]]
    shard: int
    n_shards: int
    root: int

    @property
    def has_loss_mask(self) -> bool:
        return self.sections["loss_mask"][1] > 0

    @property
    def file_bytes(self) -> int:
        return padded(max(offset + size for offset, size in self.sections.values()))

    def blocks(self, section: str) -> int:
        return -(-self.sections[section][1] // BLOCK_BYTES)


def padded(size: int) -> int:
    """The next multiple of 4096."""
    return -(-size // HEADER_BYTES) * HEADER_BYTES


def mask_bytes(n_tokens: int) -> int:
    """Bytes of a loss mask: one bit a token."""
    return -(-n_tokens // 8)


def sum_of(data: bytes | memoryview) -> int:
    return xxhash.xxh3_64_intdigest(data)


def root_of(block_sums: dict[str, np.ndarray]) -> int:
    """One number for the content of all sections: the sum of all block sums, then of each section's block sums."""
    of_section = [sum_of(block_sums[name].tobytes()) for name in SUMMED_SECTIONS]
    all_sums = b"".join(block_sums[name].tobytes() for name in SUMMED_SECTIONS)
    return sum_of(all_sums + struct.pack(f"<{len(of_section)}Q", *of_section))


def pack(header: Header) -> bytes:
    encoding = header.encoding
    flags = (encoding.eot_appended * _EOT_APPENDED) | header.has_loss_mask * _HAS_LOSS_MASK
    flags |= (header.sections["doc_hash"][1] > 0) * _HAS_DOC_HASH
    fields = _FIELDS.pack(
        MAGIC,
        MAJOR,
        MINOR,
        HEADER_BYTES,
        header.n_tokens,
        header.n_docs,
        encoding.token_bytes,
        flags,
        0,
        encoding.vocab_size,
        _NO_TOKEN if encoding.eot_id is None else encoding.eot_id,
        _NO_TOKEN if encoding.bos_id is None else encoding.bos_id,
        *(number for name in SECTIONS for number in header.sections[name]),
        bytes.fromhex(encoding.tokenizer_sha256),
        bytes.fromhex(encoding.manifest_sha256),
        header.shard,
        header.n_shards,
        header.root,
    )
    page = fields.ljust(_SUM_AT, b"\0")
    return page + _SUM.pack(sum_of(page))


def unpack(page: bytes, path: Path) -> Header:
    """Parse and check a header. Raises ValueError that names the file, what was expected and what was found."""
    if page[: len(MAGIC)] != MAGIC:
        raise ValueError(f"{path} is not a token shard: it begins with {page[:8]!r}, expected {MAGIC!r}")
    if len(page) < HEADER_BYTES:
        raise ValueError(f"{path} is truncated: {len(page):,} bytes, shorter than its {HEADER_BYTES:,}-byte header")
    fields = _FIELDS.unpack_from(page)
    _, major, minor, header_bytes, n_tokens, n_docs, token_bytes, flags, _, vocab_size, eot, bos = fields[:12]
    if major != MAJOR:
        raise ValueError(
            f"{path} has format version {major}.{minor}, but this program reads version {MAJOR}: use a matching version"
            " of gristmill, or prepare the dataset again"
        )
    if _SUM.unpack_from(page, _SUM_AT)[0] != sum_of(page[:_SUM_AT]):
        raise ValueError(
            f"{path}: the header does not match its checksum; the file is damaged, prepare or copy it again"
        )
    if header_bytes != HEADER_BYTES or token_bytes not in TOKEN_DTYPES:
        raise ValueError(
            f"{path}: a header of {header_bytes} bytes with {token_bytes}-byte tokens is not of this format"
        )
    encoding = Encoding(
        token_bytes=token_bytes,
        vocab_size=vocab_size,
        eot_id=None if eot == _NO_TOKEN else eot,
        bos_id=None if bos == _NO_TOKEN else bos,
        eot_appended=bool(flags & _EOT_APPENDED),
        tokenizer_sha256=fields[24].hex(),
        manifest_sha256=fields[25].hex(),
    )
    spans = zip(fields[12:24:2], fields[13:24:2], strict=True)
    sections: dict[str, tuple[int, int]] = dict(zip(SECTIONS, spans, strict=True))
    header = Header(n_tokens, n_docs, encoding, sections, *fields[26:29])
    _check_sections(header, path)
    if bool(flags & _HAS_LOSS_MASK) != header.has_loss_mask:
        raise ValueError(f"{path}: the flags and the section loss_mask disagree about whether there is a loss mask")
    return header


def _check_sections(header: Header, path: Path) -> None:
    blocks = sum(header.blocks(name) for name in SUMMED_SECTIONS)
    expected = {
        "tokens": header.n_tokens * header.encoding.token_bytes,
        "doc_ends": header.n_docs * 8,
        "block_sums": blocks * 8,
    }
    for name, size in expected.items():
        if header.sections[name][1] != size:
            raise ValueError(f"{path}: section {name} has {header.sections[name][1]} bytes, but the counts say {size}")
    if header.sections["loss_mask"][1] not in (0, mask_bytes(header.n_tokens)):
        raise ValueError(
            f"{path}: section loss_mask has {header.sections['loss_mask'][1]} bytes for {header.n_tokens} tokens"
        )
    if header.sections["doc_hash"][1] not in (0, header.n_docs * DOC_HASH_BYTES):
        raise ValueError(
            f"{path}: section doc_hash has {header.sections['doc_hash'][1]} bytes for {header.n_docs} texts"
        )
    if any(offset % HEADER_BYTES or offset < HEADER_BYTES for offset, _ in header.sections.values()):
        raise ValueError(f"{path}: a section does not begin at a multiple of {HEADER_BYTES}")
