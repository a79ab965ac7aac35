"""Run folders for the tests of the report, and a reader that is strict about HTML."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

CONFIG = """\
name: {name}
steps: {steps}
initial: null
preferences: null
data:
  directory: datasets/plays
  sources: {{}}
  stages:
  - {{after_step: 5, sequence_length: 64}}
  sequence_length: 32
model: {{vocab_size: 96, context_length: 64, layers: 2, width: 16, heads: 2, kv_heads: 1, head_width: 8, window: null,
  experts: 4, active_experts: 2, expert_width: 16}}
batch: {{global_size: 4}}
optimizer: {{name: adamw, lr: {lr}}}
"""


def row(step: int, layers: int = 2, **more: Any) -> dict[str, Any]:
    """A training row as the trainer writes it."""
    return {
        "step": step,
        "tokens": step * 128,
        "loss": 4.0 / step + 1,
        "grad_norm": 1.0 / step,
        "lr": 1e-3,
        "tokens_per_second": 1000.0 + step,
        "mfu": 0.3,
        "aux_loss": 1.0,
        "z_loss": 2.0,
        "router_entropy": 1.3,
        "load_max_over_mean": [1.0 + layer + 1 / step for layer in range(layers)],
        "load_cv": [0.1 * layer for layer in range(layers)],
        "dead_experts": [int(step == 3)] * layers,
        "seconds": step * 0.5,
    } | more


def write_rows(path: Path, rows: list[dict[str, Any]], tail: str = "") -> None:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows) + tail, encoding="utf-8")


def full_run(folder: Path, steps: int = 10, lr: float = 0.001) -> Path:
    """A run folder with every file that a run may leave."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.format(name=folder.name, steps=steps, lr=lr))
    environment = {
        "command": ["python", "-m", "grist_train", "--name", "a b"],
        "commit": "0123456789abcdef",
        "device": "cpu",
    }
    (folder / "environment.json").write_text(json.dumps(environment | {"world_size": 2, "torch": "2.11.0"}))
    times: dict[str, Any] = {
        "time_data_ms": 1.0,
        "time_forward_ms": 10.0,
        "time_backward_ms": 20.0,
        "time_sorting_ms": 3.0,
    }
    rows = [row(step, memory_peak_bytes=3 * 2**30, **times) for step in range(1, steps + 1)]
    rows[1] |= {"loss": math.nan, "grad_norm": math.inf}
    held_out = [{"step": step, "validation_loss": 3 / step, "validation_bits_per_byte": 2 / step} for step in (4, 8)]
    write_rows(folder / "metrics.jsonl", rows + held_out)
    (folder / "evaluation.json").write_text(json.dumps({"bits_per_byte": 0.625, "loss": 1.5, "tokens": 99}))
    (folder / "samples.txt").write_text(
        "prompt: 'To be'\n--- greedy\nTo be </pre><script>alert('sample')</script> & more\n"
    )
    bad = {
        "step": 7,
        "why": "<b>spike</b>",
        "loss": 9.5,
        "samples": [{"source": "plays", "window": 3, "text": "<script>x</script>"}],
    }
    write_rows(folder / "bad_batches.jsonl", [bad])
    for step, loss in ((4, 0.75), (8, 0.5)):
        checkpoint = folder / "checkpoints" / f"step-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"step": step, "validation_loss": loss}))
    (folder / "checkpoints" / ".step-10.partial").mkdir()
    (folder / "model").mkdir()
    return folder


class Page(HTMLParser):
    """A page taken apart; every tag that opens has to close, in order.

    Attributes:
        headings: Texts of h1 to h4.
        sections: Text of each section by the id of its heading, titles of pictures included.
        elements: (name, attributes) in order.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.sections: dict[str, str] = {}
        self._section = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "section":
            self._section = dict(attrs)["aria-labelledby"] or ""
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{tag}/> closes itself, which HTML ignores")

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1:] == [tag], f"</{tag}> while open: {self.open}"
        self.open.pop()
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3", "h4"):
            self.headings[-1] += data
        self.sections[self._section] = self.sections.get(self._section, "") + data + " "

    def of(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag == name]
