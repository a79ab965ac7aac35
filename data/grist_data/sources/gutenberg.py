"""Books of Project Gutenberg: downloads that go on where they broke, and texts without header and licence."""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from grist_data.atomic import PART_SUFFIX, write_atomically
from grist_data.document import Document, Piece

# The list of the classic lesson: ten books of prose, and Shakespeare's complete works (100).
BOOKS = (4367, 84, 41, 2009, 28569, 147, 15776, 29265, 37134, 23605, 100)
URL = "https://www.gutenberg.org/cache/epub/{book}/pg{book}.txt"
_LOCAL_NAMES = ("pg{book}.txt", "{book}.txt", "{book}-0.txt")
_ATTEMPTS = 6
_TIMEOUT_S = 30
_READ_BYTES = 1 << 16
_BOOK_BYTES = 1 << 20

# Titles run over lines, asterisks touch words, THIS or THE, EBOOK or ETEXT, small or large letters: all of it occurs.
_START = re.compile(r"\*{2,3} ?START OF (?:THE|THIS) PROJECT GUTENBERG E(?:BOOK|TEXT)(?:[^*\n]*\n?){1,4}?\*{2,3}", re.I)
_START_LINE = re.compile(r"\*{2,3} ?START OF (?:THE|THIS) PROJECT GUTENBERG E(?:BOOK|TEXT)[^\n]*", re.I)
_SMALL_PRINT = re.compile(r"\*END\*? ?THE SMALL PRINT[^\n]*", re.I)
_END = re.compile(
    r"^[ \t]*(?:\*{2,3} ?END OF (?:THE|THIS) PROJECT GUTENBERG E(?:BOOK|TEXT)"
    r"|\**End of (?:the |this )?Project Gutenberg(?:'s|’s| E(?:Book|Text)))",
    re.I | re.M,
)
_SMALL_PRINT_WITHIN = 20_000  # characters after a START marker in which a second, older header may still end


def documents(
    books: tuple[int, ...] = BOOKS,
    cache_dir: str | None = None,
    url: str = URL,
    missing_markers: str = "error",
) -> Iterator[Document]:
    """One document a book, without Project Gutenberg's header and footer.

    books: numbers of the books. cache_dir: where they are kept, as pg<number>.txt (default: ~/.cache/gristmill/gutenberg);
    a file that is there already is used as it is. url: where to download, with {book} for the number.
    missing_markers: 'error' refuses a book without START or END marker, 'keep' takes the text up to where one is missing.
    Raises OSError when a download fails for good, ValueError for a book that cannot be read.
    """
    for book in books:
        yield from read_piece(Piece(str(book)), books, cache_dir, url, missing_markers)


def pieces(span_bytes: int, books: tuple[int, ...] = BOOKS, **others: object) -> list[Piece]:
    """The books, all taken to be of one size: what they have is known when they are downloaded."""
    return [Piece(str(book), size=_BOOK_BYTES) for book in books]


def read_piece(
    piece: Piece,
    books: tuple[int, ...] = BOOKS,
    cache_dir: str | None = None,
    url: str = URL,
    missing_markers: str = "error",
) -> Iterator[Document]:
    """One book. Options and errors are those of `documents`."""
    if missing_markers not in ("error", "keep"):
        raise ValueError(f"missing_markers must be 'error' or 'keep', but got {missing_markers!r}")
    directory = Path(cache_dir).expanduser() if cache_dir else default_cache()
    book = int(piece.name)
    file = _on_disk(directory, book) or download(url.format(book=book), directory / f"pg{book}.txt")
    text = strip_boilerplate(_read_text(file), str(file), keep_unmarked=missing_markers == "keep")
    yield Document(text, f"gutenberg/{book}", "gutenberg")


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gristmill" / "gutenberg"


def strip_boilerplate(text: str, name: str, keep_unmarked: bool = False) -> str:
    """The text between the START and END markers, in any of their wordings since 1993, with newlines as \\n."""
    text = text.removeprefix("\N{ZERO WIDTH NO-BREAK SPACE}").replace("\r\n", "\n").replace("\r", "\n")
    start = _START.search(text) or _START_LINE.search(text)
    begin = start.end() if start else 0
    small_print = _SMALL_PRINT.search(text, begin, begin + _SMALL_PRINT_WITHIN)
    begin = small_print.end() if small_print else begin
    end = _END.search(text, begin)
    if not keep_unmarked and (not begin or end is None):
        missing = "END" if begin else "START"
        raise ValueError(
            f"{name} has no {missing} marker of Project Gutenberg: is it a whole book in plain text? Delete the file to"
            " download it again, or use missing_markers=keep to take it as it is"
        )
    return text[begin : end.start() if end else len(text)].strip() + "\n"


def download(url: str, target: Path) -> Path:
    """Fetch a file into `target`, which gets its name only when complete.

    An interrupted download stays as `.part` and is continued, in this call or the next, when the server still has the
    same version of the file (ETag or Last-Modified) and can send ranges. Raises OSError after six attempts.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + PART_SUFFIX)
    failure: Exception | None = None
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_pause_s(attempt))
        try:
            _fetch(url, part)
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise OSError(f"{url} cannot be downloaded: the server says {error.code} {error.reason}") from error
            failure = error
        except (OSError, http.client.HTTPException) as error:
            failure = error
        else:
            os.replace(part, target)
            _validator_file(part).unlink(missing_ok=True)
            return target
    raise OSError(
        f"{url} could not be downloaded in {_ATTEMPTS} attempts; the last failed with: {failure}"
    ) from failure


def _pause_s(attempt: int) -> float:
    return 0.5 * 2**attempt


def _fetch(url: str, part: Path) -> None:
    """One request; returns when `part` is complete, raises OSError or HTTPException when it is not."""
    have, validator = _resumable(part)
    headers = {"User-Agent": "gristmill", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=_TIMEOUT_S) as response:
        if response.status != http.HTTPStatus.PARTIAL_CONTENT:
            have = 0
        elif not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise OSError(f"the server sent another range than bytes {have}-")
        length = response.headers.get("Content-Length")
        validator = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        write_atomically(_validator_file(part), json.dumps({"validator": validator}).encode())
        with open(part, "ab" if have else "wb") as file:
            while data := response.read(_READ_BYTES):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
    if length is not None and size != have + int(length):
        raise OSError(f"the connection ended after {size:,} of {have + int(length):,} bytes")


def _resumable(part: Path) -> tuple[int, str]:
    """Bytes that can be kept, and the validator of the version they belong to. Without a validator, start over."""
    if not part.is_file() or not _validator_file(part).is_file():
        return 0, ""
    validator = json.loads(_validator_file(part).read_bytes())["validator"]
    return (part.stat().st_size, validator) if validator and not validator.startswith("W/") else (0, "")


def _validator_file(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _on_disk(directory: Path, book: int) -> Path | None:
    candidates = (directory / name.format(book=book) for name in _LOCAL_NAMES)
    return next((path for path in candidates if path.is_file()), None)


def _read_text(file: Path) -> str:
    """UTF-8, or what an old file declares itself to be."""
    data = file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        declared = re.search(rb"Character set encoding:[ \t]*([\w-]+)", data[:10_000])
        if declared is None or b"utf" in declared[1].lower():
            raise ValueError(f"{file} is not UTF-8 (byte {error.start}) and declares no other encoding") from error
        try:
            return data.decode(declared[1].decode())
        except (LookupError, UnicodeDecodeError) as wrong:
            raise ValueError(
                f"{file} cannot be decoded as {declared[1].decode()}, which it declares: {wrong}"
            ) from wrong
