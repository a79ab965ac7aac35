"""Samples of several models or checkpoints side by side, as one HTML page that needs nothing but itself."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from grist_eval.generation import distinct, repetition

# No character reference may stand for these, and the surrogates among them have no UTF-8; models write them all.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --card: #f5f6f8; --ink: #1b1f24; --soft: #59626d; --rule: #d3d8de; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171b; --card: #1e2329; --ink: #e6e9ed; --soft: #a3adb8; --rule: #39424c; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1400px; padding: 12px; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .4rem; padding-bottom: .2rem; border-bottom: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1rem 0 .4rem; }
h4 { font-size: .85rem; margin: 0; color: var(--soft); }
.side { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 10px; }
article { background: var(--card); border-radius: 8px; padding: 10px 12px; min-width: 0; }
pre { margin: .3rem 0; white-space: pre-wrap; font: inherit; unicode-bidi: plaintext; }
.given, .missing, small { color: var(--soft); }
.missing { font-style: italic; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); }
th, td { padding: .2rem .8rem .2rem 0; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; }
"""


class Drawn(NamedTuple):
    """A sample as a report holds it: `sampling` in words; text: what follows the prompt."""

    prompt: str
    sampling: str
    text: str


class Column(NamedTuple):
    """The samples of one model. name: as the reader knows it."""

    name: str
    samples: list[Drawn]


def read_report(path: Path) -> Column:
    """The samples in a JSON that `python -m grist_eval` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such JSON, or the task `samples` was not run.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        rows = report["tasks"]["samples"]["samples"]
        return Column(
            report["model"]["directory"], [Drawn(row["prompt"], row["sampling"], row["text"]) for row in rows]
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is no report with samples ({error!r}): expected the JSON of python -m grist_eval with the task samples"
        ) from error


def page(columns: Sequence[Column]) -> str:
    """The page: prompt by prompt, setting by setting, a card for each model. Cards stand side by side where there is room, and
    below each other on a phone.

    Raises:
        ValueError: there are no columns, or two have one name.
    """
    names = [column.name for column in columns]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"expected models with different names, got {', '.join(names) or 'none'}")
    drawn = [sample for column in columns for sample in column.samples]
    prompts = list(dict.fromkeys(sample.prompt for sample in drawn))
    settings = list(dict.fromkeys(sample.sampling for sample in drawn))
    title = "Samples of " + ", ".join(names)
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style></head>\n<body><h1>{_text(title)}</h1>"
    )
    sections = [_section(prompt, settings, columns) for prompt in prompts]
    return "\n".join([head, _variety(columns, settings), *sections, "</body></html>\n"])


def _section(prompt: str, settings: Sequence[str], columns: Sequence[Column]) -> str:
    parts = [f"<section><h2>{_text(prompt) if prompt else '(no prompt)'}</h2>"]
    for setting in settings:
        cards = "".join(_card(column, prompt, setting) for column in columns)
        parts.append(f'<h3>{_text(setting)}</h3><div class="side">{cards}</div>')
    return "\n".join([*parts, "</section>"])


def _card(column: Column, prompt: str, setting: str) -> str:
    texts = [sample.text for sample in column.samples if (sample.prompt, sample.sampling) == (prompt, setting)]
    if not texts:
        shown = '<p class="missing">none</p>'
    else:
        given = f'<span class="given">{_text(prompt)}</span>'
        shown = "".join(
            f"<pre>{given}{_text(text)}</pre><small>repetition-4 {repetition(text, 4):.2f}</small>" for text in texts
        )
    return f"<article><h4>{_text(column.name)}</h4>{shown}</article>"


def _variety(columns: Sequence[Column], settings: Sequence[str]) -> str:
    """A table: how alike a model's texts are under each setting, and how much each repeats itself."""
    head = "".join(f'<th scope="col">{_text(column.name)}</th>' for column in columns)
    rows = "".join(
        f'<tr><th scope="row">{_text(setting)}</th>{"".join(_cell(column, setting) for column in columns)}</tr>'
        for setting in settings
    )
    caption = "distinct-2 (1: no pair of words comes twice) / repetition-4 (0: no text repeats itself)"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Variety"><table><caption>{caption}</caption>'
        f'<tr><th scope="col">sampling</th>{head}</tr>{rows}</table></div>'
    )


def _cell(column: Column, setting: str) -> str:
    texts = [sample.text for sample in column.samples if sample.sampling == setting]
    if not texts:
        return '<td class="missing">none</td>'
    repeated = sum(repetition(text, 4) for text in texts) / len(texts)
    return f"<td>{distinct(texts, 2):.2f} / {repeated:.2f}</td>"


def _text(value: str) -> str:
    return html.escape(_UNPRINTABLE.sub("\ufffd", value))
