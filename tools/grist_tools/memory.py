"""An estimate of one GPU's memory during training, by category, from the run alone.

It follows what the trainer does (grist_train.distributed, FSDP2): float32 parameters, gradients and optimizer state cut
over all GPUs; blocks gathered in the compute type one at a time; embedding and head gathered for the whole step.
What autograd keeps is counted for the fused ops; with GRIST_KERNELS=reference it is several times as much.

Shape letters: D model width, N query heads, K key/value heads, H head width, E experts, A active experts per token,
F expert width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grist_model.config import ModelConfig
    from grist_train.config import TrainConfig

MASTER_BYTES = 4  # float32 parameters, gradients and optimizer state
RUNTIME_BYTES = 1.5 * 2**30  # CUDA context, communication and matrix-library workspaces
FRAGMENTATION = 0.05  # of what the allocator handed out, lost between blocks


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU. The peak is in the backward pass or in the optimizer step, whichever needs more."""

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    loss: float
    optimizer_step: float

    def categories(self) -> dict[str, float]:
        return {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimizer state": self.optimizer,
            "gathered parameters": self.gathered,
            "activations": self.activations,
            "loss": self.loss,
            "optimizer step": self.optimizer_step,
            "runtime, fragmentation": self.overhead,
        }

    @property
    def _used(self) -> float:
        backward = self.gathered + self.activations + self.loss
        return self.parameters + self.gradients + self.optimizer + max(backward, self.optimizer_step)

    @property
    def overhead(self) -> float:
        return RUNTIME_BYTES + FRAGMENTATION * self._used

    @property
    def peak_bytes(self) -> float:
        return self._used + self.overhead


@dataclass(frozen=True)
class _Counts:
    """Parameters by how they are sharded and updated."""

    total: int
    root: int  # outside the blocks: embedding, last norm, head
    block: int  # one block
    matrices: int  # inside the blocks, what Muon updates


def estimate(config: TrainConfig, gpus: int, micro_size: int, micro_batches: int) -> Memory:
    """Memory of one of `gpus` GPUs that puts `micro_batches` micro-batches of `micro_size` sequences through a step."""
    counts = _count(config.model)
    value_bytes = 4 if config.compute.dtype == "float32" else 2  # auto is bfloat16 on a GPU
    sharded = gpus > 1 or value_bytes < MASTER_BYTES  # one float32 rank stays plain, without FSDP
    tokens = micro_size * config.data.sequence_length
    muon = config.optimizer.name == "muon"
    adam_values = counts.total - (counts.matrices if muon else 0)
    return Memory(
        parameters=MASTER_BYTES * counts.total / gpus,
        gradients=_gradients(config, counts, gpus, micro_batches, value_bytes, sharded),
        optimizer=MASTER_BYTES * (2 * adam_values + (counts.matrices if muon else 0)) / gpus,
        gathered=_gathered(config, counts, value_bytes) if sharded else 0.0,
        activations=_activations(config, tokens, value_bytes),
        loss=_loss(config.model, tokens, value_bytes),
        # Muon's look-ahead and its orthogonalised update, and the stack it works on in half precision, three deep.
        optimizer_step=(2 * MASTER_BYTES + 3 * 2) * counts.matrices / gpus if muon else 0.0,
    )


def _count(model: ModelConfig) -> _Counts:
    import grist_model
    from grist_train.optimizer import roles

    built = grist_model.build(model, device="meta")
    total = sum(parameter.numel() for parameter in built.parameters())
    blocks = sum(parameter.numel() for parameter in built.blocks.parameters())
    matrices = sum(parameter.numel() for parameter in roles(built).matrices)
    return _Counts(total, total - blocks, blocks // model.layers, matrices)


def _gradients(
    config: TrainConfig, counts: _Counts, gpus: int, micro_batches: int, value_bytes: int, sharded: bool
) -> float:
    reduced = MASTER_BYTES * counts.total / gpus
    if not sharded:
        return reduced
    # One block's gradients on their way: whole in the compute type, and packed for the reduction.
    reduce_bytes = 4 if config.compute.reduce_dtype == "float32" else 2
    on_the_way = (value_bytes + reduce_bytes) * max(counts.block, counts.root)
    if micro_batches > 1 and not config.compute.reduce_every_micro_batch:
        # Between micro-batches whole gradients wait, in the type of the reduction, for the last one.
        return reduced + reduce_bytes * counts.total + on_the_way
    return reduced + on_the_way


def _gathered(config: TrainConfig, counts: _Counts, value_bytes: int) -> float:
    if not config.compute.reshard_after_forward:
        return value_bytes * counts.total
    # The root's parameters stay for the whole step; of the blocks, the one at work and the one fetched ahead, and for
    # the latter the buffer it arrives in.
    return value_bytes * (counts.root + 3 * counts.block)


def _activations(config: TrainConfig, tokens: int, value_bytes: int) -> float:
    layer = tokens * saved_bytes_per_token(config.model, value_bytes)
    inputs = tokens * config.model.width * value_bytes
    if config.compute.activation_checkpointing == "block":
        return config.model.layers * inputs + layer
    return config.model.layers * layer + inputs


def saved_bytes_per_token(model: ModelConfig, value_bytes: int) -> float:
    """What one block keeps of one token until its backward pass.

    attention  3 D (residual, normed, new residual) + D (normed for the feed-forward) + 2 N H + 2 K H, N log-sums
    experts    A (D + 3 F): rows by expert, gate and up, activation; dense and shared experts alike without the D
    router     D in float32, E logits and probabilities, A ids and weights
    """
    D, F, A, E = model.width, model.expert_width, model.active_experts, model.experts
    H = model.attention_head_width
    values = 4 * D + 2 * model.heads * H + 2 * model.kv_heads * H
    float32_values = model.heads
    if E:
        values += A * (D + 3 * F) + 3 * model.shared_expert_width
        float32_values += (D if value_bytes < 4 else 0) + 2 * E + 4 * A
    else:
        values += 3 * F
    return values * value_bytes + 4 * float32_values


def _loss(model: ModelConfig, tokens: int, value_bytes: int) -> float:
    """A chunk of logits, turned into their gradient in place; the gradients of weight (float32) and hidden, which wait for the
    backward, and their scaled copies, which are made when the logits are gone."""
    from grist_kernels.linear_cross_entropy.chunks import chunks

    rows = chunks(tokens, model.vocab_size, value_bytes, "cuda")[0].stop
    weight, hidden = model.vocab_size * model.width, tokens * model.width
    return max(rows * model.vocab_size, weight + hidden) * value_bytes + 4 * weight + hidden * value_bytes
