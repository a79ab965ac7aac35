"""Opening a portable model directory from a command line: the options, and the model with its tokenizer."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grist_data import Tokenizer

NEW_TOKENS = 200
DTYPES = ["float32", "bfloat16", "float16"]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="portable model directory, as runs/NAME/model")
    parser.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        help=f"tokens to write (default: {NEW_TOKENS}, or half the context if that is less)",
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest tokens")
    parser.add_argument("--top-p", type=float, help="sample among the likeliest tokens that reach this probability")
    parser.add_argument("--min-p", type=float, help="drop tokens below this share of the likeliest one's probability")
    parser.add_argument("--seed", type=int, help="makes the samples repeatable")


def sampling_of(options: argparse.Namespace, context_length: int) -> dict[str, Any]:
    """The sampling options as `grist_model.generate` takes them."""
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
    chosen = {name: getattr(options, name) for name in names}
    if chosen["max_new_tokens"] is None:
        chosen["max_new_tokens"] = min(NEW_TOKENS, context_length // 2)
    return chosen


def open_model(options: argparse.Namespace) -> tuple[Any, Tokenizer, str]:
    """The model, its tokenizer, and the device it is on.

    Raises:
        FileNotFoundError: the directory, its config.json, its weights or its tokenizer is not there.
        ValueError: a file in it does not fit, or there is no such device.
    """
    import torch

    from grist_data import Tokenizer
    from grist_eval.environment import pick_device
    from grist_model import load

    directory = Path(options.directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} is not a portable model directory: it holds no config.json")
    device = pick_device(options.device)
    tokenizer = Tokenizer.load(directory)
    return load(directory, dtype=getattr(torch, options.dtype), device=device), tokenizer, device
