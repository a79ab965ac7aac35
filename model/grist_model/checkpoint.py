"""The portable directory: a model as other people's software loads it (config.json, safetensors, tokenizer)."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
from grist_model.transformer import Transformer, build, plain_name
from grist_model.weight_files import (
    check_coverage,
    open_weights,
    read_json,
    read_region,
    read_tensor,
    target_type,
    with_progress,
    write_weights,
)

_log = logging.getLogger(__name__)

MAX_FILE_BYTES = 5_000_000_000


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
) -> str:
    """Write a model as a Hugging Face directory and return the family it was written in ("gpt_oss", "llama", ...).

    The first family that expresses the model is taken; where there is none but our own a warning says why. Instead of a
    model, a full (gathered) state dict and its config will do. dtype: convert on the way (selection biases stay
    float32). Weights are split into files of at most max_file_bytes, unless one tensor alone is larger.

    Everything is written into a neighbouring directory first, which then takes the place of an existing one; files
    there that are not part of a model are carried over. An interrupted or failed save leaves the old directory as it
    was.

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
    with _replacing(target) as draft:
        written = write_weights(state, layout, draft, dtype, max_file_bytes)
        _write_config(draft, family.config_to_hf(config), written, tokenizer)
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
    directory: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Transformer:
    """Read a Hugging Face directory of a known family: tensor by tensor, holding one copy of the weights.

    directory: a local one, or hf://owner/name[@revision], which is downloaded (hub.py). dtype None keeps what is stored; device
    None is the CPU.

    Raises FileNotFoundError for a missing directory or file; ValueError for a config that no family reads, for missing,
    unexpected or misshapen tensors (all of them listed), and for damaged files.
    """
    directory = local_directory(directory)
    hf_config = read_json(directory / "config.json", directory)
    config = ModelConfig.from_hf(hf_config)
    layout = family_of_hf(hf_config).layout(config)
    model = build(config, device="meta")
    device = torch.device("cpu" if device is None else device)
    state: dict[str, Tensor] = {}
    with ExitStack() as stack:
        read = open_weights(directory, layout, stack)
        for name in with_progress(layout.shapes, layout, (dtype or torch.float32).itemsize):
            tensor = read_tensor(name, layout, read)
            tensor = tensor.to(device, target_type(name, tensor, dtype)).contiguous()
            # A part of a larger tensor would keep all of that in memory.
            state[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    model.load_state_dict(state, strict=True, assign=True)
    if model.rope is not None:
        model.rope.reset(device)
    return model


def config_of(directory: str | Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory. Raises what `load` raises for its config.json."""
    directory = local_directory(directory)
    return ModelConfig.from_hf(read_json(directory / "config.json", directory))


def load_into(model: Transformer, directory: str | Path) -> None:
    """Fill a model that is built, and perhaps sharded (FSDP2, expert parallelism), from a portable directory.

    Every process reads the rows that it holds, a tensor at a time, and converts them to the model's types: no process ever
    holds the whole model. The model must have storage (`to_empty`), its values do not matter.

    Raises what `load` raises, and ValueError for a model of another shape than the directory's.
    """
    directory = local_directory(directory)
    hf_config = read_json(directory / "config.json", directory)
    family = family_of_hf(hf_config)
    _check_same_function(family, ModelConfig.from_hf(hf_config), model.config, directory)
    layout = family.layout(model.config)
    ours = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    check_coverage("the model", {name: tuple(tensor.shape) for name, tensor in ours.items()}, layout.shapes)
    with ExitStack() as stack, torch.no_grad():
        read = open_weights(directory, layout, stack)
        for name in with_progress(layout.shapes, layout, 4):
            if ours[name].is_meta:
                raise ValueError(f"{name} is on the meta device: call model.to_empty(device=...) before load_into")
            local, offset = local_part(ours[name])
            local.copy_(read_region(name, layout, read, offset, tuple(local.shape)))
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


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A fresh directory beside `target` that takes its place when the block ends well and disappears when it does not.

    A directory cannot be exchanged in one step everywhere, so the old one is renamed away first. If the process dies
    between the two renames, it waits as .NAME.replaced and the next save puts it back before it begins.
    """
    draft, replaced = target.parent / f".{target.name}.saving", target.parent / f".{target.name}.replaced"
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / "config.json").exists())):
        raise FileExistsError(f"{target} exists and holds no model (no config.json): choose another directory")
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (draft, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    draft.mkdir()
    try:
        yield draft
        _sync(draft)
        if target.exists():
            target.rename(replaced)
            try:
                draft.rename(target)
            except BaseException:
                replaced.rename(target)
                raise
            _carry_over(replaced, target)
            shutil.rmtree(replaced)
        else:
            draft.rename(target)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def _carry_over(old: Path, new: Path) -> None:
    """Move what is no part of a model (notes; the tokenizer when none was given) from the old directory to the new."""
    for entry in old.iterdir():
        is_weights = entry.name.startswith("model") and entry.name.endswith((".safetensors", ".safetensors.index.json"))
        if not is_weights and not (new / entry.name).exists():
            entry.rename(new / entry.name)


def _sync(directory: Path) -> None:
    """Have the disk hold every file before any of them becomes the model."""
    for path in directory.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _write_config(
    directory: Path, hf_config: dict[str, Any], written: list[torch.dtype], tokenizer: Tokenizer | None
) -> None:
    widest = reduce(torch.promote_types, written)
    # "dtype" since transformers 4.56, "torch_dtype" before and in other software.
    hf_config |= {"dtype": str(widest).removeprefix("torch."), "torch_dtype": str(widest).removeprefix("torch.")}
    eot_id = None if tokenizer is None else tokenizer.eot_id
    bos_id = None if tokenizer is None else tokenizer.bos_id
    ids = {"bos_token_id": bos_id, "eos_token_id": eot_id, "pad_token_id": eot_id}
    _write_json(directory / "config.json", hf_config | ids)
    _write_json(directory / "generation_config.json", {key: value for key, value in ids.items() if value is not None})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
