"""Adapters in PEFT's format: a directory with adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from grist_model import peft_config, peft_layout
from grist_model.config import ModelConfig
from grist_model.families import family_for, gpt2
from grist_model.lora import AdapterShape, adapter_tensors, attach, copy_adapter, shape_of, sites
from grist_model.lora_layers import Pair, Site
from grist_model.peft_layout import PREFIX, Pairs, Single
from grist_model.transformer import Transformer, plain_name
from grist_model.weight_files import read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model: Transformer, directory: str | Path, base: str | None = None) -> None:
    """Write a model's adapters as `peft.PeftModel.from_pretrained(base_model, directory)` reads them, in float32.

    base: directory, or hf://owner/name, of the model they belong to. Raises ValueError for a model without adapters.
    """
    state = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    shape = shape_of(model)
    if not shape:
        raise ValueError("the model has no adapters to save")
    write_adapter(adapter_tensors(state, model.config, shape), shape, model.config, directory, base)


def write_adapter(
    pairs: Pairs, shape: AdapterShape, config: ModelConfig, directory: str | Path, base: str | None = None
) -> None:
    """The same from whole tensors by name of their site."""
    names = {site: name for name, site in sites(config).items()}
    pairs = {name: (a.detach().float().cpu(), b.detach().float().cpu()) for name, (a, b) in pairs.items()}
    tensors: dict[str, Tensor] = {}
    modules: dict[str, Pair] = {}
    parameters: dict[str, Pair] = {}
    for module in peft_layout.modules(config):
        if isinstance(module, peft_layout.Linear):
            scales = {shape[names[site]].scale for site, _ in module.blocks if names[site] in pairs}
            if not scales:
                continue
            if len(scales) > 1:
                raise ValueError(f"{module.name} holds pairs of several scales ({scales}), which PEFT cannot express")
            a, b = peft_layout.linear_to_peft(module, pairs, names)
            modules[module.name] = Pair(a.shape[0], scales.pop())
            _put(tensors, module.name, a, b)
        else:
            there = [(parameter, site) for parameter, site, _ in module.parameters if names[site] in pairs]
            for depth, (parameter, site) in enumerate(reversed(there)):
                parameters[f"{module.name}.{parameter}"] = shape[names[site]]
                a, b = peft_layout.experts_to_peft(module, site, pairs[names[site]])
                _put(tensors, module.name + ".base_layer" * depth, a, b)
    conv1d = family_for(config) is gpt2
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    _write(target / WEIGHTS, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    text = json.dumps(peft_config.written(modules, parameters, base, conv1d), indent=2) + "\n"
    _write(target / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))


def _put(tensors: dict[str, Tensor], module: str, a: Tensor, b: Tensor) -> None:
    tensors[f"{PREFIX}{module}.lora_A.weight"] = a.contiguous()
    tensors[f"{PREFIX}{module}.lora_B.weight"] = b.contiguous()


def _write(path: Path, write: Any) -> None:
    """Under another name first, so that the file is whole or not there."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)


