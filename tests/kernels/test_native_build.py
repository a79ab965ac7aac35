"""The native library is made once, by one or by several; where it cannot be, that is said."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grist_kernels import native
from grist_kernels.native import build

needs_compiler = pytest.mark.skipif(build.find_compiler() is None, reason="no C compiler")


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    """An empty cache of its own, for a library that is compiled in no time."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "six.c").write_text("int six(void) { return 6; }\n")
    monkeypatch.setattr(build, "HERE", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gristmill" / "native"


@pytest.fixture
def untried(monkeypatch):
    """As if nobody had asked for the library yet."""
    monkeypatch.setattr(native, "_tried", False)
    monkeypatch.setattr(native, "_library", None)


def without_compiler(monkeypatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")


@needs_compiler
def test_the_library_is_made_once_and_found_without_a_compiler(cache, monkeypatch):
    assert build.load().six() == 6
    (made,) = cache.iterdir()
    written = made.stat().st_mtime_ns
    build.load()
    without_compiler(monkeypatch)
    assert build.load().six() == 6
    assert [path.stat().st_mtime_ns for path in cache.iterdir()] == [written]


@needs_compiler
@pytest.mark.parametrize(
    "damage", [lambda content: content[:-100], lambda content: b"", lambda content: b"x" + content[1:]]
)
def test_a_damaged_library_is_made_again(cache, damage):
    build.load()
    (made,) = cache.iterdir()
    whole = made.read_bytes()
    made.unlink()  # not in place: this process has the file mapped
    made.write_bytes(damage(whole))
    assert build.load().six() == 6
    assert len(made.read_bytes()) == len(whole)


@needs_compiler
def test_other_sources_are_another_library(cache):
    build.load()
    (build.HERE / "six.c").write_text("int six(void) { return 7; }\n")
    assert build.load().six() == 7
    assert len(list(cache.iterdir())) == 2


@needs_compiler
def test_two_processes_may_make_it_at_once(cache):
    program = (
        "from pathlib import Path; from grist_kernels.native import build\n"
        "build.HERE = Path({!r}); print(build.load().six())"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program.format(str(build.HERE))]
    both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate(timeout=300)[0] for process in both] == ["6\n"] * 2
    assert len(list(cache.iterdir())) == 1


def test_without_a_compiler_pytorch_runs_and_one_line_says_so(cache, untried, monkeypatch, caplog):
    without_compiler(monkeypatch)
    with caplog.at_level(logging.INFO, "grist_kernels.native"), native.using("auto"), torch.no_grad():
        assert not native.takes(torch.ones(1, 4))
        assert not native.available()
    (line,) = caplog.messages
    assert "install gcc or clang" in line


def test_what_is_required_and_cannot_be_made_is_an_error(cache, untried, monkeypatch):
    without_compiler(monkeypatch)
    with native.using("auto"):
        assert not native.available()
    with native.using("require"), pytest.raises(RuntimeError, match=r"GRIST_NATIVE=require.*no C compiler"):
        native.available()


def test_a_compiler_that_fails_is_quoted(cache, monkeypatch, tmp_path):
    broken = tmp_path / "cc"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo 1 && exit 0\necho "no such flag" >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(build.CannotBuild, match="failed:\nno such flag"):
        build.load()
    broken.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(build.CannotBuild, match="does not run"):
        build.load()
    assert not cache.exists() or not list(cache.iterdir())


@needs_compiler
def test_a_cache_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(build.CannotBuild, match="set XDG_CACHE_HOME"):
        build.load()


def test_settings_are_checked():
    with pytest.raises(ValueError, match="must be one of auto, 0 or require, but is 'off'"), native.using("off"):
        pass


def test_it_shares_pytorchs_threads():
    if not native.available():
        pytest.skip("no C compiler, and no library that one has made")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux says what a process has loaded")
    loaded = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    assert len(loaded) == 1
