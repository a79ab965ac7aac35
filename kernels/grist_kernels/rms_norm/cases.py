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


def _heads_of_qkv(generator):
    """Queries of a fused projection, normalised head by head: rows with two strides."""
    return {"x": normal(generator, 2, 33, 6, 64)[:, :, :4], "weight": normal(generator, 64)}


def _heads_with_residual(generator):
    """Views whose rows differ in strides: one of a projection, one transposed, and neither is one block."""
    x = normal(generator, 2, 5, 6, 64)[:, :, 1:4]
    return {"x": x, "weight": normal(generator, 64), "residual": normal(generator, 2, 3, 5, 64).transpose(1, 2)}


def _gemma(generator):
    """The weight is kept as its difference from one, and may stay float32 beside a bfloat16 x."""
    return {"x": normal(generator, 2, 17, 96), "weight": normal(generator, 96, scale=0.1), "offset": 1.0}


def at_size(size: int, rows: int) -> list[Case]:
    """Calls whose launches are those of the size bucket, widest row: with everything that a kernel may have to do."""
    return [_case(f"width_{size}", rows, size, residual=True)]


_X_AND_WEIGHT = ("x", "weight")

CASES = [
    _case("one_row", 1, 8),
    _case("odd", 2, 63, 60),
    _case("residual", 2, 63, 60, residual=True),
    _case("prime_width", 5, 127),
    _case("wide", 3, 2880),
    _case("wide_residual", 9, 2880, residual=True),
    _case("widest", 2, 16384, residual=True),
    _case("wider_than_a_block", 3, 10001, residual=True),
    _case("many_rows", 1100, 512, residual=True),
    _case("tiny_values", 7, 64, eps=1e-6, scale=1e-4),
    _case("large_values", 7, 64, scale=1e3),
    Case("strided", _strided, _X_AND_WEIGHT),
    Case("heads_of_qkv", _heads_of_qkv, _X_AND_WEIGHT),
    Case("heads_with_residual", _heads_with_residual, (*_X_AND_WEIGHT, "residual")),
    Case("gemma", _gemma, _X_AND_WEIGHT),
    Case("float32_weight", _gemma, _X_AND_WEIGHT, float32=("weight",)),
    *(
        _case(f"t{T}_{D}{'_residual' if residual else ''}", T, D, residual=residual, large=True)
        for T in (4096, 8192, 32768)
        for D in (2880, 4096)
        for residual in (False, True)
    ),
]
