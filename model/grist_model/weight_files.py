"""safetensors in and out of a model directory, by a family's layout, a tensor at a time."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from grist_kernels.moe_mxfp4.dequantise import BLOCK, dequantise_mxfp4
from grist_model.families.layout import Layout, Piece, Shape

_EVERYTHING = slice(None)

_BLOCKS, _SCALES = "_blocks", "_scales"
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


class Read(Protocol):
    """A tensor by its name in the layout, or rows of it; None where the files do not have it."""

    def __call__(self, name: str, rows: slice = _EVERYTHING) -> Tensor | None: ...


def open_weights(directory: Path, layout: Layout, stack: ExitStack) -> Read:
    """Open every weight file, check names and shapes, and that what is repeated is the same -> a function that reads.

    Experts in MXFP4 (X_blocks and X_scales instead of X, as published GPT-OSS files have them) are read as X in bfloat16, which
    holds their numbers exactly.
    """
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
    packed = [name.removesuffix(_BLOCKS) for name in shapes if name.endswith(_BLOCKS) and name not in layout.hf_shapes]
    for name in packed:
        shapes[name] = _unpacked_shape(name, shapes, directory)
    copies = {copy for names in layout.copies.values() for copy in names}
    check_coverage(str(directory), {n: s for n, s in shapes.items() if n not in copies}, layout.hf_shapes)

    def stored_rows(name: str, rows: slice) -> Tensor:
        file, stored = files[name]
        return file.get_tensor(stored) if rows == _EVERYTHING else file.get_slice(stored)[rows]

    def read(name: str, rows: slice = _EVERYTHING) -> Tensor | None:
        if name in packed:
            return _unpacked(stored_rows(name + _BLOCKS, rows), stored_rows(name + _SCALES, rows))
        return stored_rows(name, rows) if name in files else None

    for name in layout.copies:
        _check_copies(name, layout, read, directory)
    return read


def _unpacked(blocks_EO: Tensor, scales_EO: Tensor) -> Tensor:
    """(E, in, out) bfloat16, an expert at a time: on the way each number takes sixteen times its four bits and more."""
    E, out, n_blocks = scales_EO.shape
    found = torch.empty((E, n_blocks * BLOCK, out), dtype=torch.bfloat16)
    for expert, (blocks, scales) in enumerate(zip(blocks_EO, scales_EO, strict=True)):
        found[expert] = dequantise_mxfp4(blocks, scales).T
    return found


def _unpacked_shape(name: str, shapes: dict[str, Shape], directory: Path) -> Shape:
    """(E, in, out) of experts in MXFP4, whose parts are taken out of `shapes`."""
    blocks, scales = shapes.pop(name + _BLOCKS), shapes.pop(name + _SCALES, None)
    if len(blocks) != 4 or blocks[-1] != BLOCK // 2 or scales != blocks[:-1]:
        raise ValueError(
            f"{directory}: {name}{_BLOCKS} is {blocks} and {name}{_SCALES} {scales or 'missing'}, but MXFP4 is (E, out, in / "
            f"{BLOCK}, {BLOCK // 2}) and (E, out, in / {BLOCK})"
        )
    E, out, n_blocks, _ = blocks
    return E, n_blocks * BLOCK, out


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


def read_tensor(name: str, layout: Layout, read: Read) -> Tensor:
    """One of our tensors, of the type that is stored."""
    if name in layout.zeros:
        return torch.zeros(layout.shapes[name])
    pieces = layout.of_ours[name]
    if len(pieces) == 1 and not pieces[0].at:
        return _piece_of_ours(pieces[0], read)
    first = _piece_of_ours(pieces[0], read)
    out = first.new_empty(layout.shapes[name])
    out[pieces[0].at] = first
    for piece in pieces[1:]:
        out[piece.at] = _piece_of_ours(piece, read)
    return out


def read_region(name: str, layout: Layout, read: Read, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """The part of one of our tensors that begins at `offset` and has `size`, float32 or as it is stored.

    Where a file keeps the same rows, only these are read; elsewhere one of the file's tensors at a time, never one of ours.
    """
    shape, (first, last) = layout.shapes[name], (offset[0], offset[0] + size[0])
    if name in layout.zeros or 0 in size:
        return torch.zeros(size)
    columns = tuple(slice(begin, begin + length) for begin, length in zip(offset[1:], size[1:], strict=True))
    out = None
    for piece in layout.of_ours[name]:
        begin, end = piece.rows_of(shape)
        low, high = max(begin, first), min(end, last)
        if low < high:
            rows = _rows_of_piece(piece, low - begin, high - begin, read)
            out = rows.new_empty((size[0], *shape[1:])) if out is None else out
            inside = low - first if piece.at and isinstance(piece.at[0], int) else slice(low - first, high - first)
            out[(inside, *piece.at[1:])] = rows
    assert out is not None, "pieces cover everything"
    return out[(slice(None), *columns)]


def _rows_of_piece(piece: Piece, low: int, high: int, read: Read) -> Tensor:
    """Rows low to high of a piece; of a piece that is one row of ours, all of it."""
    if not piece.hf_at and (piece.from_hf is None or piece.by_rows):
        tensor = read(piece.hf_name, slice(low, high))
        assert tensor is not None, "coverage was checked"
        return tensor if piece.from_hf is None else piece.from_hf(tensor)
    whole = _piece_of_ours(piece, read)
    return whole if piece.at and isinstance(piece.at[0], int) else whole[low:high]


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
