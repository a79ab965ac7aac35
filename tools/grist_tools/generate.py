"""Continue a prompt, showing the text as it comes; or many prompts, an object of JSON a line.

python -m grist_tools.generate runs/quickstart/model --prompt "To be, or not to be"
python -m grist_tools.generate runs/quickstart/model --temperature 0 < prompt.txt
python -m grist_tools.generate runs/quickstart/model --prompts questions.jsonl --chat > answers.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TextIO

from grist_tools.console import fail, parser_for, run
from grist_tools.loading import add_model_options, open_model
from grist_tools.sampling_options import add_sampling_options, ends_of, sampling_of, stored_generation

if TYPE_CHECKING:
    from grist_data import Tokenizer
    from grist_tools.token_clock import TokenClock


def parser() -> argparse.ArgumentParser:
    parser = parser_for("generate", __doc__)
    add_model_options(parser)
    parser.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="text to continue (default: what comes on standard input); several give a line of JSON each",
    )
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help='a prompt a line; of a .jsonl, a text, {"prompt": text} or {"messages": [...]} a line',
    )
    parser.add_argument("--chat", action="store_true", help="prompts are a user's messages, for the chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message before each prompt, with --chat")
    parser.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="prompts at a time (default: %(default)s)"
    )
    add_sampling_options(parser)
    return parser


def new_ids(model, prompt_ids: list[int], ends: Collection[int], drawing: dict[str, Any]) -> Iterator[int]:
    """Ids that continue a prompt, each as soon as it is drawn, up to one that ends the text, which is left out."""
    from grist_model import stream

    for id_ in stream(model, prompt_ids, stop_ids=ends, **drawing):
        if id_ in ends:
            return
        yield id_


def write_continuation(
    model,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    out: TextIO,
    drawing: dict[str, Any],
    ends: Collection[int] = (),
    stops: Sequence[str] = (),
) -> TokenClock:
    """Write what continues a prompt to `out` as the tokens come, up to one of `ends` or before one of `stops`."""
    from grist_tools.text_stream import text_of, until
    from grist_tools.token_clock import TokenClock

    clock = TokenClock()
    for piece in until(text_of(tokenizer, clock.of(new_ids(model, prompt_ids, ends, drawing))), stops):
        print(piece, end="", file=out, flush=True)
    print(file=out, flush=True)
    return clock


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from grist_data.chat_template import stop_ids
    from grist_tools.generate_batch import requests_of, with_ids, write_many

    try:
        if options.system is not None and not options.chat:
            raise ValueError("--system needs --chat")
        requests = requests_of(options.prompt, options.prompts, options.chat, options.system, sys.stdin)
        if options.prompt_lookup is not None and len(requests) != 1:
            raise ValueError(f"--prompt-lookup is for one prompt, but there are {len(requests)}")
        model, tokenizer, device = open_model(options)
        stored = stored_generation(options.directory)
        drawing = sampling_of(options, stored, model.config.context_length)
        ends = ends_of(stored, stop_ids(tokenizer))
        requests = with_ids(requests, model, tokenizer, drawing["max_new_tokens"])
        if len(requests) == 1 and options.prompts is None:
            print("" if options.chat else requests[0].prompt, end="", flush=True)
            drawing["prompt_lookup"] = options.prompt_lookup
            drawing |= {"stop_strings": options.stop, "token_bytes": tokenizer.token_bytes}
            clock = write_continuation(model, tokenizer, requests[0].ids, sys.stdout, drawing, ends, options.stop)
            print(f"{clock.report()}, on {device}", file=sys.stderr)
        else:
            report = write_many(
                model, tokenizer, requests, sys.stdout, drawing, ends, options.stop, max_batch=options.max_batch
            )
            print(f"{report}, on {device}", file=sys.stderr)
    except (ValueError, OSError) as error:
        return fail("generate", error)
    return 0


if __name__ == "__main__":
    run(main)
