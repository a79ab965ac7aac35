"""What a run is made of: plain dataclasses, one YAML file, and dotted overrides on the command line.

    python -m grist_train --config train/runs/quickstart.yaml --optimizer.lr 3e-4 --steps 100

Nothing here imports torch, so `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from grist_model.config import ModelConfig
from grist_model.lora_config import LoraConfig
from grist_train.checkpoint_config import CheckpointConfig, check_checkpoint
from grist_train.data_config import BatchConfig, DataConfig, Phase, check_data, check_lengths, phases
from grist_train.guard_config import GuardConfig, check_guard
from grist_train.logging_config import LoggingConfig, ProfileConfig, check_logging
from grist_train.preference_config import PreferenceConfig, check_preferences
from grist_train.step_config import ComputeConfig, EveryBlocks, OptimizerConfig, ScheduleConfig

__all__ = [
    "ComputeConfig",
    "EveryBlocks",
    "OptimizerConfig",
    "ScheduleConfig",
    "TrainConfig",
    "load",
    "parse",
    "to_dict",
]


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out evaluation.

    Attributes:
        every: Steps between evaluations during training; 0 evaluates only at the end.
        max_tokens: Tokens of the validation split read each time during training; None reads all. The final figure
            always reads all of it.
        batch_size: Sequences a rank evaluates at once.
        final_stride: New tokens scored by each window of the final evaluation; None is the sequence length (no overlap).
            A smaller stride gives every token more context and costs proportionally more.
        tasks: Questions that are asked as well, each time and at the end: name of a task of grist_eval -> file of rows in the
            columns of its dataset, or `hub` for the dataset itself.
        task_rows: The first rows of each task; None asks all.
        task_shots: Examples before each question; None is the task's own number.
    """

    every: int = 100
    max_tokens: int | None = 65_536
    batch_size: int = 16
    final_stride: int | None = None
    tasks: dict[str, str] = field(default_factory=dict)
    task_rows: int | None = 200
    task_shots: int | None = None

    def __post_init__(self) -> None:
        for key, least in (("every", 0), ("max_tokens", 1), ("batch_size", 1), ("task_rows", 1), ("task_shots", 0)):
            value = getattr(self, key)
            _require(value is None or value >= least, f"evaluate.{key} must be at least {least}, but is {value}")


@dataclass(frozen=True)
class SampleConfig:
    """Texts written to `RUN/samples.txt` after training; no prompts, no samples. A run that trains answers in conversations
    takes the prompts for a user's messages, and writes answers."""

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = 120


