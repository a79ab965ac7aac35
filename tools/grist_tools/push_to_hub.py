"""Upload a model directory to huggingface.co, after checking that it loads and showing what would be sent.

    python -m grist_tools.push_to_hub runs/quickstart/model owner/name --private

The token is that of `hf auth login`, or HF_TOKEN in the environment. Only the files of a model are sent: settings, the weights
that the directory's own index names, the tokenizer, the card and licenses. Weights of an older push that are no longer part of
the model are removed there in the same commit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from grist_tools.console import fail, parser_for, run, size, table

# Beside the weights; checkpoints, logs and whatever else lies in the directory stay at home.
SENT = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.jinja",
    "README.md",
    "LICENSE*",
    "NOTICE*",
)
WEIGHTS_THERE = ["model*.safetensors", "model.safetensors.index.json"]


def files_to_send(directory: str | Path) -> tuple[list[Path], list[Path]]:
    """(files of the model, what is left out), each sorted by name.

    Raises what `grist_model.load` raises for a directory that it would not load: settings, and names, shapes, types and places
    of all tensors are checked.
    """
    from grist_model.checkpoint import check_directory

    directory = Path(directory)
    weights = set(check_directory(directory))
    entries = sorted(directory.iterdir())
    sent = [each for each in entries if each.is_file() and (each in weights or _is_sent(each.name))]
    return sent, [each for each in entries if each not in sent]


def _is_sent(name: str) -> bool:
    return any(fnmatch(name, pattern) for pattern in SENT)


def push(
    api: Any, directory: str | Path, name: str, files: list[Path], *, private: bool, revision: str | None, message: str
) -> str:
    """Create what is missing of repository and branch, and upload the files in one commit -> its address.

    Raises ValueError where `private` is asked for and the repository is public, and what huggingface_hub raises.
    """
    if private and api.repo_exists(name) and not api.repo_info(name).private:
        raise ValueError(f"{name} exists and is public: make it private there first, or leave out --private")
    api.create_repo(name, private=private or None, exist_ok=True)
    if revision not in (None, "main"):
        api.create_branch(name, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=name,
        folder_path=directory,
        allow_patterns=[file.name for file in files],
        delete_patterns=WEIGHTS_THERE,
        revision=revision,
        commit_message=message,
    )
    return str(commit.commit_url)


def parser() -> argparse.ArgumentParser:
    parser = parser_for("push_to_hub", __doc__)
    parser.add_argument("directory", metavar="DIR", help="portable model directory, as runs/NAME/model")
    parser.add_argument("name", metavar="OWNER/NAME", help="repository; created where it does not exist")
    parser.add_argument("--private", action="store_true", help="only its owner sees it")
    parser.add_argument("--revision", metavar="BRANCH", help="branch to commit to; created where it does not exist")
    parser.add_argument("--message", default="Upload model", help="of the commit (default: %(default)s)")
    parser.add_argument("--yes", action="store_true", help="upload without asking")
    return parser


def main(arguments: list[str] | None = None, ask: Callable[[str], str] = input) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.name.count("/") != 1:
            raise ValueError(f"{options.name} is no name of a repository: expected OWNER/NAME")
        files, left_out = files_to_send(options.directory)
        _show(options.name, files, left_out)
        if not options.yes and not _agreed(ask):
            print("nothing was sent", file=sys.stderr)
            return 1
        address = push(
            _api(),
            options.directory,
            options.name,
            files,
            private=options.private,
            revision=options.revision,
            message=options.message,
        )
    except (ValueError, OSError, ImportError, *_network_faults()) as error:
        return fail("push_to_hub", error)
    print(address)
    return 0


def _show(name: str, files: list[Path], left_out: list[Path]) -> None:
    rows = [[file.name, size(file.stat().st_size)] for file in files]
    rows.append(["together", size(sum(file.stat().st_size for file in files))])
    print(table([f"to {name}", "size"], rows))
    if left_out:
        print(f"left out: {', '.join(each.name for each in left_out)}")
    if not any(file.name == "README.md" for file in files):
        print("there is no README.md: the model's page will be empty (grist_model.model_card.write_card makes one)")


def _agreed(ask: Callable[[str], str]) -> bool:
    try:
        return ask("Upload? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError as error:
        raise ValueError("nobody is there to ask: pass --yes to upload") from error


def _api() -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ImportError("push_to_hub needs huggingface_hub: pip install gristmill[hub]") from error
    return HfApi()


def _network_faults() -> tuple[type[BaseException], ...]:
    """What the HTTP client of the installed huggingface_hub raises for a host that cannot be reached: not always an OSError."""
    try:
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:
        return ()
    return HfHubHTTPError.__bases__


if __name__ == "__main__":
    run(main)
