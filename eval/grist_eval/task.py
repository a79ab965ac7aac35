"""What an evaluation task is: a few command-line options and one function from a model to numbers."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from grist_data import Tokenizer


class Subject(NamedTuple):
    """The model under evaluation, as every task gets it, and this process among those that share its work."""

    model: Any
    tokenizer: Tokenizer
    device: str
    rank: int = 0
    world_size: int = 1


class Task(NamedTuple):
    """One evaluation.

    `add_options` adds a group with the task's own options to the command line. `check` refuses missing or wrong
    options before anything is loaded, by raising ValueError. `run` returns what goes into the JSON. `rows` picks the
    (name, value) pairs of that result for the printed table. `shared`: all ranks call
    `run` together; else the first alone does.
    """

    add_options: Callable[[ArgumentParser], Any]
    check: Callable[[Namespace], None]
    run: Callable[[Subject, Namespace], dict[str, Any]]
    rows: Callable[[dict[str, Any]], list[tuple[str, str]]]
    shared: bool = False
