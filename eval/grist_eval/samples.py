"""Samples: what the model writes after a few prompts, under several ways of picking the next token."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tqdm import tqdm

from grist_eval.completion import GREEDY, complete, describe
from grist_model.generate import Sampling

if TYPE_CHECKING:
    import torch

    from grist_data import Tokenizer

SETTINGS: tuple[Sampling, ...] = (
    GREEDY,
    Sampling(temperature=0.8),
    Sampling(temperature=1.0, top_k=40),
    Sampling(temperature=1.0, top_p=0.9),
)


class Sample(NamedTuple):
    """text: what follows the prompt; with `chat`, the answer to it."""

    prompt: str
    sampling: Sampling
    text: str
    chat: bool = False


def draw_samples(
    model,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    settings: Sequence[Sampling] = SETTINGS,
    max_new_tokens: int,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = False,
    chat: bool = False,
) -> list[Sample]:
    """One completion a prompt and setting, in that order. The same seed gives the same samples on the same device.

    With `chat` the prompts are a user's messages, put into the tokenizer's chat template, and the samples are answers.
    `device` moves the model before it writes; without it the model writes where its weights are.

    Raises:
        ValueError: there are no prompts, or `max_new_tokens` leaves no room for them in the context; with `chat`, the
            tokenizer has no template.
    """
    if not prompts:
        raise ValueError("no prompts to sample from: pass at least one, '' starts from nothing")
    if device is not None:
        model.to(device)
    texts = [
        complete(model, tokenizer, prompts, sampling, max_new_tokens=max_new_tokens, seed=seed, chat=chat)
        for sampling in tqdm(settings, desc="samples", unit="setting", leave=False, disable=None if progress else True)
    ]
    return [
        Sample(prompt, sampling, of_setting[i], chat)
        for i, prompt in enumerate(prompts)
        for sampling, of_setting in zip(settings, texts, strict=True)
    ]


def format_samples(samples: Sequence[Sample], header: Mapping[str, object] | None = None) -> str:
    """Samples as text to read: optional `name: value` lines, then prompt by prompt, one block a setting."""
    lines = [f"{name}: {value}" for name, value in (header or {}).items()]
    prompt = None
    for sample in samples:
        if sample.prompt != prompt:
            prompt = sample.prompt
            lines += ["", "=" * 80, f"prompt: {prompt!r}"]
        lines += ["", f"--- {describe(sample.sampling)}", sample.text if sample.chat else sample.prompt + sample.text]
    return "\n".join(lines).lstrip("\n") + "\n"


def write_samples(samples: Sequence[Sample], path: str | Path, header: Mapping[str, object] | None = None) -> Path:
    """Write `format_samples` to a file, under a temporary name first."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(format_samples(samples, header), encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
