"""HTML from values: whatever is not `Html` already is text, and is escaped. Tags, tables and numbers of the report."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

# No character reference may stand for these, and the surrogates among them have no UTF-8. Texts of a corpus contain them all.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_VOID = {"meta"}


class Html(str):
    """Text that is HTML already. Only this module and constants make one."""


Child: TypeAlias = "str | Iterable[Child] | None"


def escape(text: str) -> Html:
    """Any text as HTML, in an element or in a quoted attribute; control characters and lone surrogates become U+FFFD."""
    return Html(html.escape(_UNPRINTABLE.sub("\ufffd", text)))


def _inner(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, str):
        return child if isinstance(child, Html) else escape(child)
    return "".join(map(_inner, child))


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element. In names of attributes `_` stands for `-`, and is dropped at the end (`class_`); True is a bare attribute,
    None and False leave it out."""
    given = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            given.append(f" {key}")
        elif value is not None and value is not False:
            given.append(f' {key}="{escape(str(value))}"')
    start = f"<{name}{''.join(given)}>"
    return Html(start if name in _VOID else f"{start}{_inner(children)}</{name}>")


def join(*children: Child) -> Html:
    return Html(_inner(children))


def slug(title: str) -> str:
    """A title as an id: `Step time` -> `step-time`."""
    return re.sub("[^a-z0-9]+", "-", title.lower()).strip("-")


def missing(text: str) -> Html:
    """What a section says of something that is not there."""
    return tag("p", text, class_="missing")


def table(caption: str, header: Sequence[str], rows: Sequence[Sequence[Child]]) -> Html:
    """A table whose first column names the rows. It scrolls in itself where it is wider than the page, by keyboard as well."""
    head = tag("tr", [tag("th", cell, scope="col") for cell in header])
    body = [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in rows]
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", body))
    return tag("div", whole, class_="scroll", tabindex=0, role="region", aria_label=caption)


def details(summary: str, *children: Child, opened: bool = False) -> Html:
    return tag("details", tag("summary", summary), *children, open=opened)


def number(value: float) -> str:
    """A figure to read: whole numbers in full, others to four significant digits, `NaN` and `infinite` by name."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def shown(value: Any) -> str:
    """Any value of a configuration or a JSON file as text. Exact: settings that differ in the last digit look different."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def duration(seconds: float) -> str:
    """`41 s`, `3 min 05 s`, `2 h 14 min`, `3 d 04 h`."""
    if not math.isfinite(seconds):
        return number(seconds)
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    for size, large, small, unit in ((86400, "d", "h", 3600), (3600, "h", "min", 60), (60, "min", "s", 1)):
        if whole >= size:
            return f"{whole // size} {large} {whole % size // unit:02d} {small}"
    raise AssertionError("a minute or more is one of the above")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys: `{"a": {"b": 1}}` -> `{"a.b": 1}`. Empty mappings stay as values."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
