"""What a run reports while it goes: a live bar for people, `metrics.jsonl` and TensorBoard for programs.

The loss stays on the device between reads (`log_every` steps), so that reporting never makes the device wait.
"""

from __future__ import annotations

import functools
import json
import math
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from grist_model.accounting import flops_per_token, mean_visible_keys
from grist_train.config import TrainConfig
from grist_train.distributed import World, max_on_host
from grist_train.gradient_norms import GradientGroups
from grist_train.memory_peak import memory_peak
from grist_train.step_timer import StepTimes
from grist_train.trackers import open_trackers

# Dense bfloat16 peaks in FLOP/s from the vendors' data sheets (without sparsity), by a part of the device's name.
# The first match counts, so longer names stand before those they contain.
PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}
MFU_FORMULA = (
    "MFU = tokens/s * training FLOPs per token (grist_model.accounting.flops_per_token: causal, window-aware) "
    "/ peak FLOP/s"
)


def training_flops(config: TrainConfig, sequence_length: int) -> float:
    """FLOPs a token. Frozen weights, with `lora`, need no gradients: two thirds of their products remain; those of the adapters
    are left out."""
    whole = flops_per_token(config.model, sequence_length)
    if config.lora is None:
        return whole
    model = config.model
    visible = sum(mean_visible_keys(sequence_length, model.layer_window(layer)) for layer in range(model.layers))
    attention = 12.0 * model.heads * model.attention_head_width * visible
    return attention + (whole - attention) * 2 / 3


