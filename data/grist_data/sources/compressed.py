"""The bytes of a file in blocks, as they are or out of .gz and .zst, so that memory does not grow with the file."""

from __future__ import annotations

import gzip
import importlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SUFFIXES = (".gz", ".zst")
# A block of zstd input is expanded at once, unlike gzip's, so it is smaller than a block of output.
_ZSTD_INPUT_BYTES = 1 << 16


def kind_of(file_name: str) -> str:
    """What the file is under its compression: 'jsonl' for 'a.jsonl.zst'."""
    name = file_name.lower()
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name.rsplit(".", 1)[-1]


def blocks(path: Path, name: str, block_bytes: int, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The file's content in blocks of about `block_bytes`. name: what messages call the file.

    start, stop: only these bytes of it, in a file that is not compressed.

    Raises ValueError for a damaged or truncated stream, ImportError where nothing can read .zst.
    """
    suffix = path.suffix.lower()
    if suffix == ".zst":
        yield from _zstd_blocks(path, name, min(block_bytes, _ZSTD_INPUT_BYTES))
    elif suffix == ".gz":
        yield from _gzip_blocks(path, name, block_bytes)
    else:
        with open(path, "rb") as stream:
            left = stream.seek(0, os.SEEK_END) - start if stop is None else stop - start
            stream.seek(start)
            while block := stream.read(min(block_bytes, left)):
                yield block
                left -= len(block)


def _gzip_blocks(path: Path, name: str, block_bytes: int) -> Iterator[bytes]:
    with gzip.open(path, "rb") as stream:
        while True:
            try:
                block = stream.read(block_bytes)
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{name}: the gzip stream is damaged or cut short: {error}") from error
            if not block:
                return
            yield block


def _zstd_blocks(path: Path, name: str, input_bytes: int) -> Iterator[bytes]:
    """One frame after the other, since pzstd writes many. zstandard's own file objects take a cut stream for a whole one."""
    new_decoder, decoding_error = _zstd(name)
    decoder = new_decoder()
    with open(path, "rb") as stream:
        while data := stream.read(input_bytes):
            while data:
                if decoder.eof:
                    decoder = new_decoder()
                try:
                    block = decoder.decompress(data)
                except decoding_error as error:
                    raise ValueError(f"{name}: the zstd stream is damaged: {error}") from error
                if block:
                    yield block
                data = decoder.unused_data
    if not decoder.eof:
        raise ValueError(f"{name}: the zstd stream is cut short")


def _zstd(name: str) -> tuple[Callable[[], Any], type[Exception]]:
    """A maker of decoders of one frame, and their error. Windows up to 2 GiB, as `zstd --long=31` writes them."""
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        return _zstd_of_python(name)
    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj, zstandard.ZstdError


def _zstd_of_python(name: str) -> tuple[Callable[[], Any], type[Exception]]:
    try:
        zstd = importlib.import_module("compression.zstd")
    except ImportError as error:
        raise ImportError(
            f"reading {name} needs the package zstandard, or Python 3.14: pip install gristmill[files]"
        ) from error
    options = {zstd.DecompressionParameter.window_log_max: 31}
    return lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError
