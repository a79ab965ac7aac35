"""How long a step takes: FLOPs and bytes over what the GPU, its links and the network reach, and what overlaps.

A prediction, from the `Assumptions` of plan_links.py; none of them was measured on a cluster. What is not modelled: launches
and the host (small models on fast GPUs are slower than this says), other traffic on the network, stragglers, reading data,
checkpoints and evaluation.

    forward of a micro-batch   max(compute, gathering parameters) + exchanging tokens + exchanging keys beyond attention
    backward                   max(compute, gathering again + reducing gradients) + the same
    step                       those of all micro-batches, the root's parameters and gradients, hidden by nothing, the update

FSDP2 fetches one block ahead, so gathering hides behind compute and the other way round; the exchange of expert parallelism is
waited for where it happens. A ring's steps each have a latency, which is what ends the scaling of plain sharding: a ring over
4,096 ranks has 4,095 of them, for every block.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from grist_tools.memory import counted
from grist_tools.plan_links import Assumptions, all_to_all_s, group, message_s, ring_s
from grist_tools.plan_recompute import again

if TYPE_CHECKING:
    from grist_model.config import ModelConfig
    from grist_tools.plan_gpus import Gpu
    from grist_tools.plan_layout import Layout
    from grist_train.config import TrainConfig


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they go to; what is hidden behind something else is not in the sum.

    Attributes:
        compute: Products, attention and what moves data, recomputation included.
        gather: Beyond compute: gathering parameters and reducing gradients.
        exchange: Tokens on their way to experts and back, and, beyond attention, keys and values around their ring.
        update: Clipping and the optimizer.
        communication: Gathering and reducing in all, hidden or not.
    """

    compute: float
    gather: float
    exchange: float
    update: float
    communication: float

    @property
    def total(self) -> float:
        return self.compute + self.gather + self.exchange + self.update

    @property
    def bound_by(self) -> str:
        """What most of the time goes to."""
        parts = {"compute": self.compute, "gathering and reducing": self.gather, "token exchange": self.exchange}
        return max({**parts, "update": self.update}, key=lambda name: {**parts, "update": self.update}[name])


def step_time(run: TrainConfig, layout: Layout, gpu: Gpu, assumed: Assumptions) -> StepTime:
    """Seconds of one optimizer step of a run with this layout."""
    run = layout.config(run)
    work = _Work(run, layout, gpu, assumed)
    forward, backward = work.compute_s()
    gather, reduce = work.gather_s(), work.reduce_s()
    root = ring_s(work.value_bytes * work.counts.root, work.everyone, gpu, assumed)
    root_gradients = ring_s(work.reduce_bytes * work.counts.root, work.everyone, gpu, assumed)
    exchange = work.exchange_s()
    number, reductions = layout.micro_batches, layout.micro_batches if layout.reduce_every_micro_batch else 1
    again = gather if layout.reshard_after_forward else 0.0
    exposed = number * (max(0.0, gather - forward) + root) + reductions * root_gradients
    exposed += reductions * max(0.0, again + reduce - backward) + (number - reductions) * max(0.0, again - backward)
    communication = number * (gather + again + root) + reductions * (reduce + root_gradients)
    return StepTime(number * (forward + backward), exposed, number * exchange, work.update_s(), communication)


