"""Processes, devices and sharding: the only file that knows how many ranks there are.

One process is the same program as many: it opens a process group of size one (gloo), so that checkpoints and reductions need
no second code path. Parameters are sharded with FSDP2 (`fully_shard`, PyTorch >= 2.11).
"""

from __future__ import annotations

import datetime
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate

from grist_model.moe import Experts
from grist_train import expert_cut, recompute
from grist_train.allocator import keep_freed_memory
from grist_train.config import ComputeConfig
from grist_train.expert_parallel import distribute_experts, shard_dimension
from grist_train.mesh import expert_mesh, fsdp_part, grid_of, weight_mesh

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class World:
    """This process among its peers.

    Attributes:
        rank, size: Position and number of processes.
        local_rank: Position on this machine; the CUDA device it uses.
        device: Where the model lives.
        host_group: A gloo group for small host-side values, so that no device has to be waited for.
        checkpoint_group: A second gloo group: the asynchronous checkpoint runs its collectives in a background thread, and
            two threads must not share one group.
        context: Ranks that share sequences with this one, itself among them.
        context_group: Those ranks; None where every rank has sequences of its own.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device
    host_group: dist.ProcessGroup
    checkpoint_group: dist.ProcessGroup
    context: int = 1
    context_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of the samples of a step this rank reads; ranks that share sequences read the same."""
        return self.rank // self.context

    @property
    def data_size(self) -> int:
        """How many shares there are."""
        return self.size // self.context


def pick_device(wanted: str, local_rank: int = 0) -> torch.device:
    """`auto` is CUDA, else MPS, else CPU. A named device that is not there is a ValueError."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if wanted == "auto":
        wanted = next(name for name, there in available.items() if there)
    if not available[wanted]:
        there = ", ".join(name for name, yes in available.items() if yes)
        raise ValueError(f"device={wanted} was asked for, but this machine has: {there}. Use --device auto")
    return torch.device("cuda", local_rank) if wanted == "cuda" else torch.device(wanted)


def start(device: str, threads: int | None = None) -> World:
    """Join the process group that torchrun describes, or open one of size one."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    target = pick_device(device, local_rank)
    if threads is not None:
        torch.set_num_threads(threads)
    if target.type == "cpu":
        keep_freed_memory()
    if target.type == "cuda":
        torch.cuda.set_device(target)
        torch.set_float32_matmul_precision("high")
    backend = "cpu:gloo,cuda:nccl" if target.type == "cuda" else "gloo"
    timeout = datetime.timedelta(minutes=30)
    if "RANK" in os.environ:
        _require_fresh_store()
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    return World(rank, size, local_rank, target, _gloo_group(), _gloo_group())


