"""Which elements the programs of one launch touch: every address is one of an argument's elements, no two programs collide.

A kernel is given false addresses: bits 48 and up hold the number of the argument, so that an address that left its tensor
never looks like one of its neighbour's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from interpreter_memory import SPARSE_BYTES, extent, zeros
from interpreter_shim import Fault, Program
from torch import Tensor
from triton._C.libtriton import interpreter as memory  # type: ignore[import-not-found]
from triton.runtime.interpreter import TensorHandle

_TAG = 48  # user addresses of x86-64 and arm64 need 47 bits
_ADDRESS = np.uint64(2**_TAG - 1)
_MANY = -1  # an element that several programs read


class OutOfBounds(Fault):
    """A load or store of something that is no element of the tensor that the pointer came from."""


class Race(Fault):
    """Two programs of one launch use one element and one of them writes it; or two lanes write different values to it."""


class Region:
    """Memory that arguments of a launch share: for each element who wrote it and who read it (program p is p + 1, nobody 0)."""

    def __init__(self, itemsize: int) -> None:
        self.itemsize = itemsize
        self.low, self.high = 2**63, 0  # bytes
        self._maps: tuple[np.ndarray, np.ndarray] | None = None

    def include(self, argument: Argument) -> None:
        if argument.itemsize != self.itemsize:
            raise ValueError(
                f"{argument.name} shares memory with an argument of another element size; that is not followed"
            )
        self.low = min(self.low, argument.low)
        self.high = max(self.high, argument.low + argument.span * self.itemsize)

    @property
    def maps(self) -> tuple[np.ndarray, np.ndarray]:
        """(writers, readers), int32 each."""
        if self._maps is None:
            count = (self.high - self.low) // self.itemsize
            self._maps = zeros(count, np.int32), zeros(count, np.int32)
        return self._maps


class Argument:
    """A tensor given to a kernel, and how to tell its elements from the gaps between them."""

    def __init__(self, name: str, tensor: Tensor, number: int) -> None:
        self.names = [name]  # a tensor may be given as several parameters
        self.shape, self.strides = tuple(tensor.shape), tensor.stride()
        self.itemsize, self.low, self.tag = tensor.element_size(), tensor.data_ptr(), number << _TAG
        self.span = extent(self.shape, self.strides)
        self.axes = _axes(name, self.shape, self.strides)
        self.stored = False
        self.region: Region

    @property
    def name(self) -> str:
        return " = ".join(self.names)

    def are_gaps(self, elements: np.ndarray) -> np.ndarray | None:
        """Which of these offsets (in elements, within the span) are none of the view's; None if it has no gaps."""
        if self.axes in ([], [(self.span, 1)]):
            return None
        gaps = np.zeros(elements.shape, bool)
        rest = elements
        for size, stride in self.axes:
            index = rest // stride
            gaps |= index >= size
            rest = rest - index * stride
        return gaps | (rest != 0)

    def unwritten(self) -> int:
        """How many of the view's elements no program stored."""
        first = (self.low - self.region.low) // self.itemsize
        strides = [4 * stride for stride in self.strides]
        writers = np.lib.stride_tricks.as_strided(self.region.maps[0][first:], self.shape, strides)
        return writers.size - int(np.count_nonzero(writers))


