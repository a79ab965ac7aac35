"""The files of a run as parts of the page: bad batches, stages, the evaluation, samples, checkpoints."""

from __future__ import annotations

from typing import Any

from grist_tools.console import size
from grist_tools.report_html import Html, details, escape, flatten, join, missing, number, shown, table, tag
from grist_tools.report_run import Run, is_number
from grist_tools.report_settings import facts_of

# A page of bad batches is for looking at some; all are in the file.
MAX_BATCHES, MAX_TEXTS, MAX_TEXT_CHARS, MAX_FACT_CHARS = 20, 8, 600, 2000


def bad_batches(run: Run) -> Html:
    """Each bad batch folded up: its facts, the ids of its samples, and their texts."""
    unread = run.not_finite()
    note = None
    if unread.steps:
        some = ", ".join(f"{step:,}" for step in unread.steps[:20]) + (" ..." if len(unread.steps) > 20 else "")
        note = tag("p", f"Loss or gradient norm is no finite number, steps in all: {len(unread.steps):,} ({some}).")
    rows = run.bad_batches
    if not rows:
        reason = run.problems.get("bad_batches.jsonl", "bad_batches.jsonl is empty.")
        said = "There is no bad_batches.jsonl: no batch was written down as bad." if "There is no" in reason else reason
        return join(note, missing(said))
    half = MAX_BATCHES // 2
    chosen = rows if len(rows) <= MAX_BATCHES else [*rows[:half], *rows[-half:]]
    left_out = (
        f" Shown are the first and the last {half}; all are in bad_batches.jsonl." if len(chosen) < len(rows) else ""
    )
    return join(note, tag("p", f"{len(rows):,} written down.{left_out}"), [_bad_batch(row) for row in chosen])


def _bad_batch(row: dict[str, Any]) -> Html:
    step, why = row.get("step"), row.get("why", row.get("reason", "no reason given"))
    loss = f", loss {number(row['loss'])}" if is_number(row.get("loss")) else ""
    samples = [sample for key in ("samples", "texts", "text") for sample in _samples(row.get(key))]
    said = {"step", "why", "reason", "loss", "samples" if _samples(row.get("samples")) else "", "texts", "text"}
    facts = {key: value for key, value in row.items() if key not in said}
    facts = {key: _short(shown(value), MAX_FACT_CHARS) for key, value in flatten(facts).items()}
    more = tag("p", f"and {len(samples) - MAX_TEXTS} more samples") if len(samples) > MAX_TEXTS else None
    return details(
        f"step {number(step) if is_number(step) else shown(step)}: {_short(shown(why), 200)}{loss}",
        facts_of(facts, "What is known of it") if facts else None,
        tag("ol", map(_sample, samples[:MAX_TEXTS])) if samples else None,
        more,
    )


def _samples(value: Any) -> list[dict[str, Any]]:
    """Samples with what is known of each: a text, a list of texts, or a list of objects."""
    items = value if isinstance(value, list) else [value]
    found = [{"text": item} if isinstance(item, str) else item for item in items]
    return [item for item in found if isinstance(item, dict)]


def _sample(sample: dict[str, Any]) -> Html:
    """A sample of a batch: where it is from in one line, and its text."""
    text = sample.get("text")
    facts = ", ".join(f"{key} {shown(value)}" for key, value in flatten(sample).items() if key != "text")
    line = tag("p", _short(facts, MAX_TEXT_CHARS), class_="hint") if facts else None
    return tag("li", line, tag("pre", _short(shown(text), MAX_TEXT_CHARS)) if text is not None else None)


def _short(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]} ... ({len(text) - limit:,} more characters)"


