"""Training steps of the benchmark: one model, from the same files, in our trainer's step and in transformers'.

Every step begins with float32 weights, computes in the type of the setup, and ends with AdamW: the same rate for all
parameters, no weight decay, gradients clipped to a norm of 1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from grist_data import Batch
    from grist_model.config import ModelConfig
    from grist_train.config import TrainConfig

OURS, THEIRS = "gristmill", "transformers"
LR, BETAS, EPS, CLIP = 1e-3, (0.9, 0.95), 1e-8, 1.0


@dataclass(frozen=True)
class Setup:
    """What a contestant trains, and how.

    Attributes:
        directory: The initial weights, in a family that both read.
        device: `cpu` or `cuda`.
        dtype: Of the arithmetic, `float32` or `bfloat16`.
        recompute: Whether blocks are computed again in the backward.
        micro_size, micro_batches: Sequences in a micro-batch, and micro-batches a step.
    """

    directory: str
    model: ModelConfig
    device: str
    dtype: str
    recompute: bool
    sequence_length: int
    micro_size: int
    micro_batches: int

    @property
    def tokens_per_step(self) -> int:
        return self.sequence_length * self.micro_size * self.micro_batches


# Micro-batches of a step to its loss: the mean over all targets before the update, 0-dimensional; all of it on the device.
Step = Callable[[list["Batch"]], "torch.Tensor"]


def run_of(setup: Setup) -> TrainConfig:
    """The same as a run of ours: what the planner is asked about, too."""
    from grist_train.config import BatchConfig, ComputeConfig, DataConfig, OptimizerConfig, TrainConfig

    return TrainConfig(
        model=setup.model,
        data=DataConfig(sequence_length=setup.sequence_length),
        batch=BatchConfig(global_size=setup.micro_size * setup.micro_batches, micro_size=setup.micro_size),
        optimizer=OptimizerConfig(name="adamw", lr=LR, betas=BETAS, eps=EPS, clip=CLIP),
        compute=ComputeConfig(
            dtype=setup.dtype,  # pyright: ignore[reportArgumentType]  (one of two strings)
            activation_checkpointing="block" if setup.recompute else "none",
        ),
    )


def batches(setup: Setup, step: int) -> list[Batch]:
    """Of a step: ids of which few are frequent, as in text, so that there is something to learn at once."""
    import torch

    from grist_data import Batch

    draw = torch.Generator().manual_seed(step)
    shape = (setup.micro_batches, setup.micro_size, setup.sequence_length + 1)
    ids = (torch.rand(shape, generator=draw) ** 4 * setup.model.vocab_size).long().to(setup.device)
    return [Batch(rows[:, :-1], rows[:, 1:].contiguous(), None, rows[:, 1:].numel()) for rows in ids]


def ours(setup: Setup) -> Step:
    """As grist_train.__main__ on one rank, from the loss to the update."""
    import grist_model
    from grist_train import distributed, optimizer
    from grist_train.gradient_norms import clip_by_group, gradient_groups
    from grist_train.loss import language_model_loss, step_values
    from grist_train.step_guard import StepGuard, arm

    config = run_of(setup)
    world = distributed.start(setup.device)
    model = grist_model.build(config.model, device="meta")
    distributed.prepare_blocks(model, config.compute)
    distributed.shard(model, world, config.compute)
    model.to_empty(device=world.device)
    grist_model.load_into(model, setup.directory)
    optimizers = optimizer.build(model, config.optimizer)
    groups, guard = gradient_groups(model), StepGuard(config.guard, world.device)
    tokens = setup.tokens_per_step

    def step(micro_batches: list[Batch]) -> torch.Tensor:
        results = []
        for i, batch in enumerate(micro_batches):
            distributed.set_last_micro_batch(model, i == len(micro_batches) - 1, config.compute)
            results.append(language_model_loss(model, config.model, batch, tokens, tokens))
            results[-1].objective.backward()
        norm, _ = clip_by_group(groups, config.optimizer.clip)
        values = step_values(results, norm, tokens, tokens, config.model, lambda sums: sums)
        arm(optimizers, guard.judge(values[0], values[1]))
        for each in optimizers:
            each.step()
            each.zero_grad()
        return values[0]

    return step


def theirs(setup: Setup) -> Step:
    """A step as transformers.Trainer takes it: the model's own loss, accumulated over micro-batches by the targets of all of
    them (`num_items_in_batch`), under autocast where it computes in bfloat16; its own choice of kernels.

    Raises ImportError without transformers.
    """
    import torch

    model: Any = _transformers_model(setup)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0, fused=True)
    tokens = torch.tensor(setup.tokens_per_step, device=setup.device)
    narrow = setup.dtype == "bfloat16"

    def step(micro_batches: list[Batch]) -> torch.Tensor:
        total = torch.zeros((), device=setup.device)
        for batch in micro_batches:
            with torch.autocast(setup.device, torch.bfloat16) if narrow else nullcontext():
                out = model(
                    input_ids=batch.ids_BT, labels=batch.targets_BT, shift_labels=batch.targets_BT,
                    num_items_in_batch=tokens, use_cache=False,
                )  # fmt: skip
            out.loss.backward()
            total += out.loss.detach()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def _transformers_model(setup: Setup) -> Any:
    import torch

    try:
        import transformers
    except ImportError as error:
        raise ImportError("the benchmark runs beside transformers: pip install 'gristmill[export]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(setup.directory, dtype=torch.float32)
    model = model.to(setup.device)
    if setup.recompute:
        # transformers 5.2x renames it.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.train()


STEPS: dict[str, Callable[[Setup], Step]] = {OURS: ours, THEIRS: theirs}
