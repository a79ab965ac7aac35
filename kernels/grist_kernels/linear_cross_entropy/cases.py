"""Inputs of linear_cross_entropy. R rows, D model width, V vocabulary."""

from __future__ import annotations

from typing import Any

import torch

from grist_kernels.cases import Case, normal


def _case(
    name: str, R: int, D: int, V: int, ignored: float = 0.0, scale: float = 1.0, large: bool = False, **options
) -> Case:
    """ignored: the share of rows whose target is ignore_index."""

    def build(generator):
        targets = torch.randint(0, V, (R,), generator=generator)
        drop = torch.rand(R, generator=generator) < ignored
        return {
            "hidden": normal(generator, R, D),
            "weight": normal(generator, V, D, scale=scale * D**-0.5),
            "targets": targets.masked_fill(drop, options.get("ignore_index", -100)),
            **options,
        }

    return Case(name, build, ("hidden", "weight"), large=large)


def _batched(generator):
    targets = torch.randint(0, 50, (3, 21), generator=generator)
    targets[:, -1] = -100
    return {"hidden": normal(generator, 3, 21, 60), "weight": normal(generator, 50, 60, scale=0.2), "targets": targets}


_EVERYTHING: dict[str, Any] = {"z_loss": 1e-2, "softcap": 5.0, "label_smoothing": 0.1}


def at_size(size: int, rows: int) -> list[Case]:
    """Calls whose launches are those of a vocabulary of this size: as language models use it, and with every option."""
    plain = _case(f"vocabulary_{size}", rows, 16, size)
    return [plain, _case(f"everything_{size}", rows, 16, size, **_EVERYTHING)]


CASES = [
    _case("one_row", 1, 8, 11),
    _case("odd", 63, 60, 257),
    _case("sum", 63, 60, 257, ignored=0.3, reduction="sum"),
    _case("none", 63, 60, 257, ignored=0.3, reduction="none"),
    _case("z_loss", 63, 60, 257, z_loss=1e-2),
    _case("softcap", 63, 60, 257, scale=4.0, softcap=5.0),
    _case("label_smoothing", 63, 60, 257, label_smoothing=0.1),
    _case("everything_mean", 63, 60, 257, ignored=0.3, scale=3.0, **_EVERYTHING),
    _case("everything_none", 63, 60, 257, ignored=0.3, scale=3.0, reduction="none", **_EVERYTHING),
    _case("all_ignored", 9, 16, 33, ignored=1.0),
    _case("own_ignore_index", 63, 16, 33, ignored=0.3, ignore_index=0),
    _case("sharp", 63, 60, 257, scale=30.0),
    _case("several_chunks", 500, 8, 10000, ignored=0.1),
    Case("batched", _batched, ("hidden", "weight")),
    _case("wide_vocabulary", 3, 8, 20011),
    _case("gpt_oss_20b", 8192, 2880, 201088, large=True),
    _case("llama_3_8b", 8192, 4096, 128256, large=True),
]
