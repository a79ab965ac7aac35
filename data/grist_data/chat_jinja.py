"""Render a chat template as transformers does: the same dialect of Jinja, sandboxed, since templates come with downloads."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what transformers finds answers by; here it is what stands inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it so

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool,
    names: Mapping[str, str],
    today: datetime.datetime,
) -> str:
    """names: bos_token, eos_token and the like. today: what `strftime_now` of a template tells.

    Raises ValueError for a template that is not valid Jinja, or refuses the conversation.
    """
    try:
        return _compiled(template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            strftime_now=today.strftime,
            **names,
        )
    except TemplateError as error:
        raise ValueError(f"the model's chat template fails: {error}") from error
    except (TypeError, AttributeError, IndexError, KeyError) as error:  # an expression in it that does not fit its data
        raise ValueError(f"the model's chat template fails: {error!r}") from error


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _refuse
    environment.filters["tojson"] = _to_json
    return environment.from_string(template)


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _refuse(message: str) -> None:
    raise TemplateError(message)
