"""A model directory opened for export to GGUF: its config, its checked weight files, and numbers out of them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grist_model.config import ModelConfig
from grist_model.families import FAMILIES, family_of_hf

if TYPE_CHECKING:
    import numpy as np

    from grist_model.families.layout import Shape
    from grist_model.weight_reading import Weights

OWN = "gristmill"
BLOCKS, SCALES = "_blocks", "_scales"  # what stands in the files for a tensor in MXFP4


@dataclass(frozen=True)
class Source:
    """family: model_type of its config.json. weights: open until the stack given to `open_source` ends."""

    directory: Path
    family: str
    config: ModelConfig
    weights: Weights

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of our tensors, without those that the family does not have because they are all zeros."""
        layout = self.weights.layout
        return {name: shape for name, shape in layout.shapes.items() if name not in layout.zeros}

    def is_mxfp4(self, name: str) -> bool:
        """Whether one of our tensors lies in the files as MXFP4."""
        return self.weights.layout.of_ours[name][0].hf_name + BLOCKS in self.weights.stored


def open_source(directory: Path, stack: ExitStack) -> Source:
    """Raises what `grist_model.load` raises, and ValueError for a model that only gristmill's own layout can hold."""
    from grist_model.checkpoint import config_of
    from grist_model.weight_files import read_json
    from grist_model.weight_reading import open_weights

    config = config_of(directory)
    module = family_of_hf(read_json(directory / "config.json", directory))
    if module.MODEL_TYPE == OWN:
        others = [each.misfit(config) for name, each in FAMILIES.items() if name != OWN]
        listed = "\n  ".join(reason or "fits, so save it again with grist_model.save" for reason in others)
        raise ValueError(f"{directory} has settings that no architecture of llama.cpp has:\n  {listed}")
    return Source(directory, module.MODEL_TYPE, config, open_weights(directory, module.layout(config), stack))


def numbers(source: Source, name: str, box: tuple[tuple[int, int], ...]) -> np.ndarray:
    """The part of one of our tensors that `box` bounds (begin and end along every axis), as float32."""
    import torch

    from grist_model.weight_reading import fill

    target = torch.empty([end - begin for begin, end in box], dtype=torch.float32)
    fill(target, name, source.weights, tuple(begin for begin, _ in box))
    return target.numpy()


def stored_mxfp4(source: Source, name: str, box: tuple[tuple[int, int], ...]) -> np.ndarray:
    """One expert's matrix in MXFP4 bit for bit, as `mxfp4_bytes`. GPT-OSS's file has a row for every output, gate and up in
    turn."""
    hf_name, expert = source.weights.layout.of_ours[name][0].hf_name, slice(*box[0])
    blocks, scales = (
        file.read(stored, expert)[0].numpy()
        for file, stored in (source.weights.stored[hf_name + end] for end in (BLOCKS, SCALES))
    )
    if name.endswith("w_gate_up"):
        of_half = slice(0 if box[2][0] == 0 else 1, None, 2)
        blocks, scales = blocks[of_half], scales[of_half]
    return mxfp4_bytes(blocks, scales)


def mxfp4_bytes(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """blocks (out, in / 32, 16), scales (out, in / 32) uint8 -> (out, in / 32 * 17) in ggml's order of bytes.

    Here a byte holds elements 2j (low half) and 2j + 1; ggml's block begins with its scale, and a byte holds j and j + 16.
    """
    import numpy as np

    codes = np.stack([blocks & 0x0F, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    halves = codes[..., :16] | (codes[..., 16:] << 4)
    return np.concatenate([scales[..., None], halves], axis=-1).reshape(len(scales), -1)
