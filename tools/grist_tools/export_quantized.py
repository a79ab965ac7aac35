"""A model directory with packed weights: read, quantized and written a tensor at a time; memory stays near one layer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from grist_kernels.quantized import PackedWeight
from grist_model.safetensors_writing import SafetensorsWriter
from grist_model.weight_files import INDEX, SINGLE
from grist_tools.block_by_block import BlockByBlock
from grist_tools.export_options import Options
from grist_tools.export_schemes import KEPT_TYPE, Parts, Scheme, check_fits

if TYPE_CHECKING:
    from grist_model.families.layout import Layout, Piece
    from grist_model.weight_reading import Weights

MAX_FILE_BYTES = 5_000_000_000
_OF_BLOCK = re.compile(r"blocks\.(\d+)\.")


class Output:
    """The weight files of a directory, which are opened one after the other."""

    def __init__(self, directory: Path, planned: Mapping[str, Parts], stack: ExitStack, max_file_bytes: int):
        self._at: dict[str, SafetensorsWriter] = {}
        files = list(_split(planned, max_file_bytes))
        weight_map: dict[str, str] = {}
        for number, parts in enumerate(files, 1):
            name = SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            writer = stack.enter_context(SafetensorsWriter(directory / name, parts))
            self._at |= dict.fromkeys(parts, writer)
            weight_map |= dict.fromkeys(parts, name)
        self.bytes = sum(_size(parts) for parts in files)
        if len(files) > 1:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": weight_map}
            (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, name: str, tensor: Tensor, row: int = 0) -> None:
        self._at[name].write(name, tensor, row)


def _split(planned: Mapping[str, Parts], max_file_bytes: int) -> Iterator[Parts]:
    """Parts of one tensor stay in one file."""
    parts: Parts = {}
    for each in planned.values():
        if parts and _size(parts) + _size(each) > max_file_bytes:
            yield parts
            parts = {}
        parts = parts | each
    yield parts


def _size(parts: Parts) -> int:
    return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in parts.values())


def write_quantized(
    source: Path,
    draft: Path,
    scheme: Scheme,
    options: Options,
    rows_BT: Tensor | None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """The weights and config.json of `source` under `scheme`. rows_BT: ids to calibrate on, for GPTQ.

    Raises ValueError for a model that the scheme cannot hold, and for values that cannot be quantized, by the tensor's name.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    with ExitStack() as stack:
        model = BlockByBlock(source, stack)
        layout = model.weights.layout
        check_fits(scheme, config["model_type"], model.config, layout.hf_shapes)
        draft.mkdir()
        planned = {name: _parts_of(name, layout, scheme) for name in layout.hf_shapes}
        output = Output(draft, planned, stack, max_file_bytes)
        if rows_BT is None:
            for name in layout.hf_shapes:
                _convert(name, model.weights, scheme, output)
        else:
            _calibrated(model, scheme, options, rows_BT, output)
    dtype = str(KEPT_TYPE).removeprefix("torch.")
    config |= {"dtype": dtype, "torch_dtype": dtype, "quantization_config": dict(scheme.quantization)}
    (draft / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _parts_of(name: str, layout: Layout, scheme: Scheme) -> Parts:
    shape = layout.hf_shapes[name]
    return scheme.parts(name, shape) if scheme.packs(name) else {name: (KEPT_TYPE, shape)}


def _convert(name: str, weights: Weights, scheme: Scheme, output: Output) -> None:
    """One tensor; where it is all experts of a layer, one of them at a time."""
    shape = weights.layout.hf_shapes[name]
    quantized = scheme.packs(name)
    step = weights.rows_at_once(name) if not quantized else 1 if len(shape) == 3 else shape[0]
    for row in range(0, shape[0], step):
        tensor = weights.read(name, slice(row, row + step))
        if quantized:
            _write(name, _packed(name, tensor.mT if scheme.flipped else tensor, scheme), scheme, output, row)
        else:
            output.write(name, _kept(name, tensor), row)


def _packed(name: str, tensor: Tensor, scheme: Scheme) -> PackedWeight:
    try:
        return scheme.pack(tensor)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _write(name: str, packed: PackedWeight, scheme: Scheme, output: Output, row: int = 0) -> None:
    for part, tensor in scheme.stored(name, packed).items():
        output.write(part, tensor, row)


def _kept(name: str, tensor: Tensor) -> Tensor:
    kept = tensor.to(KEPT_TYPE)
    if not kept.isfinite().all():
        raise ValueError(f"{name} has values that are not finite (NaN or infinite), or that {KEPT_TYPE} cannot hold")
    return kept


def _calibrated(model: BlockByBlock, scheme: Scheme, options: Options, rows_BT: Tensor, output: Output) -> None:
    """int4 by GPTQ: a block sees the rows as the quantized blocks before it hand them on."""
    from grist_tools.calibration import collected
    from grist_tools.gptq import quantise_int4_gptq

    layout, x_BTD = model.weights.layout, model.embedded(rows_BT)
    for layer, names in groupby(layout.hf_shapes, lambda name: _layer_of(name, layout)):
        if layer is None:
            for name in names:
                _convert(name, model.weights, scheme, output)
            continue
        block = model.block(layer)
        with collected(block) as hessians:
            model.through(block, x_BTD.clone())
        state = block.state_dict()
        for name in names:
            if not scheme.packs(name):
                _convert(name, model.weights, scheme, output)
                continue
            (piece,) = layout.of_theirs[name]
            hessian_II = hessians[_key(piece)].sum_II
            packed = quantise_int4_gptq(
                model.weights.read(name),
                hessian_II,
                options.group,
                symmetric=options.symmetric,
                activation_order=options.activation_order,
                scale_type=KEPT_TYPE,
            )
            _write(name, packed, scheme, output)
            found = packed.dequantise()
            state[_inside(piece)][piece.at] = found if piece.from_hf is None else piece.from_hf(found)
        x_BTD = model.through(block, x_BTD)


def _layer_of(name: str, layout: Layout) -> int | None:
    found = _OF_BLOCK.match(layout.of_theirs[name][0].name)
    return int(found[1]) if found else None


def _inside(piece: Piece) -> str:
    """The parameter's name within its block."""
    return _OF_BLOCK.sub("", piece.name, count=1)


def _key(piece: Piece) -> tuple[str, int | None]:
    expert = piece.at[0] if piece.at else None
    return _inside(piece), expert if isinstance(expert, int) else None
