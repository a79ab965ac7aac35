"""Compiles the C sources of this folder, once for a machine, and keeps the library in the user's cache.

The library's name says what it was made from: sources, flags and CPU, then the compiler. Its last 32 bytes are the SHA-256 of
all before them, which the linker does not see: a file that was cut short would end a process that loads it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno")
COMPILERS = ("cc", "gcc", "clang")
_DIGEST_BYTES = 32


class CannotBuild(Exception):
    """Why there is no library, and what to do about it."""


def load() -> ctypes.CDLL:
    """The library, from the cache or compiled now (1 to 3 seconds). Raises CannotBuild."""
    folder, compiler = cache_folder(), find_compiler()
    target = _what_for()
    if compiler is None:
        kept = sorted(path for path in folder.glob(f"{target}-*.so") if _is_whole(path))
        if not kept:
            raise CannotBuild(
                "there is no C compiler: install gcc or clang, or name one in the environment variable CC"
            )
        return ctypes.CDLL(str(kept[0]))
    path = folder / f"{target}-{_short_hash(_version(compiler))}.so"
    if not _is_whole(path):
        _compile(compiler, path)
    return ctypes.CDLL(str(path))


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/gristmill/native, or ~/.cache/gristmill/native."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gristmill" / "native"


def find_compiler() -> list[str] | None:
    """The command in CC if that is set, else the first of cc, gcc and clang that is there."""
    given = shlex.split(os.environ.get("CC", ""))
    if given:
        return given if shutil.which(given[0]) else None
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def sources() -> list[Path]:
    return sorted(HERE.glob("*.c"))


def _what_for() -> str:
    parts = [path.name.encode() + b"\0" + path.read_bytes() for path in sorted(HERE.glob("*.[ch]"))]
    return _short_hash(b"\0".join([*parts, " ".join(FLAGS).encode(), _cpu().encode()]))


def _cpu() -> str:
    """What -march=native depends on: a home folder may be shared by different machines."""
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else [platform.processor()]
    names = ("model name", "flags", "Features", "CPU part")
    first = {line.split(":")[0].strip(): line for line in reversed(lines)}
    return "\n".join([platform.system(), platform.machine(), *(first.get(name, "") for name in names)])


def _version(compiler: list[str]) -> bytes:
    try:
        return subprocess.run([*compiler, "--version"], check=True, capture_output=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise CannotBuild(f"the C compiler `{shlex.join(compiler)}` does not run: {error}") from error


def _compile(compiler: list[str], path: Path) -> None:
    """Under another name first: two processes may compile at once, and either's file is good."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as folder:
            made, objects = Path(folder) / "library.so", [Path(folder) / f"{path.stem}.o" for path in sources()]
            _run_all([[*compiler, *FLAGS, "-c", str(a), "-o", str(b)] for a, b in zip(sources(), objects, strict=True)])
            _run_all([[*compiler, *FLAGS, "-shared", *map(str, objects), "-o", str(made), "-lm"]])
            content = made.read_bytes()
            made.write_bytes(content + hashlib.sha256(content).digest())
            os.replace(made, path)
    except OSError as error:
        raise CannotBuild(f"the library cannot be kept in {path.parent} ({error}): set XDG_CACHE_HOME") from error


def _run_all(commands: list[list[str]]) -> None:
    """At the same time."""
    started = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for command in commands
    ]
    said = [process.communicate()[0] for process in started]
    for command, process, text in zip(commands, started, said, strict=True):
        if process.returncode:
            raise CannotBuild(f"`{shlex.join(command)}` failed:\n{text.strip()}")


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    content = path.read_bytes()
    return hashlib.sha256(content[:-_DIGEST_BYTES]).digest() == content[-_DIGEST_BYTES:]


def _short_hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
