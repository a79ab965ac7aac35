"""What a run leaves behind: held-out figures, the portable directory, samples and curves."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import grist_model
from grist_data import Tokenizer
from grist_data.chat_template import stop_ids
from grist_eval.bits_per_byte import bits_per_byte, together
from grist_eval.samples import draw_samples, write_samples
from grist_model.adapters import write_adapter
from grist_model.hub import public_name
from grist_model.lora import adapter_tensors, merged, shape_of
from grist_model.model_card import write_card
from grist_model.transformer import Transformer
from grist_train import curves
from grist_train.card import card_facts
from grist_train.checkpoint import Checkpoints, write_json
from grist_train.config import EvaluateConfig, TrainConfig
from grist_train.data import Data
from grist_train.distributed import World, barrier, full_state_dict
from grist_train.metrics import Metrics
from grist_train.question_tasks import task_scores

if TYPE_CHECKING:
    from grist_train.tasks import NextToken, Preference


def validate(
    model: Transformer, data: Data, sequence_length: int, config: TrainConfig, world: World, final: bool = False
) -> dict[str, Any]:
    """Bits per byte, perplexity and loss on the validation splits; on all of them when `final`.

    Of several sources, the figures of all their held-out text together, and under `sources` those of each. With
    `evaluate.tasks` also what `task_scores` says of them.
    """
    settings: EvaluateConfig = config.evaluate
    results = {
        name: bits_per_byte(
            model,
            held_out,
            sequence_length=sequence_length,
            stride=settings.final_stride if final else None,
            batch_size=settings.batch_size,
            rank=world.rank,
            world_size=world.size,
            group=world.host_group,
            max_tokens=None if final else settings.max_tokens,
            device=world.device,
            tokenizer=data.tokenizer,
            documents=config.data.document_masks or config.data.packing != "none",
            progress=final and sys.stderr.isatty(),
        )
        for name, held_out in data.held_out.items()
    }
    of_tasks = task_scores(model, data.tokenizer, settings, world)
    if len(results) == 1:
        return {**next(iter(results.values())), **of_tasks}
    return {**together(list(results.values())), "sources": results, **of_tasks}


def write_portable(model: Transformer, tokenizer: Tokenizer, config: TrainConfig, world: World) -> Path:
    """`RUN/model`: the Hugging Face directory of the model's family, gathered from all ranks and written by the first.

    With `lora`, `RUN/adapter` in PEFT's format as well, and the model with the adapters folded in.
    """
    directory = config.run_dir / "model"
    state = full_state_dict(model, world)
    if world.is_main:
        if config.lora is not None:
            assert config.initial is not None
            shape, base = shape_of(model), public_name(config.initial)
            pairs = adapter_tensors(state, config.model, shape)
            write_adapter(pairs, shape, config.model, config.run_dir / "adapter", base)
            state = merged(state, config.model, shape)
        ends = {} if tokenizer.chat_template is None else {"eos_token_id": sorted(stop_ids(tokenizer))}
        grist_model.save(
            state, directory, tokenizer=tokenizer, config=config.model, dtype=torch.float32, generation=ends
        )
    barrier(world)
    return directory


def finish(
    model: Transformer,
    task: NextToken | Preference,
    checkpoints: Checkpoints,
    metrics: Metrics,
    config: TrainConfig,
    world: World,
) -> None:
    """Evaluate, write the portable directory, read it back, sample from it and plot.

    Samples come from the files on disk, not from the model in memory: the run ends by proving that they load.
    """
    best = checkpoints.best()
    if config.checkpoint.portable == "best" and best is not None:
        checkpoints.load_weights(best["step"], model)
    result = task.validate(model, final=True) if task.has_held_out else None
    directory = write_portable(model, task.tokenizer, config, world)
    if world.is_main:
        if result is not None:
            write_json(config.run_dir / "evaluation.json", result)
            metrics.validation(config.steps, result)
        write_card(directory, card_facts(config, result, metrics.tokens))
        if config.sample.prompts:
            portable = grist_model.load(directory, device=world.device)
            samples = draw_samples(
                portable,
                task.tokenizer,
                config.sample.prompts,
                max_new_tokens=config.sample.max_new_tokens,
                device=str(world.device),
                chat=task.of_answers and task.tokenizer.chat_template is not None,
            )
            write_samples(samples, config.run_dir / "samples.txt")
        curves.plot(config.run_dir / "metrics.jsonl", config.run_dir / "curves.png")
    barrier(world)
