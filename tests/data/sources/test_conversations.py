"""Chat files of every kind become messages; a row that is none is an error that says where."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
import zstandard

from grist_data.conversation import conversation_of
from grist_data.document import Piece
from grist_data.sources import conversations

USER, ASSISTANT = {"role": "user", "content": "Who grinds?"}, {"role": "assistant", "content": "The mill."}
SYSTEM = {"role": "system", "content": "Be brief."}

CHAT = {"messages": [SYSTEM, USER, ASSISTANT], "id": 7}
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "Who grinds?"},
        {"from": "gpt", "value": "The mill."},
    ]
}
ALPACA = {"instruction": "Who grinds?", "input": "", "output": "The mill."}


def write(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def messages_in(*paths: Path, **options) -> list[list[dict[str, str]]]:
    documents = conversations.documents(tuple(map(str, paths)), **options)
    return [[*(document.messages or ())] for document in documents]


def test_three_kinds_in_one_file(tmp_path):
    file = write(tmp_path / "a.jsonl", [CHAT, SHAREGPT, ALPACA])
    assert messages_in(file) == [[SYSTEM, USER, ASSISTANT], [SYSTEM, USER, ASSISTANT], [USER, ASSISTANT]]


def test_the_text_is_the_canonical_json_of_the_messages(tmp_path):
    spaced = tmp_path / "a.jsonl"
    spaced.write_text(
        '\n{ "id": 1, "messages": [ {"content": "ä \\u00e4", "role": "user"}, {"role": "assistant", "content": "b"} ] }\n'
    )
    asked, answered = {"from": "human", "value": "ä ä"}, {"from": "gpt", "value": "b"}
    other = write(tmp_path / "b.jsonl", [{"conversations": [asked, answered]}])
    one, two = (next(conversations.documents((str(file),))) for file in (spaced, other))
    assert one.text == two.text == '[{"content":"ä ä","role":"user"},{"content":"b","role":"assistant"}]'
    assert one.prose == "ä ä\n\nb"
    assert one.id == f"{spaced}:2"


def test_a_system_text_of_the_row_and_an_input(tmp_path):
    rows = [
        {"conversations": SHAREGPT["conversations"][1:], "system": "Be brief."},
        {**ALPACA, "input": "Say it.", "system": "Be brief."},
    ]
    asked = {"role": "user", "content": "Who grinds?\n\nSay it."}
    assert messages_in(write(tmp_path / "a.jsonl", rows)) == [[SYSTEM, USER, ASSISTANT], [SYSTEM, asked, ASSISTANT]]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow"])
def test_other_files(tmp_path, suffix):
    rows = [CHAT, {"messages": [USER, ASSISTANT]}]
    file = tmp_path / f"a{suffix}"
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".jsonl.gz":
        file.write_bytes(gzip.compress(data))
    elif suffix == ".jsonl.zst":
        file.write_bytes(zstandard.ZstdCompressor().compress(data))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"messages": [row["messages"] for row in rows], "score": [1, 2]})
        if suffix == ".parquet":
            parquet.write_table(table, file)
        else:
            with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table)
    assert messages_in(file) == [[SYSTEM, USER, ASSISTANT], [USER, ASSISTANT]]


def test_a_table_without_conversations(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: none of the columns messages, .*; the columns are text"):
        messages_in(tmp_path / "a.parquet")


def test_large_files_are_read_in_parts(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"{k}?"}, ASSISTANT]} for k in range(500)]
    file = write(tmp_path / "a.jsonl", rows)
    pieces = list(conversations.pieces(5000, (str(file),)))
    assert len(pieces) > 4
    parts = [document for piece in pieces for document in conversations.read_piece(piece, (str(file),))]
    assert [document.text for document in parts] == [d.text for d in conversations.documents((str(file),))]
    assert f" after byte {pieces[-1].start}" in parts[-1].id


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["x"], "expected an object, but got list"),
        ({"text": "x"}, "expected messages (role, content), conversations (from, value), or instruction and output"),
        ({"messages": []}, "messages: expected messages, but the list is empty"),
        ({"messages": "x"}, "messages: expected a list of messages, but got str"),
        ({"messages": ["x"]}, "messages, message 0: expected an object, but got str"),
        (
            {"messages": [{"content": "x"}]},
            "0: expected the keys role and content, or from and value, but got content",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "unknown role 'tool': expected one of system, user, human",
        ),
        ({"messages": [{"role": ["a"], "content": "x"}]}, "unknown role ['a']"),
        (
            {"messages": [USER, {"role": "assistant", "content": " \n"}]},
            "1 (assistant): expected a text, but it is empty",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "message 0 (user): expected a text, but got list",
        ),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "is half of a UTF-16 pair"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": [1]}]}, "message 1: tool_calls cannot be used"),
        ({"messages": [SYSTEM, USER]}, "no message of the assistant: there is nothing to learn from"),
        ({"messages": [SYSTEM, ASSISTANT, USER]}, "the assistant speaks before any message of the user"),
        (
            {"messages": [SYSTEM, USER, ASSISTANT], "system": "x"},
            "the row has a system text, and its first message is one",
        ),
        ({"messages": [USER, ASSISTANT], "tools": [1]}, "tools cannot be told to a model"),
        ({**ALPACA, "output": ""}, "output: expected a text, but it is empty"),
        ({**ALPACA, "history": [["a", "b"]]}, "history is not read"),
    ],
)
def test_what_is_no_conversation_is_told_with_its_line(tmp_path, row, message):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(CHAT) + "\n\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(f"{file}:3") + ".*" + re.escape(message)):
        messages_in(file)


def test_a_line_that_is_not_json_and_a_text_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl:1: not valid JSON"):
        messages_in(tmp_path / "a.jsonl")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"a\.txt: a \.txt file holds no conversations"):
        messages_in(tmp_path / "a.txt")
    with pytest.raises(ValueError, match="errors must be 'strict' or 'replace', but got 'ignore'"):
        conversations.read_piece(Piece("a.jsonl"), ("a.jsonl",), errors="ignore").__next__()


def test_what_is_no_text_may_be_replaced(tmp_path):
    line = json.dumps({"messages": [{"role": "user", "content": "a\ud800b \ufffd"}, ASSISTANT]}).encode()
    (tmp_path / "a.jsonl").write_bytes(line.replace(b"Who", b"\xff\xfe") + b"\n")
    (document,) = conversations.documents((str(tmp_path / "a.jsonl"),), errors="replace")
    assert next(iter(document.messages or ()))["content"] == "a\ufffdb \ufffd"
    assert document.replaced == 1
    (tmp_path / "b.jsonl").write_bytes(json.dumps(CHAT).encode().replace(b"Who", b"W\xffo"))
    (document,) = conversations.documents((str(tmp_path / "b.jsonl"),), errors="replace")
    assert document.replaced == 1
    with pytest.raises(ValueError, match=r"b\.jsonl:1: byte 0xff is not UTF-8"):
        messages_in(tmp_path / "b.jsonl")


def test_null_columns_of_a_table_are_none_at_all():
    row = {
        "messages": [{**USER, "tool_calls": None}, ASSISTANT],
        "conversations": None,
        "instruction": None,
        "system": None,
    }
    assert next(iter(conversation_of(row, "row").messages or ())) == USER
