"""The command line of `grist_data.prepare`: one option for each field of PrepareConfig."""

from __future__ import annotations

import argparse
import dataclasses
import re
import signal
import sys
import typing
from types import FrameType
from typing import Any

from grist_data.prepare import PrepareConfig, prepare


def main(arguments: list[str] | None = None) -> int:
    """Prepare a dataset; returns the exit status. Errors of input are one line on stderr."""
    values = vars(_parser().parse_args(_with_underscores(sys.argv[1:] if arguments is None else arguments)))
    verify = values.pop("verify")
    for name in ("separator", "template"):
        if values.get(name):
            values[name] = values[name].replace("\\n", "\n").replace("\\t", "\t")
    signal.signal(signal.SIGTERM, _stop)
    try:
        directory = prepare(PrepareConfig(**values))
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: run the same command again, it goes on from here", file=sys.stderr)
        return 130
    if verify:
        from grist_data.verify import main as verify_main

        return verify_main([str(directory)])
    return 0


def _stop(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends like Ctrl-C: temporary files are removed on the way out."""
    raise KeyboardInterrupt


def _with_underscores(arguments: list[str]) -> list[str]:
    """--val-fraction is --val_fraction."""
    return [
        re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), argument)
        if argument[:2] == "--"
        else argument
        for argument in arguments
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m grist_data.prepare", description="Text to a dataset of token shards.")
    hints, help_of = typing.get_type_hints(PrepareConfig), _help_of_fields()
    for field in dataclasses.fields(PrepareConfig):
        options: dict[str, Any] = {"help": help_of[field.name].replace("%", "%%"), "default": argparse.SUPPRESS}
        hint = hints[field.name]
        optional = [member for member in typing.get_args(hint) if member is not type(None)]
        if hint is bool:
            options |= {"type": _boolean, "nargs": "?", "const": True, "metavar": "true|false"}
        elif typing.get_origin(hint) is tuple:
            options |= {"type": typing.get_args(hint)[0], "nargs": "+", "metavar": field.name[:-1].upper()}
        elif typing.get_origin(hint) is typing.Literal:
            options |= {"choices": typing.get_args(hint)}
        else:
            options |= {"type": optional[0] if optional else hint}
        if field.name != "out" and field.default not in (None, (), False):
            options["help"] += f" [{field.default}]"
        parser.add_argument(f"--{field.name}", required=field.name == "out", **options)
    parser.add_argument("--verify", action="store_true", help="check every byte of the dataset afterwards")
    return parser


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, but got {text!r}")
    return text.lower() == "true"


def _help_of_fields() -> dict[str, str]:
    """Field -> its line in the docstring of PrepareConfig."""
    attributes = (PrepareConfig.__doc__ or "").partition("Attributes:")[2]
    entries = re.findall(r"^        (\w+): (.+(?:\n {12}.+)*)", attributes, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in entries}
