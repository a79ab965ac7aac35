"""The page: sections in their order, style and script inside, nothing from anywhere else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from grist_tools import report_facts, report_files, report_settings
from grist_tools.report_curves import legend_of_runs, router_curves, training_curves
from grist_tools.report_heat import heat_strips
from grist_tools.report_html import Html, details, join, missing, slug, tag
from grist_tools.report_run import Run
from grist_tools.report_step_time import step_time

_HERE = Path(__file__).parent
MAX_NOTES = 20

# Sections that show every run by itself: title -> what it has to say of one.
OF_A_RUN: dict[str, Callable[[Run], Html]] = {
    "Step time": step_time,
    "Bad batches": report_files.bad_batches,
    "Stages": report_files.stages,
    "Evaluation": report_files.evaluation,
    "Samples": report_files.samples,
    "Checkpoints": report_files.checkpoints,
}


def page(runs: Sequence[Run]) -> str:
    """The whole file. It depends on the run folders alone: no date, no place."""
    sections = {
        "In short": report_facts.headlines(runs),
        "Curves": join(_notes(runs), training_curves(runs)),
        "Router health": join(router_curves(runs), _each(runs, heat_strips)),
        **{title: _each(runs, content) for title, content in OF_A_RUN.items()},
        "Configuration": join(
            report_settings.differences(runs) if len(runs) > 1 else None, _each(runs, report_settings.configuration)
        ),
        "Environment": _each(runs, report_settings.environment),
    }
    title = "Run " + runs[0].label if len(runs) == 1 else "Runs " + ", ".join(run.label for run in runs)
    links = tag("ul", [tag("li", tag("a", name, href=f"#{slug(name)}")) for name in sections])
    body = [
        tag("header", tag("h1", title), [_status(run, len(runs)) for run in runs], legend_of_runs(runs)),
        tag("nav", links, aria_label="Sections"),
        tag("main", [_section(name, content) for name, content in sections.items()]),
    ]
    script = (_HERE / "report_page.js").read_text(encoding="utf-8")
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html((_HERE / "report_page.css").read_text(encoding="utf-8"))),
    ]
    whole = tag("html", tag("head", head), tag("body", body, tag("script", Html(script))), lang="en")
    return f"<!doctype html>\n{whole}\n"


def _policy(script: str) -> str:
    """Nothing is fetched, and no script runs but ours, even if some text of a run came through unescaped."""
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def _section(title: str, content: Html) -> Html:
    return tag("section", tag("h2", title, id=slug(title)), content, aria_labelledby=slug(title))


def _status(run: Run, of: int) -> Html:
    name = f"{run.label}: " if of > 1 else ""
    words = report_settings.in_words(run)
    return join(tag("p", name + report_facts.status(run)), tag("p", words, class_="hint") if words else None)


def _each(runs: Sequence[Run], content: Callable[[Run], Html]) -> Html:
    """One run's content as it is, that of several under their names."""
    if len(runs) == 1:
        return content(runs[0])
    return join([[tag("h3", run.label), content(run)] for run in runs])


def _notes(runs: Sequence[Run]) -> Html:
    """What is wrong with metrics.jsonl, where something is."""
    said = []
    for run in runs:
        name = f"{run.label}: " if len(runs) > 1 else ""
        if "metrics.jsonl" in run.problems:
            said.append(missing(name + run.problems["metrics.jsonl"]))
        if run.notes:
            items = [tag("li", note) for note in run.notes[:MAX_NOTES]]
            said.append(details(f"{name}left out of metrics.jsonl: {len(run.notes):,}", tag("ul", items)))
    return join(said)