def _axes(name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    """(size, stride) of a view's axes, outermost first, merged where one continues the next."""
    axes: list[tuple[int, int]] = []
    reach = 0  # of the axes so far, in elements
    for stride, size in sorted(
        (stride, size) for size, stride in zip(shape, strides, strict=True) if size > 1 and stride
    ):
        if stride <= reach:
            raise ValueError(
                f"{name}: elements of shape {shape}, strides {strides} overlap or interleave; that is not followed"
            )
        if axes and stride == axes[-1][0] * axes[-1][1]:
            axes[-1] = (axes[-1][0] * size, axes[-1][1])
        else:
            axes.append((size, stride))
        reach += (size - 1) * stride
    return axes[::-1]


class Accesses:
    """The loads and stores of one launch."""

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.kernel = kernel
        self.arguments: list[Argument] = []
        self._by_identity: dict[int, Argument] = {}
        regions: dict[int, Region] = {}
        for name, tensor in _tensors(arguments):
            self._add(name, tensor, regions)
        self._number = 0
        self._program: Program = (0, 0, 0)

    def _add(self, name: str, tensor: Tensor, regions: dict[int, Region]) -> None:
        if tensor.device.type != "cpu":
            raise ValueError(f"{self.kernel}: {name} must be on the CPU to be interpreted, but is on {tensor.device}")
        if id(tensor) in self._by_identity:
            self._by_identity[id(tensor)].names.append(name)
            return
        argument = Argument(name, tensor, len(self.arguments) + 1)
        # Tensors without elements all lie at address 0, and share nothing.
        storage = tensor.untyped_storage().data_ptr() if argument.span else -argument.tag
        argument.region = regions.setdefault(storage, Region(argument.itemsize))
        argument.region.include(argument)
        self.arguments.append(argument)
        self._by_identity[id(tensor)] = argument

    def address(self, tensor: Tensor) -> int:
        """The false address of an argument's first element."""
        argument = self._by_identity[id(tensor)]
        return argument.low | argument.tag

    def start(self, program: Program, number: int) -> None:
        self._program, self._number = program, number + 1

    def load(self, pointers: TensorHandle, mask: np.ndarray | None) -> np.ndarray:
        """Check a load; the true addresses of its lanes, masked or not."""
        for argument, elements in self._elements(pointers, mask, "load"):
            writers, readers = argument.region.maps
            self._alone(argument, writers[elements], "load", "written")
            before = readers[elements]
            readers[elements] = np.where((before == 0) | (before == self._number), self._number, _MANY)
        return pointers.data & _ADDRESS

    def store(self, pointers: TensorHandle, value: np.ndarray, mask: np.ndarray | None) -> None:
        """Check a store, and do it."""
        for argument, elements in self._elements(pointers, mask, "store"):
            writers, readers = argument.region.maps
            self._alone(argument, writers[elements], "store", "written")
            self._alone(argument, readers[elements], "store", "read")
            writers[elements] = self._number
            argument.stored = True
        addresses = pointers.data & _ADDRESS
        active = np.ones(addresses.shape, bool) if mask is None else mask
        memory.store(addresses, value, active)
        found = memory.load(addresses, active, value, value.dtype)
        if found.tobytes() != np.ascontiguousarray(value).tobytes():
            raise Race(f"{self._where('store')}: lanes of one program store different values to one element")

    def _alone(self, argument: Argument, users: np.ndarray, what: str, how: str) -> None:
        others = (users != 0) & (users != self._number)
        if others.any():
            other = int(users[others][0])
            who = "several programs" if other == _MANY else f"program number {other - 1}"
            raise Race(
                f"{self._where(what)} through {argument.name}: {int(others.sum())} of its elements are also {how} by other "
                f"programs of this launch, such as {who}"
            )

    def _elements(
        self, pointers: TensorHandle, mask: np.ndarray | None, what: str
    ) -> list[tuple[Argument, np.ndarray]]:
        """The elements that the active lanes hit, numbered within their region: one entry for each argument hit."""
        addresses = pointers.data.reshape(-1) if mask is None else pointers.data[mask]
        if addresses.size == 0:
            return []
        tags = addresses >> np.uint64(_TAG)
        low, high = int(tags.min()), int(tags.max())
        groups = [(low, addresses)] if low == high else [(int(tag), addresses[tags == tag]) for tag in np.unique(tags)]
        return [self._of_argument(pointers, tag, group, what) for tag, group in groups]

    def _of_argument(
        self, pointers: TensorHandle, tag: int, addresses: np.ndarray, what: str
    ) -> tuple[Argument, np.ndarray]:
        if not 1 <= tag <= len(self.arguments):
            raise OutOfBounds(f"{self._where(what)}: an address that comes from no tensor argument")
        argument = self.arguments[tag - 1]
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        if itemsize != argument.itemsize:
            raise OutOfBounds(
                f"{self._where(what)}: {itemsize} bytes at once of {argument.name}, whose elements have {argument.itemsize}"
            )
        offsets = (addresses - np.uint64(argument.low | argument.tag)).view(np.int64)
        elements = offsets // itemsize
        if offsets.min() < 0 or int(elements.max()) >= argument.span:
            self._outside(argument, elements[(elements < 0) | (elements >= argument.span)], what, "outside of")
        if itemsize > 1 and (offsets & (itemsize - 1)).any():
            self._outside(argument, elements[offsets % itemsize != 0], what, "across two elements of")
        gaps = argument.are_gaps(elements)
        if gaps is not None and gaps.any():
            self._outside(argument, elements[gaps], what, "in the gaps of")
        return argument, elements + (argument.low - argument.region.low) // itemsize

    def _outside(self, argument: Argument, elements: np.ndarray, what: str, how: str) -> None:
        raise OutOfBounds(
            f"{self._where(what)}: {elements.size} lanes {how} {argument.name}, shape {argument.shape}, strides "
            f"{argument.strides}; the first is {int(elements[0])} elements from its beginning"
        )

    def _where(self, what: str) -> str:
        return f"{self.kernel}, program {self._program}, {what}"

    def unwritten(self) -> dict[str, int]:
        """For each argument stored to, by its first name, how many of its elements were not. Virtual memory is not counted."""
        stored = [argument for argument in self.arguments if argument.stored]
        return {
            argument.names[0]: argument.unwritten()
            for argument in stored
            if argument.region.maps[0].nbytes <= SPARSE_BYTES
        }


def _tensors(arguments: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """The tensors among a launch's arguments, in tuples and descriptors too."""
    found: list[tuple[str, Tensor]] = []
    for name, value in arguments.items():
        if isinstance(value, tuple):
            found += _tensors({f"{name}[{i}]": item for i, item in enumerate(value)})
        elif isinstance(value, Tensor):
            found.append((name, value))
        elif isinstance(getattr(value, "base", None), Tensor):
            found.append((name, value.base))
    return found
