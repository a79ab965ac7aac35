"""Where a run's first weights come from: its seed, or a portable directory to go on from."""

from __future__ import annotations

from dataclasses import replace

import grist_model
from grist_data import Tokenizer
from grist_data.tokenizer import TOKENIZER_FILE
from grist_model.families.decoder import ROUTER_TRAINING
from grist_model.hub import local_directory
from grist_model.transformer import Transformer
from grist_train.config import TrainConfig
from grist_train.distributed import World, barrier

# Settings of a model that say how it is trained: the run's own count.
_OF_THE_RUN = (*ROUTER_TRAINING, "aux_loss_weight")


def with_initial_model(config: TrainConfig, world: World) -> TrainConfig:
    """The configuration with the model that `initial` names, and with `initial` as a local directory.

    The first rank downloads, the others wait. Raises what `grist_model.config_of` raises, and ValueError for samples longer
    than that model's context, and for ranks that its experts cannot be dealt out to.
    """
    if config.initial is None:
        return config
    if world.is_main:
        local_directory(config.initial)
    barrier(world)
    directory = local_directory(config.initial)
    stored = grist_model.config_of(directory)
    model = replace(stored, **{name: getattr(config.model, name) for name in _OF_THE_RUN})
    found = replace(config, model=model, initial=str(directory))
    found.check_model()
    return found


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


def fill(model: Transformer, config: TrainConfig, resuming: bool) -> None:
    """Give a model with storage, sharded or not, its first values. resuming: a checkpoint will replace them."""
    if config.initial is None or resuming:
        grist_model.initialize(model, config.seed)
    else:
        grist_model.load_into(model, config.initial)
