"""One rank's memory during training, by formula: for choosing among many layouts, and where nothing can be traced.

`plan_trace.py` runs the trainer's own step on fake tensors and is what a plan rests on; this is its shorthand, a few
milliseconds long. It follows what the trainer does (grist_train.distributed, FSDP2) at the moments that compete for the
peak: when the loss is computed, all activations being there; in the backward of a block; when its gradients, or at the end
those of embedding and head, are reduced; and in the optimizer's step. A test holds it against traces.

Shape letters: D model width, N query heads, K key/value heads, H head width, E experts, A active experts per token,
F expert width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from grist_tools.plan_recompute import recomputed_blocks
from grist_tools.plan_roles import (
    ACTIVATIONS,
    COMMUNICATION,
    DATA,
    GATHERED,
    GRADIENTS,
    LOSS,
    OPTIMIZER,
    PARAMETERS,
    SLACK,
    UPDATE,
)

if TYPE_CHECKING:
    from grist_model.config import ModelConfig
    from grist_tools.plan_layout import Layout
    from grist_train.config import TrainConfig
    from grist_train.step_config import EveryBlocks

MASTER_BYTES = 4  # float32 parameters, gradients and optimizer state
RUNTIME_BYTES = 1.5 * 2**30  # CUDA context, communicators and matrix-library workspaces, which torch does not count
FRAGMENTATION = 0.05  # of what the allocator handed out, lost between blocks


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak of a step.

    Attributes:
        roles: What they are for (plan_roles.py).
        phase: What the step is doing then: forward, loss, backward or optimizer step.
        source: "traced", or "formula" and why.
        on_gpu: Whether a caching allocator and a CUDA context take their part.
    """

    roles: dict[str, float]
    phase: str
    source: str
    on_gpu: bool = True

    @property
    def used_bytes(self) -> float:
        """What tensors take."""
        return sum(self.roles.values())

    @property
    def slack_bytes(self) -> float:
        """What the allocator and the runtime take beside it: assumed, not traced."""
        return RUNTIME_BYTES + FRAGMENTATION * self.used_bytes if self.on_gpu else 0.0

    @property
    def peak_bytes(self) -> float:
        return self.used_bytes + self.slack_bytes

    def categories(self) -> dict[str, float]:
        return {**self.roles, SLACK: self.slack_bytes}


@dataclass(frozen=True)
class Counts:
    """Values of parameters, as one rank meets them in a layout: FSDP2 pads a matrix to as many rows for every rank.

    Attributes:
        held: What the first rank keeps of all of them; no rank keeps more.
        matrices: Of those, what Muon updates.
        root: Gathered outside the blocks: embedding, last norm, head.
        dense, experts: Gathered for one block, without its experts and of those that the rank computes.
        expert_ranks: That the latter are cut over (grist_train.expert_cut).
        in_rows: Of the latter, those that are cut into rows, which FSDP2 copies once more when they arrive or leave.
        root_values, block_values: The same without padding, a block's dense part and experts together: gradients have none.
    """

    held: int
    matrices: int
    root: int
    dense: int
    experts: int
    expert_ranks: int
    in_rows: int
    root_values: int
    block_values: int


def estimate(run: TrainConfig, layout: Layout, on_gpu: bool = True, why: str = "formula") -> Memory:
    """Memory of one rank of a run with this layout."""
    run = layout.config(run)
    counts = counted(run.model, layout.shards, layout.expert_parallel)
    # auto is bfloat16 on a GPU, float32 on a CPU
    value_bytes = 4 if run.compute.dtype == "float32" or (run.compute.dtype == "auto" and not on_gpu) else 2
    sharded = layout.gpus > 1 or value_bytes < MASTER_BYTES  # one float32 rank stays plain, without FSDP
    reduce_bytes = 4 if run.compute.reduce_dtype == "float32" else 2
    tokens = layout.micro_size * run.data.sequence_length // layout.context_parallel
    muon = run.optimizer.name == "muon"
    shard = float(MASTER_BYTES * counts.held)
    unit = counts.dense + counts.experts  # what a rank gathers for one block

    always = {
        PARAMETERS: shard,
        OPTIMIZER: 2 * shard - (MASTER_BYTES * counts.matrices if muon else 0),
        DATA: 16.0 * tokens * layout.micro_batches,
    }
    waits = not run.compute.reduce_every_micro_batch and sharded
    whole = reduce_bytes * (counts.root_values + counts.block_values * run.model.layers)
    before = (whole if waits else shard) if layout.micro_batches > 1 else 0.0
    blocks = 0.0 if not sharded else value_bytes * unit * (1 if layout.reshard_after_forward else run.model.layers)
    root = value_bytes * counts.root if sharded else 0.0
    layer = tokens * saved_bytes_per_token(run.model, value_bytes, layout.expert_parallel > 1)
    kept, repeated = _kept(run.model, layout.activation_checkpointing, layer / tokens, value_bytes, on_gpu)
    kept, repeated = tokens * kept, tokens * repeated
    weight_gradient, hidden_gradient, logits = _loss(run.model, tokens, value_bytes, on_gpu)

    at_loss = {
        **always,
        GRADIENTS: before,
        GATHERED: root + (0.0 if layout.reshard_after_forward else blocks),
        ACTIVATIONS: kept,
        LOSS: weight_gradient + hidden_gradient + logits,
    }
    # The head's, and one block's.
    arriving = before + (value_bytes * (counts.root_values / 2 + counts.block_values) if sharded else shard)
    one_more = 0.0 if layout.reshard_after_forward else blocks
    in_block = {
        **always,
        GRADIENTS: arriving,
        GATHERED: root + max(blocks / (1 if layout.reshard_after_forward else run.model.layers), one_more),
        ACTIVATIONS: kept + layer + repeated,
    }
    in_reduction = {
        **always,
        GRADIENTS: arriving,
        GATHERED: root + one_more,
        COMMUNICATION: reduce_bytes * unit if sharded else 0.0,
        ACTIVATIONS: kept,
    }
    at_the_end = {
        **always,
        GRADIENTS: max(before, shard) + (value_bytes * counts.root_values if sharded else 0.0),
        COMMUNICATION: reduce_bytes * counts.root if sharded else 0.0,
    }
    in_update = {
        **always,
        GRADIENTS: shard,
        # Muon's look-ahead and its orthogonalised update, and the stack that it works on, three deep.
        UPDATE: (2 * MASTER_BYTES + 3 * (2 if on_gpu else 4)) * counts.matrices if muon else 0.0,
    }
    moments = [
        ("loss", at_loss),
        ("backward", in_block),
        ("backward", in_reduction),
        ("backward", at_the_end),
        ("optimizer step", in_update),
    ]
    phase, held = max(moments, key=lambda moment: sum(moment[1].values()))
    return Memory({role: size for role, size in held.items() if size}, phase, why, on_gpu)


