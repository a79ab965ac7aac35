"""Every byte that a step takes and gives back, found by watching it run on fake tensors, which have sizes and no storage.

`torch.distributed._tools.fsdp2_mem_tracker.FSDPMemTracker` does the same for one FSDP2 model and one optimizer. This one
also takes a model that is not sharded and several optimizers, tells the loss from the activations, and counts what ranks
send each other; a test holds the two against each other where both apply. Like that one it replaces UntypedStorage.resize_
while it watches, which is how FSDP2 frees and refills gathered parameters and which no dispatch mode sees.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grist_tools.plan_roles import ACTIVATIONS, COMMUNICATION, DATA, GATHERED, GRADIENTS, OPTIMIZER, PARAMETERS


@dataclass(eq=False)
class _Block:
    """One storage. Its role may become clear only after it was made."""

    role: str


@dataclass
class Peak:
    """The moment at which most bytes were taken.

    Attributes:
        phase: What the step was doing.
        roles: Bytes by role; their sum is the peak.
    """

    phase: str
    roles: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.roles.values())


@dataclass
class Traffic:
    """What one rank sent and received: (collective, ranks in its group) -> bytes of the whole it worked on, and calls."""

    size: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    calls: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))


class Ledger(TorchDispatchMode):
    """Storages made, resized and freed while this mode is on.

    Args:
        rounding: Bytes that an allocation is rounded up to (512 in CUDA's caching allocator).
        gloo: Whether collectives are gloo's, which gathers into a copy of its output, and reduces and scatters by summing a
            copy of its input.
    """

    def __init__(self, rounding: int = 1, gloo: bool = False) -> None:
        super().__init__()
        self.rounding, self.gloo = rounding, gloo
        self.phase, self.role = "forward", ACTIVATIONS
        self.traffic = Traffic()
        self._blocks: dict[int, _Block] = {}
        self._sizes: dict[int, int] = {}
        self._events: list[tuple[_Block, int, str]] = []

    @contextmanager
    def during(self, phase: str, role: str) -> Iterator[None]:
        """What is made inside has this role, unless an operation says better."""
        before = self.phase, self.role
        self.phase, self.role = phase, role
        try:
            yield
        finally:
            self.phase, self.role = before

    def register(self, role: str, tensors: Iterable[torch.Tensor]) -> None:
        """Count tensors that are there already, or give those counted another role."""
        for tensor in tensors:
            self._note(tensor, role, again=True)

    def count_from_here(self) -> None:
        """Forget the traffic so far; what is held stays."""
        self.traffic = Traffic()

    def peak(self) -> Peak:
        """Found by going through the events once more: roles are known only at the end."""
        held: dict[str, int] = defaultdict(int)
        total, highest, best = 0, -1, Peak("forward", {})
        for block, change, phase in self._events:
            held[block.role] += change
            total += change
            if total > highest:
                highest, best = total, Peak(phase, dict(held))
        return best

    def __enter__(self) -> Ledger:
        self._resize = torch.UntypedStorage.resize_
        ledger = self

        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            ledger._resize(storage, size)
            ledger._resized(storage)

        torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # A DTensor first becomes the local operation that it stands for, which then comes here.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        kwargs = kwargs or {}
        answer = _answer(func, args)
        out = func(*args, **kwargs) if answer is None else answer
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, self.role)
        self._recognise(func, args, kwargs)
        return out

    def _note(self, tensor: torch.Tensor, role: str, again: bool = False) -> None:
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            if again:
                self._blocks[key].role = role
            return
        block = self._blocks[key] = _Block(role)
        self._take(key, block, storage.nbytes())
        weakref.finalize(storage, self._forget, key).atexit = False

    def _take(self, key: int, block: _Block, size: int) -> None:
        size = -(-size // self.rounding) * self.rounding
        self._events.append((block, size - self._sizes.get(key, 0), self.phase))
        self._sizes[key] = size

    def _resized(self, storage: torch.UntypedStorage) -> None:
        block = self._blocks.get(storage._cdata)
        if block is not None:
            block.role = GATHERED  # nobody but FSDP2 resizes storages during a step
            self._take(storage._cdata, block, storage.nbytes())

    def _forget(self, key: int) -> None:
        self._events.append((self._blocks.pop(key), -self._sizes.pop(key), self.phase))

    def _recognise(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Roles that an operation gives away, and the bytes that it exchanges."""
        name = func._schema.name
        if name == "fsdp::chunk_cat":  # gradients of whole parameters, packed for their reduction
            self._rename(args[0], GRADIENTS)
            self._rename([kwargs.get("out", args[-1])], COMMUNICATION)
        elif name == "fsdp::all_gather_copy_in":
            self._rename([args[1]], COMMUNICATION)
        elif name == "fsdp::split_with_sizes_copy":
            self._rename(kwargs.get("out", ()), GATHERED)
        elif name == "c10d::_allgather_base_":
            self._exchanged("all-gather", args[0], args[2])
        elif name == "c10d::_reduce_scatter_base_":
            self._exchanged("reduce-scatter", args[1], args[2])
        elif name == "c10d::alltoall_base_":
            self._rename([args[1]], COMMUNICATION)
            self._exchanged("all-to-all", args[1], args[2])
        elif name == "c10d::send":
            self._exchanged("send", args[0][0], args[1])
        elif name == "c10d::allreduce_":
            self._exchanged("all-reduce", args[0][0], args[1])

    def _rename(self, tensors: Iterable[Any], role: str) -> None:
        for tensor in tensors:
            block = self._blocks.get(tensor.untyped_storage()._cdata) if isinstance(tensor, torch.Tensor) else None
            if block is not None and block.role not in (PARAMETERS, OPTIMIZER, DATA):
                block.role = role

    def _exchanged(self, collective: str, whole: torch.Tensor, group: Any) -> None:
        key = (collective, torch.distributed.ProcessGroup.unbox(group).size())
        self.traffic.size[key] += whole.nbytes
        self.traffic.calls[key] += 1
        if self.gloo and collective in ("all-gather", "reduce-scatter"):
            copy = _Block(COMMUNICATION)
            self._events += [(copy, whole.nbytes, self.phase), (copy, -whole.nbytes, self.phase)]


def _answer(func: Any, args: tuple) -> Any:
    """What a question about values is answered with, since fake tensors have none: yes. (Is every target to be counted?)"""
    if func is not torch.ops.aten._local_scalar_dense.default:
        return None
    return True if args[0].dtype == torch.bool else 0
