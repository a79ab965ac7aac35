"""Continue a prompt, showing the text as it comes.

python -m grist_tools.generate runs/quickstart/model --prompt "To be, or not to be"
python -m grist_tools.generate runs/quickstart/model --temperature 0 < prompt.txt
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from grist_tools.console import fail, parser_for, run
from grist_tools.loading import add_model_options, add_sampling_options, open_model, sampling_of

if TYPE_CHECKING:
    from grist_data import Tokenizer


def parser() -> argparse.ArgumentParser:
    parser = parser_for("generate", __doc__)
    add_model_options(parser)
    parser.add_argument("--prompt", metavar="TEXT", help="text to continue (default: what comes on standard input)")
    add_sampling_options(parser)
    return parser


def new_ids(model, tokenizer: Tokenizer, prompt_ids: list[int], sampling: dict[str, Any]) -> Iterator[int]:
    """Ids that continue a prompt, each as soon as it is drawn, up to an end-of-text token, which is left out."""
    from grist_model import stream

    stop_ids = () if tokenizer.eot_id is None else (tokenizer.eot_id,)
    for id_ in stream(model, prompt_ids, stop_ids=stop_ids, **sampling):
        if id_ in stop_ids:
            return
        yield id_


def write_continuation(model, tokenizer: Tokenizer, prompt: str, sampling: dict[str, Any], out: TextIO) -> int:
    """Write prompt and continuation to `out` as the tokens come, and count them. A prompt too long keeps its end."""
    from grist_eval.completion import prompt_ids, room_for_prompt
    from grist_tools.text_stream import text_of

    ids = prompt_ids(tokenizer, prompt, room_for_prompt(model, sampling["max_new_tokens"]))
    count = 0

    def counted() -> Iterator[int]:
        nonlocal count
        for id_ in new_ids(model, tokenizer, ids, sampling):
            count += 1
            yield id_

    print(prompt, end="", file=out, flush=True)
    for piece in text_of(tokenizer, counted()):
        print(piece, end="", file=out, flush=True)
    print(file=out, flush=True)
    return count


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        prompt = sys.stdin.read() if options.prompt is None else options.prompt
        model, tokenizer, device = open_model(options)
        started = time.perf_counter()
        sampling = sampling_of(options, model.config.context_length)
        count = write_continuation(model, tokenizer, prompt, sampling, sys.stdout)
    except (ValueError, OSError) as error:
        return fail("generate", error)
    seconds = time.perf_counter() - started
    print(f"{count} tokens in {seconds:.2f} s on {device}: {count / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
