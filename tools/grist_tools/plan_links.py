"""What is assumed about speed, and how long collectives take under it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grist_tools.plan_gpus import Gpu


@dataclass(frozen=True)
class Assumptions:
    """Shares of the data sheet's rates that are reached, and latencies. Guesses with a reason each, for a whole step in eager
    mode: below what single kernels reach.

    Together they give 13.6 k tokens a second and GPU for GPT-OSS 20b on eight H100 (16 micro-batches of 2 sequences of 4,096,
    experts shared by 8), where NeMo Automodel publishes 13.1 k (docs/performance-summary.mdx, not all of its layout told).

    Attributes:
        products: Of the peak, by matrix products outside the experts; large ones alone were measured at 769 to 798 of 989
            TFLOP/s on an H200.
        experts: Of the peak, by the grouped products of experts; the best published alone reach 0.4 to 0.6 (SonicMoE).
        attention: Of the peak, by causal attention, which with heads of 64 is bound by exponentials.
        memory: Of the memory bandwidth, by what only moves data; a copy alone reaches 4.3 of 4.8 TB/s on an H200.
        links: 360 of 450 GB/s is what NCCL's all-gather reaches between eight H100
            (https://github.com/NVIDIA/nccl-tests/issues/326).
        network: NCCL reaches 46 to 48 of 50 GB/s a card between two machines
            (https://github.com/NVIDIA/nccl-tests/issues/290) and half of it over 256 GPUs
            (https://github.com/NVIDIA/nccl/issues/1218).
        link_hop_s, network_hop_s: Latency of one step of a ring, from NCCL's own tuning (src/graph/tuning.cc: ring, Simple).
        exchange_s: Of an all-to-all, and of the wait for the host that its sizes need.
        imbalance: The busiest rank's tokens over the mean's, where ranks share experts.
    """

    products: float = 0.55
    experts: float = 0.40
    attention: float = 0.30
    memory: float = 0.70
    links: float = 0.80
    network: float = 0.70
    link_hop_s: float = 3.4e-6
    network_hop_s: float = 14e-6
    exchange_s: float = 50e-6
    imbalance: float = 1.15


@dataclass(frozen=True)
class Group:
    """Ranks of one collective: so many of one machine, on so many machines."""

    local: int
    nodes: int

    @property
    def ranks(self) -> int:
        return self.local * self.nodes


def group(ranks: int, stride: int, gpus_per_node: int) -> Group:
    """Every stride-th rank, so many of them."""
    local = min(ranks, max(1, gpus_per_node // stride))
    return Group(local, -(-ranks // local))


def ring_s(size: float, over: Group, gpu: Gpu, assumed: Assumptions) -> float:
    """An all-gather to, or a reduce-scatter of, `size` bytes on every rank.

    Every rank receives all but its own part over its link; what comes from other machines enters each machine once, through the
    cards of all the ranks there.
    """
    if over.ranks == 1:
        return 0.0
    inside = size * (over.ranks - 1) / over.ranks / (gpu.link_rate * assumed.links) if over.local > 1 else 0.0
    across = size * (over.nodes - 1) / over.nodes / (over.local * gpu.network_rate * assumed.network)
    between = over.nodes - 1
    return max(inside, across) + (over.ranks - 1 - between) * assumed.link_hop_s + between * assumed.network_hop_s


def all_to_all_s(size: float, over: Group, gpu: Gpu, assumed: Assumptions) -> float:
    """`size` bytes of every rank spread over all of them evenly."""
    if over.ranks == 1:
        return 0.0
    inside = size * (over.local - 1) / over.ranks / (gpu.link_rate * assumed.links)
    across = size * (over.ranks - over.local) / over.ranks / (gpu.network_rate * assumed.network)
    return max(inside, across) + assumed.exchange_s


def message_s(size: float, over: Group, gpu: Gpu, assumed: Assumptions) -> float:
    """`size` bytes from every rank to its next neighbour: as slow as where two of them are on different machines."""
    if over.ranks == 1:
        return 0.0
    if over.nodes > 1:
        return size / (gpu.network_rate * assumed.network) + assumed.network_hop_s
    return size / (gpu.link_rate * assumed.links) + assumed.link_hop_s
