"""A conversation to token ids by the tokenizer's own chat template (the Jinja text that Hugging Face models carry).

Templates write special tokens by name, and a user may type such a name. What the template writes becomes special ids,
what people wrote stays text: contents are rendered as placeholders and put in as plain text afterwards.
"""

from __future__ import annotations

import datetime
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grist_data import Tokenizer

Message = dict[str, str]  # {"role": "user" | "assistant" | "system", "content": text}

# Private-use characters: they mean nothing to a template, survive `trim` and `tojson`, and are in no ordinary text.
_OPEN, _CLOSE = "\ue0f1", "\ue0f2"
_PLACEHOLDER = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


def find_template(directory: str | Path, tokenizer: Tokenizer) -> str | None:
    """The chat template in a model directory, chat_template.jinja before tokenizer_config.json, or None."""
    file = Path(directory) / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = tokenizer.config.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    return template


def conversation_ids(tokenizer: Tokenizer, template: str, messages: list[Message]) -> list[int]:
    """Ids of a conversation up to where the assistant's next message begins.

    Raises:
        ValueError: the template is not valid Jinja, or refuses this conversation.
    """
    holders = [{**message, "content": f"{_OPEN}{i}{_CLOSE}"} for i, message in enumerate(messages)]
    rendered = _render(template, holders, tokenizer)
    ids: list[int] = []
    position = 0
    for holder in _PLACEHOLDER.finditer(rendered):
        ids += _with_specials(tokenizer, rendered[position : holder.start()])
        ids += tokenizer.encode(messages[int(holder[1])]["content"])
        position = holder.end()
    return ids + _with_specials(tokenizer, rendered[position:])


def stop_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids that end the assistant's message: end of text, and what tokenizer_config.json calls eos_token."""
    eos = tokenizer.config.get("eos_token")
    name = eos.get("content") if isinstance(eos, dict) else eos
    ends = {tokenizer.eot_id, None if name is None else tokenizer.special_tokens.get(name)}
    return {id_ for id_ in ends if id_ is not None}


def _with_specials(tokenizer: Tokenizer, text: str) -> list[int]:
    names = sorted(tokenizer.special_tokens, key=len, reverse=True)
    parts = re.split("(" + "|".join(map(re.escape, names)) + ")", text) if names else [text]
    ids: list[int] = []
    for part in parts:
        special = tokenizer.special_tokens.get(part)
        ids += tokenizer.encode(part) if special is None else [special]
    return ids


def _render(template: str, messages: list[Message], tokenizer: Tokenizer) -> str:
    # Sandboxed and without attribute writes: the template comes with a downloaded model.
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    names: dict[str, Any] = {}
    for key in ("bos_token", "eos_token", "unk_token", "pad_token"):
        value = tokenizer.config.get(key)
        names[key] = value.get("content") if isinstance(value, dict) else value or ""
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=True, **names)
    except TemplateError as error:
        raise ValueError(f"the model's chat template fails: {error}") from error


def _refuse(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
