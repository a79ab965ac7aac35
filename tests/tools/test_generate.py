from __future__ import annotations

import io
import shutil

import pytest
import tiny_house

from grist_tools import generate
from grist_tools.generate import main, write_continuation

SAMPLING = {"max_new_tokens": 8, "temperature": 0.0, "top_k": None, "top_p": None, "min_p": None, "seed": 0}


class Recorder(io.StringIO):
    """Remembers what had been written at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


def test_text_is_shown_token_by_token():
    tokenizer = tiny_house.tokenizer()
    out = Recorder()
    count = write_continuation(tiny_house.model(tokenizer.vocab_size), tokenizer, "The miller", SAMPLING, out)
    assert count == 8
    assert out.flushed[0] == "The miller"
    assert len(out.flushed) > 3
    assert out.getvalue().endswith("\n")


def test_command_line_writes_prompt_and_continuation(model_directory, capsys):
    arguments = [str(model_directory), "--max-new-tokens", "8", "--seed", "1", "--device", "cpu"]
    assert main([*arguments, "--prompt", "The miller"]) == 0
    first = capsys.readouterr()
    assert first.out.startswith("The miller")
    assert len(first.out) > len("The miller\n")
    assert "tokens/s" in first.err
    assert main([*arguments, "--prompt", "The miller"]) == 0
    assert capsys.readouterr().out == first.out


def test_the_prompt_may_come_on_standard_input(model_directory, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("When the river"))
    assert main([str(model_directory), "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("When the river")


def test_an_end_of_text_token_ends_the_text_and_is_not_shown(monkeypatch):
    tokenizer = tiny_house.tokenizer()
    letters = tokenizer.encode("flour")
    monkeypatch.setattr("grist_model.stream", lambda *_, **__: iter([*letters, tokenizer.eot_id]))
    assert list(generate.new_ids(None, tokenizer, [1], SAMPLING)) == letters


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["{absent}", "--prompt", "x"], "is not a portable model directory"),
        (["{model}", "--prompt", "x", "--max-new-tokens", "64"], "must be 1 to 63"),
        (["{model}", "--prompt", "x", "--temperature", "-1"], "temperature must be 0"),
        (["{model}", "--prompt", "x", "--device", "toaster"], "unknown device 'toaster'"),
        (["{bare}", "--prompt", "x"], "no tokenizer"),
    ],
)
def test_bad_input_is_told(model_directory, tmp_path, capsys, arguments, fault):
    bare = tmp_path / "bare"
    shutil.copytree(model_directory, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    places = {"absent": tmp_path / "absent", "model": model_directory, "bare": bare}
    arguments = [argument.format(**places) for argument in arguments]
    assert main([*arguments, *([] if "--device" in arguments else ["--device", "cpu"])]) == 2
    assert fault in capsys.readouterr().err
