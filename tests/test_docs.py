"""The documentation is true: the course runs, the commands exist, the links lead somewhere."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
COURSE = sorted((DOCS / "course").glob("*.md"))
TEXTS = [
    *sorted(DOCS.rglob("*.md")),
    *(
        ROOT / name
        for name in ("CONTRIBUTING.md", "benchmarks/README.md", "eval/README.md", "tools/README.md", "train/README.md")
    ),
]
FOLDERS = ("kernels", "model", "data", "train", "eval", "tools")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


HOW_TO_WITH_CODE = [page for page in sorted((DOCS / "how-to").glob("*.md")) if blocks(page, "python")]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A folder that looks like the root of the repository and may be written to."""
    folder = tmp_path_factory.mktemp("desk")
    for name in (*FOLDERS, "docs"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.parametrize("page", [*COURSE, *HOW_TO_WITH_CODE], ids=lambda page: page.stem)
def test_python_on_the_pages_runs(page, desk):
    """All blocks of a page after each other in one process; pages of the course use what the pages before them made."""
    program = "\n".join(blocks(page, "python"))
    assert program, f"{page.name} has no block of Python"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(FOLDERS), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=desk,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, f"{page.name}:\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"


def module_exists(module: str) -> bool:
    path = ROOT / module.split(".")[0].removeprefix("grist_") / Path(*module.split("."))
    return path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8")
    for module in re.findall(r"python -m (grist_[a-z_.]+)", text):
        assert module_exists(module), f"{page.name} runs {module}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for target in re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, flags=re.MULTILINE):
        assert target in targets, f"{page.name} says make {target}"
    for run in re.findall(r"train/runs/[a-z0-9_]+\.yaml", text):
        assert (ROOT / run).is_file(), f"{page.name} names {run}"


def command_lines(page: Path) -> list[list[str]]:
    """Arguments of every `python -m grist_...` in a page's blocks of shell, module first."""
    lines = "".join(blocks(page, "sh") + blocks(page, "")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines if line.startswith("python -m grist_")]
    return [words[2:] for words in split]


def accepts(module: str, arguments: list[str]) -> None:
    """Parse arguments as the program would; SystemExit or ValueError where it would refuse them."""
    if module == "grist_train":
        from grist_train.config import parse

        parse(arguments)
    elif module == "grist_data.prepare":
        from grist_data.command_line import _parser

        _parser().parse_args(arguments)
    elif module == "grist_tools.plan":
        importlib.import_module(module).parser().parse_known_args(arguments)
    else:
        name = f"{module}.__main__" if module == "grist_eval" else module
        importlib.import_module(name).parser().parse_args(arguments)


@pytest.mark.parametrize("page", [*TEXTS, ROOT / "README.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_are_accepted(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for module, *arguments in command_lines(page):
        try:
            accepts(module, arguments)
        except (SystemExit, ValueError) as error:
            pytest.fail(f"{page.name}: python -m {module} {shlex.join(arguments)} is refused: {error}")


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in link and not link.startswith("#"):
            assert (page.parent / link.split("#")[0]).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_paths_in_code_exist(page):
    """`kernels/grist_kernels/...`, `train/launch/...` and the like, where a text names a file of the repository."""
    for path in re.findall(
        rf"`((?:{'|'.join(FOLDERS)}|docs|benchmarks|tests)/[\w./-]+)`", page.read_text(encoding="utf-8")
    ):
        if not re.search(r"NAME|<|\*", path):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def navigation(entries) -> list[str]:
    """File names in mkdocs.yml's nav."""
    if isinstance(entries, str):
        return [entries]
    values = entries if isinstance(entries, list) else entries.values()
    return [name for value in values for name in navigation(value)]


def test_navigation_lists_every_page_once():
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = navigation(config["nav"])
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))
