"""The portable directory: a model as other people's software loads it (config.json, safetensors, tokenizer)."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from grist_model.config import ModelConfig
from grist_model.families import FAMILIES, family_for, family_of_hf
from grist_model.families.layout import TensorMap
from grist_model.transformer import Transformer, build, plain_name

_log = logging.getLogger(__name__)

MAX_FILE_BYTES = 5_000_000_000
_PROGRESS_FROM_BYTES = 1_000_000_000
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


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
    """Write a model as a Hugging Face directory and return the family it was written in ("gpt_oss" or "gristmill").

    The first family that expresses the model is taken; where that is not GPT-OSS a warning says why. Instead of a
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
    maps = family.tensors(config)
    _check_state(state, maps)
    target = Path(directory).resolve()
    with _replacing(target) as draft:
        written = _write_weights(state, maps, draft, dtype, max_file_bytes)
        _write_config(draft, family.config_to_hf(config), written, tokenizer)
        if tokenizer is not None:
            tokenizer.save(draft)
    if name == "gpt_oss":
        _log.info("saved %s in the layout of GPT-OSS", target)
    else:
        _log.warning(
            "saved %s in gristmill's own layout, which only grist_model.load reads: %s",
            target,
            FAMILIES["gpt_oss"].misfit(config, state),
        )
    return name


def load(
    directory: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Transformer:
    """Read a Hugging Face directory of a known family: tensor by tensor, holding one copy of the weights.

    dtype None keeps what is stored; device None is the CPU.

    Raises FileNotFoundError for a missing directory or file; ValueError for a config that no family reads, for missing,
    unexpected or misshapen tensors (all of them listed), and for damaged files.
    """
    directory = Path(directory)
    hf_config = _read_json(directory / "config.json", directory)
    config = ModelConfig.from_hf(hf_config)
    maps = family_of_hf(hf_config).tensors(config)
    model = build(config, device="meta")
    device = torch.device("cpu" if device is None else device)
    state: dict[str, Tensor] = {}
    with ExitStack() as stack:
        read = _open_weights(directory, maps, stack)
        for tensor_map in _progress(maps, _bytes_of(maps, dtype or torch.float32), "load"):
            tensor = _read_tensor(tensor_map, read, directory)
            state[tensor_map.name] = tensor.to(device, _target_type(tensor_map, tensor, dtype))
    model.load_state_dict(state, strict=True, assign=True)
    model.rope.reset(device)
    return model


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


def _check_state(state: Mapping[str, Tensor], maps: list[TensorMap]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _check_coverage("the state dict", shapes, {m.name: m.shape for m in maps})
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: it has a shape but no values to save")
        if hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"{name} is sharded (a DTensor): gather the weights first with torch.distributed.checkpoint.state_dict."
                "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))"
            )


def _check_coverage(where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ValueError that lists every tensor missing, left over or of another shape."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    misshapen = [
        f"{name} is {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = (("missing", missing), ("unexpected", extra), ("misshapen", misshapen))
    if any(names for _, names in problems):
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in problems if names)
        raise ValueError(f"{where} does not match the model's config. {listed}")


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


def _write_weights(
    state: Mapping[str, Tensor], maps: list[TensorMap], directory: Path, dtype: torch.dtype | None, max_file_bytes: int
) -> list[Tensor]:
    """Write the files and their index; returns one empty tensor of each type written."""
    stored = [m for m in maps if m.hf_name is not None]
    types = {m.name: _target_type(m, state[m.name], dtype) for m in stored}
    sizes = {m.name: state[m.name].numel() * types[m.name].itemsize for m in stored}
    files = _split(stored, sizes, max_file_bytes)
    weight_map: dict[str, str] = {}
    bar = tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, desc="save", disable=_quiet(sum(sizes.values())))
    with bar:
        for number, members in enumerate(files, 1):
            name = _SINGLE if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
            tensors = {str(m.hf_name): _for_file(m, state[m.name], types[m.name]) for m in members}
            save_file(tensors, directory / name, metadata={"format": "pt"})  # transformers refuses files without it
            weight_map.update(dict.fromkeys(tensors, name))
            bar.update(sum(sizes[m.name] for m in members))
    if len(files) > 1:
        values = sum(state[m.name].numel() for m in stored)
        index = {"metadata": {"total_size": sum(sizes.values()), "total_parameters": values}, "weight_map": weight_map}
        _write_json(directory / _INDEX, index)
    return [torch.empty(0, dtype=t) for t in Counter(types.values())]


