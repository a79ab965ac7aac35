"""Differentiable ops with two faces, made of the same functions, so that both give the same bits.

In eager mode a torch.autograd.Function: the cheapest way to a kernel. While torch.compile traces, an op of the `gristmill`
torch.library namespace: the compiler, and policies such as selective checkpointing, see one opaque call with known
shapes instead of a graph break. A library op in eager mode would cost several times a small kernel's own time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

LIBRARY = torch.library.Library("gristmill", "FRAGMENT")


class Faces(NamedTuple):
    """A function, and the library op that runs it."""

    eager: Callable
    traced: Callable
    name: str


def faces(schema: str, function: Callable, fake: Callable) -> Faces:
    """Define the library op gristmill::<schema> over function; fake gives empty results of the same shapes and types.

    The function may neither write to its arguments nor return one of them, nor return one tensor twice.
    """
    name = f"gristmill::{schema[: schema.index('(')]}"
    LIBRARY.define(schema)
    LIBRARY.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(name, fake, lib=LIBRARY)
    return Faces(function, getattr(torch.ops.gristmill, name.removeprefix("gristmill::")).default, name)


def differentiable(forward: Faces, backward: Faces, save: Callable, gradients: Callable) -> Callable:
    """A function of forward's arguments that knows its gradient.

    save(ctx, inputs, output) keeps what the gradient needs; gradients(ctx, run, *d_outputs) -> one gradient (or None) for each
    input, where run is the face of `backward` to call and an output that nobody used has gradient None.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward.eager(*inputs)
            ctx.set_materialize_grads(False)
            save(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *d_outputs: Any) -> Any:
            return gradients(ctx, backward.eager, *d_outputs)

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.set_materialize_grads(False)
        save(ctx, inputs, output)

    def traced_backward(ctx: Any, *d_outputs: Any) -> Any:
        return gradients(ctx, backward.traced, *d_outputs)

    torch.library.register_autograd(forward.name, traced_backward, setup_context=setup_context, lib=LIBRARY)

    def apply(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward.traced(*inputs)
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in inputs):
            return Eager.apply(*inputs)
        return forward.eager(*inputs)

    return apply
