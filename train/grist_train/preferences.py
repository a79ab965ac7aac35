"""The pairs of a run on preferences: read, divided, and measured under the reference before anything is trained.

P pairs of a micro-batch, S = 2 * P sequences.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from grist_data import Tokenizer
from grist_data.contrast import contrasting_rows
from grist_data.preferences import PreferencePair, pairs_of, read_preferences
from grist_data.sources import SOURCES
from grist_model.transformer import Transformer
from grist_train.config import TrainConfig
from grist_train.data import check_batch
from grist_train.distributed import World, barrier
from grist_train.preference_batches import PreferenceBatches, digest, drawn, pair_batch, split
from grist_train.preference_config import PreferenceConfig
from grist_train.preference_loss import FIGURES, answer_log_probabilities, preference_loss

REFERENCE_FILE = "reference.npz"


@dataclass(frozen=True)
class Preferences:
    """train, held_out: numbers of pairs. reference_P2: (pairs, 2) float64, log-probabilities of the chosen and the rejected
    answer under the reference, in nats."""

    pairs: Sequence[PreferencePair]
    train: list[int]
    held_out: list[int]
    reference_P2: np.ndarray


def read_pairs(config: TrainConfig, tokenizer: Tokenizer, world: World) -> list[PreferencePair]:
    """The pairs that fit the model, the same on every rank; says how many do not.

    Raises what `read_preferences` raises, and ValueError when no pair is short enough.
    """
    settings = _settings(config)
    most = min(settings.max_tokens or config.model.context_length, config.model.context_length)
    if settings.contrast is None:
        where = ", ".join(settings.paths)
        found = read_preferences(settings.paths, tokenizer, raw_text=settings.raw_text)
    else:
        where = settings.contrast.source
        documents = SOURCES[where](**settings.contrast.source_options())
        found = pairs_of(contrasting_rows(documents, config.seed), tokenizer)
    # The last token is only said, never read.
    pairs = [pair for pair in found if max(len(pair.chosen_ids), len(pair.rejected_ids)) - 1 <= most]
    if not pairs:
        raise ValueError(
            f"none of the {len(found):,} pairs of {where} fits into {most} tokens "
            "(preferences.max_tokens, and the context of the model)"
        )
    if len(pairs) < len(found) and world.is_main:
        print(
            f"{len(found) - len(pairs):,} of {len(found):,} pairs are longer than {most} tokens and left out",
            file=sys.stderr,
        )
    return drawn(pairs, settings.max_pairs, config.seed)


def measured(
    pairs: Sequence[PreferencePair], config: TrainConfig, model: Transformer, world: World, resuming: bool
) -> Preferences:
    """The pairs with the reference's log-probabilities: those of the model as it is, before the first step.

    They are kept in `RUN/reference.npz`, because a run that goes on no longer has the reference.
    Raises ValueError when a run goes on without that file, or with other pairs.
    """
    settings, file = _settings(config), config.run_dir / REFERENCE_FILE
    train, held_out = split(pairs, settings.val_fraction, config.seed)
    key = digest(pairs)
    if resuming:
        return Preferences(pairs, train, held_out, _read_reference(file, key))
    reference_P2 = _log_probabilities(pairs, model, config, world)
    if world.is_main:
        _write_reference(file, key, reference_P2)
    barrier(world)
    return Preferences(pairs, train, held_out, reference_P2)


def open_pair_batches(
    preferences: Preferences, config: TrainConfig, world: World, state: dict[str, Any] | None
) -> PreferenceBatches:
    """Batches of a run from its beginning, or from where `state`, the state.json of a checkpoint, left them."""
    batches = PreferenceBatches(
        [preferences.pairs[i] for i in preferences.train],
        preferences.reference_P2[preferences.train],
        config.batch.global_size,
        check_batch(config.phases[0], world),
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )
    if state is not None:
        batches.load_state_dict(state["batches"])
    return batches


def validate_pairs(model: Transformer, preferences: Preferences, config: TrainConfig, world: World) -> dict[str, Any]:
    """Loss and figures of all pairs that are held out: means over them."""
    sums = torch.zeros(1 + len(FIGURES), dtype=torch.float64)
    with _evaluating(model):
        for numbers, counted in _dealt(preferences.held_out, config, world):
            batch = pair_batch([preferences.pairs[i] for i in numbers], preferences.reference_P2[numbers], world.device)
            result = preference_loss(model, config.model, batch, _settings(config), 1, batch.ids_BT.numel())
            if counted:
                assert result.figures is not None
                sums += torch.cat([result.sums[:1], result.figures.float()]).cpu().double()
    dist.all_reduce(sums, group=world.host_group)
    means = (sums / len(preferences.held_out)).tolist()
    return {"loss": means[0], **dict(zip(FIGURES, means[1:], strict=True)), "pairs": len(preferences.held_out)}


def _settings(config: TrainConfig) -> PreferenceConfig:
    assert config.preferences is not None
    return config.preferences


def _log_probabilities(
    pairs: Sequence[PreferencePair], model: Transformer, config: TrainConfig, world: World
) -> np.ndarray:
    """(pairs, 2) float64, every rank a share of them."""
    found_P2 = torch.zeros(len(pairs), 2, dtype=torch.float64)
    dealt = list(_dealt(range(len(pairs)), config, world))
    with _evaluating(model):
        for numbers, counted in tqdm(
            dealt, desc="reference", unit="batch", dynamic_ncols=True, disable=None if world.is_main else True
        ):
            batch = pair_batch([pairs[i] for i in numbers], None, world.device)
            log_p_S, _ = answer_log_probabilities(model, config.model, batch)
            if counted:
                found_P2[numbers] = log_p_S.double().view(-1, 2).cpu()
    dist.all_reduce(found_P2, group=world.host_group)
    return found_P2.numpy()


def _dealt(numbers: Sequence[int], config: TrainConfig, world: World) -> Iterator[tuple[list[int], bool]]:
    """(numbers of a micro-batch, whether they count) for this rank. All ranks get equally many: sharded models wait for each
    other in every call, so one that runs out is given pairs that do not count."""
    size = config.batch.micro_size or max(1, config.batch.global_size // world.size)
    parts = [list(numbers[at : at + size]) for at in range(0, len(numbers), size)]
    for first in range(0, len(parts), world.size):
        mine = first + world.rank
        yield (parts[mine], True) if mine < len(parts) else (parts[0], False)


@contextmanager
def _evaluating(model: Transformer) -> Iterator[None]:
    """No gradients, and the model as it is used."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def _write_reference(file: Path, key: str, reference_P2: np.ndarray) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "wb") as out:
        np.savez(out, pairs=np.array(key), log_probabilities=reference_P2)
    partial.replace(file)


def _read_reference(file: Path, key: str) -> np.ndarray:
    if not file.is_file():
        raise ValueError(
            f"{file} is not there: it holds what the reference says of the pairs, and a run cannot go on without it. Begin "
            "again under another --name"
        )
    with np.load(file, allow_pickle=False) as stored:
        if str(stored["pairs"]) != key:
            raise ValueError(f"the run began with other pairs than those of preferences.paths (see {file})")
        return stored["log_probabilities"]
