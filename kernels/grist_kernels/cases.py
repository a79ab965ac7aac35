"""Inputs worth trying, and how close a result has to be: read by the tests and by the benchmark alike.

Closeness is measured, not guessed. `want` is the reference in float64 on the same (rounded) inputs; `plain` is the reference
computed in the input's own type throughout, which is what PyTorch makes of the formula. A result may be off by at most
twice plain's largest error, plus one unit in the last place of the largest value (float64: by 1e-12 of the largest value).
Where plain's error says little it is rounded up: below two units it counts as two, and for a tensor of a few elements the
worst relative error of the whole call counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grist_kernels import precision
from grist_kernels.quantized import PackedWeight

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One call of an op.

    build makes its keyword arguments: floating tensors in float64 on the CPU (normally distributed, never zeros: low-entropy
    data makes a GPU look faster than it is), everything else as it is.
    gradients names the arguments whose gradients are compared. float32 names those that stay float32 in low precision.
    gradient_factor stands for the "twice" of the policy in gradients, where an algorithm (not an implementation) rounds more
    than the reference's autograd; a case that sets it says why.
    large marks a size for the benchmark and for a GPU's tests, too slow for a CPU's.
    """

    name: str
    build: Callable[[torch.Generator], Arguments]
    gradients: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    gradient_factor: float = 2.0
    large: bool = False

    def arguments(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Arguments:
        """The call's arguments, rounded to dtype, on a device."""
        built = self.build(torch.Generator().manual_seed(seed))
        return {name: self._placed(name, value, dtype, device) for name, value in built.items()}

    def _placed(self, name: str, value: Any, dtype: torch.dtype, device: str | torch.device) -> Any:
        if isinstance(value, PackedWeight):
            return value.mapped(
                lambda part: torch.empty_strided(part.shape, part.stride(), dtype=part.dtype, device=device).copy_(part)
            )
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.to(device)
        keep = name in self.float32 and dtype != torch.float64
        # .to() would make a view with gaps contiguous, and a case may be about just such a view.
        placed = torch.empty_strided(value.shape, value.stride(), dtype=torch.float32 if keep else dtype, device=device)
        return placed.copy_(value)


def normal(generator: torch.Generator, *shape: int, scale: float = 1.0) -> Tensor:
    """Normally distributed float64, on the generator's device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device) * scale


def widened(arguments: Arguments) -> Arguments:
    """The same values in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in arguments.items()
    }


def run(function: Callable, arguments: Arguments, gradients: tuple[str, ...], seed: int = 1) -> dict[str, Tensor]:
    """Call a function, and differentiate its outputs against fixed random gradients: name -> tensor.

    Outputs are called out, or out0, out1, ...; gradients d_<argument>.
    """
    arguments = dict(arguments)
    for name in gradients:
        arguments[name] = arguments[name].detach().requires_grad_()
    result = function(**arguments)
    outputs = result if isinstance(result, tuple) else (result,)
    named = {"out" if len(outputs) == 1 else f"out{i}": out.detach() for i, out in enumerate(outputs)}
    if gradients:
        place = outputs[0].device  # for large outputs a GPU draws a thousand times faster
        generator = torch.Generator(place if place.type == "cuda" else "cpu").manual_seed(seed)
        d_outputs = [normal(generator, *out.shape).to(out) for out in outputs]
        grads = torch.autograd.grad(outputs, [arguments[name] for name in gradients], d_outputs)
        named |= {f"d_{name}": grad for name, grad in zip(gradients, grads, strict=True)}
    return named


@dataclass(frozen=True)
class Expected:
    """The float64 result of a case under one name, and the largest error that is allowed."""

    want: Tensor
    allowed: float


def expected(reference: Callable, case: Case, arguments: Arguments) -> dict[str, Expected]:
    """What a call on these arguments must give, by name, with the error that the policy above allows."""
    want = run(reference, widened(arguments), case.gradients)
    with precision.at_input_dtype():
        plain = run(reference, arguments, case.gradients)
    error = {name: _relative_error(plain[name], want[name]) for name in want}
    return {name: Expected(want[name], _allowed(name, case, plain[name], want[name], error)) for name in want}


_FEW = 64  # elements: too few for their largest rounding error to say much


def _allowed(name: str, case: Case, plain: Tensor, want: Tensor, relative_error: dict[str, float]) -> float:
    largest = _largest(want)
    if plain.dtype == torch.float64:  # as exact as what it is compared with: only the order of sums may differ
        return 1e-12 * largest
    unit = torch.finfo(plain.dtype).eps
    own = max(relative_error.values()) if want.numel() < _FEW else relative_error[name]
    factor = case.gradient_factor if name.startswith("d_") else 2.0
    return (factor * max(own, 2 * unit) + unit) * largest


def _relative_error(plain: Tensor, want: Tensor) -> float:
    """The largest error, as a share of the largest value; 0 where plain left its type's range, which says nothing."""
    if not plain.isfinite().all():
        return 0.0
    return _largest(plain.double() - want) / max(_largest(want), 1e-300)


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0