def peak_flops(device: torch.device) -> tuple[float, str]:
    """Peak FLOP/s of one device and where the figure comes from: a data sheet, or a measured matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in PEAK_FLOPS.items():
            if part in name:
                return peak, f"{name} data sheet, dense bfloat16"
    size, dtype = (4096, torch.bfloat16) if device.type == "cuda" else (512, torch.float32)
    name = f"measured {size} x {size} matrix product in {str(dtype).removeprefix('torch.')} on {device.type}"
    return _measured_matmul_flops(device, size, dtype), name


def _measured_matmul_flops(device: torch.device, size: int, dtype: torch.dtype, budget_s: float = 0.1) -> float:
    a = torch.rand(size, size, device=device, dtype=dtype)
    (a @ a)[0, 0].item()  # loads the library
    best, start = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - start < budget_s:
        began = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def environment(config: TrainConfig, world: World) -> dict[str, Any]:
    """What a reader needs to run this again: versions, device, commit, command."""
    cuda = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    return {
        "command": ["python", "-m", "grist_train", *sys.argv[1:]],
        "commit": _commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "device": cuda or world.device.type,
        "world_size": world.size,
        "threads": torch.get_num_threads(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "run": config.name,
    }


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


class _Pending(NamedTuple):
    """A step whose values are not read yet."""

    step: int
    lr: float
    tokens: int
    tokens_so_far: int
    sequence_length: int
    values: torch.Tensor
    skip: torch.Tensor
    norms_G: torch.Tensor
    times: StepTimes


class Metrics:
    """Rows of `metrics.jsonl`, TensorBoard scalars and the live bar; silent on ranks other than the first.

    A row a step: `step, tokens, loss, grad_norm, lr, tokens_per_second, mfu, seconds`, and in a mixture of experts those of
    `router_health`.
    """

    def __init__(
        self,
        config: TrainConfig,
        world: World,
        state: dict[str, Any] | None,
        figures: tuple[str, ...],
        groups: GradientGroups,
        on_read: Callable[[int, float, float, bool], None],
    ) -> None:
        """state: state.json of the checkpoint that the run goes on from. figures: names of what a step's values have after loss
        and gradient norm, before the router's. on_read: is told step, loss, gradient norm, and whether it was skipped, when
        they are known."""
        self.config, self.world, self.figures, self.on_read = config, world, figures, on_read
        self.groups = groups
        self.pending: list[_Pending] = []
        first_step, self.tokens, self.seconds_before = 0, 0, 0.0
        if state is not None:
            first_step, self.tokens, self.seconds_before = state["step"], state["tokens"], state["seconds"]
        self.start = time.perf_counter()
        self.last_read = self.start
        self.last_loss = float("nan")
        self.rows = None
        if not world.is_main:
            return
        peak, source = peak_flops(world.device)
        print(f"{MFU_FORMULA}; peak {peak / 1e12:.3g} TFLOP/s a device ({source})", file=sys.stderr)
        self.peak = peak * world.size if world.device.type == "cuda" else peak
        self.flops_per_token = functools.cache(functools.partial(training_flops, config))
        truncate_rows(config.run_dir / "metrics.jsonl", first_step, config.steps)
        self.rows = open(config.run_dir / "metrics.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self.trackers = open_trackers(config, first_step)
        self.bar = tqdm(
            total=config.steps, initial=first_step, unit="step", desc=config.name, dynamic_ncols=True, disable=None
        )

    @property
    def seconds(self) -> float:
        """Training time so far, all earlier parts of the run included."""
        return self.seconds_before + time.perf_counter() - self.start

    def step(
        self,
        step: int,
        lr: float,
        tokens: int,
        sequence_length: int,
        values: torch.Tensor,
        skip: torch.Tensor,
        norms_G: torch.Tensor,
        times: StepTimes,
    ) -> None:
        """Record a finished step of so many tokens over all ranks. `values` stays on the device: loss, gradient norm, then the
        router's figures; so does `skip`, whether the step was not applied."""
        self.tokens += tokens
        self.pending.append(_Pending(step, lr, tokens, self.tokens, sequence_length, values, skip, norms_G, times))
        if step % self.config.log_every == 0 or step == self.config.steps:
            self.flush()

    def flush(self) -> None:
        """Read the recorded values, pass them on (on every rank alike), and write them out."""
        if not self.pending:
            return
        # One read for all: a read waits for the device.
        table = torch.stack([torch.cat([each.values, each.norms_G, each.skip[None]]) for each in self.pending]).tolist()
        memory = memory_peak(self.world.device)
        worst = max_on_host(list(memory.values()), self.world)  # of the rank that would run out first
        memory = dict(zip(memory, worst, strict=True))
        now = time.perf_counter()
        elapsed = now - self.last_read
        rate, mfu = sum(each.tokens for each in self.pending) / elapsed, 0.0
        if self.rows is not None:
            mfu = sum(each.tokens * self.flops_per_token(each.sequence_length) for each in self.pending)
            mfu /= elapsed * self.peak
        self.last_read = now
        for each, (*values, skipped) in zip(self.pending, table, strict=True):
            values, norms_G = values[: len(each.values)], values[len(each.values) :]
            self.on_read(each.step, values[0], values[1], bool(skipped))
            self.last_loss = values[0]
            if self.rows is not None:
                numbers = {"loss": values[0], "grad_norm": values[1], "lr": each.lr}
                numbers |= {"tokens_per_second": round(rate, 1), "mfu": round(mfu, 4)}
                router = 2 + len(self.figures)
                numbers |= zip(self.figures, values[2:router], strict=True)
                if values[router:]:
                    numbers |= router_health(values[router:], self.config.model.layers, self.config.model.experts)
                numbers |= self.groups.row(norms_G)
                if skipped:
                    numbers = {key: _finite(value) for key, value in numbers.items()} | {"skipped": True}
                row = {"step": each.step, "tokens": each.tokens_so_far, **numbers, **each.times.row(), **memory}
                self._write(row | {"seconds": round(self.seconds, 3)})
        if self.rows is not None:
            self._show(self.pending[-1], rate, mfu)
        self.pending.clear()

    def validation(self, step: int, result: dict[str, Any]) -> None:
        """Record a held-out evaluation."""
        if self.rows is None:
            return
        keys = [key for key in ("loss", "bits_per_byte", "perplexity", *self.figures) if key in result]
        row = {"step": step, **{f"validation_{key}": result[key] for key in keys}}
        # Of several sources, each one's part of what is reported first: bits per byte, or the loss of masked text.
        first = "bits_per_byte" if "bits_per_byte" in result else "loss"
        sources = {name: each[first] for name, each in result.get("sources", {}).items()}
        row |= {f"validation_{first}/{name}": value for name, value in sources.items()}
        scores = {f"{name}_{each['main']}": each[each["main"]] for name, each in result.get("tasks", {}).items()}
        scores |= {"core": result["core"]} if scores else {}
        row |= {f"validation_{name}": value for name, value in scores.items()}
        self._write(row | {"seconds": round(self.seconds, 3)})
        parts = [
            f"{result[key]:.4f} {key.replace('_', ' ')}" for key in (first, *keys) if key != "loss" or first == "loss"
        ]
        parts[1:1] = [f"{name} {value:.4f}" for name, value in sources.items()]
        parts += [f"{name.replace('_', ' ')} {value:.4f}" for name, value in scores.items()]
        self.say(f"step {step}: held-out " + ", ".join(dict.fromkeys(parts)))

    def pause(self) -> None:
        """Time from here to `resume` (evaluation, say) does not count in tokens per second."""
        self.flush()
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        self.last_read += time.perf_counter() - self._paused_at

    def say(self, text: str) -> None:
        """One line for people, above the bar."""
        if self.rows is not None:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.rows is not None:
            self.bar.close()
            self.rows.close()
            for tracker in self.trackers:
                tracker.close()

    def _show(self, last: _Pending, rate: float, mfu: float) -> None:
        self.bar.set_postfix_str(f"loss {self.last_loss:.4f}, {rate:,.0f} tok/s, MFU {mfu:.1%}", refresh=False)
        self.bar.update(len(self.pending))
        if self.bar.disable:
            left = (self.config.steps - last.step) * last.tokens / rate
            print(
                f"step {last.step}/{self.config.steps}  loss {self.last_loss:.4f}  {rate:,.0f} tok/s  MFU {mfu:.1%}  "
                f"{left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )

    def _write(self, row: dict[str, Any]) -> None:
        if self.rows is None:
            return
        self.rows.write(json.dumps(row) + "\n")
        for tracker in self.trackers:
            tracker.write(row)


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is no number in a step that was skipped is null."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def router_health(values: list[float], layers: int, experts: int) -> dict[str, Any]:
    """The router's part of a row of `metrics.jsonl`, from what `loss.step_values` gives after loss and gradient norm.

    `aux_loss`, `z_loss`: means over layers and tokens. `router_entropy`: nats, mean over layers and tokens; ln E when the
    router is undecided. Lists over layers, of the step's assignments: `load_max_over_mean`, the busiest expert's against the
    mean (1 is balance, E the worst); `load_cv`, their standard deviation over their mean; `dead_experts`, how many got none.
    """
    entropy_L, counts = values[2 : 2 + layers], values[2 + layers :]
    load = [counts[i * experts : (i + 1) * experts] for i in range(layers)]
    return {
        "aux_loss": values[0],
        "z_loss": values[1],
        "router_entropy": sum(entropy_L) / layers,
        "load_max_over_mean": [round(max(counts_E) / fmean(counts_E), 4) for counts_E in load],
        "load_cv": [round(pstdev(counts_E) / fmean(counts_E), 4) for counts_E in load],
        "dead_experts": [counts_E.count(0) for counts_E in load],
    }


def truncate_rows(path: Path, step: int, last_step: int) -> None:
    """Drop what a run that resumes at `step` will write again: later rows, the evaluation that ends the run, and a
    half-written last line.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        ends_the_run = "validation_loss" in row and row["step"] == last_step
        if row["step"] <= step and not ends_the_run:
            kept.append(line + "\n")
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)
