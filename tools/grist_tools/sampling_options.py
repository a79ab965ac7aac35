"""How text is drawn: options of the command line above what the model's generation_config.json says, above our defaults."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NEW_TOKENS = 200
TEMPERATURE = 0.8
FILE = "generation_config.json"
# Key there, and name in grist_model.generate -> what it has to be.
_KINDS: dict[str, tuple[type, ...]] = {
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "min_p": (int, float),
    "repetition_penalty": (int, float),
    "max_new_tokens": (int,),
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "sampling",
        f"What is not given here is taken from the directory's {FILE}, and what that does not say is as below.",
    )
    group.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"tokens to write ({NEW_TOKENS}, or half the context if that is less)",
    )
    group.add_argument("--temperature", type=float, metavar="T", help=f"0 is greedy ({TEMPERATURE})")
    group.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens (0: all of them)")
    group.add_argument(
        "--top-p", type=float, metavar="P", help="sample among the likeliest that reach this probability (1)"
    )
    group.add_argument(
        "--min-p", type=float, metavar="P", help="drop tokens below this share of the likeliest one's (0)"
    )
    group.add_argument(
        "--repetition-penalty", type=float, metavar="R", help="above 1, what was said becomes less likely (1)"
    )
    group.add_argument("--seed", type=int, metavar="N", help="makes the samples repeatable")
    group.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times"
    )
    group.add_argument(
        "--prompt-lookup",
        type=int,
        metavar="N",
        help="guess up to N tokens a step from repetitions: the same greedy text, sooner (with --temperature 0)",
    )


def stored_generation(directory: str | Path) -> dict[str, Any]:
    """A model directory's generation_config.json, {} where there is none.

    Raises ValueError that names the key for a value of the wrong kind.
    """
    from grist_model.hub import local_directory
    from grist_model.weight_files import read_json

    path = local_directory(directory) / FILE
    if not path.is_file():
        return {}
    stored = read_json(path, path.parent)
    for key, kinds in _KINDS.items():
        value = stored.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise ValueError(f"{path}: {key} must be a number, but is {json.dumps(value)}")
    ends = _as_list(stored.get("eos_token_id"))
    if not all(isinstance(end, int) for end in ends):
        raise ValueError(f"{path}: eos_token_id must be an id or a list of ids, but is {json.dumps(ends)}")
    return stored


def sampling_of(options: argparse.Namespace, stored: dict[str, Any], context_length: int) -> dict[str, Any]:
    """Arguments of `grist_model.generate`, but for what ends a text."""
    chosen = {key: stored.get(key) if getattr(options, key) is None else getattr(options, key) for key in _KINDS}
    if chosen["temperature"] is None or (options.temperature is None and stored.get("do_sample") is False):
        chosen["temperature"] = 0.0 if stored.get("do_sample") is False else TEMPERATURE
    if chosen["top_k"] is not None and chosen["top_k"] <= 0:  # how other programs write that there is none
        chosen["top_k"] = None
    if chosen["max_new_tokens"] is None:
        chosen["max_new_tokens"] = min(NEW_TOKENS, context_length // 2)
    chosen["seed"] = options.seed
    return chosen


def ends_of(stored: dict[str, Any], others: Iterable[int]) -> set[int]:
    """Ids that end a text: those of generation_config.json, of which there may be several, and others."""
    return {*_as_list(stored.get("eos_token_id")), *others}


def _as_list(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