class _Work:
    """One rank's work on one micro-batch.

    D model width, N query heads, K key/value heads, H head width, A active experts per token.
    """

    def __init__(self, run: TrainConfig, layout: Layout, gpu: Gpu, assumed: Assumptions) -> None:
        self.run, self.layout, self.gpu, self.assumed = run, layout, gpu, assumed
        self.model, self.counts = run.model, counted(run.model, layout.shards, layout.expert_parallel)
        self.tokens = layout.micro_size * run.data.sequence_length // layout.context_parallel
        in_bfloat16 = run.compute.dtype == "bfloat16" or (run.compute.dtype == "auto" and gpu.architecture is not None)
        self.value_bytes = 2 if in_bfloat16 else 4
        self.reduce_bytes = 2 if run.compute.reduce_dtype == "bfloat16" else 4
        self.again = again(self.model, layout.activation_checkpointing, gpu.architecture is not None)
        P = layout.expert_parallel
        self.everyone = group(layout.shards, 1, layout.gpus_per_node)
        self.expert_peers = group(self.counts.expert_ranks, P, layout.gpus_per_node)
        self.sharers = group(P, 1, layout.gpus_per_node)

    def compute_s(self) -> tuple[float, float]:
        """Forward and backward, recomputation in the latter."""
        flops, assumed = forward_flops(self.model, self.run.data.sequence_length), self.assumed
        peak = self.gpu.peak_flops
        busiest = assumed.imbalance if self.layout.expert_parallel > 1 else 1.0
        projections, experts = projection_flops(self.model), flops.experts * busiest / assumed.experts
        block = flops.products / assumed.products + flops.attention / assumed.attention + experts
        block = self.tokens * block / peak
        head = self.tokens * flops.head / assumed.products / peak
        moved = self.tokens * self._moved_bytes() / (self.gpu.memory_rate * assumed.memory)
        recomputed = self.tokens * (
            self.again.projections * projections / assumed.products
            + self.again.attention * flops.attention / assumed.attention
            + self.again.feed_forward * ((flops.products - projections) / assumed.products + experts)
        ) / peak + self.again.moved * moved  # fmt: skip
        # All three products of the head happen in the forward (linear_cross_entropy).
        return block + moved + 3 * head, 2 * (block + moved) + recomputed

    def gather_s(self) -> float:
        """All blocks once."""
        dense = ring_s(self.value_bytes * self.counts.dense, self.everyone, self.gpu, self.assumed)
        experts = ring_s(self.value_bytes * self.counts.experts, self.expert_peers, self.gpu, self.assumed)
        return self.model.layers * (dense + experts)

    def reduce_s(self) -> float:
        """The gradients of all blocks once; where there are copies of weights, their sums over the copies too."""
        seconds, layout = 0.0, self.layout
        for values, peers, ranks in (
            (self.counts.dense, self.everyone, layout.shards),
            (self.counts.experts, self.expert_peers, self.counts.expert_ranks * layout.expert_parallel),
        ):
            size = self.reduce_bytes * values
            copies = group(layout.gpus // ranks, ranks, layout.gpus_per_node)
            # An all-reduce is a reduce-scatter and an all-gather.
            seconds += ring_s(size, peers, self.gpu, self.assumed)
            seconds += 2 * ring_s(size / peers.ranks, copies, self.gpu, self.assumed)
        return self.model.layers * seconds

    def exchange_s(self) -> float:
        """Tokens to their experts and back, forward and backward, and once more where the forward is repeated; and the keys and
        values of other ranks' parts of a sequence, as far as attention does not hide them."""
        seconds = 0.0
        if self.layout.expert_parallel > 1:
            rows = self.tokens * self.model.active_experts * self.model.width * self.value_bytes
            there_and_back = 2 * all_to_all_s(rows * self.assumed.imbalance, self.sharers, self.gpu, self.assumed)
            seconds += self.model.layers * (2 + self.again.feed_forward) * there_and_back
        if self.layout.context_parallel > 1:
            windows = [self.model.layer_window(layer) for layer in range(self.model.layers)]
            seconds += sum(windows.count(window) * self._ring_attention_s(window) for window in set(windows))
        return seconds

    def _ring_attention_s(self, window: int | None) -> float:
        """One layer of sequences that are shared: messages travel while attention computes, in both directions."""
        length = self.run.data.sequence_length
        visits = ring_visits(length, self.layout.context_parallel, window)
        values = self.tokens * 2 * self.model.kv_heads * self.model.attention_head_width
        ring = group(self.layout.context_parallel, 1, self.layout.gpus_per_node)
        flops = attention_flops(self.model, length, window)
        attention = self.tokens * flops / self.assumed.attention / self.gpu.peak_flops
        keys, gradients = (message_s(size * values, ring, self.gpu, self.assumed) for size in (self.value_bytes, 4))
        forward = max(0.0, (visits - 1) * keys - attention)
        backward = max(0.0, (visits - 1) * keys + visits * gradients - 2 * attention)
        return (1 + self.again.attention) * forward + backward

    def update_s(self) -> float:
        """Clipping reads gradients once and scales them; AdamW reads four values and writes three, Muon multiplies besides."""
        seconds = self.counts.held * (12 + 28) / (self.gpu.memory_rate * self.assumed.memory)
        if self.run.optimizer.name == "muon":
            flops = muon_flops(self.model, self.run.optimizer.muon_iterations)
            seconds += flops / self.layout.shards / (self.gpu.peak_flops * self.assumed.products)
        return seconds

    def _moved_bytes(self) -> float:
        """By the forward of all layers, of one token, outside of products: two norms with their residual sums (four D each),
        the last sum (three), rotation, and the rows that each expert's share is put together from."""
        model = self.model
        heads = 2 * (model.heads + model.kv_heads) * model.attention_head_width
        rows = (model.active_experts + 1) * model.width if model.experts else 0
        travelling = 4 * model.active_experts * model.width if self.layout.expert_parallel > 1 else 0
        return model.layers * self.value_bytes * (11 * model.width + heads + rows + travelling)


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one token's forward, over all layers."""

    products: float
    experts: float
    attention: float
    head: float


def forward_flops(model: ModelConfig, sequence_length: int) -> ForwardFlops:
    """A third of `flops_per_token`, by what computes it."""
    from grist_model.accounting import flops_per_token

    D = model.width
    windows = [model.layer_window(layer) for layer in range(model.layers)]
    attention, head = (
        sum(attention_flops(model, sequence_length, window) for window in windows),
        2.0 * model.vocab_size * D,
    )
    experts = 2.0 * model.layers * 3 * D * model.expert_width * model.active_experts if model.experts else 0.0
    whole = flops_per_token(model, sequence_length) / 3
    return ForwardFlops(whole - attention - head - experts, experts, attention, head)


def attention_flops(model: ModelConfig, sequence_length: int, window: int | None) -> float:
    """Of one token in one layer, forward."""
    from grist_model.accounting import mean_visible_keys

    return 4.0 * model.heads * model.attention_head_width * mean_visible_keys(sequence_length, window)


def projection_flops(model: ModelConfig) -> float:
    """Of one token's forward, over all layers: queries, keys, values and what attention gives."""
    return 4.0 * model.layers * model.width * (model.heads + model.kv_heads) * model.attention_head_width


def ring_visits(sequence_length: int, ranks: int, window: int | None) -> int:
    """How many ranks' keys and values a rank works on, its own among them."""
    from grist_kernels.attention.ring import _stops

    return len(_stops(ranks, sequence_length // (2 * ranks), window))


@cache
def muon_flops(model: ModelConfig, iterations: int) -> float:
    """Of one update: every iteration multiplies x x^T, its square, and that with x; matrices as blocks hold them."""
    import grist_model
    from grist_train.optimizer import roles

    flops = 0.0
    for matrix in roles(grist_model.build(model, device="meta")).matrices:
        short, long = sorted(matrix.shape[-2:])
        each = 4.0 * short * short * long + 2.0 * short**3
        flops += iterations * each * (matrix.numel() // (short * long))
    return flops
