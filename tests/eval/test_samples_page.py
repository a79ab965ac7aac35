"""The page of samples: whole, escaped, and every model beside the others."""

from __future__ import annotations

import html.parser
import json

import pytest
import tiny_house

from grist_eval.__main__ import main
from grist_eval.samples_page import Column, Drawn, page, read_report


class Reader(html.parser.HTMLParser):
    """Tags that are open, all tags, and the text of the body."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not {name for name, _ in attrs} & {"src", "href", "onclick", "onload"}
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)


def read(text: str) -> Reader:
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


ONE = Column("runs/a", [Drawn("To <b>", "greedy", " be & be"), Drawn("", "greedy", "x")])
TWO = Column(
    "runs/b",
    [Drawn("To <b>", "greedy", "</pre><script>1\x00\ud800"), Drawn("To <b>", "temperature 0.8", "a b a b a b a b")],
)


def test_models_stand_beside_each_other_whatever_they_wrote():
    text = page([ONE, TWO])
    text.encode("utf-8")
    found = read(text)
    assert "script" not in found.seen
    assert found.seen.count("article") == 2 * 2 * 2  # prompts, settings, models
    assert found.seen.count("pre") == 4
    assert found.texts.count("none") == 5  # four cards, and a cell of the table
    assert "</pre><script>1\ufffd\ufffd" in found.texts
    assert found.texts.count("To <b>") == 1 + 3
    assert "(no prompt)" in found.texts
    assert "repetition-4 0.60" in found.texts  # of five runs of four words, two are new
    assert "0.29 / 0.60" in found.texts
    assert 'name="viewport"' in text


def test_names_must_differ():
    with pytest.raises(ValueError, match="different names, got runs/a, runs/a"):
        page([ONE, ONE])
    with pytest.raises(ValueError, match="got none"):
        page([])


def test_a_file_that_is_no_report_is_told(tmp_path):
    for text in ("{", "[]", '{"tasks": {}}'):
        (tmp_path / "report.json").write_text(text)
        with pytest.raises(ValueError, match=r"report\.json is no report with samples"):
            read_report(tmp_path / "report.json")
    with pytest.raises(FileNotFoundError):
        read_report(tmp_path / "absent.json")


def test_the_command_draws_from_models_and_takes_reports(model_directory, tmp_path, capsys):
    other = tiny_house.portable(tmp_path / "other", rope_theta=77.0)
    given = ["--tasks", "samples", "--device", "cpu", "--prompt", "The miller", "--sample-tokens", "5"]
    assert main([str(other), *given, "--seed", "3", "--out", str(tmp_path / "old.json")]) == 0
    old = json.loads((tmp_path / "old.json").read_text())
    old["model"]["directory"] = "step-100"
    (tmp_path / "old.json").write_text(json.dumps(old))
    beside = ["--beside", str(other), "--beside", str(tmp_path / "old.json")]
    out = tmp_path / "samples.html"
    assert (
        main([str(model_directory), *given, *beside, "--samples-page", str(out), "--out", str(tmp_path / "r.json")])
        == 0
    )
    found = read(out.read_text(encoding="utf-8"))
    assert found.seen.count("article") == 4 * 3
    heads = [text for text in found.texts if text in (str(model_directory), str(other), "step-100")]
    assert heads == [str(model_directory), str(other), "step-100"] * 5
    for sample in old["tasks"]["samples"]["samples"]:
        assert sample["text"] in found.texts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--beside", "{here}"], "give --samples-page FILE.html"),
        (["--beside", "{here}", "--samples-page", "p.html"], "is not a portable model directory"),
        (["--beside", "{here}/absent.json", "--samples-page", "p.html"], "absent.json"),
        (["--beside", "{model}", "--samples-page", "p.html"], "--beside names a model twice"),
    ],
)
def test_bad_options_are_told(model_directory, tmp_path, capsys, arguments, message):
    given = [each.format(here=tmp_path, model=model_directory) for each in arguments]
    assert main([str(model_directory), "--tasks", "samples", *given, "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err
