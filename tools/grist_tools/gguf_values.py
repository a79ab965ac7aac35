"""Types of a GGUF file's tensors, and their values in pieces of bounded size: as bytes for the file and as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from grist_tools.gguf_names import GgufTensor, Part
from grist_tools.gguf_source import Source, mxfp4_bytes, numbers, stored_mxfp4

if TYPE_CHECKING:
    import numpy as np

# kind -> general.file_type, llama.cpp's LLAMA_FTYPE.
FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_0": 2, "mxfp4": 38}
BLOCK = 32  # numbers that share a scale in Q8_0, Q4_0 and MXFP4, all within a row
_BLOCK_TYPES = ("Q8_0", "Q4_0", "MXFP4")
_AT_ONCE = 1 << 22  # numbers


def type_of(tensor: GgufTensor, kind: str, source: Source) -> str:
    """ggml's type of a tensor in a file of a kind, by llama.cpp's rules.

    Vectors, biases, norms, routers and learned positions stay float32. MXFP4 is for experts, and those that the source has in
    it keep it, in every kind but f32. In q4_0, embedding and output are Q8_0: they are the most sensitive (llama-quantize
    gives the output Q6_K, for which the gguf package has no writer). Rows that are no multiple of a block are F16.
    """
    single = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "rope_freqs.weight")
    if len(tensor.shape) == 1 or not tensor.name.endswith(".weight") or tensor.name.endswith(single):
        return "F32"
    if kind == "f32":
        return "F32"
    experts = tensor.name.endswith("_exps.weight")
    wanted = kind.upper()
    if experts and source.is_mxfp4(tensor.parts[0].name):
        wanted = "MXFP4"
    elif (kind == "mxfp4" and not experts) or (
        kind == "q4_0" and tensor.name in ("token_embd.weight", "output.weight")
    ):
        wanted = "Q8_0"
    return "F16" if misses_blocks(tensor, wanted) else wanted


def misses_blocks(tensor: GgufTensor, type: str) -> bool:
    return type in _BLOCK_TYPES and tensor.shape[-1] % BLOCK != 0


def size_in_bytes(tensor: GgufTensor, type: str) -> int:
    from math import prod

    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[type]]
    return prod(tensor.shape) // values * size


def pieces(tensor: GgufTensor, source: Source) -> Iterator[tuple[Part | None, np.ndarray]]:
    """What a tensor is made of in the order of the file: float32 arrays, of as many dimensions as are left of one part.

    Raises ValueError for numbers that are not finite.
    """
    import numpy as np

    if tensor.fixed:
        yield None, np.array(tensor.fixed, np.float32)
    for part in (small for whole in tensor.parts for small in _in_steps(whole)):
        found = numbers(source, part.name, part.box)
        if not np.isfinite(found).all():
            raise ValueError(f"{part.name} has values that are not finite: this model is broken, export an older save")
        if part.turned:
            found = found[0].T
        if part.heads:
            halves = found.reshape(part.heads, 2, -1, *found.shape[1:])
            found = halves.swapaxes(1, 2).reshape(found.shape)
        yield part, np.ascontiguousarray(found)


def encoded(tensor: GgufTensor, type: str, source: Source) -> Iterator[np.ndarray]:
    """The bytes of a tensor, in order. Raises ValueError as `pieces`, and for numbers that F16 cannot hold."""
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, quants

    from grist_tools.quantize import quantise_mxfp4

    if type == "MXFP4" and source.is_mxfp4(tensor.parts[0].name):
        for part in tensor.parts:
            yield stored_mxfp4(source, part.name, part.box)
        return
    for _, values in pieces(tensor, source):
        if type == "F16" and np.abs(values).max() > np.finfo(np.float16).max:
            raise ValueError(f"{tensor.name} has values over 65,504, which f16 cannot hold: export as bf16 or q8_0")
        if type == "MXFP4":  # the numbers of `--format mxfp4`, and four times as fast as by the gguf package
            packed = quantise_mxfp4(torch.from_numpy(values))
            yield mxfp4_bytes(packed.blocks.numpy(), packed.scales.numpy())
        else:
            yield quants.quantize(values, GGMLQuantizationType[type])


def _in_steps(part: Part) -> Iterator[Part]:
    """The same by rows, where rows can be taken alone."""
    (first, last), *rest = part.box
    row = 1
    for begin, end in rest:
        row *= end - begin
    step = max(1, _AT_ONCE // row)
    if part.turned or part.heads or last - first <= step:
        yield part
        return
    for begin in range(first, last, step):
        yield replace(part, box=((begin, min(begin + step, last)), *rest))
