"""`python -m grist_data.prepare`: quick help, plain errors, every field an option."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grist_data import Shards, command_line
from grist_data.cleaning import CleanConfig
from grist_data.prepare import PrepareConfig

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "data")}


@pytest.mark.parametrize("module", ["prepare", "verify"])
def test_help_is_quick(module):
    begin = time.monotonic()
    command = [sys.executable, "-m", f"grist_data.{module}", "--help"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert time.monotonic() - begin < 2
    assert "Warning" not in done.stderr
    if module == "prepare":
        assert all(
            f"--{field.name} " in done.stdout for field in dataclasses.fields(PrepareConfig) if field.name != "clean"
        )
        assert all(f"--clean.{field.name} " in done.stdout for field in dataclasses.fields(CleanConfig))


def test_the_package_does_not_import_torch():
    program = "import sys, grist_data, grist_data.prepare, grist_data.verify; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], env=ENVIRONMENT, check=True)


def test_every_field_has_a_help_text():
    for config in (PrepareConfig, CleanConfig):
        assert set(command_line._help_of_fields(config)) == {field.name for field in dataclasses.fields(config)}


def parsed(*arguments: str) -> dict:
    return vars(command_line._parser().parse_args(command_line.with_underscores(list(arguments))))


def test_options_are_read():
    values = parsed(
        "--source", "files", "--out", "d", "--paths", "a.txt", "b-c.txt", "--vocab-size=300", "--val_fraction", "0.1",
        "--streaming", "--append_eot", "false", "--books", "1", "2", "--special-tokens", "<|a-b|>",
    )  # fmt: skip
    assert values["paths"] == ["a.txt", "b-c.txt"]
    assert (values["vocab_size"], values["val_fraction"], values["books"]) == (300, 0.1, [1, 2])
    assert (values["streaming"], values["append_eot"]) == (True, False)
    assert values["special_tokens"] == ["<|a-b|>"]
    assert "name" not in values
    assert parsed("--out", "d", "--streaming", "true")["streaming"] is True


def test_the_way_through(corpus, tmp_path, capsys):
    arguments = [
        "--source",
        "files",
        "--paths",
        str(corpus),
        "--out",
        str(tmp_path / "d"),
        "--vocab_size",
        "300",
        "--verify",
    ]
    assert command_line.main(arguments) == 0
    assert "every checksum matches" in capsys.readouterr().out
    path = sorted((tmp_path / "d").glob("*.tok"))[0]
    data = bytearray(path.read_bytes())
    data[4096] ^= 1
    path.write_bytes(data)
    assert command_line.main(arguments) == 1
    assert f"{path}: block 0 of section tokens" in capsys.readouterr().err


def test_separator_escapes(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("grain\n\n\nmill\n\n\nflour")
    arguments = ["--source", "files", "--paths", str(file), "--separator", r"\n\n\n", "--vocab_size", "257"]
    assert command_line.main([*arguments, "--out", str(tmp_path / "d")]) == 0
    assert sum(Shards.open(tmp_path / "d", split).n_docs for split in ("train", "val")) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "files"], "error: source 'files' needs paths"),
        (["--source", "files", "--paths", "absent.txt"], "error: no such file"),
        (["--source", "nowhere"], "error: unknown source 'nowhere'"),
    ],
)
def test_errors_are_one_line(arguments, message, tmp_path, capsys):
    assert command_line.main([*arguments, "--out", str(tmp_path / "d")]) == 1
    said = capsys.readouterr().err
    assert said.startswith(message)
    assert said.count("\n") == 1


def test_settings_from_a_file(tmp_path):
    file = tmp_path / "prepare.yaml"
    file.write_text("source: files\npaths: [a.txt]\nval_fraction: 0\nseed: 3\nclean: {min_chars: 5, languages: [en]}\n")
    made = command_line.read_config(str(file), {"seed": 4, "clean.min_chars": 9, "separator": r"\n"})
    assert (made.paths, made.val_fraction, made.seed, made.separator) == (("a.txt",), 0, 4, "\n")
    assert made.clean == CleanConfig(min_chars=9, languages=("en",))
    assert made == PrepareConfig.from_values(json.loads(json.dumps(dataclasses.asdict(made))))
    file.write_text(json.dumps({"source": "files", "paths": ["a.txt"]}))
    assert command_line.read_config(str(file), {}) == PrepareConfig(source="files", paths=("a.txt",))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sauce: files", "unknown setting 'sauce'; the settings are source, out"),
        ("seed: '3'", "seed must be a whole number, but is '3'"),
        ("streaming: 1", "streaming must be true or false, but is 1"),
        ("paths: a.txt", "paths must be a list, each a text, but is 'a.txt'"),
        ("engine: fast", "engine must be one of auto, tokenizers, tiktoken, gigatoken, but is 'fast'"),
        ("name: [a]", r"name must be a text or null, but is \['a'\]"),
        ("clean: {min_chars: few}", "clean: min_chars must be a whole number, but is 'few'"),
        ("[1]", "expected names of settings and their values, but got list"),
        ("a: [", "is neither YAML nor JSON"),
    ],
)
def test_wrong_settings_in_a_file(text, message, tmp_path):
    (tmp_path / "prepare.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        command_line.read_config(str(tmp_path / "prepare.yaml"), {})