def stages(run: Run) -> Html:
    """What held from which step on: the beginning and each stage, with what a stage leaves as it was filled in."""
    data, batch = _part(run, "data"), _part(run, "batch")
    given = [stage for stage in data.get("stages") or [] if isinstance(stage, dict)]
    if not run.config:
        return missing("Stages are not known without config.yaml.")
    if run.config.get("preferences"):
        return missing("One stage: a run on preferences has no others.")
    sources = data.get("sources") if isinstance(data.get("sources"), dict) else {}
    weights = {name: each.get("weight", 1.0) for name, each in (sources or {}).items() if isinstance(each, dict)}
    now: dict[str, Any] = {"after_step": 0, "weights": weights or {"data": 1.0}}
    now |= {"sequence_length": data.get("sequence_length"), "global_size": batch.get("global_size")}
    rows = [_stage_row(now, 0, run.step)]
    for number_, stage in enumerate(given, start=1):
        now = {key: stage[key] if stage.get(key) is not None else value for key, value in now.items()}
        rows.append(_stage_row(now, number_, run.step))
    header = [
        "stage",
        "after step",
        "begun",
        "shares of sources",
        "sequence length",
        "sequences a step",
        "tokens a step",
    ]
    return table(f"Stages of {run.label}", header, rows)


def _stage_row(now: dict[str, Any], index: int, step: int) -> list[str]:
    weights = {name: weight for name, weight in now["weights"].items() if is_number(weight) and weight > 0}
    whole = sum(weights.values())
    shares = ", ".join(f"{name} {weight / whole:.1%}" for name, weight in weights.items())
    length, sequences, after = now["sequence_length"], now["global_size"], now["after_step"]
    tokens = number(length * sequences) if is_number(length) and is_number(sequences) else "unknown"
    begun = "unknown" if not is_number(after) else "yes" if step > after else "no"
    return [str(index), shown(after), begun, shares, shown(length), shown(sequences), tokens]


def _part(run: Run, name: str) -> dict[str, Any]:
    value = run.config.get(name)
    return value if isinstance(value, dict) else {}


def evaluation(run: Run) -> Html:
    """Everything that evaluation.json says; sources of a mixture beside each other."""
    if not run.evaluation:
        reason = run.problems.get("evaluation.json", "evaluation.json is empty.")
        return missing(f"{reason} A run writes it at its end, when it has held-out data.")
    sources = run.evaluation.get("sources")
    rest = {key: value for key, value in run.evaluation.items() if key != "sources"}
    whole = facts_of(rest, f"Held-out figures of {run.label}, at the end")
    if not isinstance(sources, dict) or not all(isinstance(each, dict) for each in sources.values()):
        return whole
    keys = dict.fromkeys(key for each in sources.values() for key in each)
    rows = [[name, *(shown(each[key]) if key in each else "none" for key in keys)] for name, each in sources.items()]
    return join(whole, table(f"Sources of {run.label}", ["source", *keys], rows))


def samples(run: Run) -> Html:
    if not run.samples:
        reason = run.problems.get("samples.txt", "samples.txt is empty.")
        return missing(f"{reason} A run with sample.prompts writes it at its end.")
    return details("samples.txt", tag("pre", escape(run.samples)), opened=True)


def checkpoints(run: Run) -> Html:
    """Checkpoints that are there now, and the portable model."""
    exported = [name for name in ("model", "adapter") if (run.folder / name).is_dir()]
    last = tag("p", "Written at the end: ", ", ".join(f"{name}/" for name in exported)) if exported else None
    if not run.checkpoints:
        return join(missing("There is no checkpoint."), last)
    losses = [each.validation_loss for each in run.checkpoints if each.validation_loss is not None]
    best = min(losses, default=None)
    rows = []
    for each in run.checkpoints:
        loss = "not evaluated" if each.validation_loss is None else number(each.validation_loss)
        loss += " (best)" if best is not None and each.validation_loss == best else ""
        rows.append([f"step {each.step:,}", size(each.n_bytes), loss, "whole" if each.whole else "not whole"])
    return join(table(f"Checkpoints of {run.label}", ["checkpoint", "size", "held-out loss", "state"], rows), last)
