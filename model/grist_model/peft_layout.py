"""How adapters lie in PEFT's files (LoRA of peft 0.21, with transformers 5), against our pairs.

A linear module of theirs has lora_A (R, in) and lora_B (out, R). Where it holds several of our sites (queries, keys and values
in GPT-2's c_attn), their pairs of rank r stand in it as blocks: A one below the other, B along a diagonal, R = r times their
number.

Experts are one module with a pair for each of its parameters ("target_parameters"), in every family, also those whose files
have a tensor an expert: lora_A (E * r, in), an expert's rows together, and lora_B (out, r * E), an expert in every E-th column.
The pair of the last parameter is called as the module is; where both have one, that of the first hangs below `base_layer`.
Adapters made with transformers 4 have a pair for each expert's gate, up and down, as the model's files have: those are read,
too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from grist_model.config import ModelConfig
from grist_model.families import family_for
from grist_model.families.gristmill import MODEL_TYPE as OWN
from grist_model.families.layout import Layout
from grist_model.lora import sites
from grist_model.lora_layers import Site

PREFIX = "base_model.model."
Pairs = dict[str, tuple[Tensor, Tensor]]  # site -> a, b


@dataclass(frozen=True)
class Linear:
    """A linear module of theirs: our sites in it and the first of their rows of outputs there."""

    name: str
    blocks: tuple[tuple[Site, int], ...]

    @property
    def outputs(self) -> int:
        return sum(site.outputs for site, _ in self.blocks)


@dataclass(frozen=True)
class Single:
    """One expert's matrix as a linear module of its own: our columns of outputs `begin` to `end`."""

    name: str
    expert: int
    begin: int
    end: int


@dataclass(frozen=True)
class Experts:
    """The experts' module: its parameters, in order, with our site of each and the matrices that it consists of; and the change
    of layout of its outputs, by our weight."""

    name: str
    parameters: tuple[tuple[str, Site, tuple[Single, ...]], ...]
    to_hf: Mapping[str, Callable[[Tensor], Tensor]]
    from_hf: Mapping[str, Callable[[Tensor], Tensor]]


def modules(config: ModelConfig) -> list[Linear | Experts]:
    """Every module of the model's family that adapters of ours can be in."""
    family = family_for(config)
    layout = family.layout(config)
    blocks: dict[str, list[tuple[Site, int]]] = {}
    experts: dict[str, list[Site]] = {}
    for site in sites(config).values():
        if site.experts is not None:
            experts.setdefault(site.module, []).append(site)
            continue
        for piece in layout.of_ours[site.weight]:
            (first, last), *_ = piece.box(layout.shapes[site.weight])
            if first <= site.begin < last:
                row = _first_row(piece.hf_at) + site.begin - first
                blocks.setdefault(piece.hf_name.removesuffix(".weight"), []).append((site, row))
    found: list[Linear | Experts] = [Linear(name, tuple(entries)) for name, entries in blocks.items()]
    for module, entries in experts.items():
        whole = [piece for site in entries for piece in layout.of_ours[site.weight] if not piece.at]
        to_hf = {piece.name: piece.to_hf for piece in whole if piece.to_hf is not None}
        from_hf = {piece.name: piece.from_hf for piece in whole if piece.from_hf is not None}
        name, called = module, {site: site.part for site in entries}
        if family.MODEL_TYPE != OWN:
            name = f"model.layers.{module.split('.')[1]}.mlp.experts"
            called = {site: f"{site.part.removeprefix('w_')}_proj" for site in entries}
        parameters = tuple((called[site], site, _singles(site, layout)) for site in entries)
        found.append(Experts(name, parameters, to_hf, from_hf))
    return found


def _singles(site: Site, layout: Layout) -> tuple[Single, ...]:
    found = []
    for piece in layout.of_ours[site.weight]:
        if piece.at:
            (expert, _), _, (begin, end) = piece.box(layout.shapes[site.weight])
            found.append(Single(piece.hf_name.removesuffix(".weight"), expert, begin, end))
    return tuple(found)


def _first_row(hf_at: tuple[int | slice, ...]) -> int:
    """Of a piece in one of their weights; GPT-2's are (in, out), so that our rows are columns there."""
    last = hf_at[-1] if hf_at else None
    return last.start or 0 if isinstance(last, slice) else 0


# Writing


def linear_to_peft(module: Linear, pairs: Pairs, names: Mapping[Site, str]) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of a module, of the pairs that are there."""
    present = [(site, row) for site, row in module.blocks if names[site] in pairs]
    parts = [pairs[names[site]] for site, _ in present]
    lora_a = torch.cat([a for a, _ in parts])
    lora_b = lora_a.new_zeros(module.outputs, lora_a.shape[0])
    column = 0
    for (site, row), (a, b) in zip(present, parts, strict=True):
        lora_b[row : row + site.outputs, column : column + a.shape[0]] = b
        column += a.shape[0]
    return lora_a, lora_b


def experts_to_peft(module: Experts, site: Site, pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """lora_A and lora_B of one parameter."""
    a, b = pair  # (E, in, r), (E, r, out)
    if site.weight in module.to_hf:
        b = module.to_hf[site.weight](b)
    return a.transpose(1, 2).flatten(0, 1).contiguous(), b.permute(2, 1, 0).flatten(1).contiguous()


# Reading


def linear_from_peft(
    module: Linear, lora_a: Tensor, lora_b: Tensor, names: Mapping[Site, str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs of a module. Blocks along a diagonal become pairs of their own rank; anything else is exact too, each site
    having all of A and its rows of B."""
    rows = [(site, lora_b[row : row + site.outputs]) for site, row in module.blocks]
    used = [(site, b) for site, b in rows if b.any()] or rows
    rank, rest = divmod(lora_a.shape[0], len(used))
    own = [slice(i * rank, (i + 1) * rank) for i in range(len(used))]
    inside = [b.count_nonzero() == b[:, at].count_nonzero() for (_, b), at in zip(used, own, strict=True)]
    if rest or not all(inside):
        own = [slice(None)] * len(used)
    return {names[site]: (lora_a[at].clone(), b[:, at].contiguous()) for (site, b), at in zip(used, own, strict=True)}


def experts_from_peft(module: Experts, site: Site, lora_a: Tensor, lora_b: Tensor) -> tuple[Tensor, Tensor]:
    """a and b of one parameter's pair."""
    assert site.experts is not None, "a site of experts"
    a = lora_a.unflatten(0, (site.experts, -1)).transpose(1, 2).contiguous()
    b = lora_b.unflatten(1, (-1, site.experts)).permute(2, 1, 0).contiguous()
    return a, module.from_hf[site.weight](b) if site.weight in module.from_hf else b


def experts_from_singles(site: Site, found: Mapping[Single, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """a and b from pairs of one rank r for each expert's matrices. Gate and up stand in one pair of rank 2r as blocks."""
    parts = sorted({single.begin for single in found})
    rank = next(iter(found.values()))[0].shape[0]
    shape_a, shape_b = site.shapes(rank * len(parts))
    a, b = torch.zeros(shape_a), torch.zeros(shape_b)
    for single, (lora_a, lora_b) in found.items():
        first = parts.index(single.begin) * rank
        a[single.expert, :, first : first + rank] = lora_a.T
        b[single.expert, first : first + rank, single.begin : single.end] = lora_b.T
    return a, b
