"""How far an export is from the model it was made of: Kullback-Leibler divergence, best tokens, bits per byte of a text.

B rows, T time, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from grist_data import Tokenizer

PROBE_TOKENS = 64  # of random ids, where no text is given
ROW_TOKENS = 512
MEASURED_ROWS = 16


@dataclass(frozen=True)
class Rows:
    """ids_BT: what both models read. measured_on: in words. bytes: of text that ids_BT[:, 1:] spell, None for no text."""

    ids_BT: torch.Tensor
    measured_on: str
    bytes: int | None = None


@dataclass(frozen=True)
class Agreement:
    """mean_kl: nats a token, of the export from the source. same_best_token: share of positions. bits_per_byte: of the source
    and of the export, None where they read no text."""

    measured_on: str
    tokens: int
    mean_kl: float
    same_best_token: float
    largest_logit_change: float
    bits_per_byte: tuple[float, float] | None = None

    def text(self) -> str:
        lines = [
            f"against the source, on {self.measured_on}: mean KL divergence {self.mean_kl:.3g} nats a token, "
            f"same best token at {self.same_best_token:.1%} of {self.tokens:,} positions, "
            f"largest change of a logit {self.largest_logit_change:.3g}"
        ]
        if self.bits_per_byte is not None:
            before, after = self.bits_per_byte
            lines.append(f"bits per byte {before:.4f} before, {after:.4f} now ({after - before:+.4f})")
        return "\n".join(lines)


def probe_ids(config) -> torch.Tensor:
    """The same random ids (1, T) for every model of a vocabulary."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (1, min(PROBE_TOKENS, config.context_length)), generator=generator)


def measured_rows(config, tokenizer: Tokenizer | None, text: Path | None, dataset: Path | None) -> Rows:
    """What to compare on: a text, else held-out rows of a dataset, else random ids.

    Raises ValueError for a text too short, without a tokenizer, or for a dataset of another tokenizer.
    """
    if text is not None:
        return _of_text(config, tokenizer, text)
    if dataset is not None:
        return _of_dataset(config, tokenizer, dataset)
    return random_rows(config)


def random_rows(config) -> Rows:
    return Rows(probe_ids(config), "random ids, for no text was given")


def _of_text(config, tokenizer: Tokenizer | None, text: Path) -> Rows:
    import torch

    if tokenizer is None:
        raise ValueError(f"{text} cannot be read: the model has no tokenizer.json; leave --text out")
    ids = torch.tensor(tokenizer.encode(text.read_text(encoding="utf-8")))
    T = min(config.context_length, ROW_TOKENS, len(ids))
    if T < 2:
        raise ValueError(f"{text} has {len(ids)} token(s); at least 2 are needed to predict one from another")
    n_rows = min(MEASURED_ROWS, len(ids) // T)
    ids_BT = ids[: n_rows * T].view(n_rows, T)
    return Rows(ids_BT, text.name, _spelled(ids_BT, tokenizer, config.vocab_size))


def _of_dataset(config, tokenizer: Tokenizer | None, dataset: Path) -> Rows:
    from grist_tools.calibration import dataset_rows, held_out_split

    split = held_out_split(dataset)
    ids_BT = dataset_rows(dataset, tokenizer, config, MEASURED_ROWS, split)
    n_bytes = None if tokenizer is None else _spelled(ids_BT, tokenizer, config.vocab_size)
    return Rows(ids_BT, f"the {split} split of {dataset.name}", n_bytes)


def _spelled(ids_BT: torch.Tensor, tokenizer: Tokenizer, vocab_size: int) -> int | None:
    from grist_eval.bits_per_byte import spelled_bytes

    return spelled_bytes(ids_BT[:, 1:].flatten().bincount(minlength=vocab_size), tokenizer)


def compare(source: Path, export: Path, rows: Rows) -> Agreement:
    """Both models block by block, in float32.

    Raises what `grist_model.load` raises for either directory.
    """
    import torch

    from grist_tools.block_by_block import BlockByBlock

    with ExitStack() as stack, torch.no_grad():
        models = [BlockByBlock(directory, stack) for directory in (source, export)]
        hidden = [model.embedded(rows.ids_BT) for model in models]
        for layer in range(models[0].config.layers):
            hidden = [model.through(model.block(layer), x_BTD) for model, x_BTD in zip(models, hidden, strict=True)]
        pairs = (
            [model.logits(x_BTD[b : b + 1]) for model, x_BTD in zip(models, hidden, strict=True)]
            for b in range(len(rows.ids_BT))
        )
        return agreement(pairs, rows)


def check_weights(source: Path, export: Path, packs: Callable[[str], bool], largest_error: float) -> None:
    """Raises ValueError for the first quantized tensor whose squared error, over its squares, is more than `largest_error`.

    It names what is broken, where a model of few layers, or untrained, hardly shows it in what it predicts.
    """
    from grist_model import checkpoint

    with ExitStack() as stack:
        (_, before), (_, after) = (checkpoint.opened(directory, stack) for directory in (source, export))
        for name in filter(packs, before.layout.hf_shapes):
            error = squares = 0.0
            step = before.rows_at_once(name)
            for row in range(0, before.layout.hf_shapes[name][0], step):
                old, new = (weights.read(name, slice(row, row + step)).float() for weights in (before, after))
                error += (new - old).square().sum().item()
                squares += old.square().sum().item()
            if not error <= largest_error * squares:  # NaN as well
                raise ValueError(
                    f"{name} does not reload to what was quantized: its error is {error / max(squares, 1e-30):.3g} of its "
                    f"squares, and more than {largest_error} is taken for broken"
                )


def agreement(pairs, rows: Rows) -> Agreement:
    """pairs: for some rows after the others, (logits of the source, logits of the export), each (rows, T, V) float32."""
    kl, same, positions, largest, at = 0.0, 0, 0, 0.0, 0
    nll = [0.0, 0.0]
    for before_BTV, after_BTV in pairs:
        targets = rows.ids_BT[at : at + len(before_BTV), 1:, None]
        at += len(before_BTV)
        p_BTV, q_BTV = before_BTV.double().log_softmax(-1), after_BTV.double().log_softmax(-1)
        kl += (p_BTV.exp() * (p_BTV - q_BTV)).sum().item()
        same += (before_BTV.argmax(-1) == after_BTV.argmax(-1)).sum().item()
        positions += before_BTV[..., 0].numel()
        change = (before_BTV - after_BTV).abs().max().item()
        largest = change if math.isnan(change) else max(largest, change)
        for i, each in enumerate((p_BTV, q_BTV)):
            nll[i] -= each[:, :-1].gather(-1, targets).sum().item()
    bits = None if not rows.bytes else (nll[0] / math.log(2) / rows.bytes, nll[1] / math.log(2) / rows.bytes)
    return Agreement(rows.measured_on, positions, kl / positions, same / positions, largest, bits)
