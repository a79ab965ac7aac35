"""Inputs of rms_norm. D model width."""

from __future__ import annotations

from grist_kernels.cases import Case, normal


def _case(
    name: str, *shape: int, residual: bool = False, eps: float = 1e-5, scale: float = 1.0, large: bool = False
) -> Case:
    def build(generator):
        arguments = {"x": normal(generator, *shape, scale=scale), "weight": normal(generator, shape[-1]), "eps": eps}
        if residual:
            arguments["residual"] = normal(generator, *shape, scale=scale)
        return arguments

    gradients = ("x", "weight", "residual") if residual else ("x", "weight")
    return Case(name, build, gradients, large=large)


def _strided(generator):
    return {"x": normal(generator, 3, 63, 100)[:, :, 20:80], "weight": normal(generator, 60)}


CASES = [
    _case("one_row", 1, 8),
    _case("odd", 2, 63, 60),
    _case("residual", 2, 63, 60, residual=True),
    _case("prime_width", 5, 127),
    _case("wide", 3, 2880),
    _case("many_rows", 1100, 512, residual=True),
    _case("tiny_values", 7, 64, eps=1e-6, scale=1e-4),
    _case("large_values", 7, 64, scale=1e3),
    Case("strided", _strided, ("x", "weight")),
    _case("gpt_oss", 16384, 2880, residual=True, large=True),
    _case("width_4096", 16384, 4096, large=True),
]
