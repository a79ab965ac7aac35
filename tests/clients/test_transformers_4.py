"""Directories that we write, read by transformers 4.57 in a Python of its own, which GRIST_TRANSFORMERS4_PYTHON names.

Its config.json differs from version 5's in ways that it passes over in silence; model/README.md says which.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny_house
import torch
from family_shapes import SHAPES, model_of
from safetensors import safe_open
from safetensors.torch import save_file

from grist_data.tokenizer_training import train_bpe
from grist_model import save

PYTHON = os.environ.get("GRIST_TRANSFORMERS4_PYTHON")
TEXT = "the miller carries the grain to the mill — naïve 🥞"
CASES = [(family, name) for family, shapes in SHAPES.items() for name in shapes]

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not PYTHON, reason="GRIST_TRANSFORMERS4_PYTHON names no Python with transformers 4.57"),
]


@pytest.fixture(scope="module")
def read_by_version_4(tmp_path_factory):
    """(their logits, their ids of TEXT, our logits, our ids of TEXT) by family and name; a text where they fail."""
    folder = tmp_path_factory.mktemp("families")
    tokenizer = train_bpe(tiny_house.PARAGRAPHS * 4, 512)
    # As long as the models' context: scalings, windows and learned positions all show.
    ids = torch.randint(0, 512, (2, 200), generator=torch.Generator().manual_seed(3))
    save_file({"ids": ids, "text": torch.tensor(list(TEXT.encode()))}, folder / "ids.safetensors")
    directories, ours = [], []
    for number, (family, name) in enumerate(CASES):
        model, directory = model_of(family, name), folder / str(number)
        assert save(model, directory, tokenizer) == family
        directories.append(str(directory))
        with torch.no_grad():
            ours.append(model(ids))
    script = str(Path(__file__).with_name("transformers_logits.py"))
    out = folder / "out.safetensors"
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [str(PYTHON), script, str(folder / "ids.safetensors"), str(out), *directories]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
        faults = json.loads(metadata["faults"])
        found = {
            case: faults.get(str(number))
            or (file.get_tensor(f"logits-{number}"), file.get_tensor(f"ids-{number}").tolist(), ours[number])
            for number, case in enumerate(CASES)
        }
    assert metadata["version"].startswith("4."), f"{PYTHON} has transformers {metadata['version']}"
    return found, tokenizer.encode(TEXT)


@pytest.mark.parametrize(("family", "name"), CASES, ids=[f"{family}: {name}" for family, name in CASES])
def test_logits_and_ids_are_ours(read_by_version_4, family, name):
    found, our_ids = read_by_version_4
    result = found[family, name]
    assert not isinstance(result, str), result
    their_logits, their_ids, our_logits = result
    assert float(our_logits.abs().max()) > 0.5
    assert float((their_logits - our_logits).abs().max()) <= 1e-4
    assert their_ids == our_ids
