"""GPT-OSS as OpenAI publishes it: experts as blocks and scales, out-major, in place of the matrices."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def packed_in_mxfp4(directory: Path, seed: int = 0) -> dict[str, Tensor]:
    """Replace the experts of a directory in GPT-OSS's layout by random ones in MXFP4; its tensors as they are then."""
    path, draw = directory / "model.safetensors", torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "experts.down_proj"))]:
        E, inputs, outputs = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (E, outputs, inputs // 32, 16), generator=draw).to(torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, (E, outputs, inputs // 32), generator=draw).to(torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    return tensors
