"""What a run is: one line of words, its configuration, how runs differ, and where it was computed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from grist_tools.report_html import Html, details, flatten, join, missing, shown, table, tag
from grist_tools.report_run import Run


def in_words(run: Run) -> str:
    """Model, optimizer, data, device and commit in one line; the parts that its files tell."""
    flat = flatten(run.config)
    parts = [
        ("{} layers of width {}", "model.layers", "model.width"),
        ("{} experts, {} of them active", "model.experts", "model.active_experts")
        if flat.get("model.experts")
        else ("",),
        ("{} at {}", "optimizer.name", "optimizer.lr"),
        ("from {}", "initial"),
    ]
    said = [text.format(*(shown(flat[key]) for key in keys)) for text, *keys in parts if _all_known(flat, keys)]
    sources = _sources(run.config)
    said.append(f"trained on {', '.join(sources)}" if sources else "")
    ranks, device, commit = (run.environment.get(key) for key in ("world_size", "device", "commit"))
    said.append(f"{ranks} × {device}" if ranks and device else "")
    said.append(f"commit {str(commit)[:12]}" if commit else "")
    return "; ".join(filter(None, said))


def _all_known(flat: dict[str, Any], keys: Sequence[str]) -> bool:
    return all(flat.get(key) is not None for key in keys)


def _sources(config: dict[str, Any]) -> list[str]:
    """Directories or files that the run learns from."""
    preferences, data = config.get("preferences"), config.get("data")
    if isinstance(preferences, dict):
        return [shown(path) for path in preferences.get("paths") or []]
    if not isinstance(data, dict):
        return []
    sources = data.get("sources")
    if isinstance(sources, dict) and sources:
        return [shown(each.get("directory", name)) for name, each in sources.items() if isinstance(each, dict)]
    return [shown(data["directory"])] if data.get("directory") else []


def facts_of(tree: dict[str, Any], caption: str) -> Html:
    """A nested mapping as a table of dotted keys."""
    return table(caption, ["key", "value"], [[str(key), shown(value)] for key, value in flatten(tree).items()])


def configuration(run: Run) -> Html:
    if not run.config:
        return missing(run.problems.get("config.yaml", "config.yaml is empty."))
    flat = flatten(run.config)
    return details(f"config.yaml: {len(flat)} settings", facts_of(run.config, f"Configuration of {run.label}"))


def differences(runs: Sequence[Run]) -> Html:
    """The settings in which runs differ; one that a run has not is told from one that is null."""
    flats = [flatten(run.config) for run in runs]
    keys = dict.fromkeys(key for flat in flats for key in flat)
    texts = {key: [shown(flat[key]) if key in flat else "(not there)" for flat in flats] for key in keys}
    rows = [[key, *cells] for key, cells in texts.items() if len(set(cells)) > 1]
    if not rows:
        return missing("The configurations are equal in every setting.")
    return table("Settings that differ", ["key", *(run.label for run in runs)], rows)


def environment(run: Run) -> Html:
    """Where the run was computed, and the command that repeats it."""
    if not run.environment:
        return missing(run.problems.get("environment.json", "environment.json is empty."))
    command = run.environment.get("command")
    words = command if isinstance(command, list) else [command] if command else []
    rest = {key: value for key, value in run.environment.items() if key != "command"}
    line = tag("pre", " ".join(map(_quoted, words))) if words else None
    return join(line, facts_of(rest, f"Environment of {run.label}"))


def _quoted(word: Any) -> str:
    return shlex.quote(str(word))
