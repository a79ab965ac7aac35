"""The portable directory: a model as other people's software loads it (config.json, safetensors, tokenizer)."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from grist_model.config import ModelConfig
from grist_model.families import FAMILIES, family_for, family_of_hf
from grist_model.families.decoder import ROUTER_TRAINING
from grist_model.families.layout import Layout
from grist_model.hub import local_directory
from grist_model.local_part import local_part
from grist_model.quantized_layers import is_quantized
from grist_model.quantized_loading import pack_layers
from grist_model.replacing import replacing
from grist_model.transformer import Transformer, build, plain_name
from grist_model.weight_files import check_coverage, read_json, target_type, with_progress, write_weights
from grist_model.weight_reading import Weights, fill, open_weights

_log = logging.getLogger(__name__)

MAX_FILE_BYTES = 5_000_000_000
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_SAMPLED = {"temperature", "top_k", "top_p", "min_p"}


class Tokenizer(Protocol):
    """What `save` needs of a tokenizer; grist_data's has it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eot_id(self) -> int | None: ...
    @property
    def bos_id(self) -> int | None: ...
    def save(self, directory: Any, /) -> Any: ...


def save(
    model_or_state: Transformer | Mapping[str, Any],
    directory: str | Path,
    tokenizer: Tokenizer | None = None,
    config: ModelConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
    generation: Mapping[str, Any] | None = None,
) -> str:
    """Write a model as a Hugging Face directory and return the family it was written in ("gpt_oss", "llama", ...).

    The first family that expresses the model is taken; where there is none but our own a warning says why. Instead of a
    model, a full (gathered) state dict and its config will do. dtype: convert on the way (selection biases stay
    float32). Weights are split into files of at most max_file_bytes, unless one tensor alone is larger. generation:
    keys of generation_config.json beside the tokenizer's ids or instead of them, such as {"temperature": 0.7,
    "eos_token_id": [0, 7]} where a chat's turns end otherwise than documents.

    Everything is written into a neighbouring directory first, which then takes the place of an existing one; files
    there that are not part of a model are carried over, but for those of another tokenizer and a model card that was
    written for the old weights. Without a tokenizer the old one stays, with its ids. An interrupted or failed save
    leaves the old directory as it was.

    Raises ValueError if the state does not match the config, is sharded, or the tokenizer does not fit;
    FileExistsError if `directory` is a file or a non-empty directory without a config.json; OSError from the file
    system.
    """
    state, config = _state_and_config(model_or_state, config)
    _check_tokenizer(tokenizer, config)
    family = family_for(config, state)
    name = next(key for key, module in FAMILIES.items() if module is family)
    layout = family.layout(config)
    _check_state(state, layout)
    target = Path(directory).resolve()
    with replacing(target) as draft:
        written = write_weights(state, layout, draft, dtype, max_file_bytes)
        _write_config(draft, target, family.config_to_hf(config), written, tokenizer, generation or {})
        if tokenizer is not None:
            tokenizer.save(draft)
    if name != "gristmill":
        _log.info("saved %s in the layout of %s", target, name)
    else:
        why = [each.misfit(config, state) for key, each in FAMILIES.items() if key != name]
        closest = min(why, key=lambda reason: reason.count(","))
        _log.warning("saved %s in gristmill's own layout, which only grist_model.load reads: %s", target, closest)
    return name


def load(
    directory: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    *,
    quantized: bool = False,
) -> Transformer:
    """Read a Hugging Face directory of a known family: tensor by tensor, holding one copy of the weights.

    directory: a local one, or hf://owner/name[@revision], which is downloaded (hub.py). dtype None keeps what is stored; device
    None is the CPU. Quantized weights are read as the numbers they stand for; with quantized=True they stay packed, for running
    the model alone (quantized_layers.py), and dtype is that of the activations and of all the rest.

    Raises FileNotFoundError for a missing directory or file; ValueError for a config that no family reads, for missing,
    unexpected or misshapen tensors (all of them listed), for damaged files, and with quantized=True where nothing is quantized.
    """
    directory = local_directory(directory)
    family, config = _family_and_config(directory)
    layout = family.layout(config)
    model = build(config, device="meta")
    device = torch.device("cpu" if device is None else device)
    state: dict[str, Tensor] = {}
    with ExitStack() as stack:
        weights = open_weights(directory, layout, stack)
        packed = pack_layers(model, weights, device) if quantized else set()
        plain = [name for name in layout.shapes if name not in packed]
        for name in with_progress(plain, layout, (dtype or torch.float32).itemsize):
            kind = target_type(name, weights.type_of(name), dtype)
            state[name] = torch.empty(layout.shapes[name], dtype=kind, device=device)
            fill(state[name], name, weights)
    model.load_state_dict(state, strict=True, assign=True)
    if model.rope is not None:
        model.rope.reset(device)
    return model


