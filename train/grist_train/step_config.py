"""How a step is computed: optimizer, schedule, arithmetic and layout. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW for vectors, embeddings and the router; for matrices AdamW or Muon.

    Attributes:
        name: `muon` orthogonalises the update of every matrix inside the blocks (https://kellerjordan.github.io/posts/muon/);
            `adamw` uses AdamW throughout.
        lr: Peak learning rate of AdamW.
        embedding_lr: Peak rate of the embedding when it should differ from `lr`.
        muon_lr: Peak learning rate of Muon. Updates are scaled by 0.2 * sqrt(max(rows, columns)), which gives them the
            root mean square of an AdamW update (Liu et al. 2025, arXiv:2502.16982), so AdamW-like rates carry over.
        muon_momentum: Final Nesterov momentum; it is warmed up from 0.85 over `muon_warmup_steps`.
        muon_iterations: Steps of the orthogonalising iteration, 1 to 5.
        weight_decay: Decoupled, on matrices and embeddings only.
        clip: Largest global gradient norm; 0 turns clipping off.
        state_bits: 8 keeps AdamW's averages in 8 bits (needs torchao), a quarter of their memory; Muon's stay in 32. The host
            then waits for the device once a step. A run that began with 32 may go on with 8, not the other way.
    """

    name: Literal["adamw", "muon"] = "muon"
    lr: float = 3e-3
    embedding_lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    muon_lr: float = 0.02
    muon_momentum: float = 0.95
    muon_warmup_steps: int = 100
    muon_iterations: int = 5
    clip: float = 1.0
    state_bits: Literal[32, 8] = 32


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning-rate multiplier over the run.

    Attributes:
        kind: `cosine` and `linear` fall to `final_fraction` from the end of the warmup to that of the run; `wsd` holds the
            peak, then falls over the last `decay_fraction` of the run (warmup-stable-decay, Hu et al. 2024,
            arXiv:2404.06395); `constant` holds it.
        warmup_steps: Linear rise from zero.
        decay_shape: How `wsd` falls: `linear`, or `1-sqrt`, steeply at first and flatter at the end (Hägele et al. 2024,
            arXiv:2405.18392).
    """

    kind: Literal["cosine", "linear", "wsd", "constant"] = "wsd"
    warmup_steps: int = 20
    decay_fraction: float = 0.5
    decay_shape: Literal["linear", "1-sqrt"] = "linear"
    final_fraction: float = 0.0


@dataclass(frozen=True)
class EveryBlocks:
    """Activation checkpointing of some blocks: the first of every `every`; 1 is all of them, `block`."""

    every: int


@dataclass(frozen=True)
class ComputeConfig:
    """How the arithmetic is carried out.

    Attributes:
        dtype: Forward and backward arithmetic. Parameters and optimizer state stay float32 ("master weights"). `auto` is
            bfloat16 on CUDA and float32 elsewhere.
        reduce_dtype: Arithmetic of gradient reductions between ranks.
        reduce_every_micro_batch: Reduce and reshard gradients after every micro-batch (least memory) instead of once a step
            (least communication).
        reshard_after_forward: Free a block's gathered parameters between its forward and its backward (FSDP2; ZeRO-3).
        expert_parallel: Neighbouring ranks that share the experts among them: each computes its own, and tokens travel to
            theirs. A divisor of the number of ranks and of model.experts; 1 gathers experts as all other weights. It changes
            neither what a run computes nor its checkpoints, so a run may go on with another value.
        replicate: Copies of the model (HSDP): weights are cut over the ranks of a copy only, and copies meet to sum gradients.
            More memory and less traffic between machines than cutting them over all ranks. A divisor of the number of ranks;
            a run may go on with another value.
        context_parallel: Neighbouring ranks that share every sequence of a micro-batch: each computes two pieces of it, and
            keys and values go around (ring attention). For sequences that are too long for one rank. A divisor of the number
            of ranks of a copy, and twice it one of data.sequence_length; a run may go on with another value.
        activation_checkpointing: What is kept of the forward for the backward, which computes the rest again. `none` keeps all;
            `block` only the input of each block; `{every: n}` only that of one block in n, and all of the others; `selective`
            the inputs of attention and of the MLP, the outputs of products with weights (not with experts), and that of
            attention where PyTorch sees it (on a CPU, or with `compile`).
        compile: torch.compile of each block. Its graph breaks at experts that are sharded.
        threads: CPU threads a process uses; None leaves the choice to torch (torchrun sets one a process).
    """

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    reduce_every_micro_batch: bool = False
    reshard_after_forward: bool = True
    expert_parallel: int = 1
    replicate: int = 1
    context_parallel: int = 1
    activation_checkpointing: Literal["none", "block", "selective"] | EveryBlocks = "none"
    compile: bool = False
    threads: int | None = None
