"""Uploading, with a stand-in for the hub that records what it is asked."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

import grist_model
from grist_tools import push_to_hub
from grist_tools.push_to_hub import files_to_send, main


class Hub:
    """What `push` uses of huggingface_hub.HfApi."""

    def __init__(self, existing: dict[str, bool] | None = None) -> None:
        self.private_of = existing or {}
        self.calls: list[tuple[str, dict]] = []

    def repo_exists(self, name: str) -> bool:
        return name in self.private_of

    def repo_info(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(private=self.private_of[name])

    def create_repo(self, name: str, **options) -> None:
        self.calls.append(("create_repo", {"name": name, **options}))

    def create_branch(self, name: str, **options) -> None:
        self.calls.append(("create_branch", {"name": name, **options}))

    def upload_folder(self, **options) -> SimpleNamespace:
        self.calls.append(("upload_folder", options))
        return SimpleNamespace(commit_url="https://example.org/commit/1")


@pytest.fixture
def hub(monkeypatch) -> Hub:
    stand_in = Hub()
    monkeypatch.setattr(push_to_hub, "_api", lambda: stand_in)
    return stand_in


@pytest.fixture
def directory(model_directory, tmp_path):
    """A model directory with more in it than a model."""
    shutil.copytree(model_directory, tmp_path / "model")
    for name in (
        "README.md",
        "chat_template.jinja",
        "LICENSE.txt",
        "optimizer.pt",
        "model-00009-of-00009.safetensors",
        "a.json",
    ):
        (tmp_path / "model" / name).write_text("x")
    (tmp_path / "model" / "checkpoints").mkdir()
    (tmp_path / "model" / "checkpoints" / "config.json").write_text("x")
    return tmp_path / "model"


OF_THE_MODEL = [
    "LICENSE.txt", "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
    "tokenizer.json", "tokenizer_config.json",
]  # fmt: skip
OF_NO_MODEL = ["a.json", "checkpoints", "model-00009-of-00009.safetensors", "optimizer.pt"]


def test_only_the_files_of_the_model_are_sent(directory):
    sent, left_out = files_to_send(directory)
    assert [file.name for file in sent] == OF_THE_MODEL
    assert [file.name for file in left_out] == OF_NO_MODEL


def test_they_are_shown_and_sent_in_one_commit(directory, hub, capsys):
    arguments = [str(directory), "me/mill", "--private", "--revision", "v2", "--message", "first"]
    assert main(arguments, ask=lambda question: "y") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in [*OF_THE_MODEL, "together", "left out: a.json, checkpoints"])
    assert shown.endswith("https://example.org/commit/1\n")
    assert hub.calls == [
        ("create_repo", {"name": "me/mill", "private": True, "exist_ok": True}),
        ("create_branch", {"name": "me/mill", "branch": "v2", "exist_ok": True}),
        (
            "upload_folder",
            {
                "repo_id": "me/mill",
                "folder_path": str(directory),
                "allow_patterns": OF_THE_MODEL,
                "delete_patterns": ["model*.safetensors", "model.safetensors.index.json"],
                "revision": "v2",
                "commit_message": "first",
            },
        ),
    ]


def test_the_calls_are_those_of_the_real_interface():
    import inspect

    hub = pytest.importorskip("huggingface_hub")
    for name, given in (
        ("create_repo", {"repo_id": "a/b", "private": None, "exist_ok": True}),
        ("create_branch", {"repo_id": "a/b", "branch": "v2", "exist_ok": True}),
        ("repo_exists", {"repo_id": "a/b"}),
        ("repo_info", {"repo_id": "a/b"}),
        ("upload_folder", dict.fromkeys(
            ("repo_id", "folder_path", "allow_patterns", "delete_patterns", "revision", "commit_message"))),
    ):  # fmt: skip
        inspect.signature(getattr(hub.HfApi, name)).bind(None, **given)


def test_several_weight_files_are_those_of_the_index(model_directory, tmp_path):
    model = grist_model.load(model_directory)
    grist_model.save(model, tmp_path / "model", max_file_bytes=40_000)
    sent, left_out = files_to_send(tmp_path / "model")
    assert len([file for file in sent if file.suffix == ".safetensors"]) > 2
    assert "model.safetensors.index.json" in [file.name for file in sent]
    assert left_out == []


def test_nothing_is_sent_without_consent(directory, hub, capsys):
    assert main([str(directory), "me/mill"], ask=lambda question: "") == 1
    assert "nothing was sent" in capsys.readouterr().err

    def nobody(question: str) -> str:
        raise EOFError

    assert main([str(directory), "me/mill"], ask=nobody) == 2
    assert "pass --yes" in capsys.readouterr().err
    assert hub.calls == []


def test_broken_directories_are_refused(directory, hub, tmp_path, capsys):
    for damage, fault in (
        (lambda: (directory / "model.safetensors").write_bytes(b"half"), "model.safetensors is damaged"),
        (lambda: (directory / "config.json").write_text("{}"), "config.json has model_type None"),
        (lambda: shutil.rmtree(directory), "config.json does not exist"),
    ):
        damage()
        assert main([str(directory), "me/mill", "--yes"]) == 2
        assert fault in capsys.readouterr().err
    assert main([str(tmp_path), "mill", "--yes"]) == 2
    assert "expected OWNER/NAME" in capsys.readouterr().err
    assert hub.calls == []


def test_a_public_repository_is_not_taken_for_a_private_one(directory, hub, capsys):
    hub.private_of = {"me/mill": False}
    assert main([str(directory), "me/mill", "--yes", "--private"]) == 2
    assert "exists and is public" in capsys.readouterr().err
    assert hub.calls == []
    hub.private_of = {"me/mill": True}
    assert main([str(directory), "me/mill", "--yes", "--private"]) == 0


def test_a_model_without_card_is_said_to_be(model_directory, hub, capsys):
    assert main([str(model_directory), "me/mill", "--yes"]) == 0
    assert "there is no README.md" in capsys.readouterr().out


def test_a_hub_that_cannot_be_reached_is_told(directory, monkeypatch, capsys):
    pytest.importorskip("huggingface_hub")
    (client_fault, *_) = push_to_hub._network_faults()

    class Unreachable(Hub):
        def create_repo(self, name: str, **options) -> None:
            raise client_fault("name resolution failed")

    monkeypatch.setattr(push_to_hub, "_api", Unreachable)
    assert main([str(directory), "me/mill", "--yes"]) == 2
    assert "name resolution failed" in capsys.readouterr().err


def test_faults_of_the_hub_and_a_missing_package_are_told(directory, monkeypatch, capsys):
    import sys

    class Refusing(Hub):
        def upload_folder(self, **options):
            raise OSError("401 Unauthorized")

    monkeypatch.setattr(push_to_hub, "_api", Refusing)
    assert main([str(directory), "me/mill", "--yes"]) == 2
    assert "401 Unauthorized" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main([str(directory), "me/mill", "--yes"]) == 2
    assert "pip install gristmill[hub]" in capsys.readouterr().err
