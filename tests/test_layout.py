"""The house keeps its shape: imports point one way, and the README tells the truth."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "kernels": set(),
    "data": set(),
    "model": {"kernels"},
    "eval": {"model", "data"},
    "train": {"model", "data", "eval", "kernels"},
    "tools": {"kernels", "model", "data", "eval", "train"},
}
README = (ROOT / "README.md").read_text(encoding="utf-8")


def imported_folders(path: Path) -> set[str]:
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules.add(node.module)
    return {m.split(".")[0].removeprefix("grist_") for m in modules if m.startswith("grist_")}


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_imports_point_one_way(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        extra = imported_folders(path) - MAY_IMPORT[folder] - {folder}
        assert not extra, (
            f"{path.relative_to(ROOT)} imports {sorted(extra)}; {folder} may import {sorted(MAY_IMPORT[folder])}"
        )


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_folders_at_the_root_are_not_packages(folder):
    assert not (ROOT / folder / "__init__.py").exists(), "a top-level package of this name would shadow other people's"


def readme_tree() -> list[str]:
    """Paths named in the first column of the README's tree."""
    block = README.split("```text", 1)[1].split("```", 1)[0]
    return [line.split()[0] for line in block.splitlines() if line and not line.startswith(" ")]


def test_readme_tree_exists():
    paths = readme_tree()
    assert len(paths) >= 8
    for path in paths:
        assert (ROOT / path).exists(), f"README's tree names {path}, which does not exist"


def test_readme_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert {"train", "test"} <= named
    assert named <= targets, f"README names make targets that do not exist: {sorted(named - targets)}"


def test_readme_modules_exist():
    for module in set(re.findall(r"python -m (grist_[a-z_.]+)", README)):
        folder = module.split(".")[0].removeprefix("grist_")
        path = ROOT / folder / Path(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), f"README runs {module}"


def test_readme_files_exist():
    for path in set(re.findall(r"\]\(([^)#]+)\)", README)):
        if "://" not in path:
            assert (ROOT / path).exists(), f"README links to {path}, which does not exist"


def test_bare_make_lists_every_target():
    listed = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for target in ("setup", "train", "test", "test-gpu", "bench", "export", "chat", "lint"):
        assert f"make {target} " in listed


def test_continuous_integration_runs_the_readme_test_command():
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