@dataclass(frozen=True)
class TrainConfig:
    """One run.

    Attributes:
        name: Folder of the run under `out`.
        out: Where run folders live.
        seed: Decides initial weights and data order, whatever the number of machines.
        steps: Optimizer steps.
        initial: Portable directory, or hf://owner/name, whose weights the run begins with; None draws them from the seed. The
            model is then the one that is there: of `model` only what concerns training counts (balance, weights of losses).
        lora: Train low-rank adapters of that model instead of its weights; None trains the weights.
        preferences: Train on pairs of answers (DPO) instead of on the tokens of `data`; sizes of a batch are then pairs.
        stop_at: Stop, checkpoint and exit after this step as if interrupted; the schedule still spans `steps`.
        device: auto (CUDA, else MPS, else CPU), cuda, mps or cpu.
        log_every: Steps between reads of the loss from the device; every step is recorded all the same.
        profile: Record some steps with every operation in them; None records none.
        watchdog_seconds: End the process (to be restarted) when nothing in it has gone on for so long during training; longer
            than the longest evaluation. null waits for ever.
    """

    name: str = "run"
    out: str = "runs"
    seed: int = 0
    initial: str | None = None
    lora: LoraConfig | None = None
    steps: int = 100
    stop_at: int | None = None
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    log_every: int = 10
    data: DataConfig = field(default_factory=DataConfig)
    preferences: PreferenceConfig | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    profile: ProfileConfig | None = None
    watchdog_seconds: float | None = 3600.0

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"steps must be at least 1, but is {self.steps}")
        _require(
            self.watchdog_seconds is None or self.watchdog_seconds > 0,
            f"watchdog_seconds must be above 0, or null for none, but is {self.watchdog_seconds}",
        )
        _require(self.log_every >= 1, f"log_every must be at least 1, but is {self.log_every}")
        _require(
            1 <= self.optimizer.muon_iterations <= 5,
            f"optimizer.muon_iterations must be 1 to 5, but is {self.optimizer.muon_iterations}",
        )
        check_data(self.data, self.batch)
        check_guard(self.guard)
        check_logging(self.logging, self.profile, self.steps)
        if self.preferences is not None:
            self._check_preferences(self.preferences)
        check_checkpoint(self.checkpoint)
        for key in ("expert_parallel", "replicate", "context_parallel"):
            ranks = getattr(self.compute, key)
            _require(ranks >= 1, f"compute.{key} must be at least 1, but is {ranks}")
        kept = self.compute.activation_checkpointing
        if isinstance(kept, EveryBlocks):
            _require(
                kept.every >= 1,
                f"compute.activation_checkpointing.every must be at least 1, but is {kept.every}: 1 is every block",
            )
        if self.lora is not None:
            self._check_lora()
        if self.initial is None:  # else the model is not known yet: initial.py checks when it is
            self.check_model()
        if self.checkpoint.portable == "best":
            every, evaluate = self.checkpoint.every, self.evaluate.every
            _require(
                every > 0 and evaluate > 0 and every % evaluate == 0,
                "checkpoint.portable=best needs a validation loss for every checkpoint: make checkpoint.every "
                f"({every}) a multiple of evaluate.every ({evaluate})",
            )

    def _check_lora(self) -> None:
        _require(
            self.initial is not None,
            "lora adapts a model that is there: give its directory, or hf://owner/name, as initial",
        )
        _require(
            self.optimizer.name == "adamw",
            f"lora trains its matrices with AdamW, but optimizer.name is {self.optimizer.name}: set it to adamw (an "
            "orthogonalised update of A and B apart is not one of their product)",
        )

    def check_model(self) -> None:
        """Whether the rest fits the model. Raises ValueError."""
        if self.preferences is None:
            check_lengths(self.phases, self.model.context_length)
        if self.compute.context_parallel > 1:
            self._check_shared_sequences(self.compute.context_parallel)
        ranks, experts = self.compute.expert_parallel, self.model.experts
        if ranks > 1:
            _require(
                experts > 0,
                f"compute.expert_parallel {ranks} needs a mixture of experts, but model.experts is 0: set it to 1",
            )
            _require(
                experts % ranks == 0,
                f"compute.expert_parallel {ranks} does not divide model.experts {experts}: use a divisor of it",
            )

    def _check_shared_sequences(self, ranks: int) -> None:
        what = f"compute.context_parallel {ranks}"
        for phase in self.phases:
            _require(
                phase.sequence_length % (2 * ranks) == 0,
                f"{what} cuts every sequence into {2 * ranks} pieces, which do not divide data.sequence_length "
                f"{phase.sequence_length}: make it a multiple of {2 * ranks}",
            )
        _require(
            not self.data.document_masks and self.data.packing == "none",
            f"{what} does not keep attention inside documents: set data.document_masks to false and data.packing to none",
        )
        _require(self.preferences is None, f"{what} does not share pairs of answers: set it to 1 with preferences")
        scaling = self.model.rope_scaling
        _require(
            scaling is None or scaling.kind != "dynamic",
            f"{what} does not fit model.rope_scaling.kind dynamic, whose angles depend on the last token of a call",
        )

    def _check_preferences(self, preferences: PreferenceConfig) -> None:
        check_preferences(preferences)
        _require(
            self.initial is not None,
            "preferences need a model that answers already: name its directory as `initial`",
        )
        _require(self.data == DataConfig(), "preferences stand instead of data: give one or the other")
        _require(
            self.checkpoint.portable == "last" or preferences.val_fraction > 0,
            "checkpoint.portable=best needs pairs that are held out: set preferences.val_fraction above 0",
        )

    def evaluation_due(self, step: int) -> bool:
        """Whether to evaluate after `step`. The end of a run evaluates everything anyway, so the last step only needs the
        quick figure when it competes for the best checkpoint."""
        if step == self.steps:
            return self.checkpoint.portable == "best"
        return self.evaluate.every > 0 and step % self.evaluate.every == 0

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What holds from which step on: sizes, lengths and shares, in order."""
        return phases(self.data, self.batch)

    @property
    def run_dir(self) -> Path:
        """`RUN`: everything a run writes is under here."""
        return Path(self.out) / self.name


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def valid_keys(cls: type, prefix: str = "") -> set[str]:
    """Every dotted key that a YAML file or a command line may set, e.g. `optimizer.lr`."""
    keys: set[str] = set()
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        key = f"{prefix}{f.name}"
        keys.add(key)
        for option in _members(hints[f.name]):
            if dataclasses.is_dataclass(option):
                keys |= valid_keys(typing.cast(type, option), f"{key}.")
    return keys


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union type, or the type itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def _open_ended(cls: type, key: str) -> bool:
    """True below a plain dict field, whose keys are the user's own."""
    hint: Any = cls
    for part in key.split("."):
        options = [o for o in _members(hint) if dataclasses.is_dataclass(o)]
        if not options:
            return any(typing.get_origin(o) is dict or o is dict for o in _members(hint))
        hints = typing.get_type_hints(options[0])
        if part not in hints:
            return False
        hint = hints[part]
    return False


