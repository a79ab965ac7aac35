"""Prompts from the command line or a file, and what a model writes after many of them, in their order."""

from __future__ import annotations

import json
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

if TYPE_CHECKING:
    from grist_data import Tokenizer


@dataclass(frozen=True)
class Request:
    """A prompt: text to continue, or the messages of a conversation; and its ids, once a tokenizer has made them."""

    prompt: str = ""
    messages: list[dict[str, str]] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)


def requests_of(
    prompts: Sequence[str] | None, file: str | Path | None, chat: bool, system: str | None, standard_input: TextIO
) -> list[Request]:
    """Those of `prompts` and then of `file`; with neither, all of standard input as one.

    Raises ValueError that names file and line for what is no prompt, and FileNotFoundError for a file that is not there.
    """
    texts = list(prompts or ())
    found = [Request(prompt=text) for text in texts]
    if file is not None:
        found += _of_file(Path(file))
    elif not texts:
        found = [Request(prompt=standard_input.read())]
    if not found:
        raise ValueError(f"{file} holds no prompts")
    if not chat:
        if any(request.messages for request in found):
            raise ValueError(f"{file} holds messages: --chat puts them into the model's chat template")
        return found
    before = [] if system is None else [{"role": "system", "content": system}]
    return [
        request
        if request.messages
        else replace(request, messages=[*before, {"role": "user", "content": request.prompt}])
        for request in found
    ]


def _of_file(path: Path) -> list[Request]:
    lines = path.read_text(encoding="utf-8").split("\n")
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if path.suffix != ".jsonl":
        return [Request(prompt=line.removesuffix("\r")) for _, line in numbered]
    return [_of_json(line, f"{path}:{number}") for number, line in numbered]


def _of_json(line: str, where: str) -> Request:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not valid JSON: {error}") from error
    given = {"prompt": value} if isinstance(value, str) else value
    if isinstance(given, dict) and isinstance(given.get("prompt"), str):
        return Request(prompt=given["prompt"])
    messages = given.get("messages") if isinstance(given, dict) else None
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return Request(messages=messages)
    raise ValueError(
        f'{where}: expected a text, {{"prompt": text}} or {{"messages": [{{"role": ..., "content": text}}, ...]}}, '
        f"but it is {line[:80]}"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def with_ids(requests: Iterable[Request], model, tokenizer: Tokenizer, max_new_tokens: int) -> list[Request]:
    """Texts too long for the context keep their end; conversations that are too long are refused.

    Raises ValueError for messages without a chat template.
    """
    from grist_data.chat_template import conversation_ids
    from grist_eval.completion import prompt_ids, room_for_prompt

    room = room_for_prompt(model, max_new_tokens)
    found = []
    for request in requests:
        if not request.messages:
            found.append(replace(request, ids=prompt_ids(tokenizer, request.prompt, room)))
            continue
        if tokenizer.chat_template is None:
            raise ValueError("--chat needs a model with a chat template; a base model only continues text")
        found.append(replace(request, ids=conversation_ids(tokenizer, tokenizer.chat_template, request.messages)))
    return found


def write_many(
    model,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    out: TextIO,
    drawing: dict[str, Any],
    ends: Collection[int],
    stops: Sequence[str],
    *,
    max_batch: int,
) -> str:
    """Write a line of JSON for every request, in their order, each as soon as those before it are there -> how fast it was.

    "finish" is "stop" where one of `ends` or `stops` ended the text, which then is left out, else "length".
    """
    from grist_model import generate_many

    started, count, done, written = time.perf_counter(), 0, {}, 0
    results = generate_many(
        model,
        [request.ids for request in requests],
        max_batch=max_batch,
        stop_ids=ends,
        stop_strings=stops,
        token_bytes=tokenizer.token_bytes,
        **drawing,
    )
    for index, new in tqdm(results, total=len(requests), desc="prompts", unit="", disable=None):
        count += len(new)
        done[index] = _result(tokenizer, requests[index], new, ends, stops)
        while written in done:
            print(json.dumps(done.pop(written), ensure_ascii=False), file=out, flush=True)
            written += 1
    seconds = time.perf_counter() - started
    return f"{count} tokens after {len(requests)} prompts in {seconds:.2f} s: {count / seconds:.1f} tokens/s"


def _result(
    tokenizer: Tokenizer, request: Request, new: list[int], ends: Collection[int], stops: Sequence[str]
) -> dict[str, Any]:
    from grist_tools.text_stream import until

    ended = new[-1] in ends
    whole = tokenizer.decode(new[:-1] if ended else new)
    text = "".join(until([whole], stops))
    asked = {"messages": request.messages} if request.messages else {"prompt": request.prompt}
    return {**asked, "text": text, "tokens": len(new), "finish": "stop" if ended or text != whole else "length"}
