"""The smallest real things: a text, a tokenizer trained on it, a model, its portable directory, a dataset."""

from __future__ import annotations

from pathlib import Path

import torch

import grist_model
from grist_data import Tokenizer
from grist_data.tokenizer_training import train_bpe

PARAGRAPHS = [
    "The miller's daughter carried the grain to the mill, and the mill ground the grain to flour.",
    "Water turned the wheel, the wheel turned the stone, and the stone turned the grain to flour again.",
    "When the river froze the wheel stood still; the miller sat by the fire and counted empty sacks.",
    "Naïve cafés sell crêpes made of fine flour — “très bien”, said the cook, and ate three 🥞.",
]


def tokenizer(vocab_size: int = 320) -> Tokenizer:
    return train_bpe(PARAGRAPHS * 4, vocab_size)


def config(vocab_size: int = 320, **changes) -> grist_model.ModelConfig:
    shape = {"context_length": 64, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "window": 16}
    shape |= {"experts": 4, "active_experts": 2, "expert_width": 32}
    return grist_model.ModelConfig(vocab_size=vocab_size, **{**shape, **changes})


def small(**changes) -> grist_model.ModelConfig:
    """Half as wide as `config`, 64 ids: for tests that take optimizer steps."""
    shape = {"context_length": 16, "width": 16, "heads": 2, "kv_heads": 1, "expert_width": 8, "window": 4}
    return config(64, **{**shape, **changes})


def model(vocab_size: int = 320, **changes) -> grist_model.Transformer:
    """Initialised ten times wider than usual, so that its predictions are not all alike."""
    made = grist_model.build(config(vocab_size, initializer_range=0.2, **changes))
    return made.eval()


def portable(directory: Path, **changes) -> Path:
    """A model directory with tokenizer, as a run leaves it."""
    of_text = tokenizer()
    grist_model.save(model(of_text.vocab_size, **changes), directory, tokenizer=of_text)
    return directory


def dataset(directory: Path, documents: int = 40, **changes) -> Path:
    """A prepared dataset with a training and a validation split, with the tokenizer of `portable`."""
    from grist_data.prepare import PrepareConfig, prepare

    folder = directory.parent / f"{directory.name}-text"
    folder.mkdir(parents=True)
    for i in range(documents):
        body = " ".join(PARAGRAPHS[(i + j) % len(PARAGRAPHS)] for j in range(1 + i % 3))
        (folder / f"{i:03d}.txt").write_text(f"{i}. {body}\n", encoding="utf-8")
    tokenizer().save(folder / "tokenizer")
    config = PrepareConfig(
        source="files", paths=(str(folder),), tokenizer=str(folder / "tokenizer"), out=str(directory), **changes
    )
    return prepare(config)


def random_ids(batch: int, length: int, vocab_size: int = 320, seed: int = 0) -> torch.Tensor:
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))
