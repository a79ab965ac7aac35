"""A safetensors file written in parts is one that the package's own reader takes."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from grist_model.safetensors_file import TYPES, SafetensorsFile
from grist_model.safetensors_writing import SafetensorsWriter

PLANNED = {
    "bytes": (torch.uint8, (3, 5)),
    "wide": (torch.int64, (2,)),
    "rows": (torch.bfloat16, (7, 3)),
    "fp8": (torch.float8_e4m3fn, (4, 1)),
    "number": (torch.float32, ()),
    "none": (torch.float32, (0, 4)),
}


def tensors() -> dict[str, torch.Tensor]:
    return {
        name: torch.arange(torch.Size(shape).numel()).view(shape).to(dtype) for name, (dtype, shape) in PLANNED.items()
    }


def test_every_reader_finds_what_was_written(tmp_path):
    path, expected = tmp_path / "x.safetensors", tensors()
    with SafetensorsWriter(path, PLANNED) as writer:
        writer.write("rows", expected["rows"][4:], 4)
        for name in ("none", "number", "fp8", "wide", "bytes"):
            writer.write(name, expected[name])
        writer.write("rows", expected["rows"][:4])
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float()), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    with SafetensorsFile(path) as file:
        assert torch.equal(file.read("rows", slice(2, 5)), expected["rows"][2:5])
        for name, entry in file.entries.items():
            assert entry.start % TYPES[entry.type].itemsize == 0, name


@pytest.mark.parametrize(
    "tensor", [torch.zeros(3, 5), torch.zeros(3, 4, dtype=torch.uint8), torch.zeros(15, dtype=torch.uint8)]
)
def test_another_tensor_than_announced_is_refused(tmp_path, tensor):
    with pytest.raises(ValueError, match=r"bytes was announced as torch\.uint8 \(3, 5\), but is"):  # noqa: SIM117
        with SafetensorsWriter(tmp_path / "x.safetensors", PLANNED) as writer:
            writer.write("bytes", tensor)


def test_rows_beyond_the_last_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at row 2"), SafetensorsWriter(tmp_path / "x.safetensors", PLANNED) as writer:
        writer.write("bytes", torch.zeros(2, 5, dtype=torch.uint8), 2)


def test_a_tensor_that_was_not_written_whole_is_told(tmp_path):
    writer = SafetensorsWriter(tmp_path / "x.safetensors", PLANNED)
    for name in ("bytes", "wide"):
        writer.write(name, tensors()[name])
    writer.write("rows", tensors()["rows"][:2])
    with pytest.raises(ValueError, match="rows, fp8, number was announced but not written whole"):
        writer.__exit__(None, None, None)


def test_what_ends_the_block_is_what_is_raised(tmp_path):
    with pytest.raises(KeyError), SafetensorsWriter(tmp_path / "x.safetensors", PLANNED) as writer:
        writer.write("absent", torch.zeros(1))
