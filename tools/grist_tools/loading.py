"""Opening a portable model directory from a command line: the options, and the model with its tokenizer."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grist_data import Tokenizer

DTYPES = ["float32", "bfloat16", "float16"]


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="model directory, as runs/NAME/model, or hf://owner/name")
    parser.add_argument("--device", default="auto", help="auto (CUDA, else MPS, else CPU), cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    parser.add_argument(
        "--quantized",
        action="store_true",
        help="run quantized weights as they are stored; --dtype is then that of the activations and of all the rest",
    )


def open_model(options: argparse.Namespace) -> tuple[Any, Tokenizer, str]:
    """The model, its tokenizer, and the device it is on.

    Raises:
        FileNotFoundError: the directory, its config.json, its weights or its tokenizer is not there.
        ValueError: a file in it does not fit, there is no such device, or --quantized and nothing in it is quantized.
    """
    import torch

    from grist_data import Tokenizer
    from grist_eval.environment import pick_device
    from grist_model import load
    from grist_model.hub import local_directory

    directory = local_directory(options.directory)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} is not a portable model directory: it holds no config.json")
    device = pick_device(options.device)
    tokenizer = Tokenizer.load(directory)
    dtype = getattr(torch, options.dtype)
    return load(directory, dtype=dtype, device=device, quantized=options.quantized), tokenizer, device
