"""A model directory as one GGUF file, which llama.cpp and what is built on it run: Ollama, LM Studio, llamafile.

Written a part of a tensor at a time, read back and compared with the source, and only then given its name. GGUF:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

from grist_tools.gguf_metadata import Values, model_metadata, model_warnings
from grist_tools.gguf_names import ARCHITECTURES, GgufTensor, gguf_tensors, unfit
from grist_tools.gguf_source import Source, open_source
from grist_tools.gguf_tokenizer import tokenizer_metadata
from grist_tools.gguf_values import FILE_TYPES, encoded, misses_blocks, size_in_bytes, type_of

KINDS = tuple(FILE_TYPES)
_ALIGNMENT = 32  # bytes; what a file without general.alignment has


class GgufFile(NamedTuple):
    """bits_per_weight: of all tensors, over all their numbers. kept_f16: tensors whose rows are no multiple of a block.
    warnings: in what llama.cpp will differ, for the caller to show."""

    path: Path
    bytes: int
    bits_per_weight: float
    tensors: int
    kept_f16: tuple[str, ...]
    warnings: tuple[str, ...]


def write_gguf(source: Path, out: Path, kind: str = "f16", pre_tokenizer: str | None = None) -> GgufFile:
    """Write the model in the Hugging Face directory `source` as the GGUF file `out`, verified.

    kind: one of KINDS, the type of the matrices; gguf_values.py says which tensors have another. pre_tokenizer: llama.cpp's
    name of the regex that splits text, where tokenizer.json has one that is not known here. At any time one piece of 16 MiB,
    or one expert's matrix, is held as float32.

    Raises ValueError for a model, tokenizer or kind that llama.cpp cannot express, and for a file that does not read back as
    it should; FileExistsError if `out` exists; FileNotFoundError if `source` is no model directory; OSError for a disk
    without enough space; ImportError without the gguf package.
    """
    from grist_data.atomic import atomic_file
    from grist_tools.gguf_verify import compare

    _require_gguf()
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; there are {', '.join(KINDS)}")
    if out.exists():
        raise FileExistsError(f"{out} exists; export to a new file")
    with ExitStack() as stack:
        opened = open_source(source, stack)
        _require_expressible(opened, kind)
        of_tokenizer, warnings = tokenizer_metadata(source, opened.config.vocab_size, pre_tokenizer)
        metadata = model_metadata(opened, kind) | of_tokenizer
        tensors = gguf_tensors(opened)
        types = [type_of(tensor, kind, opened) for tensor in tensors]
        total = sum(size_in_bytes(tensor, type) for tensor, type in zip(tensors, types, strict=True))
        _require_space(out, total)
        with atomic_file(out) as file:
            _write_head(Path(file.name), ARCHITECTURES[opened.family].name, metadata, tensors, types)
            file.seek(0, 2)
            _write_tensors(file, opened, tensors, types)
            file.flush()
            compare(Path(file.name), opened, pre_tokenizer)
        warnings = [*model_warnings(opened), *warnings]
        kept = tuple(t.name for t in tensors if misses_blocks(t, kind.upper()) and type_of(t, kind, opened) == "F16")
        numbers = sum(prod(tensor.shape) for tensor in tensors)
    return GgufFile(out, out.stat().st_size, 8 * total / numbers, len(tensors), kept, tuple(warnings))


def _require_gguf() -> None:
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError("writing GGUF needs the gguf package: pip install gristmill[export]") from error


def _require_expressible(source: Source, kind: str) -> None:
    if why := unfit(source.family, source.config):
        raise ValueError(f"{source.directory} cannot be written as GGUF: {why}")
    if kind == "mxfp4" and not source.config.experts:
        raise ValueError(f"mxfp4 is for experts, and {source.directory} has none: use q4_0 or q8_0")


def _require_space(out: Path, total: int) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if total > free:
        raise OSError(f"{out} needs {total / 2**30:.1f} GiB, but its disk has {free / 2**30:.1f} GiB free")


def _write_head(
    path: Path, architecture: str, metadata: Values, tensors: Sequence[GgufTensor], types: Sequence[str]
) -> None:
    """Everything before the numbers, by the gguf package; its writer wants whole tensors for the rest."""
    import numpy as np
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(None, architecture)
    add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    for name, value in metadata.items():
        add.get(type(value), writer.add_array)(name, value)
    for tensor, kind in zip(tensors, types, strict=True):
        raw = GGMLQuantizationType[kind]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size_in_bytes(tensor, kind), raw)
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _write_tensors(file: BinaryIO, source: Source, tensors: Sequence[GgufTensor], types: Sequence[str]) -> None:
    from tqdm import tqdm

    sizes = [size_in_bytes(tensor, kind) for tensor, kind in zip(tensors, types, strict=True)]
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="gguf", disable=sum(sizes) < 1_000_000_000) as bar:
        for tensor, kind in zip(tensors, types, strict=True):
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            for data in encoded(tensor, kind, source):
                bar.update(file.write(data.tobytes()))
        file.write(b"\0" * (-file.tell() % _ALIGNMENT))
