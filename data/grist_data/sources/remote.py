"""Files elsewhere, through fsspec: s3://, gs://, hf://, https:// and whatever else it knows.

A file is copied to the local disk when it is first read, since `prepare` reads a source several times. fsspec's own caches
are not used: they write under the final name, so that a copy that was interrupted is taken for the whole file.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from grist_data.atomic import atomic_file
from grist_data.lock import exclusive

# What stores call the thing that changes when a file's content does.
_VERSION_KEYS = ("size", "ETag", "etag", "blob_id")


def is_remote(path: str) -> bool:
    return "://" in path


def file_name(url: str) -> str:
    """The last part of the path: no query of https://."""
    return PurePosixPath(urlsplit(url).path if _is_web(url) else url).name


def find(url: str, suffixes: tuple[str, ...]) -> list[str]:
    """URLs that a URL names, sorted: of a file, of what a directory holds (hidden names left out), or of a glob's matches.

    Raises as `sizes`.
    """
    return [*sizes(url, suffixes)]


def sizes(url: str, suffixes: tuple[str, ...]) -> dict[str, int | None]:
    """What `find` finds, with the bytes of each as far as the store says so when it lists them.

    Raises ValueError for one file with none of the suffixes, ImportError without fsspec or its package for this protocol.
    """
    system, root = _system(url)
    signs = "*[" if _is_web(url) else "*?["  # ? begins the query of a web address
    if pattern := re.search(rf"[^/]*[{re.escape(signs)}].*", root):
        found = {name: facts for name, facts in system.glob(root, detail=True).items() if facts["type"] == "file"}
        if not re.search(r"(^|/)\.", pattern[0]):  # as in a shell, * is no hidden name
            found = {name: facts for name, facts in found.items() if not _is_hidden(name, root[: pattern.start()])}
    else:
        kind = _kind(system, root)
        if kind == "file" and not _ends_in(url, suffixes):
            raise ValueError(f"{url}: unknown kind of file; expected one that ends in {', '.join(suffixes)}")
        if kind == "file":
            return {url: system.info(root).get("size")}
        inside = system.find(root, detail=True) if kind == "directory" else {}
        found = {name: facts for name, facts in inside.items() if not _is_hidden(name, root.rstrip("/") + "/")}
    urls = {
        system.unstrip_protocol(name): facts.get("size") for name, facts in found.items() if _ends_in(name, suffixes)
    }
    return {url: urls[url] for url in sorted(urls, key=lambda url: url.split("/"))}  # as local paths: a/z before a-b/a


def _kind(system: Any, root: str) -> str | None:
    """'file', 'directory', or None for nothing. fsspec's isfile and isdir say False for a refused login, too."""
    try:
        return system.info(root)["type"]
    except FileNotFoundError:
        return None


def local_copy(url: str, cache_dir: str | None) -> Path:
    """The file on the local disk, copied there unless it is. Where the store says that it changed, it is copied again.

    cache_dir: where copies are kept (default: ~/.cache/gristmill/files). Raises OSError where the copy is not whole.
    """
    system, root = _system(url)
    facts = system.info(root)
    version = repr([url, *((key, facts[key]) for key in _VERSION_KEYS if facts.get(key) is not None)])
    base = Path(cache_dir).expanduser() if cache_dir else default_cache()
    directory = base / hashlib.sha256(version.encode()).hexdigest()[:32]
    copy = directory / file_name(url)
    if copy.is_file():
        return copy
    directory.mkdir(parents=True, exist_ok=True)
    with exclusive(directory):
        if not copy.is_file():  # another process may have copied it meanwhile
            _download(system, root, url, copy, facts.get("size"))
    return copy


def default_cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gristmill" / "files"


def _download(system: Any, root: str, url: str, copy: Path, expected_bytes: int | None) -> None:
    with atomic_file(copy) as part:
        # By name: not every file system of fsspec can write into an open file. Both names are of one file.
        system.get_file(root, part.name)
        found_bytes = os.path.getsize(part.name)
        if expected_bytes is not None and found_bytes != expected_bytes:
            raise OSError(
                f"{url}: expected {expected_bytes:,} bytes, but {found_bytes:,} came; run the same command again"
            )


def _system(url: str) -> tuple[Any, str]:
    """fsspec's file system of the URL, and the URL's path in it."""
    try:
        import fsspec.core
    except ImportError as error:
        raise ImportError(f"reading {url} needs the package fsspec: pip install gristmill[files]") from error
    return fsspec.core.url_to_fs(url)


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _ends_in(url: str, suffixes: tuple[str, ...]) -> bool:
    return file_name(url).lower().endswith(suffixes)


def _is_hidden(name: str, directory: str) -> bool:
    return "/." in "/" + name.removeprefix(directory)