def check_keys(keys: list[str], where: str, cls: type = TrainConfig) -> None:
    """Raise ValueError for a key that no configuration has, naming the nearest one that exists."""
    known = valid_keys(cls)
    for key in keys:
        if key in known or _open_ended(cls, key):
            continue
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        same_leaf = sorted(k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1])
        hint = (same_leaf or near or [None])[0]
        advice = f"did you mean `{hint}`?" if hint else "`--help` lists all keys"
        raise ValueError(f"unknown key `{key}` in {where}: {advice}")


def _flatten(tree: dict[str, Any], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, value in tree.items():
        keys.append(f"{prefix}{name}")
        if isinstance(value, dict):
            keys += _flatten(value, f"{prefix}{name}.")
    return keys


def _check_yaml(path: Path) -> None:
    if not path.is_file():
        known = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"no such run file: {path}" + (f"; there are {', '.join(known)}" if known else ""))
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a mapping of keys to values, but holds {type(tree).__name__}")
    check_keys(_flatten(tree), str(path))


def _check_arguments(arguments: list[str]) -> None:
    for position, argument in enumerate(arguments):
        name, _, value = argument.partition("=")
        if name == "--config":
            _check_yaml(Path(value or (arguments[position + 1] if position + 1 < len(arguments) else "")))
        elif name.startswith("--") and name not in ("--help", "--print_config"):
            check_keys([name[2:]], "the command line")


def _parser() -> Any:
    from jsonargparse import ActionConfigFile, ArgumentParser

    parser = ArgumentParser(prog="python -m grist_train", description="Train a model: one YAML file is one run.")
    parser.add_argument("--config", action=ActionConfigFile, help="a run file, e.g. train/runs/quickstart.yaml")
    parser.add_class_arguments(TrainConfig)
    return parser


def parse(arguments: list[str] | None = None) -> TrainConfig:
    """The configuration of a command line; wrong input ends the process with one line that says what is wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _check_arguments(arguments)
        parser = _parser()
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # renamed in jsonargparse 4.49
        values = instantiate(parser.parse_args(arguments)).as_dict()
        values.pop("config", None)
        return TrainConfig(**values)
    except ValueError as error:
        # After what is wrong, jsonargparse repeats the whole value that it is wrong with.
        message = str(error).partition("\nGiven value type")[0]
        raise SystemExit(f"error: {message}") from error


def load(path: str | Path, **overrides: Any) -> TrainConfig:
    """Read a run file; `overrides` are dotted keys, e.g. `load(path, **{"optimizer.lr": 1e-3})`."""
    return parse(["--config", str(path), *[f"--{key}={_scalar(value)}" for key, value in overrides.items()]])


def _scalar(value: Any) -> str:
    return (
        value
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    )


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain nested values, as written to `RUN/config.yaml`."""
    return _plain(dataclasses.asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
