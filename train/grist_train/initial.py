"""Where a run's first weights come from: its seed, or a portable directory to go on from; and adapters beside them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

import grist_model
from grist_data import Tokenizer
from grist_data.prepare import PrepareConfig
from grist_data.tokenizer import TOKENIZER_FILE
from grist_model.adapters import read_adapter
from grist_model.families.decoder import ROUTER_TRAINING
from grist_model.hub import local_directory
from grist_model.lora import adapter_shape, attach, base_only, copy_adapter, initialize_adapters
from grist_model.transformer import Transformer
from grist_train.config import TrainConfig
from grist_train.data_config import DataConfig
from grist_train.distributed import World, barrier, compute_dtype

# Settings of a model that say how it is trained: the run's own count.
_OF_THE_RUN = (*ROUTER_TRAINING, "aux_loss_weight")
_END_BYTES = 2**20


def with_initial_model(config: TrainConfig, world: World) -> TrainConfig:
    """The configuration with the model that `initial` names, and with `initial` as a local directory, which is also where
    `tokenizer: initial` finds the tokenizer to prepare data with.

    The first rank downloads, the others wait. Raises what `grist_model.config_of` raises, and ValueError for samples longer
    than that model's context, and for ranks that its experts cannot be dealt out to.
    """
    if config.initial is None:
        if _with_tokenizer(config.data, "") != config.data:
            raise ValueError(
                "prepare.tokenizer is initial, the tokenizer of the initial model, but the run has no initial"
            )
        return config
    if world.is_main:
        local_directory(config.initial)
    barrier(world)
    directory = local_directory(config.initial)
    stored = grist_model.config_of(directory)
    model = replace(stored, **{name: getattr(config.model, name) for name in _OF_THE_RUN})
    found = replace(config, model=model, initial=str(directory), data=_with_tokenizer(config.data, str(directory)))
    found.check_model()
    return found


def _with_tokenizer(data: DataConfig, directory: str) -> DataConfig:
    def of(prepare: PrepareConfig | None) -> PrepareConfig | None:
        if prepare is None or prepare.tokenizer != "initial":
            return prepare
        return replace(prepare, tokenizer=directory)

    sources = {name: replace(source, prepare=of(source.prepare)) for name, source in data.sources.items()}
    return replace(data, prepare=of(data.prepare), sources=sources)


def check_tokenizer(config: TrainConfig, tokenizer: Tokenizer) -> None:
    """Raises ValueError when the data was made with another tokenizer than the initial model's."""
    if config.initial is None or not (local_directory(config.initial) / TOKENIZER_FILE).is_file():
        return
    theirs = Tokenizer.load(local_directory(config.initial))
    if theirs.sha256 != tokenizer.sha256:
        raise ValueError(
            f"the data was made with another tokenizer (sha256 {tokenizer.sha256}) than the model in {config.initial} has "
            f"({theirs.sha256}): prepare it with --tokenizer {config.initial}"
        )


def add_adapters(model: Transformer, config: TrainConfig, world: World) -> None:
    """With `lora`: freeze a model without storage and give it the adapters that are asked for, or that `lora.initial` has.

    Weights that are stored in the type of the arithmetic are kept in it: nothing is lost, and a frozen weight needs no
    float32 copy to add small updates to. Adapters are float32.

    Raises ValueError for targets that the model does not have, and what `read_adapter` raises.
    """
    if config.lora is None:
        return
    assert config.initial is not None, "TrainConfig has checked"
    if config.lora.initial is None:
        attach(model, adapter_shape(config.model, config.lora))
    else:
        attach(model, read_adapter(config.lora.initial, config.model)[0])
    dtype = compute_dtype(config.compute, world.device)
    if str(dtype).removeprefix("torch.") == _stored_type(config.initial):
        for parameter in model.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)


def _stored_type(directory: str) -> str | None:
    stored = json.loads((Path(directory) / "config.json").read_text(encoding="utf-8"))
    return stored.get("dtype") or stored.get("torch_dtype")


def fingerprint(config: TrainConfig) -> str | None:
    """xxh3_64 of what a run with adapters adds them to: of every weight file its name, its size and 1 MiB at either end."""
    if config.lora is None or config.initial is None:
        return None
    digest = xxhash.xxh3_64()
    for path in sorted(Path(config.initial).glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_END_BYTES))
            file.seek(max(0, size - _END_BYTES))
            digest.update(file.read(_END_BYTES))
    return digest.hexdigest()


def check_base(config: TrainConfig, state: dict[str, Any] | None) -> None:
    """Raises ValueError when a checkpoint's adapters were trained beside other weights than `initial` has now."""
    if state is not None and state.get("initial_xxh3") != fingerprint(config):
        raise ValueError(
            f"the checkpoints of this run hold adapters of other weights than {config.initial} has now: put those back, or use "
            "another --name"
        )


def fill(model: Transformer, config: TrainConfig, resuming: bool) -> None:
    """Give a model with storage, sharded or not, its first values. resuming: a checkpoint will replace what is trained."""
    if config.lora is None:
        if config.initial is None or resuming:
            grist_model.initialize(model, config.seed)
        else:
            grist_model.load_into(model, config.initial)
        return
    assert config.initial is not None, "TrainConfig has checked"
    with base_only(model):
        grist_model.load_into(model, config.initial)
    if config.lora.initial is None:
        initialize_adapters(model, config.seed)
    elif not resuming:
        copy_adapter(model, read_adapter(config.lora.initial, config.model)[1])
