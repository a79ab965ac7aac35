"""A rank among many, on a device that is not there: all that a trace replaces, and why; and all private imports.

Used of PyTorch and not public (written for and tested with 2.13; the names are the same in 2.11 and 2.12):
    torch._subclasses.fake_tensor.FakeTensorMode                 tensors with shapes and no storage
    torch.testing._internal.distributed.fake_pg.FakeStore        registers the backend "fake", whose collectives do nothing
    torch.distributed.tensor._sharding_prop.ShardingPropagator   works out shapes on whole tensors, which nobody allocates
    torch.utils._python_dispatch._disable_current_modes          keeps those out of the account

A GPU is played by fake tensors that say they live on the CPU, because neither autograd nor FSDP2 runs on "cuda" where
PyTorch was built without it. What then has to be told that it is on a GPU is told here.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from grist_kernels import backend, launch
from grist_kernels.launch import Target
from grist_kernels.linear_cross_entropy.chunks import CHUNK_BYTES
from grist_kernels.moe import cpu
from grist_train import expert_parallel
from grist_train.distributed import World


@contextmanager
def world_of(ranks: int) -> Iterator[World]:
    """The first of so many ranks, alone in this process.

    Raises RuntimeError in a process that already has a process group.
    """
    if dist.is_initialized():
        raise RuntimeError("a plan plays a process group of its own, but this process is already in one")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        group: Any = dist.group.WORLD
        yield World(0, ranks, 0, torch.device("cpu"), group, group)
    finally:
        dist.destroy_process_group()


@contextmanager
def pretending(gpu: Target | None) -> Iterator[FakeTensorMode]:
    """Tensors made inside are fake, kernels launch nothing, and tokens are spread over experts evenly.

    gpu: what Triton's launches are chosen for; None is a CPU, with the ops that a CPU runs.
    """
    with ExitStack() as stack:
        stack.enter_context(patch.object(ShardingPropagator, _PROPAGATE, _unaccounted))
        stack.enter_context(patch.object(expert_parallel, "_agree", _even_routes))
        stack.enter_context(patch.object(sys.modules["grist_kernels.linear_cross_entropy"], "_check_range", _nothing))
        if gpu is None:
            stack.enter_context(patch.object(cpu, "_route", _even_segments))
        else:
            _pretend_gpu(stack, gpu)
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


_PROPAGATE = "_propagate_tensor_meta_non_cached"
_propagate = getattr(ShardingPropagator, _PROPAGATE)


def _unaccounted(*args: Any) -> Any:
    with _disable_current_modes():
        return _propagate(*args)


def _pretend_gpu(stack: ExitStack, gpu: Target) -> None:
    attention = importlib.import_module("grist_kernels.attention.triton_kernel")
    cross_entropy = importlib.import_module("grist_kernels.linear_cross_entropy.triton_kernel")
    stack.enter_context(backend.using("triton"))
    stack.enter_context(patch.object(backend, "_check_can_run", _nothing))
    stack.enter_context(launch.assuming(gpu))
    stack.enter_context(patch.object(launch, "run", _nothing))
    # Asks for an address.
    stack.enter_context(patch.object(attention, "_describable", lambda tensor: False))
    stack.enter_context(patch.dict(CHUNK_BYTES, cpu=CHUNK_BYTES["cuda"]))
    # A CPU needs float32 copies for it; a GPU adds the product to what is there.
    stack.enter_context(patch.object(cross_entropy, "_add_product", _nothing))
    # Muon works in bfloat16 on a GPU.
    stack.enter_context(patch.object(FakeTensor, "is_cuda", True))


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _even_routes(ids_RA: torch.Tensor, experts: int, group: dist.ProcessGroup) -> expert_parallel._Routes:
    """As `expert_parallel._agree` when every rank sends every other as many rows."""
    ranks = dist.get_world_size(group)
    rows = [len(part) for part in torch.arange(ids_RA.numel(), device="meta").tensor_split(ranks)]
    return expert_parallel._Routes(group, rows, rows, ids_RA.new_empty(sum(rows)))


def _even_segments(expert_ids: torch.Tensor, experts: int) -> cpu._Routing:
    """As `cpu._route` when every expert is chosen as often."""
    flat_R = expert_ids.reshape(-1)
    pair_R = flat_R.argsort(stable=True)
    rows, segments, start = flat_R.numel(), [], 0
    for expert in range(min(experts, rows)):
        end = rows * (expert + 1) // min(experts, rows)
        segments.append((expert, slice(start, end)))
        start = end
    return cpu._Routing(
        pair_R, pair_R // expert_ids.shape[1], torch.empty_like(pair_R).view(expert_ids.shape), segments
    )