def _require_fresh_store() -> None:
    """Raises ValueError in a process that torchrun has restarted with the store of the last attempt.

    The addresses of dead ranks are still in it, and ranks would wait for those
    (https://github.com/pytorch/pytorch/issues/135712).
    """
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ValueError(
            "torchrun has restarted this run with the store of the attempt before, in which ranks that are gone would be "
            "waited for: start it with train/launch/torchrun.py, or with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )


def _gloo_group() -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo")
    assert isinstance(group, dist.ProcessGroup)  # a number only where this rank is not a member; all of them are
    return group


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def compute_dtype(config: ComputeConfig, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on CUDA, float32 elsewhere (few CPUs have fast bfloat16, and MPS emulates parts of it)."""
    if config.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[config.dtype]


def prepare_blocks(model: nn.Module, config: ComputeConfig) -> None:
    """Per-block activation checkpointing and compilation; before `shard`, so that FSDP's hooks stay outside both."""
    for layer, block in enumerate(blocks(model)):
        recompute.prepare(block, layer, config)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, in order."""
    return list(model.get_submodule("blocks").children())


def shard(model: nn.Module, world: World, config: ComputeConfig) -> None:
    """FSDP2: experts, then each block, then the rest (embedding, last norm, head), each its own unit of communication.

    With `expert_parallel` a rank keeps its own experts, and only those are sharded further (grist_train.expert_parallel);
    without it experts are cut as grist_train.expert_cut says. With `replicate` all of it is sharded within a copy of the
    model, and gradients are summed over the copies besides.
    One rank computing in float32 stays plain: there is nothing to shard and nothing to cast.
    """
    dtype = compute_dtype(config, world.device)
    if world.size == 1 and dtype == torch.float32:
        return
    if world.device.type == "mps":
        raise ValueError("compute.dtype bfloat16 needs FSDP2, which MPS does not have: use --compute.dtype float32")
    grid = grid_of(config, world.size)
    device_type = world.device.type
    mesh = fsdp_part(weight_mesh(device_type, grid), "shard")
    # Inputs are not cast: rotary angles must stay float32 beside bfloat16 activations.
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=DTYPES[config.reduce_dtype], cast_forward_inputs=False
    )
    wrap = functools.partial(_fully_shard, mp_policy=policy, reshard_after_forward=config.reshard_after_forward)
    all_experts = [module for module in model.modules() if isinstance(module, Experts)]
    if config.expert_parallel > 1:
        experts_mesh = expert_mesh(device_type, grid)
        cut = functools.partial(shard_dimension, mesh=experts_mesh)
        for experts in all_experts:
            distribute_experts(experts, experts_mesh)
            wrap(experts, mesh=fsdp_part(experts_mesh, "expert_data"), shard_placement_fn=cut)
    else:
        meshes = {grid.shards: mesh}
        for experts in all_experts:
            ranks = expert_cut.ranks_of([p.shape for p in experts.parameters()], grid.shards)
            if ranks not in meshes:
                meshes[ranks] = fsdp_part(weight_mesh(device_type, grid.cut_over(ranks)), "shard")
            cut = functools.partial(expert_cut.placement, ranks=ranks)
            wrap(experts, mesh=meshes[ranks], shard_placement_fn=cut)
    for block in blocks(model):
        wrap(block, mesh=mesh)
    # The loss reads the unembedding after `hidden` has returned, so the root keeps its parameters gathered until then.
    wrap(model, mesh=mesh, reshard_after_forward=False)
    register_fsdp_forward_method(model, "hidden")
    if config.expert_parallel > 1:
        _prefetch(blocks(model), all_experts)


def _prefetch(decoder_blocks: list[nn.Module], all_experts: list[Experts]) -> None:
    """Let every block ask for the weights of its experts and of the next block before it computes.

    FSDP2 otherwise asks when it comes to them, which is early enough only if the host runs ahead of the device; with expert
    parallelism the host waits in every layer.
    """
    following = [*decoder_blocks[1:], None]
    for block, experts, after in zip(decoder_blocks, all_experts, following, strict=True):
        assert isinstance(block, FSDPModule)
        block.set_modules_to_forward_prefetch([m for m in (experts, after) if isinstance(m, FSDPModule)])


def _fully_shard(module: nn.Module, **options: Any) -> None:
    """fully_shard with gradients that are summed over the ranks of its mesh.

    The loss is already divided by the tokens of all ranks; an average would also be wrong by a different factor for experts,
    whose mesh is smaller than that of the other parameters while their gradients come from as many tokens.
    """
    fully_shard(module, **options)
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    # Gloo has no pre-multiplied sum, which a divide factor of 1 would otherwise ask for.
    module.set_force_sum_reduction_for_comms(True)


def set_last_micro_batch(model: nn.Module, is_last: bool, config: ComputeConfig) -> None:
    """Reduce gradients on the last micro-batch of a step only, unless the run prefers less memory."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(is_last or config.reduce_every_micro_batch)
        model.set_is_last_backward(is_last)


def sum_on_host(values: list[int], world: World) -> list[int]:
    """Sum of small integers over the ranks, without touching the device."""
    if world.size == 1:
        return values
    total = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(total, group=world.host_group)
    return total.tolist()


def max_on_host(values: list[float], world: World) -> list[float]:
    """The largest of each of some numbers over the ranks, without touching the device."""
    if world.size == 1:
        return values
    largest = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=world.host_group)
    return largest.tolist()


def sum_on_device(values: torch.Tensor, world: World) -> torch.Tensor:
    """Sum of a tensor over the ranks, in place."""
    if world.size > 1:
        dist.all_reduce(values)
    return values


def barrier(world: World) -> None:
    """Wait for all ranks, on the host."""
    if world.size > 1:
        dist.barrier(group=world.host_group)


def full_state_dict(model: nn.Module, world: World) -> dict[str, torch.Tensor]:
    """All parameters and buffers, whole, on the main rank's CPU (empty elsewhere). One tensor is gathered at a time."""
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        whole = _gathered(tensor) if isinstance(tensor, DTensor) else tensor
        if world.is_main:
            state[name] = whole.detach().cpu()
    return state


def _gathered(tensor: DTensor) -> torch.Tensor:
    """The whole tensor, one mesh dimension after the other: `full_tensor` does the same with sharded experts, and warns."""
    for dim in range(tensor.device_mesh.ndim):
        placements = [Replicate()] * (dim + 1) + list(tensor.placements[dim + 1 :])
        tensor = tensor.redistribute(placements=placements)
    return tensor.to_local()
