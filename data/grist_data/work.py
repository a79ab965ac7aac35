"""The steps of a preparation over processes: shares dealt out, progress shown, and the dataset at the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grist_data.encode import read_part_facts
from grist_data.encoder import encoding_facts
from grist_data.join import plan_shards, splits_of
from grist_data.manifest import write_manifest
from grist_data.obtain_tokenizer import obtain_tokenizer
from grist_data.plan import Plan
from grist_data.preparation import Preparation
from grist_data.prepare import tokenizer_facts
from grist_data.workers import Workers


def survey(preparation: Preparation, workers: Workers, numbers: Sequence[int] | None = None) -> None:
    """Survey the spans that are not, all or those of these numbers; nothing once there is a plan."""
    if preparation.journal.plan is not None:
        return
    preparation.reader.store_stream()
    tasks = preparation.survey_tasks(numbers)
    sizes = {task["span"]: preparation.spans[task["span"]].size for task in tasks}
    total = sum(sizes.values())
    with tqdm(total=total or None, desc="reading", unit="B", unit_scale=True, disable=None, leave=False) as bar:
        for done in workers.run(tasks, workers.number(total)):
            bar.update(sizes[done["span"]])


def plan(preparation: Preparation) -> None:
    """Merge the surveys, say what they left out, and obtain the tokenizer. Raises ValueError when a span is not surveyed."""
    if preparation.journal.plan is None:
        preparation.make_plan()
        _say_left_out(preparation.plan)
    obtain_tokenizer(preparation)


def _say_left_out(plan: Plan) -> None:
    if plan.dropped:
        counts = ", ".join(f"{counts['documents']:,} {reason}" for reason, counts in plan.dropped.items())
        print(f"documents left out: {counts}; {plan.documents:,} stay", file=sys.stderr)
    if plan.replaced["documents"]:
        characters, documents = plan.replaced["characters"], plan.replaced["documents"]
        print(f"{characters:,} characters in {documents:,} documents could not be read and are U+FFFD", file=sys.stderr)


def encode(preparation: Preparation, workers: Workers, units: Sequence[int]) -> None:
    """Encode those of the units that are not yet."""
    plan = preparation.plan
    missing = preparation.missing_units(units)
    total = sum(plan.units[number].text_bytes for number in units)
    left = sum(plan.units[number].text_bytes for number in missing)
    n_tokens = 0
    with tqdm(total=total, initial=total - left, desc="encoding", unit="B", unit_scale=True, disable=None) as bar:
        processes = workers.number(left)
        for done in workers.run(preparation.encode_tasks(missing, processes), processes):
            n_tokens += done["tokens"]
            bar.update(plan.units[done["unit"]].text_bytes)
            bar.set_postfix_str(f"{n_tokens / 1e6 / max(bar.format_dict['elapsed'], 1e-3):.2f} M tokens/s")


def finish(preparation: Preparation, workers: Workers, units: Sequence[int], directory: Path) -> dict[str, Any]:
    """Join the parts of these units into shards in the directory and write dataset.json; returns its `splits`."""
    job = preparation.job
    shards = plan_shards(job, units, preparation.config.shard_tokens)
    tasks = [
        {"step": "join", "index": index, "shard": asdict(shard), "directory": str(directory)}
        for index, shard in enumerate(shards)
    ]
    total = sum(shard.tokens for shard in shards)
    roots: dict[int, int] = {}
    with tqdm(total=total, desc="writing shards", unit=" tokens", unit_scale=True, disable=None, leave=False) as bar:
        for done in workers.run(tasks, workers.number(total)):
            roots[done["index"]] = done["root"]
            bar.update(shards[done["index"]].tokens)
    splits = splits_of(shards, [roots[index] for index in range(len(shards))], job)
    trained = {} if preparation.journal.trained_by is None else {"trained_by": preparation.journal.trained_by}
    tokenizer = tokenizer_facts(preparation.tokenizer) | trained
    write_manifest(directory, splits, tokenizer, _facts(preparation, units))
    return splits


def chat_facts(template_sha256: str, train_on: str) -> dict[str, str]:
    """For dataset.json: how conversations became tokens."""
    return {"chat_template_sha256": template_sha256, "train_on": train_on}


def _facts(preparation: Preparation, units: Sequence[int]) -> dict[str, Any]:
    config, plan, split = preparation.config, preparation.plan, preparation.split
    licence = {} if config.licence is None else {"licence": config.licence}
    chat = {} if preparation.chat is None else {"conversations": chat_facts(*preparation.chat)}
    partial = {} if len(units) == len(plan.units) else {"units": {"in_here": len(units), "of": len(plan.units)}}
    return {
        "source": {
            "name": config.source,
            "options": json.loads(json.dumps(config.source_options())),
            **licence,
            **preparation.source_facts,
            "documents": sum(plan.units[number].documents for number in units),
            "text_bytes": sum(plan.units[number].text_bytes for number in units),
            **partial,
            "dropped": plan.dropped,
            "replaced": plan.replaced,
            "manifest_sha256": preparation.job.encoding.manifest_sha256,
        },
        "encoding": encoding_facts(read_part_facts(number, preparation.job) for number in units),
        **chat,
        "held_out": {"below": f"{split.threshold:016x}", "adjusted": split.adjusted},
        "settings": preparation.settings,
    }
