"""Write with a model, turn by turn.

    python -m grist_tools.chat runs/quickstart/model

A model with a chat template answers. A base model continues: what you type is added to the text so far, and the model
writes on from there; an empty line lets it go on. /help lists the commands.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from grist_tools.console import fail, parser_for, run
from grist_tools.loading import add_model_options, add_sampling_options, open_model, sampling_of

if TYPE_CHECKING:
    from grist_data import Tokenizer

HELP = """\
/help    this list
/reset   forget the text so far
/quit    leave (also Ctrl-D)
Ctrl-C   stop the model; at the prompt, forget the line
"""


class Chat:
    """A conversation at a terminal. Lines come from `read(prompt)`, text goes to `write(text)`.

    With a chat template the history is messages; without one it is ids, continued as one text.
    """

    def __init__(
        self,
        model,
        tokenizer: Tokenizer,
        sampling: dict[str, Any],
        *,
        template: str | None = None,
        system: str | None = None,
        read: Callable[[str], str] = input,
        write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
    ) -> None:
        from grist_eval.completion import room_for_prompt

        if system is not None and template is None:
            raise ValueError("--system needs a model with a chat template; a base model only continues text")
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.template, self.system = template, system
        self.read, self.write = read, write
        self.room = room_for_prompt(model, sampling["max_new_tokens"])
        self.turn = 0
        self.reset()

    def reset(self) -> None:
        self.ids: list[int] = []
        self.messages = [] if self.system is None else [{"role": "system", "content": self.system}]

    def run(self) -> None:
        """Read lines until the end of input or /quit."""
        kind = "answers" if self.template else "continues your text"
        self.write(f"The model {kind}. /help lists the commands.\n")
        while True:
            try:
                line = self.read("> ")
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:
                self.write("\n(Ctrl-D or /quit leaves)\n")
                continue
            command = line.strip()
            if command == "/quit":
                return
            if command == "/reset":
                self.reset()
                self.write("(forgotten)\n")
            elif command == "/help":
                self.write(HELP)
            elif command.startswith("/"):
                self.write(f"unknown command {command.split()[0]}\n{HELP}")
            else:
                self.respond(line)

    def respond(self, line: str) -> None:
        """Take one line from the user and write what the model makes of it."""
        from grist_tools.text_stream import text_of

        prompt_ids = self._answer_prompt(line) if self.template else self._continuation_prompt(line)
        new: list[int] = []
        text = ""
        try:
            for piece in text_of(self.tokenizer, self._new_ids(prompt_ids[-self.room :], new)):
                text += piece
                self.write(piece)
        except KeyboardInterrupt:
            self.write(" (stopped)")
        self.write("\n")
        if self.template:
            self.messages.append({"role": "assistant", "content": text})
        else:
            self.ids = prompt_ids + new

    def _answer_prompt(self, line: str) -> list[int]:
        from grist_data.chat_template import conversation_ids

        assert self.template is not None
        self.messages.append({"role": "user", "content": line})
        return conversation_ids(self.tokenizer, self.template, self.messages)

    def _continuation_prompt(self, line: str) -> list[int]:
        # A line typed after the model's text starts a new line of it; an empty line adds nothing.
        text = "\n" + line if line and self.ids else line
        begin = self.tokenizer.bos_id if self.tokenizer.bos_id is not None else self.tokenizer.eot_id
        ids = (self.ids or ([] if begin is None else [begin])) + self.tokenizer.encode(text)
        if not ids:
            raise ValueError("nothing to continue: the tokenizer has no end-of-text token, so type something first")
        return ids

    def _new_ids(self, prompt_ids: list[int], new: list[int]) -> Iterator[int]:
        """Draw ids, keeping them in `new` as they come; the stop token is not among them."""
        from grist_data.chat_template import stop_ids
        from grist_model import stream

        stops = stop_ids(self.tokenizer)
        seed = self.sampling["seed"]
        # One seed for every turn would draw the same numbers again and again.
        sampling = {**self.sampling, "seed": None if seed is None else seed + self.turn}
        self.turn += 1
        for id_ in stream(self.model, prompt_ids, stop_ids=stops, **sampling):
            if id_ in stops:
                return
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
    from grist_data.chat_template import find_template

    try:
        model, tokenizer, _ = open_model(options)
        template = find_template(options.directory, tokenizer)
        sampling = sampling_of(options, model.config.context_length)
        Chat(model, tokenizer, sampling, template=template, system=options.system).run()
    except (ValueError, OSError) as error:
        return fail("chat", error)
    return 0


if __name__ == "__main__":
    run(main)
