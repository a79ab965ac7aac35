"""Weights out of a model directory, by a family's layout: what is there is checked first, then read some rows at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

from grist_kernels.quantized import PackedWeight
from grist_model.families.layout import Layout, Piece
from grist_model.quantized_reading import Packed, find_packed
from grist_model.safetensors_file import EVERYTHING, TYPES, SafetensorsFile
from grist_model.weight_files import INDEX, SINGLE, check_coverage, read_json

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_AT_ONCE_BYTES = 1 << 26  # read and converted at a time, where the file has rows in our order


@dataclass(frozen=True)
class Weights:
    """The tensors of a directory by the layout's names. packed: those that are stored in quantized parts, which are read as
    the numbers they stand for."""

    layout: Layout
    stored: Mapping[str, tuple[SafetensorsFile, str]]
    packed: Mapping[str, Packed]

    def type_of(self, name: str) -> torch.dtype:
        """The type of one of our tensors: the one that holds all of its parts."""
        if name in self.layout.zeros:
            return torch.float32
        return reduce(torch.promote_types, [self._stored_type(each.hf_name) for each in self.layout.of_ours[name]])

    def read(self, hf_name: str, rows: slice = EVERYTHING) -> Tensor:
        if hf_name in self.packed:
            return self.packed[hf_name].read(self._stored, rows)
        return self._stored(hf_name, rows)

    def read_packed(self, hf_name: str) -> PackedWeight:
        """A quantized tensor as it is stored, outputs first. Raises ValueError for one that is stored as plain numbers."""
        if hf_name not in self.packed:
            raise ValueError(
                f"{hf_name} is not quantized, but other parts of its layer are: load it without quantized=True"
            )
        return self.packed[hf_name].packed(self._stored, EVERYTHING)

    def rows_at_once(self, hf_name: str) -> int:
        """How many rows of a tensor make up what is read at a time."""
        row = torch.Size(self.layout.hf_shapes[hf_name][1:]).numel() * self._stored_type(hf_name).itemsize
        return max(1, _AT_ONCE_BYTES // max(1, row))

    def _stored(self, hf_name: str, rows: slice) -> Tensor:
        file, name = self.stored[hf_name]
        return file.read(name, rows)

    def _stored_type(self, hf_name: str) -> torch.dtype:
        if hf_name in self.packed:
            return self.packed[hf_name].type
        file, name = self.stored[hf_name]
        return TYPES[file.entries[name].type]


def fill(target: Tensor, name: str, weights: Weights, offset: tuple[int, ...] | None = None) -> None:
    """Copy one of our tensors, or the part of it that begins at `offset` and has target's shape, into `target`.

    Where a file keeps the same rows, only these are read; elsewhere one of the file's tensors at a time, never one of ours.
    """
    layout = weights.layout
    if name in layout.zeros:
        target.zero_()
        return
    offset = offset or (0,) * target.dim()
    for piece in layout.of_ours[name]:
        box = piece.box(layout.shapes[name])
        wanted = [(max(a, o), min(b, o + n)) for (a, b), o, n in zip(box, offset, target.shape, strict=True)]
        if any(low >= high for low, high in wanted):
            continue
        for rows in _in_steps(*wanted[0], piece, weights):
            part = [rows, *wanted[1:]]
            inside = tuple(slice(low - o, high - o) for (low, high), o in zip(part, offset, strict=True))
            if _read_straight(target[inside], piece, slice(rows[0] - box[0][0], rows[1] - box[0][0]), weights):
                continue
            found = _rows_of_piece(piece, rows[0] - box[0][0], rows[1] - box[0][0], weights)
            columns = tuple(slice(low - a, high - a) for (low, high), (a, _) in zip(part[1:], box[1:], strict=True))
            target[inside].copy_(found[(slice(None), *columns)])


def _read_straight(out: Tensor, piece: Piece, rows: slice, weights: Weights) -> bool:
    """Read rows of a piece to where they belong, if they lie there as in the file; whether that was done."""
    if piece.hf_name in weights.packed or not piece.same_rows or piece.from_hf is not None:
        return False
    file, name = weights.stored[piece.hf_name]
    entry = file.entries[name]
    alike = out.dtype == TYPES[entry.type] and out.device.type == "cpu" and tuple(out.shape[1:]) == entry.shape[1:]
    if not alike or not out.is_contiguous():
        return False
    file.read_into(name, rows, out)
    return True


def _in_steps(low: int, high: int, piece: Piece, weights: Weights) -> Iterator[tuple[int, int]]:
    step = weights.rows_at_once(piece.hf_name) if piece.same_rows else high - low
    for first in range(low, high, step):
        yield first, min(first + step, high)


def _rows_of_piece(piece: Piece, low: int, high: int, weights: Weights) -> Tensor:
    """Rows low to high of a piece, with all axes of our tensor."""
    if piece.same_rows:
        tensor = weights.read(piece.hf_name, slice(low, high))
        return tensor if piece.from_hf is None else piece.from_hf(tensor)
    part = weights.read(piece.hf_name)[piece.hf_at]
    whole = part if piece.from_hf is None else piece.from_hf(part)
    return whole[None] if piece.at and isinstance(piece.at[0], int) else whole[low:high]


def open_weights(directory: Path, layout: Layout, stack: ExitStack) -> Weights:
    """Open every weight file and check names, shapes and types, and that what is repeated is the same.

    Raises FileNotFoundError for files that are missing, ValueError for damaged ones and for what does not match, all of it
    listed with its file.
    """
    stored: dict[str, tuple[SafetensorsFile, str]] = {}
    for path, listed in _weight_files(directory).items():
        file = stack.enter_context(SafetensorsFile(path))
        _check_listed(file, listed, directory)
        for name in file.entries:
            ours = _name_of(name, layout)
            if ours in stored:
                raise ValueError(
                    f"{name} is in both {stored[ours][0].path} and {path}: one of them is of another model or an older save"
                )
            if ours is not None:
                stored[ours] = file, name
    packed = _find_packed(stored, layout, directory)
    parts = {part: name for name, each in packed.items() for part in each.parts}
    shapes = {name: file.entries[at].shape for name, (file, at) in stored.items() if name not in parts}
    shapes |= {name: each.shape for name, each in packed.items()}
    places = {parts.get(name, name): file.path.name for name, (file, _) in stored.items()}
    copies = {copy for names in layout.copies.values() for copy in names}
    check_coverage(str(directory), {n: s for n, s in shapes.items() if n not in copies}, layout.hf_shapes, places)
    _check_types(stored, packed, directory)
    weights = Weights(layout, stored, packed)
    for name in layout.copies:
        _check_copies(name, weights)
    return weights


def _weight_files(directory: Path) -> dict[Path, list[str]]:
    """Every file and the tensors that the index promises of it."""
    listed: dict[str, list[str]] = {SINGLE: []}
    index = directory / INDEX
    if index.is_file():
        if (directory / SINGLE).is_file():
            raise ValueError(f"{directory} has {SINGLE} and {INDEX}: remove the one that is of an older save")
        weight_map = read_json(index, directory).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map of tensors to file names: download or save the model again")
        listed = {}
        for tensor, name in weight_map.items():
            listed.setdefault(name, []).append(tensor)
        outside = [name for name in listed if Path(name).name != name]
        if outside:
            raise ValueError(f"{index} names files outside its directory: {', '.join(outside)}")
    missing = [name for name in sorted(listed) if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)} (weights are read from safetensors only, never from pickled files)"
        )
    return {directory / name: listed[name] for name in sorted(listed)}


def _check_listed(file: SafetensorsFile, listed: list[str], directory: Path) -> None:
    absent = [name for name in listed if name not in file.entries]
    if absent:
        raise ValueError(
            f"{directory / INDEX} says that {file.path.name} holds {', '.join(absent)}, but it does not: the index and the "
            "files are of different saves, so fetch or save all of them again"
        )


def _find_packed(
    stored: Mapping[str, tuple[SafetensorsFile, str]], layout: Layout, directory: Path
) -> dict[str, Packed]:
    def read(name: str, rows: slice) -> Tensor:
        file, at = stored[name]
        return file.read(at, rows)

    settings = read_json(directory / "config.json", directory)
    dtype = _DTYPES.get(settings.get("dtype") or settings.get("torch_dtype") or "")
    shapes = {name: file.entries[at].shape for name, (file, at) in stored.items()}
    try:
        return find_packed(shapes, layout.hf_shapes, settings.get("quantization_config"), dtype, read)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _check_types(
    stored: Mapping[str, tuple[SafetensorsFile, str]], packed: Mapping[str, Packed], directory: Path
) -> None:
    of_parts = {part: types for each in packed.values() for part, types in each.parts.items()}
    wrong = []
    for name, (file, at) in stored.items():
        kind, expected = file.entries[at].type, of_parts.get(name, ("F64", "F32", "F16", "BF16"))
        if kind not in expected:
            wrong.append(f"{at} (in {file.path.name}) is {kind}, expected {' or '.join(expected)}")
    if wrong:
        raise ValueError(
            f"{directory} has weights of a type that cannot be read: {'; '.join(wrong)}. Convert them to bfloat16 or float32 "
            "with the program that wrote them"
        )


def _check_copies(hf_name: str, weights: Weights) -> None:
    step = weights.rows_at_once(hf_name)
    for copy in weights.layout.copies[hf_name]:
        if copy not in weights.stored:
            continue
        file, name = weights.stored[copy]
        shape = weights.layout.hf_shapes[hf_name]
        same = file.entries[name].shape == shape and all(
            torch.equal(file.read(name, slice(row, row + step)), weights.read(hf_name, slice(row, row + step)))
            for row in range(0, shape[0], step)
        )
        if not same:
            raise ValueError(
                f"{file.path}: {copy} differs from {hf_name}, but config.json says they are tied: "
                'set "tie_word_embeddings" to false there if the model has a head of its own'
            )


def _name_of(stored: str, layout: Layout) -> str | None:
    """The layout's name of a tensor in a file; None for what is computed, not trained."""
    if layout.computed is not None and re.search(layout.computed, stored):
        return None
    if stored not in layout.hf_shapes and layout.optional_prefix + stored in layout.hf_shapes:
        return layout.optional_prefix + stored
    return stored
