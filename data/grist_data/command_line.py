"""The command line of `grist_data.prepare`: one option for each field of PrepareConfig."""

from __future__ import annotations

import argparse
import dataclasses
import re
import signal
import sys
import typing
from pathlib import Path
from types import FrameType
from typing import Any

from grist_data.cleaning import CleanConfig
from grist_data.prepare import prepare
from grist_data.prepare_config import PrepareConfig

_CLEAN_FIELDS = [field.name for field in dataclasses.fields(CleanConfig)]


def main(arguments: list[str] | None = None) -> int:
    """Prepare a dataset; returns the exit status. Errors of input are one line on stderr."""
    values = vars(_parser().parse_args(with_underscores(sys.argv[1:] if arguments is None else arguments)))
    verify = values.pop("verify")
    signal.signal(signal.SIGTERM, _stop)
    try:
        directory = prepare(read_config(values.pop("config"), values))
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


def with_underscores(arguments: list[str]) -> list[str]:
    """--val-fraction is --val_fraction."""
    return [
        re.sub(r"^--[^=]+", lambda name: "--" + name[0][2:].replace("-", "_"), argument)
        if argument[:2] == "--"
        else argument
        for argument in arguments
    ]


def read_config(file: str | None, given: dict[str, Any]) -> PrepareConfig:
    r"""Settings from a file of YAML or JSON, and over them those that were given as options.

    In separator and template given as options, \n and \t are a new line and a tabulator. Raises ValueError for a name that is
    no setting and a value of another type.
    """
    given = dict(given)
    for name in ("separator", "template"):
        if given.get(name):
            given[name] = given[name].replace("\\n", "\n").replace("\\t", "\t")
    clean = {name: given.pop(f"clean.{name}") for name in _CLEAN_FIELDS if f"clean.{name}" in given}
    values = {} if file is None else _read_settings(Path(file))
    return PrepareConfig.from_values(values | given | {"clean": values.get("clean", {}) | clean})


def _read_settings(file: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is neither YAML nor JSON: {error}") from error
    _check_settings(values, PrepareConfig, str(file))
    return values


def _check_settings(values: object, config: type, where: str) -> None:
    """Raises ValueError for anything but a mapping of the dataclass's fields to values of their types."""
    if not isinstance(values, dict):
        raise ValueError(f"{where}: expected names of settings and their values, but got {type(values).__name__}")
    hints = typing.get_type_hints(config)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{where}: unknown setting {name!r}; the settings are {', '.join(hints)}")
        if dataclasses.is_dataclass(hints[name]):
            _check_settings(value, hints[name], f"{where}, {name}")
        elif not _fits(value, hints[name]):
            raise ValueError(f"{where}: {name} must be {_said(hints[name])}, but is {value!r}")


def _fits(value: object, hint: Any) -> bool:
    if typing.get_origin(hint) is tuple:
        return isinstance(value, list) and all(_fits(member, typing.get_args(hint)[0]) for member in value)
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if members := typing.get_args(hint):
        return any(_fits(value, member) for member in members)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _said(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_said(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    names = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", type(None): "null"}
    return " or ".join(names[member] for member in typing.get_args(hint) or (hint,))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m grist_data.prepare", description="Text to a dataset of token shards.")
    add_options(parser)
    parser.add_argument("--config", metavar="FILE", help="YAML or JSON of settings; options come before it")
    parser.add_argument("--verify", action="store_true", help="check every byte of the dataset afterwards")
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    """One option for each field of PrepareConfig, absent from the result where it is not given."""
    _add_fields(parser, PrepareConfig, "")


def _add_fields(parser: argparse.ArgumentParser, config: type, prefix: str) -> None:
    hints, help_of = typing.get_type_hints(config), _help_of_fields(config)
    for field in dataclasses.fields(config):
        options: dict[str, Any] = {"help": help_of[field.name].replace("%", "%%"), "default": argparse.SUPPRESS}
        hint = hints[field.name]
        optional = [member for member in typing.get_args(hint) if member is not type(None)]
        if dataclasses.is_dataclass(hint):
            _add_fields(parser.add_argument_group(field.name, help_of[field.name]), hint, f"{field.name}.")  # pyright: ignore
            continue
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
        parser.add_argument(f"--{prefix}{field.name}", **options)


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected true or false, but got {text!r}")
    return text.lower() == "true"


def _help_of_fields(config: type = PrepareConfig) -> dict[str, str]:
    """Field -> its line in the docstring of the dataclass."""
    attributes = (config.__doc__ or "").partition("Attributes:")[2]
    entries = re.findall(r"^        (\w+): (.+(?:\n {12}.+)*)", attributes, re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in entries}
