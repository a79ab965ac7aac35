"""Every tool explains itself at once: its options are known without loading torch."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import grist_tools

FOLDER = Path(grist_tools.__file__).parent
TOOLS = [path.stem for path in sorted(FOLDER.glob("*.py")) if "def main(" in path.read_text(encoding="utf-8")]

PROGRAM = f"""
import importlib, sys
for name in {TOOLS}:
    text = importlib.import_module(f"grist_tools.{{name}}").parser().format_help()
    assert f"python -m grist_tools.{{name}}" in text, name
heavy = {{"torch", "numpy", "transformers", "matplotlib", "tokenizers", "jsonargparse"}} & set(sys.modules)
sys.exit(f"loaded for --help: {{sorted(heavy)}}" if heavy else 0)
"""


def test_help_loads_nothing_heavy():
    assert len(TOOLS) >= 8
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 2


def test_the_table_of_tools_is_complete():
    text = (FOLDER.parents[0] / "README.md").read_text(encoding="utf-8")
    for name in TOOLS:
        assert f"python -m grist_tools.{name}" in text, f"tools/README.md does not list {name}"
