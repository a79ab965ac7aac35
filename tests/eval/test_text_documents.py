"""Files of texts: every bad row is named, and the command measures what is in them."""

from __future__ import annotations

import json

import pytest

from grist_eval.__main__ import main
from grist_eval.text_documents import TextDocument, TextSources, check_documents, read_documents


def test_texts_and_rows_are_read_in_order(tmp_path):
    (tmp_path / "prose").mkdir()
    one = tmp_path / "prose" / "one.txt"
    one.write_text("first line\nsecond ü\n", encoding="utf-8")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"body": "a", "kind": "x"}\n\n{"body": "b", "kind": "y"}', encoding="utf-8")
    sources = TextSources((one,), (rows,), "body")
    assert check_documents(sources) == 3
    assert list(read_documents(sources)) == [
        TextDocument("first line\nsecond ü\n", "prose", str(one)),
        TextDocument("a", "rows", f"{rows}:1"),
        TextDocument("b", "rows", f"{rows}:3"),
    ]
    told = read_documents(TextSources(rows=(rows,), text_column="body", domain_column="kind"))
    assert [document.domain for document in told] == ["x", "y"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        (b'{"text": ', "not a line of JSON"),
        (b'{"text": "\xff"}', "not a line of JSON in UTF-8"),
        (b'["a"]', "expected an object"),
        (b'{"body": "a", "kind": "b"}', "no column 'text'; the columns are body, kind"),
        (b'{"text": 3}', "'text' must be a string, but is 3"),
        (b'{"text": ""}', "'text' must not be empty"),
        (b'{"text": "\\ud800", "kind": "b"}', "no text that UTF-8 can hold"),
        (b'{"text": "a"}', "no column 'kind'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, line, fault):
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(b'{"text": "good", "kind": "a"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"1 bad row\(s\):\n.*rows\.jsonl:2: .*" + fault):
        check_documents(TextSources(rows=(rows,), domain_column="kind"))


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match=r"(?s)bad\.txt: not UTF-8.*empty\.txt: the file is empty"):
        check_documents(TextSources((tmp_path / "bad.txt", tmp_path / "empty.txt")))
    with pytest.raises(FileNotFoundError, match="no such file of texts"):
        check_documents(TextSources((tmp_path / "absent.txt",)))
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no documents in"):
        check_documents(TextSources(rows=(tmp_path / "rows.jsonl",)))


def test_the_command_measures_texts_with_the_models_own_tokenizer(model_directory, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    lines = [{"text": f"The miller {i} sat by the fire.", "source": "even" if i % 2 == 0 else "odd"} for i in range(6)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [str(model_directory), "--device", "cpu", "--tasks", "bits_per_byte", "--data", str(rows)]
    arguments += ["--domain-column", "source", "--stride", "16", "--out", str(tmp_path / "report.json")]
    arguments += ["--documents-out", str(tmp_path / "documents.jsonl"), "--cache", str(tmp_path / "cache")]
    assert main(arguments) == 0
    found = json.loads((tmp_path / "report.json").read_text())["tasks"]["bits_per_byte"]
    assert (found["documents"], found["bytes"]) == (6, sum(len(line["text"]) for line in lines))
    assert found["domains"].keys() == {"even", "odd"}
    assert (found["sequence_length"], found["stride"]) == (64, 16)
    each = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    assert [row["document"] for row in each] == [f"{rows}:{number}" for number in range(1, 7)]
    assert sum(row["loss"] * row["tokens"] for row in each) / found["tokens"] == pytest.approx(found["loss"])
    printed = capsys.readouterr().out
    assert f"{found['bits_per_byte']:.4f}  (95 %: {found['bits_per_byte_low']:.4f} to" in printed
    assert "bits per byte, odd" in printed
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert main(arguments) == 0
    again = json.loads((tmp_path / "report.json").read_text())["tasks"]["bits_per_byte"]
    assert {**again, "seconds": 0} == {**found, "seconds": 0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{here}/rows.jsonl", "--max-tokens", "5"], "--max-tokens is for a dataset"),
        (["--data", "{here}", "--text", "{here}/rows.jsonl"], "are measured apart"),
        (["--data", "{here}", "--domain-column", "x"], "--domain-column is for texts"),
        (["--text", "/nowhere.txt"], "no such file of texts: /nowhere.txt"),
        (["--data", "{here}/rows.jsonl", "--text-column", "body"], "rows.jsonl:1: no column 'body'"),
    ],
)
def test_bad_options_are_told_before_a_model_is_loaded(tmp_path, capsys, arguments, message):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    given = [each.format(here=tmp_path) for each in arguments]
    assert main([str(tmp_path / "absent"), "--tasks", "bits_per_byte", *given]) == 2
    assert message in capsys.readouterr().err
