"""A run small enough for tests: text of this repository's own making, two blocks, a second of training."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
WORDS = """grain mill stone wheel water flour bread river wind sail miller sack oven dawn the a of and turns grinds
    carries""".split()


def write_text(path: Path, documents: int = 24, words: int = 400, seed: int = 0) -> Path:
    """JSON lines of nonsense with learnable statistics."""
    import json

    draw = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for i in range(documents):
            text = " ".join(draw.choice(WORDS) for _ in range(words)) + f" {i}.\n"
            file.write(json.dumps({"text": text}) + "\n")
    return path


def write_run(folder: Path, **changes: Any) -> Path:
    """A run file whose dataset and run folder live under `folder`. `changes` replace top-level keys or update sections."""
    text = write_text(folder / "text.jsonl")
    run: dict[str, Any] = {
        "name": "tiny",
        "out": str(folder / "runs"),
        "steps": 12,
        "log_every": 1,
        "device": "cpu",
        "data": {
            "directory": str(folder / "dataset"),
            "prepare": {"source": "files", "paths": [str(text)], "vocab_size": 300, "val_fraction": 0.2},
            "sequence_length": 32,
        },
        "model": {
            "vocab_size": 300,
            "context_length": 32,
            "layers": 2,
            "width": 32,
            "heads": 4,
            "kv_heads": 2,
            "window": 8,
            "experts": 4,
            "active_experts": 2,
            "expert_width": 32,
        },
        "batch": {"global_size": 8},
        "compute": {"threads": 1},
        "checkpoint": {"every": 6},
        "evaluate": {"every": 6, "max_tokens": 512, "batch_size": 4},
        "sample": {"prompts": ["the mill"], "max_new_tokens": 8},
    }
    for key, value in changes.items():
        run[key] = run[key] | value if isinstance(value, dict) and isinstance(run.get(key), dict) else value
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    folders = ("kernels", "model", "data", "train", "eval", "tools")
    paths = os.pathsep.join(str(ROOT / folder) for folder in folders)
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def command(config: Path, *overrides: str, processes: int = 1) -> list[str]:
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*launch, "-m", "grist_train", "--config", str(config), *overrides]


def train(config: Path, *overrides: str, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run training as a user would; a failure shows what it printed."""
    done = subprocess.run(
        command(config, *overrides, processes=processes),
        env=environment(),
        cwd=config.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"training ended with {done.returncode}:\n{done.stderr[-4000:]}")
    return done


def losses(folder: Path, name: str = "tiny") -> dict[int, float]:
    """Training loss by step."""
    import json

    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}