def read_adapter_config(directory: str | Path) -> dict[str, Any]:
    """adapter_config.json. Raises FileNotFoundError where there is none, ValueError for one that is not plain LoRA's."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: {directory} holds no adapter in PEFT's format")
    stated = read_json(path, Path(directory))
    peft_config.refuse_unsupported(stated, path)
    return stated


def read_adapter(directory: str | Path, config: ModelConfig) -> tuple[AdapterShape, Pairs]:
    """The pairs of an adapter for a model of this config: what they are like, and a and b of each, by name of the site.

    Raises FileNotFoundError for missing files; ValueError for damaged ones, for options of PEFT that are not plain LoRA, and
    for tensors that are missing, left over or of another model's shapes, all of them listed.
    """
    directory = Path(directory)
    stated = read_adapter_config(directory)
    reading = _Reading(directory / CONFIG, stated, _tensors(directory / WEIGHTS))
    names = {site: name for name, site in sites(config).items()}
    for module in peft_layout.modules(config):
        if isinstance(module, peft_layout.Linear):
            _read_linear(module, names, reading)
        else:
            _read_experts(module, names, reading)
    problems = reading.problems + [f"unexpected: {key}" for key in reading.tensors]
    if problems or not reading.pairs:
        listed = "; ".join(problems) or "it has no tensors"
        raise ValueError(f"{directory} is no adapter of this model. {listed}")
    return reading.shape, reading.pairs


def load_adapter(model: Transformer, directory: str | Path) -> Transformer:
    """Give a model the adapters of a directory; its own weights are frozen. `lora.merge` folds them in. Raises what
    `read_adapter` raises, and ValueError for a model that has adapters already."""
    shape, pairs = read_adapter(directory, model.config)
    attach(model, shape)
    copy_adapter(model, pairs)
    return model


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist (weights are read from safetensors only, never from pickled files)"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error


@dataclass
class _Reading:
    """An adapter half read. tensors: those that nobody has taken yet."""

    path: Path
    stated: dict[str, Any]
    tensors: dict[str, Tensor]
    shape: AdapterShape = field(default_factory=dict)
    pairs: Pairs = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def take(self, module: str, inputs: int, outputs: int, experts: int = 1) -> tuple[Tensor, Tensor] | None:
        """A module's two tensors in float32; None where it has none, or a problem was noted."""
        keys = [f"{PREFIX}{module}.lora_{letter}.weight" for letter in "AB"]
        a, b = (self.tensors.pop(key, None) for key in keys)
        if a is None and b is None:
            return None
        if a is None or b is None:
            self.problems.append(f"missing: {keys[0] if a is None else keys[1]}")
            return None
        R, before = a.shape[0], len(self.problems)
        for key, tensor, expected in zip(keys, (a, b), ((R, inputs), (outputs, R)), strict=True):
            if tuple(tensor.shape) != expected or R % experts or not tensor.is_floating_point():
                self.problems.append(f"misshapen: {key} is {tuple(tensor.shape)} {tensor.dtype}, expected {expected}")
        return (a.float(), b.float()) if len(self.problems) == before else None

    def pair_of(self, module: str, rank: int) -> Pair:
        return peft_config.pair_of(self.stated, module, rank, self.path)


def _read_linear(module: peft_layout.Linear, names: Mapping[Site, str], reading: _Reading) -> None:
    taken = reading.take(module.name, module.blocks[0][0].inputs, module.outputs)
    if taken is not None:
        scale = reading.pair_of(module.name, taken[0].shape[0]).scale
        found = peft_layout.linear_from_peft(module, *taken, names)
        reading.pairs |= found
        reading.shape |= {name: Pair(a.shape[0], scale) for name, (a, _) in found.items()}


def _read_experts(module: peft_layout.Experts, names: Mapping[Site, str], reading: _Reading) -> None:
    nested = module.name + ".base_layer"
    both = any(key.startswith(f"{PREFIX}{nested}.lora_") for key in reading.tensors)
    for number, (parameter, site, singles) in enumerate(module.parameters):
        _read_singles(names[site], site, singles, reading)
        if names[site] in reading.pairs or not (both or _is_target(reading.stated, f"{module.name}.{parameter}")):
            continue
        assert site.experts is not None, "a site of experts"
        where = nested if both and number == 0 else module.name
        taken = reading.take(where, site.inputs, site.outputs, site.experts)
        if taken is not None:
            rank = taken[0].shape[0] // site.experts
            reading.shape[names[site]] = reading.pair_of(f"{module.name}.{parameter}", rank)
            reading.pairs[names[site]] = peft_layout.experts_from_peft(module, site, *taken)


def _read_singles(name: str, site: Site, singles: tuple[Single, ...], reading: _Reading) -> None:
    """Of a site of experts the pairs that each expert has for itself, if there are any, as one."""
    found, kinds = {}, {}
    for single in singles:
        taken = reading.take(single.name, site.inputs, single.end - single.begin)
        if taken is not None:
            found[single] = taken
            kinds[single.name] = reading.pair_of(single.name, taken[0].shape[0])
    if len(set(kinds.values())) > 1:
        reading.problems.append(f"pairs of several ranks or scales, but experts need one: {', '.join(kinds)}")
    elif found:
        reading.pairs[name] = peft_layout.experts_from_singles(site, found)
        reading.shape[name] = Pair(reading.pairs[name][0].shape[-1], next(iter(kinds.values())).scale)


def _is_target(config: Mapping[str, Any], parameter: str) -> bool:
    targets = config.get("target_parameters") or []
    return any(re.match(rf"(.*\.)?{re.escape(target)}$", parameter) for target in targets)
