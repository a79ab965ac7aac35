"""A GGUF file read back and compared with the model it was made from: keys, tensors, types, and every number."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_tools.gguf_metadata import model_metadata
from grist_tools.gguf_names import ARCHITECTURES, GgufTensor, gguf_tensors
from grist_tools.gguf_source import Source, open_source
from grist_tools.gguf_tokenizer import tokenizer_metadata
from grist_tools.gguf_values import BLOCK, FILE_TYPES, pieces, type_of

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader
    from gguf.gguf_reader import ReaderTensor

# Type -> largest error as a share of the number itself, and of the largest number of its block.
# F16 and BF16: half a unit in the last place. Q8_0: half a step of 1/127, and the rounding of the step to 11 bits. Q4_0: the
# step is 1/8, and the end that has seven steps only misses a whole one. MXFP4: numbers up to 8 become 6 at most.
_ERRORS = {
    "F32": (0.0, 0.0),
    "F16": (2**-11, 0.0),
    "BF16": (2**-8, 0.0),
    "Q8_0": (0.0, 0.5 / 127 + 2**-11),
    "Q4_0": (0.0, (1 + 2**-8) / 8),
    "MXFP4": (0.0, 0.25),
}
# Besides, of what float16 (numbers and steps) and MXFP4's scale have no smaller unit for.
_SMALLEST = {
    "F32": 0.0,
    "F16": 2.0**-25,
    "BF16": 2.0**-133,
    "Q8_0": 127 * 2.0**-25,
    "Q4_0": 2.0**-22,
    "MXFP4": 2.0**-125,
}


def verify_gguf(path: str | Path, source: str | Path, pre_tokenizer: str | None = None) -> None:
    """Raise ValueError that says what in the GGUF file is not what the model directory `source` holds.

    Every number must be as close as its type allows; MXFP4 that the directory has too must be equal. pre_tokenizer: as given
    when the file was written.
    """
    with ExitStack() as stack:
        compare(Path(path), open_source(Path(source), stack), pre_tokenizer)


def compare(path: Path, source: Source, pre_tokenizer: str | None = None) -> None:
    """`verify_gguf` with a source that is open."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    kind = _check_metadata(reader, source, pre_tokenizer, path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    expected = {tensor.name: tensor for tensor in gguf_tensors(source)}
    if found.keys() != expected.keys():
        raise ValueError(f"{path}: tensors missing or left over: {sorted(found.keys() ^ expected.keys())}")
    for name, tensor in expected.items():
        _check_tensor(found[name], tensor, type_of(tensor, kind, source), source, path)


def _check_metadata(reader: GGUFReader, source: Source, pre_tokenizer: str | None, path: Path) -> str:
    """The kind that the file says it is."""
    import numpy as np

    found = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    kinds = [kind for kind, number in FILE_TYPES.items() if number == found.get("general.file_type")]
    if not kinds:
        raise ValueError(f"{path}: general.file_type is {found.get('general.file_type')}, expected {FILE_TYPES}")
    expected: dict[str, Any] = {"general.architecture": ARCHITECTURES[source.family].name}
    expected |= model_metadata(source, kinds[0])
    expected |= tokenizer_metadata(source.directory, source.config.vocab_size, pre_tokenizer)[0]
    for name, value in expected.items():
        value = float(np.float32(value)) if isinstance(value, float) else value
        if name not in found or found[name] != value:
            raise ValueError(f"{path}: {name} is {str(found.get(name))[:80]}, expected {str(value)[:80]}")
    if found.keys() != expected.keys():
        raise ValueError(f"{path}: keys left over: {sorted(found.keys() - expected.keys())}")
    return kinds[0]


def _check_tensor(found: ReaderTensor, tensor: GgufTensor, type: str, source: Source, path: Path) -> None:
    from gguf import quants

    shape = tuple(reversed(found.shape.tolist()))
    if (found.tensor_type.name, shape) != (type, tensor.shape):
        raise ValueError(f"{path}: {tensor.name} is {found.tensor_type.name} {shape}, expected {type} {tensor.shape}")
    exact = type == "MXFP4" and source.is_mxfp4(tensor.parts[0].name)
    rows = found.data.reshape(-1, 1 if len(shape) == 1 else found.data.shape[-1])
    row = 0
    for part, values in pieces(tensor, source):
        expected = values.reshape(-1, 1 if len(shape) == 1 else shape[-1])
        written = quants.dequantize(rows[row : row + len(expected)], found.tensor_type)
        row += len(expected)
        bound = 0.0 if exact else _bound(expected, type)
        error = abs(written - expected)
        if not (error <= bound).all():  # false for NaN too
            where = f"{tensor.name}, from {part.name} {part.box}" if part else tensor.name
            raise ValueError(f"{path}: {where} is off by up to {error.max():.3g}, more than {type} rounds")


def _bound(values: np.ndarray, type: str) -> np.ndarray:
    """The largest error of each number."""
    import numpy as np

    of_number, of_block = _ERRORS[type]
    bound = of_number * np.abs(values) + _SMALLEST[type]
    if of_block:
        blocks = np.abs(values).reshape(-1, BLOCK)
        bound = bound + of_block * np.repeat(blocks.max(axis=1, keepdims=True), BLOCK, axis=1).reshape(values.shape)
    return bound