def config_of(directory: str | Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory. Raises what `load` raises for its config.json."""
    return _family_and_config(local_directory(directory))[1]


def check_directory(directory: str | Path) -> list[Path]:
    """The weight files of a local directory that `load` would read, without reading the weights.

    Names, shapes, types and places of all tensors are checked by the headers. Raises what `load` raises.
    """
    directory = Path(directory)
    family, config = _family_and_config(directory)
    with ExitStack() as stack:
        weights = open_weights(directory, family.layout(config), stack)
        return sorted({file.path for file, _ in weights.stored.values()})


def opened(directory: Path, stack: ExitStack) -> tuple[ModelConfig, Weights]:
    """The config of a local directory and its weights, checked as `load` checks them, to be read a part at a time while `stack`
    is open. Raises what `load` raises."""
    family, config = _family_and_config(directory)
    return config, open_weights(directory, family.layout(config), stack)


def _family_and_config(directory: Path) -> tuple[ModuleType, ModelConfig]:
    path = directory / "config.json"
    hf_config = read_json(path, directory)
    try:
        family = family_of_hf(hf_config)
        return family, family.config_from_hf(hf_config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_into(model: Transformer, directory: str | Path) -> None:
    """Fill a model that is built, and perhaps sharded (FSDP2, expert parallelism), from a portable directory.

    Every process reads the rows that it holds, a tensor at a time, and converts them to the model's types: no process ever
    holds the whole model. The model must have storage (`to_empty`), its values do not matter.

    Raises what `load` raises, and ValueError for a model of another shape than the directory's.
    """
    directory = local_directory(directory)
    family, stored = _family_and_config(directory)
    _check_same_function(family, stored, model.config, directory)
    layout = family.layout(model.config)
    ours = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    check_coverage("the model", {name: tuple(tensor.shape) for name, tensor in ours.items()}, layout.shapes)
    on_meta = [name for name, tensor in ours.items() if tensor.is_meta]
    if on_meta:
        raise ValueError(f"{on_meta[0]} is on the meta device: call model.to_empty(device=...) before load_into")
    with ExitStack() as stack, torch.no_grad():
        weights = open_weights(directory, layout, stack)
        for name in with_progress(layout.shapes, layout, 4):
            local, offset = local_part(ours[name])
            fill(local, name, weights, offset)
    if model.rope is not None:
        model.rope.reset()


# What decides how a model is trained, and not what it computes.
_TRAINING = ("gristmill", "router_aux_loss_coef", "initializer_range", *ROUTER_TRAINING, "aux_loss_weight")


def _check_same_function(family: ModuleType, stored: ModelConfig, given: ModelConfig, directory: Path) -> None:
    """Compared as the family writes them: settings without a meaning, of a router in a dense model say, do not matter."""
    if (why := family.misfit(given)) and family.misfit(stored) is None:
        raise ValueError(f"{directory} cannot be the model that this config describes: {why}")
    there, here = family.config_to_hf(stored), family.config_to_hf(given)
    differing = [
        f"{key} ({there.get(key)} there, {here.get(key)} here)"
        for key in there | here
        if key not in _TRAINING and there.get(key) != here.get(key)
    ]
    if differing:
        raise ValueError(f"{directory} holds a model of another shape: {', '.join(differing)}")


def _state_and_config(
    model_or_state: Transformer | Mapping[str, Any], config: ModelConfig | None
) -> tuple[dict[str, Tensor], ModelConfig]:
    if isinstance(model_or_state, torch.nn.Module):
        if is_quantized(model_or_state):
            raise ValueError(
                "this model's weights are quantized, which save does not write: `python -m grist_tools.export` makes quantized "
                "directories, from the one that this was made of"
            )
        if config is not None and config != model_or_state.config:
            raise ValueError("the config given is not the model's own; leave it out when saving a model")
        state, config = model_or_state.state_dict(), model_or_state.config
    else:
        state = model_or_state
        if config is None:
            raise ValueError("saving a state dict needs its config: save(state, directory, config=...)")
    return {plain_name(name): tensor for name, tensor in state.items()}, config


def _check_tokenizer(tokenizer: Tokenizer | None, config: ModelConfig) -> None:
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocab_size is only {config.vocab_size}"
        )


def _check_state(state: Mapping[str, Tensor], layout: Layout) -> None:
    check_coverage("the state dict", {name: tuple(tensor.shape) for name, tensor in state.items()}, layout.shapes)
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: it has a shape but no values to save")
        if hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"{name} is sharded (a DTensor): gather the weights first with torch.distributed.checkpoint.state_dict."
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))"
            )


# Writing


def _write_config(
    draft: Path,
    target: Path,
    hf_config: dict[str, Any],
    written: list[torch.dtype],
    tokenizer: Tokenizer | None,
    generation: Mapping[str, Any],
) -> None:
    """config.json and generation_config.json. Without a tokenizer, that of an existing directory stays, and so its ids stay."""
    widest = str(reduce(torch.promote_types, written)).removeprefix("torch.")
    stays: dict[str, Any] = {}
    if tokenizer is not None:
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eot_id, "pad_token_id": tokenizer.eot_id}
    else:
        before = _read_if_there(target / "config.json")
        ids = {name: before.get(name) for name in _TOKEN_IDS}
        stays = _read_if_there(target / "generation_config.json")
    # "dtype" since transformers 4.56, "torch_dtype" before and in other software.
    _write_json(draft / "config.json", hf_config | {"dtype": widest, "torch_dtype": widest} | ids)
    found = {name: value for name, value in ids.items() if value is not None} | stays | dict(generation)
    if _SAMPLED & found.keys():  # transformers passes over these settings, with a warning, where it does not sample
        found.setdefault("do_sample", True)
    _write_json(draft / "generation_config.json", found)


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path, path.parent) if path.is_file() else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