def _target_type(tensor_map: TensorMap, tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if dtype is None or not tensor.is_floating_point() or tensor_map.name.endswith("selection_bias"):
        return tensor.dtype
    return dtype


def _split(maps: list[TensorMap], sizes: Mapping[str, int], max_file_bytes: int) -> list[list[TensorMap]]:
    files: list[list[TensorMap]] = [[]]
    filled = 0
    for tensor_map in maps:
        size = sizes[tensor_map.name]
        if files[-1] and filled + size > max_file_bytes:
            files.append([])
            filled = 0
        files[-1].append(tensor_map)
        filled += size
    return files


def _for_file(tensor_map: TensorMap, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().to("cpu", dtype)
    if tensor_map.to_hf is not None:
        tensor = tensor_map.to_hf(tensor)
    tensor = tensor.contiguous()
    # A view into a larger storage would be refused by safetensors when its neighbour is saved too.
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _write_config(
    directory: Path, hf_config: dict[str, Any], written: list[Tensor], tokenizer: Tokenizer | None
) -> None:
    widest = reduce(torch.promote_types, [tensor.dtype for tensor in written])
    # "dtype" since transformers 4.56, "torch_dtype" before and in other software.
    hf_config |= {"dtype": str(widest).removeprefix("torch."), "torch_dtype": str(widest).removeprefix("torch.")}
    eot_id = None if tokenizer is None else tokenizer.eot_id
    bos_id = None if tokenizer is None else tokenizer.bos_id
    ids = {"bos_token_id": bos_id, "eos_token_id": eot_id, "pad_token_id": eot_id}
    _write_json(directory / "config.json", hf_config | ids)
    _write_json(directory / "generation_config.json", {key: value for key, value in ids.items() if value is not None})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# Reading


def _read_json(path: Path, directory: Path) -> dict[str, Any]:
    if not path.is_file():
        hint = ""
        if (directory.parent / f".{directory.name}.replaced").is_dir():
            hint = f"; an interrupted save left the last model in {directory.parent / f'.{directory.name}.replaced'}"
        raise FileNotFoundError(f"{path} does not exist: {directory} is not a model directory{hint}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, but holds a {type(content).__name__}")
    return content


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _INDEX).is_file():
        weight_map = _read_json(directory / _INDEX, directory).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{directory / _INDEX} has no weight_map")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise ValueError(f"{directory / _INDEX} names files outside its directory: {', '.join(outside)}")
    else:
        names = [_SINGLE]
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{directory} lacks {', '.join(missing)} (weights are read from safetensors only, never from pickled files)"
        )
    return [directory / name for name in names]


def _open_weights(directory: Path, maps: list[TensorMap], stack: ExitStack) -> Callable[[str], Tensor | None]:
    """Open every weight file and check names and shapes -> a function from a name in the files to its tensor."""
    files: dict[str, Any] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(directory):
        try:
            file = stack.enter_context(safe_open(path, framework="pt"))
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file: {error}") from error
        for name in file.keys():  # noqa: SIM118 - a safetensors file is not iterable
            files[name] = file
            shapes[name] = tuple(file.get_slice(name).get_shape())
    copies = {name for m in maps for name in m.also_named}
    needed = {name: shape for name, shape in shapes.items() if name not in copies}
    _check_coverage(str(directory), needed, {m.hf_name: m.shape for m in maps if m.hf_name is not None})
    return lambda name: files[name].get_tensor(name) if name in files else None


def _read_tensor(tensor_map: TensorMap, read: Callable[[str], Tensor | None], directory: Path) -> Tensor:
    if tensor_map.hf_name is None:
        return torch.zeros(tensor_map.shape)
    tensor = read(tensor_map.hf_name)
    assert tensor is not None
    for name in tensor_map.also_named:
        copy = read(name)
        if copy is not None and not torch.equal(copy, tensor):
            raise ValueError(
                f"{directory}: {name} differs from {tensor_map.hf_name}, but config.json says they are tied"
            )
    return tensor if tensor_map.from_hf is None else tensor_map.from_hf(tensor)


def _progress(maps: list[TensorMap], total_bytes: int, what: str) -> Iterator[TensorMap]:
    yield from tqdm(maps, desc=what, unit=" tensors", disable=_quiet(total_bytes))


def _bytes_of(maps: list[TensorMap], dtype: torch.dtype) -> int:
    return sum(torch.Size(m.shape).numel() for m in maps) * dtype.itemsize


def _quiet(total_bytes: int) -> bool:
    return total_bytes < _PROGRESS_FROM_BYTES
