"""What a call of an op would launch, without launching it, and what Triton would compile for that.

A call goes through the op's door on meta tensors, forward and backward, for an architecture that need not be there. Each
launch then becomes a Build by the very steps of Triton's just-in-time compiler: the types of the arguments, and what it
specialises (ones, multiples of 16, aligned pointers) without being asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

from grist_kernels import OPS, backend, launch
from grist_kernels.cases import Case, run
from grist_kernels.launch import Target

# A GPU of each architecture: A100, H100 and H200, B200, MI300X.
GPUS = {
    "sm_80": Target("sm_80", 108),
    "sm_90": Target("sm_90", 132),
    "sm_100": Target("sm_100", 148),
    "gfx942": Target("gfx942", 304),
}


def ops_with_tables(names: str | None) -> list[str]:
    """Ops that have a launch table: those named, "a,b", or all. Raises ValueError for one that has none."""
    there = [op for op in OPS if launch.table_path(op).exists()]
    wanted = there if names is None else names.split(",")
    if unknown := [name for name in wanted if name not in there]:
        raise ValueError(f"no launch table for {', '.join(unknown)}; there are tables for {', '.join(there)}")
    return wanted


@dataclass(frozen=True)
class Launch:
    """The arguments of one launch.run."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel as launch tables call it: forward, for the function _forward_kernel."""
        return self.kernel.fn.__name__.removeprefix("_").removesuffix("_kernel")


@contextmanager
def recorded(*, execute: bool = False) -> Iterator[list[Launch]]:
    """The launches made inside, which only happen if `execute`. Not thread-safe."""
    launches: list[Launch] = []
    before = launch.run

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
        if 0 not in grid:
            launches.append(Launch(kernel, grid, arguments, constants))
        if execute:
            before(kernel, grid, device, *arguments, **constants)

    launch.run = record
    try:
        yield launches
    finally:
        launch.run = before


@contextmanager
def rows_read(op: str) -> Iterator[set[tuple[str, int]]]:
    """(kernel, size) of the rows of an op's table that launches inside ask for."""
    found: set[tuple[str, int]] = set()
    before = launch.config

    def noting(asked: str, kernel: str, where: Target, dtype: torch.dtype, size: int, formula: Any) -> launch.Config:
        if asked == op:
            found.add((kernel, size))
        return before(asked, kernel, where, dtype, size, formula)

    launch.config = noting  # type: ignore[assignment]
    try:
        yield found
    finally:
        launch.config = before


def record(op: str, case: Case, dtype: torch.dtype, gpu: Target) -> tuple[list[Launch], set[tuple[str, int]]]:
    """The launches of a case on a GPU, forward and backward, and (kernel, size) of the table's rows that they read."""
    arguments = case.arguments(dtype, "meta")
    with backend.using("triton"), launch.assuming(gpu), rows_read(op) as rows, recorded() as launches:
        run(OPS[op].door, arguments, case.gradients)
    return launches, rows


@dataclass(frozen=True)
class Build:
    """All that decides what Triton compiles, in plain values: to compare, and to send to another process."""

    module: str
    function: str
    architecture: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    attributes: tuple[tuple[tuple[int, ...], tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, int], ...]


def build_of(launched: Launch, architecture: str) -> Build:
    """What the just-in-time compiler would build for a launch. Meta tensors count as aligned, as allocations are.

    Raises ValueError while Triton interprets, which leaves nothing to build.
    """
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    kernel = launched.kernel
    if not isinstance(kernel, JITFunction):
        raise ValueError(
            "kernels are interpreted, so there is nothing to build: start the process with TRITON_INTERPRET=0"
        )
    compiler = make_backend(_gpu_target(architecture))
    bind = create_function_from_signature(kernel.signature, kernel.params, compiler)
    bound, specialization, options = bind(*launched.arguments, **launched.constants)
    _, signature, constants, attributes = kernel._pack_args(
        compiler, launched.constants, bound, specialization, options
    )
    return Build(
        kernel.module,
        kernel.fn.__name__,
        architecture,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple((where, tuple((name, value) for name, value in found)) for where, found in attributes.items()),
        tuple(sorted(options.items())),
    )


def compiled(build: Build) -> Any:
    """Compile a build to Triton's CompiledKernel. Needs no GPU."""
    import triton
    from triton.compiler import ASTSource

    kernel = getattr(import_module(build.module), build.function)
    attributes = {where: [list(pair) for pair in found] for where, found in build.attributes}
    source = ASTSource(kernel, dict(build.signature), dict(build.constants), attributes)
    return triton.compile(source, target=_gpu_target(build.architecture), options=dict(build.options))


def _gpu_target(architecture: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if architecture.startswith("sm_"):
        return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return GPUTarget("hip", architecture, 64)
