"""Weights into a model directory, by a family's layout, and what reading (weight_reading.py) shares with it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from grist_model.families.layout import Layout, Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PROGRESS_FROM_BYTES = 1_000_000_000


def check_coverage(
    where: str, found: Mapping[str, Shape], expected: Mapping[str, Shape], files: Mapping[str, str] | None = None
) -> None:
    """Raise ValueError that lists every tensor missing, left over or of another shape; files: name -> where it was found."""

    def named(name: str) -> str:
        return f"{name} (in {files[name]})" if files else name

    missing = [name for name in expected if name not in found]
    extra = [named(name) for name in found if name not in expected]
    misshapen = [
        f"{named(name)} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = (("missing", missing), ("unexpected", extra), ("misshapen", misshapen))
    if any(names for _, names in problems):
        listed = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems if names)
        hint = "; config.json and weights must come from one save" if files else ""
        raise ValueError(f"{where} does not match the model's config. {listed}{hint}")


def _some(names: list[str], most: int = 20) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def target_type(name: str, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """The type that one of our tensors is converted to: selection biases keep theirs."""
    if dtype is None or not stored.is_floating_point or name.endswith("selection_bias"):
        return stored
    return dtype


def read_json(path: Path, directory: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError where there is none, and ValueError for anything else."""
    if not path.is_file():
        hint = ""
        if (directory.parent / f".{directory.name}.replaced").is_dir():
            hint = f"; an interrupted save left the last model in {directory.parent / f'.{directory.name}.replaced'}"
        elif not directory.exists() and not directory.is_absolute() and len(directory.parts) == 2:
            hint = f"; a model on the hub is hf://{directory.as_posix()}"
        raise FileNotFoundError(f"{path} does not exist: {directory} is not a model directory{hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content


def with_progress(names: Iterable[str], layout: Layout, itemsize: int) -> Iterable[str]:
    """The names, under a bar where there is much to read."""
    total = sum(torch.Size(shape).numel() for shape in layout.shapes.values()) * itemsize
    return tqdm(names, desc="load", unit=" tensors", disable=total < _PROGRESS_FROM_BYTES)


# Writing


def write_weights(
    state: Mapping[str, Tensor], layout: Layout, directory: Path, dtype: torch.dtype | None, max_file_bytes: int
) -> list[torch.dtype]:
    """Write the files and their index; returns the types that were written."""
    types = {name: target_type(name, tensor.dtype, dtype) for name, tensor in state.items()}
    type_of = {hf_name: types[pieces[0].name] for hf_name, pieces in layout.of_theirs.items()}
    sizes = {name: torch.Size(shape).numel() * type_of[name].itemsize for name, shape in layout.hf_shapes.items()}
    files = _split(sizes, max_file_bytes)
    weight_map: dict[str, str] = {}
    total = sum(sizes.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="save", disable=total < _PROGRESS_FROM_BYTES) as bar:
        for number, members in enumerate(files, 1):
            file = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {name: _for_file(name, layout, state, type_of[name]) for name in members}
            save_file(tensors, directory / file, metadata={"format": "pt"})  # transformers refuses files without it
            weight_map.update(dict.fromkeys(tensors, file))
            bar.update(sum(sizes[name] for name in members))
    if len(files) > 1:
        values = sum(torch.Size(shape).numel() for shape in layout.hf_shapes.values())
        index = {"metadata": {"total_size": total, "total_parameters": values}, "weight_map": weight_map}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return list(Counter(type_of.values()))


def _split(sizes: Mapping[str, int], max_file_bytes: int) -> list[list[str]]:
    files: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if files[-1] and filled + size > max_file_bytes:
            files.append([])
            filled = 0
        files[-1].append(name)
        filled += size
    return files


def _for_file(hf_name: str, layout: Layout, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    """One of the file's tensors, in storage of its own: safetensors refuses views that share one."""
    out = torch.empty(layout.hf_shapes[hf_name], dtype=dtype)
    for piece in layout.of_theirs[hf_name]:
        ours = state[piece.name].detach()[piece.at].to("cpu", dtype)
        out[piece.hf_at] = ours if piece.to_hf is None else piece.to_hf(ours)
    return out
