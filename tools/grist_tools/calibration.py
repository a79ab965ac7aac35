"""What the layers of a model see of real data: rows of a token dataset, and the Hessians that GPTQ needs.

N rows, T time, D model width, E experts, R tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import grist_kernels
from grist_model.layers import Linear
from grist_model.moe import Experts
from grist_tools.export_compare import ROW_TOKENS
from grist_tools.gptq import Hessian

if TYPE_CHECKING:
    from grist_data import Tokenizer
    from grist_model.config import ModelConfig
    from grist_model.transformer import Block

Key = tuple[str, int | None]  # a parameter's name inside its block, and the expert


def held_out_split(dataset: Path) -> str:
    """val where the dataset has it, else train."""
    from grist_data.manifest import read_manifest

    return "val" if "val" in read_manifest(dataset)["splits"] else "train"


def dataset_rows(
    dataset: Path, tokenizer: Tokenizer | None, config: ModelConfig, rows: int, split: str = "train"
) -> Tensor:
    """ids (N, T) of a dataset directory in its training order; fewer than `rows` where the split has no more.

    Raises ValueError for a dataset made with another tokenizer, or for other ids than the model's; FileNotFoundError for none.
    """
    from grist_data import Batches, Shards

    sha256 = None if tokenizer is None else tokenizer.sha256
    shards = Shards.open(dataset, split, tokenizer_sha256=sha256)
    if shards.vocab_size > config.vocab_size:
        raise ValueError(f"{dataset} has ids up to {shards.vocab_size}, but the model has {config.vocab_size} tokens")
    T = min(config.context_length, ROW_TOKENS, shards.n_tokens - 1)
    n_rows = max(1, min(rows, (shards.n_tokens - 1) // T))
    batches = Batches(shards, sequence_length=T, global_batch_size=n_rows, seed=0)
    try:
        return torch.cat([batch.ids_BT for batch in next(batches)]).long()
    finally:
        batches.close()


@contextmanager
def collected(block: Block) -> Iterator[dict[Key, Hessian]]:
    """The Hessians of every matrix of a block, of what runs through it inside the `with`."""
    found: dict[Key, Hessian] = {}
    handles = []
    for name, module in block.named_modules():
        if isinstance(module, Linear):
            hook = _of_linear(found, (f"{name}.weight", None))
        elif isinstance(module, Experts):
            hook = _of_experts(found, name)
        else:
            continue
        handles.append(module.register_forward_pre_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _add(found: dict[Key, Hessian], key: Key, x: Tensor) -> None:
    found.setdefault(key, Hessian(x.shape[-1])).add(x)


def _of_linear(found: dict[Key, Hessian], key: Key):
    def hook(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        _add(found, key, inputs[0])

    return hook


def _of_experts(found: dict[Key, Hessian], name: str):
    """An expert sees the tokens that chose it, and its second matrix what its first made of them."""

    def hook(experts: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(experts, Experts)
        x_RD, ids_RA = inputs[:2]
        for expert in range(experts.w_down.shape[0]):
            x = x_RD[(ids_RA == expert).any(1)]
            gate_up = x @ experts.w_gate_up[expert]
            if experts.b_gate_up is not None:
                gate_up = gate_up + experts.b_gate_up[expert]
            _add(found, (f"{name}.w_gate_up", expert), x)
            _add(
                found,
                (f"{name}.w_down", expert),
                grist_kernels.swiglu(gate_up, alpha=experts.alpha, limit=experts.limit),
            )

    return hook
