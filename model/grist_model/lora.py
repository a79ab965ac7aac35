"""LoRA (Hu et al., 2021, arXiv:2106.09685): a frozen model with a trained pair of small matrices beside some of its weights.

`attach` replaces the modules that hold those weights by ones with adapters; base weights keep their names, and the pairs are
called MODULE.adapters.PART.{a, b}.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from grist_model.config import ModelConfig
from grist_model.families.layout import own_shapes
from grist_model.initialization import drawn
from grist_model.layers import Linear
from grist_model.local_part import local_part
from grist_model.lora_config import ATTENTION, DENSE, EXPERTS, LoraConfig
from grist_model.lora_layers import LoraExperts, LoraLinear, LowRank, Pair, Site, delta
from grist_model.moe import Experts
from grist_model.transformer import Transformer, plain_name

# Name of a site ("blocks.0.attention.q", "blocks.0.mlp.gate", "blocks.0.mlp.experts.w_down") -> its pair.
AdapterShape = dict[str, Pair]


def sites(config: ModelConfig) -> dict[str, Site]:
    """Every place of a model that can have a pair, by name."""
    found: dict[str, Site] = {}
    for name, shape in own_shapes(config).items():
        module, _, leaf = name.rpartition(".")
        parent, _, kind = module.rpartition(".")
        if leaf in EXPERTS:
            found[name] = Site(module, leaf, name, 0, shape[2], shape[1], shape[0])
        elif leaf == "weight" and kind == "gate_up":
            half = shape[0] // 2
            found[f"{parent}.gate"] = Site(module, "gate", name, 0, half, shape[1])
            found[f"{parent}.up"] = Site(module, "up", name, half, 2 * half, shape[1])
        elif leaf == "weight" and kind in (*ATTENTION, *DENSE):
            found[module] = Site(module, kind, name, 0, shape[0], shape[1])
    return found


def adapter_shape(config: ModelConfig, lora: LoraConfig) -> AdapterShape:
    """The pairs that the settings ask for. Raises ValueError for targets that the model does not have."""
    places = sites(config)
    there = {site.part for site in places.values()}
    absent = [target for target in lora.targets if not LoraConfig(targets=(target,)).matrices & there]
    if absent:
        raise ValueError(
            f"lora.targets names {', '.join(absent)}, which this model does not have: it has "
            f"{', '.join(sorted(there))} (or use all)"
        )
    return {name: Pair(lora.rank, lora.scale) for name, site in places.items() if site.part in lora.matrices}


def attach(model: Transformer, shape: AdapterShape) -> None:
    """Freeze a model and give it the pairs, without values: fill them with `initialize_adapters` or `copy_adapter`.

    Before sharding. Raises ValueError where the model has adapters already, or no such places.
    """
    if has_adapters(model):
        raise ValueError("the model has adapters already: merge them first")
    places = sites(model.config)
    unknown = [name for name in shape if name not in places]
    if unknown:
        raise ValueError(f"the model has no {', '.join(unknown)} to adapt")
    model.requires_grad_(False)
    by_module: dict[str, dict[str, LowRank]] = {}
    for name, pair in shape.items():
        site = places[name]
        like = model.get_parameter(site.weight)
        by_module.setdefault(site.module, {})[site.part] = LowRank(site, pair, like)
    for module, adapters in by_module.items():
        base = model.get_submodule(module)
        if isinstance(base, Experts):
            _replace(model, module, LoraExperts(base, adapters))
        else:
            parts = tuple((site.part, site.outputs) for site in places.values() if site.module == module)
            _replace(model, module, LoraLinear(cast(Linear, base), adapters, parts))


def has_adapters(model: nn.Module) -> bool:
    return any(isinstance(module, LowRank) for module in model.modules())


def shape_of(model: Transformer) -> AdapterShape:
    """The pairs that a model has."""
    named = {plain_name(name): module for name, module in model.named_modules() if isinstance(module, LowRank)}
    of = {name: f"{site.module}.adapters.{site.part}" for name, site in sites(model.config).items()}
    return {name: named[path].pair for name, path in of.items() if path in named}


def initialize_adapters(model: Transformer, seed: int) -> None:
    """B is zero, so that the model computes what it did; A is normal(0, 1 / sqrt(3 in)), the spread of PEFT's uniform values.

    Like a model's initial weights it depends on seed and name only; of a DTensor the local part is drawn.
    """
    places = sites(model.config)
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name in shape_of(model):
            name_a, name_b = places[name].parameters
            local, offset = local_part(parameters[name_a])
            std = (3 * places[name].inputs) ** -0.5
            local.copy_(drawn(name_a, tuple(parameters[name_a].shape), offset, tuple(local.shape), std, seed))
            local_part(parameters[name_b])[0].zero_()


def copy_adapter(model: Transformer, tensors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Fill a model's pairs, sharded or not, from whole ones by name of their site, as adapters.read_adapter gives them."""
    places = sites(model.config)
    parameters = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for name, pair in tensors.items():
            for parameter_name, tensor in zip(places[name].parameters, pair, strict=True):
                local, offset = local_part(parameters[parameter_name])
                local.copy_(tensor[tuple(slice(o, o + n) for o, n in zip(offset, local.shape, strict=True))])


def adapter_tensors(
    state: Mapping[str, Tensor], config: ModelConfig, shape: AdapterShape
) -> dict[str, tuple[Tensor, Tensor]]:
    """a and b of every pair by name of its site, from a whole state dict."""
    places = sites(config)
    names = {name: places[name].parameters for name in shape}
    return {name: (state[a], state[b]) for name, (a, b) in names.items()}


def merged(state: Mapping[str, Tensor], config: ModelConfig, shape: AdapterShape) -> dict[str, Tensor]:
    """The state dict of the plain model that computes what base and adapters compute; weights with a pair become float32."""
    places = sites(config)
    out = {name: tensor.detach() for name, tensor in state.items() if ".adapters." not in name}
    wide: dict[str, Tensor] = {}
    for name, (a, b) in adapter_tensors(state, config, shape).items():
        site = places[name]
        if site.weight not in wide:
            wide[site.weight] = out[site.weight].to(torch.float32, copy=True)
        part = wide[site.weight] if site.experts is not None else wide[site.weight][site.begin : site.end]
        part += delta(a.detach(), b.detach(), shape[name].scale)
    return out | wide


def merge(model: Transformer) -> Transformer:
    """Fold a model's adapters into its weights, in place: a plain model again, with every parameter trainable.

    Weights keep their type: in bfloat16 updates smaller than its steps are lost. Raises ValueError for a model without
    adapters.
    """
    if not has_adapters(model):
        raise ValueError("the model has no adapters to merge")
    state = merged(model.state_dict(), model.config, shape_of(model))
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLinear):
            plain = Linear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
            plain.weight, plain.bias = module.weight, module.bias
            _replace(model, name, plain)
        elif isinstance(module, LoraExperts):
            with torch.device("meta"):
                experts = Experts(model.config)
            for parameter_name, parameter in module.named_parameters(recurse=False):
                setattr(experts, parameter_name, parameter)
            _replace(model, name, experts)
    model.load_state_dict(state)
    model.requires_grad_(True)
    return model


@contextmanager
def base_only(model: nn.Module) -> Iterator[None]:
    """Within the block the model has the parameters and the state dict of the plain one, for `load_into`, say."""
    adapted = [module for module in model.modules() if isinstance(module, (LoraLinear, LoraExperts))]
    adapters = [module.adapters for module in adapted]
    for module in adapted:
        del module.adapters
    try:
        yield
    finally:
        for module, own in zip(adapted, adapters, strict=True):
            module.adapters = own


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
