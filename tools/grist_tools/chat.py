"""Write with a model, turn by turn.

    python -m grist_tools.chat runs/quickstart/model

A model with a chat template answers. A base model continues: what you type is added to the text so far, and the model
writes on from there; an empty line lets it go on. /help lists the commands.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from grist_tools.console import fail, parser_for, run
from grist_tools.generate import new_ids
from grist_tools.loading import add_model_options, open_model
from grist_tools.sampling_options import add_sampling_options, ends_of, sampling_of, stored_generation
from grist_tools.token_clock import TokenClock

if TYPE_CHECKING:
    from grist_data import Tokenizer

HELP = """\
/help           this list
/reset          forget the conversation so far
/system TEXT    begin anew with this system message; without TEXT, show it (models with a chat template)
/quit           leave (also Ctrl-D)
Ctrl-C          stop the model; at the prompt, forget the line
"""


class Chat:
    """A conversation at a terminal. Lines come from `read(prompt)`, text goes to `write(text)`.

    drawing: arguments of `grist_model.stream`. ends: ids that end an answer; stops: texts that do, besides the tokenizer's.
    Raises ValueError for a system message without a chat template.
    """

    def __init__(
        self,
        model,
        tokenizer: Tokenizer,
        drawing: dict[str, Any],
        *,
        system: str | None = None,
        ends: Collection[int] = (),
        stops: Sequence[str] = (),
        read: Callable[[str], str] = input,
        write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
    ) -> None:
        from grist_data.chat_template import stop_ids
        from grist_eval.completion import room_for_prompt
        from grist_tools.chat_history import GrowingText, History, Messages

        template = tokenizer.chat_template
        if system is not None and template is None:
            raise ValueError("--system needs a model with a chat template; a base model only continues text")
        self.model, self.tokenizer, self.drawing = model, tokenizer, drawing
        self.ends, self.stops = {*ends, *stop_ids(tokenizer)}, stops
        self.read, self.write = read, write
        room = room_for_prompt(model, drawing["max_new_tokens"])
        self.history: History = (
            GrowingText(tokenizer, room) if template is None else Messages(tokenizer, template, room, system)
        )
        self.answers = template is not None
        self.turn = 0

    def run(self) -> None:
        """Read lines until the end of input or /quit."""
        self.write(f"The model {'answers' if self.answers else 'continues your text'}. /help lists the commands.\n")
        while True:
            try:
                line = self.read("> ")
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:
                self.write("\n(Ctrl-D or /quit leaves)\n")
                continue
            if line.strip() == "/quit":
                return
            if line.lstrip().startswith("/"):
                self._command(*line.strip().partition(" ")[::2])
            else:
                self.respond(line)

    def _command(self, name: str, rest: str) -> None:
        if name == "/reset":
            self.history.reset()
            self.write("(forgotten)\n")
        elif name == "/system":
            self._system(rest.strip())
        elif name == "/help":
            self.write(HELP)
        else:
            self.write(f"unknown command {name}\n{HELP}")

    def _system(self, text: str) -> None:
        from grist_tools.chat_history import Messages

        if not isinstance(self.history, Messages):
            self.write("(a base model has no system message)\n")
        elif text:
            self.history.system = text
            self.history.reset()
            self.write("(a new conversation)\n")
        else:
            self.write(f"({self.history.system or 'no system message'})\n")

    def respond(self, line: str) -> None:
        """Take one line from the user and write what the model makes of it, and how fast."""
        from grist_tools.text_stream import text_of, until

        try:
            prompt_ids = self.history.ask(line)
        except ValueError as error:
            self.write(f"({error})\n")
            return
        if self.history.note:
            self.write(f"({self.history.note})\n")
        new: list[int] = []
        text, clock = "", TokenClock()
        try:
            for piece in until(text_of(self.tokenizer, clock.of(self._new_ids(prompt_ids, new))), self.stops):
                text += piece
                self.write(piece)
        except KeyboardInterrupt:
            self.write(" (stopped)")
        self.write(f"\n({clock.report()})\n")
        self.history.answered(text, new)

    def _new_ids(self, prompt_ids: list[int], new: list[int]) -> Iterator[int]:
        """Draw ids, keeping them in `new` as they come."""
        seed = self.drawing["seed"]
        # One seed for every turn would draw the same numbers again and again.
        drawing = {**self.drawing, "seed": None if seed is None else seed + self.turn}
        self.turn += 1
        for id_ in new_ids(self.model, prompt_ids, self.ends, drawing):
            new.append(id_)
            yield id_


def parser() -> argparse.ArgumentParser:
    parser = parser_for("chat", __doc__)
    add_model_options(parser)
    add_sampling_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message, for a model with a chat template")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 - importing it gives input() line editing and a history

    try:
        model, tokenizer, _ = open_model(options)
        stored = stored_generation(options.directory)
        drawing = sampling_of(options, stored, model.config.context_length)
        drawing["prompt_lookup"] = options.prompt_lookup
        drawing |= {"stop_strings": options.stop, "token_bytes": tokenizer.token_bytes}
        Chat(model, tokenizer, drawing, system=options.system, ends=ends_of(stored, ()), stops=options.stop).run()
    except (ValueError, OSError) as error:
        return fail("chat", error)
    return 0


if __name__ == "__main__":
    run(main)