@cache
def counted(model: ModelConfig, shards: int, expert_parallel: int) -> Counts:
    """The parameters of a model on so many ranks, counted on a copy without storage."""
    import grist_model
    from grist_model.moe import Experts
    from grist_train import expert_cut
    from grist_train.optimizer import roles

    built = grist_model.build(model, device="meta")
    stacks = next((list(module.parameters()) for module in built.modules() if isinstance(module, Experts)), [])
    travelling = {id(p) for module in built.modules() if isinstance(module, Experts) for p in module.parameters()}
    expert_ranks = shards // expert_parallel
    if stacks and expert_parallel == 1:
        expert_ranks = expert_cut.ranks_of([p.shape for p in stacks], shards)
    muon = {id(p) for p in roles(built).matrices}
    held = matrices = root = dense = experts = in_rows = root_values = block_values = 0
    for name, p in built.named_parameters():
        ranks, plain = shards, p.numel()
        if id(p) in travelling and expert_parallel > 1:  # cut evenly: check_layout refuses what would not be
            ranks, plain = expert_ranks, plain // expert_parallel
            values = plain
        elif id(p) in travelling:
            ranks = expert_ranks
            values = expert_cut.held(p.shape, ranks) * ranks
            in_rows += values if expert_cut.dimension(p.shape, ranks) else 0
        else:
            values = -(-p.shape[0] // ranks) * ranks * (plain // p.shape[0])
        held += values // ranks
        matrices += values // ranks if id(p) in muon else 0
        if not name.startswith("blocks."):
            root, root_values = root + values, root_values + plain
            continue
        block_values += plain
        if id(p) in travelling:
            experts += values
        else:
            dense += values
    L = model.layers
    return Counts(
        held, matrices, root, dense // L, experts // L, expert_ranks, in_rows // L, root_values, block_values // L
    )


def saved_bytes_per_token(model: ModelConfig, value_bytes: int, rows_travel: bool = False) -> float:
    """What one block keeps of one token until its backward pass.

    attention  3 D (residual, normed, new residual) + D (normed for the feed-forward) + 2 N H + 2 K H, N log-sums
    experts    A 2 F: gate and up of each chosen expert, and A D for rows that came from other ranks
    dense      3 F: gate, up and the activation; the same of a shared expert
    router     D in float32, E logits and probabilities, A ids and weights
    """
    D, F, A, E = model.width, model.expert_width, model.active_experts, model.experts
    H = model.attention_head_width
    values = 4 * D + 2 * model.heads * H + 2 * model.kv_heads * H
    float32_values = model.heads
    if E:
        values += A * (2 * F + (D if rows_travel else 0)) + 3 * model.shared_expert_width
        float32_values += (D if value_bytes < 4 else 0) + 2 * E + 6 * A
    else:
        values += 3 * F
    return values * value_bytes + 4 * float32_values


def _kept(
    model: ModelConfig, kind: str | EveryBlocks, layer: float, value_bytes: int, on_gpu: bool
) -> tuple[float, float]:
    """Bytes of one token that all blocks keep, and that a block then computes again; `layer` is what one keeps with `none`.

    selective  4 D as without, what products give: N H + 2 K H and D, with a dense MLP 2 F and D; on a CPU, N H and N log-sums
    """
    if kind == "selective":
        D, heads_width = model.width, model.heads * model.attention_head_width
        values = 5 * D + heads_width + 2 * model.kv_heads * model.attention_head_width
        values += 0 if model.experts else 2 * model.expert_width + D
        kept = values * value_bytes + (0 if on_gpu else heads_width * value_bytes + 4 * model.heads)
        return kept * model.layers, max(0.0, layer - kept)
    inputs_only = recomputed_blocks(model.layers, kind)
    kept = inputs_only * model.width * value_bytes + (model.layers - inputs_only) * layer
    return kept, layer if inputs_only else 0.0


def _loss(model: ModelConfig, tokens: int, value_bytes: int, on_gpu: bool) -> tuple[float, float, float]:
    """Gradients of weight (float32) and hidden, made in the forward, and a chunk of logits that becomes its own gradient."""
    from grist_kernels.linear_cross_entropy.chunks import chunks

    rows = chunks(tokens, model.vocab_size, value_bytes, "cuda" if on_gpu else "cpu")[0].stop
    copies = 1 if on_gpu else 2  # plain PyTorch makes the logarithms beside the logits
    logits = copies * rows * model.vocab_size * value_bytes
    return 4.0 * model.vocab_size * model.width, float(tokens * model.width * value_bytes), float(logits)
