"""safetensors in and out of a model directory, by a family's layout, a tensor at a time."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from grist_model.families.layout import Layout, Piece, Shape

Read = Callable[[str], Tensor | None]

_PROGRESS_FROM_BYTES = 1_000_000_000
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


def check_coverage(where: str, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    """Raise ValueError that lists every tensor missing, left over or of another shape."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = (("missing", missing), ("unexpected", extra), ("misshapen", misshapen))
    if any(names for _, names in problems):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems if names)
        raise ValueError(f"{where} does not match the model's config. {listed}")


def target_type(name: str, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """The type that one of our tensors is converted to: selection biases keep theirs."""
    if dtype is None or not tensor.is_floating_point() or name.endswith("selection_bias"):
        return tensor.dtype
    return dtype


# Writing


def write_weights(
    state: Mapping[str, Tensor], layout: Layout, directory: Path, dtype: torch.dtype | None, max_file_bytes: int
) -> list[torch.dtype]:
    """Write the files and their index; returns the types that were written."""
    types = {name: target_type(name, tensor, dtype) for name, tensor in state.items()}
    type_of = {hf_name: types[pieces[0].name] for hf_name, pieces in layout.of_theirs.items()}
    sizes = {name: torch.Size(shape).numel() * type_of[name].itemsize for name, shape in layout.hf_shapes.items()}
    files = _split(sizes, max_file_bytes)
    weight_map: dict[str, str] = {}
    total = sum(sizes.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="save", disable=total < _PROGRESS_FROM_BYTES) as bar:
        for number, members in enumerate(files, 1):
            file = _SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {name: _for_file(name, layout, state, type_of[name]) for name in members}
            save_file(tensors, directory / file, metadata={"format": "pt"})  # transformers refuses files without it
            weight_map.update(dict.fromkeys(tensors, file))
            bar.update(sum(sizes[name] for name in members))
    if len(files) > 1:
        values = sum(torch.Size(shape).numel() for shape in layout.hf_shapes.values())
        index = {"metadata": {"total_size": total, "total_parameters": values}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
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


# Reading


def read_json(path: Path, directory: Path) -> dict[str, Any]:
    """A JSON object. Raises FileNotFoundError where there is none, and ValueError for anything else."""
    if not path.is_file():
        hint = ""
        if (directory.parent / f".{directory.name}.replaced").is_dir():
            hint = f"; an interrupted save left the last model in {directory.parent / f'.{directory.name}.replaced'}"
        raise FileNotFoundError(f"{path} does not exist: {directory} is not a model directory{hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content


def open_weights(directory: Path, layout: Layout, stack: ExitStack) -> Read:
    """Open every weight file and check names and shapes -> a function from a name of the layout to its tensor."""
    files: dict[str, tuple[Any, str]] = {}
    shapes: dict[str, Shape] = {}
    for path in _weight_files(directory):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
        for stored in file.keys():  # noqa: SIM118 - a safetensors file is not iterable
            name = _name_of(stored, layout)
            if name is not None:
                files[name] = file, stored
                shapes[name] = tuple(file.get_slice(stored).get_shape())
    copies = {copy for names in layout.copies.values() for copy in names}
    check_coverage(str(directory), {n: s for n, s in shapes.items() if n not in copies}, layout.hf_shapes)

    def read(name: str) -> Tensor | None:
        if name not in files:
            return None
        file, stored = files[name]
        return file.get_tensor(stored)

    return read


def _name_of(stored: str, layout: Layout) -> str | None:
    """The layout's name of a tensor in a file; None for what is computed, not trained."""
    if layout.computed is not None and re.search(layout.computed, stored):
        return None
    if stored not in layout.hf_shapes and layout.optional_prefix + stored in layout.hf_shapes:
        return layout.optional_prefix + stored
    return stored


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _INDEX).is_file():
        weight_map = read_json(directory / _INDEX, directory).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{directory / _INDEX} has no weight_map")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{directory / _INDEX} names files outside its directory: {', '.join(outside)}")
    else:
        names = [_SINGLE]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)} (weights are read from safetensors only, never from pickled files)"
        )
    return [directory / name for name in names]


def read_tensor(name: str, layout: Layout, read: Read, directory: Path) -> Tensor:
    """One of our tensors, of the type that is stored. Raises ValueError where a file repeats one with other values."""
    if name in layout.zeros:
        return torch.zeros(layout.shapes[name])
    pieces = layout.of_ours[name]
    for piece in pieces:
        _check_copies(piece.hf_name, layout, read, directory)
    if len(pieces) == 1 and not pieces[0].at:
        return _piece_of_ours(pieces[0], read)
    first = _piece_of_ours(pieces[0], read)
    out = first.new_empty(layout.shapes[name])
    out[pieces[0].at] = first
    for piece in pieces[1:]:
        out[piece.at] = _piece_of_ours(piece, read)
    return out


def _piece_of_ours(piece: Piece, read: Read) -> Tensor:
    tensor = read(piece.hf_name)
    assert tensor is not None, "coverage was checked"
    part = tensor[piece.hf_at]
    return part if piece.from_hf is None else piece.from_hf(part)


def _check_copies(hf_name: str, layout: Layout, read: Read, directory: Path) -> None:
    for copy_name in layout.copies.get(hf_name, ()):
        copy, tensor = read(copy_name), read(hf_name)
        if copy is not None and tensor is not None and not torch.equal(copy, tensor):
            raise ValueError(f"{directory}: {copy_name} differs from {hf_name}, but config.json says they are tied")


def with_progress(names: Iterable[str], layout: Layout, itemsize: int) -> Iterable[str]:
    """The names, under a bar where there is much to read."""
    total = sum(torch.Size(shape).numel() for shape in layout.shapes.values()) * itemsize
    return tqdm(names, desc="load", unit=" tensors", disable=total < _PROGRESS_FROM_BYTES)
