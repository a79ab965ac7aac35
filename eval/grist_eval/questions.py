"""Tasks of questions on a model in memory: the rows, their prompts, the scores of all ranks together, and the summary.

`evaluate_tasks` is the door: the command line, a trainer and the tests go through it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_eval import few_shot
from grist_eval.asking import keys_of, score_rows, write_rows
from grist_eval.encoding import Bos
from grist_eval.multiple_choice import chance_of, row_metrics, summary
from grist_eval.result_cache import ResultCache, key_of
from grist_eval.row_files import hub_rows, read_rows
from grist_eval.row_task import Row, RowTask
from grist_eval.scoring import BATCH_TOKENS, Score
from grist_eval.statistics import centred
from grist_eval.tasks import ROW_TASKS

if TYPE_CHECKING:
    from grist_data import Tokenizer

Files = Mapping[str, "str | Path"]


@dataclass(frozen=True)
class Settings:
    """How questions are asked.

    shots: examples before each; None: the task's own number. seed: of their draws. limit: the first rows of each task only.
    max_new_tokens: of an answer, instead of the task's own. allow_code: run what a model wrote, where a task asks for it.
    """

    shots: int | None = None
    seed: int = few_shot.SEED
    limit: int | None = None
    bos: Bos = "tokenizer"
    batch_tokens: int = BATCH_TOKENS
    max_new_tokens: int | None = None
    allow_code: bool = False

    def __post_init__(self) -> None:
        for name, least in (("shots", 0), ("limit", 1), ("batch_tokens", 1), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, but is {value}")


@dataclass(frozen=True)
class Questions:
    """A task with its rows, and what stands before the context of each."""

    name: str
    task: RowTask
    rows: list[Row]
    prefixes: list[str]
    shots: int
    origin: str

    def pairs(self, at: int) -> list[tuple[str, str]]:
        """(context, continuation) of a row, its examples included."""
        row = self.rows[at]
        return [
            (self.prefixes[at] + context, continuation)
            for context, continuation in zip(row.contexts, row.continuations, strict=True)
        ]

    def prompt(self, at: int) -> str:
        return self.prefixes[at] + self.rows[at].contexts[0]


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work. With a group that is not the default one, rank and world_size are its."""

    rank: int = 0
    world_size: int = 1
    group: Any = None

    def same(self, value: Any) -> Any:
        """What the first rank has. All ranks call this together."""
        return self.gathered(value)[0]

    def gathered(self, value: Any) -> list[Any]:
        """Of every rank, by rank. All ranks call this together."""
        if self.world_size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.group)
        return found


@dataclass
class Results:
    """Results of the rows of one task by their hash: those known from the cache, and those this rank adds."""

    keys: list[str]
    known: dict[str, Any]
    cache: ResultCache | None
    added: dict[str, Any] = field(default_factory=dict)

    def add(self, results: Mapping[int, Any]) -> None:
        by_key = {self.keys[at]: result for at, result in results.items()}
        self.added |= by_key
        if self.cache is not None:
            self.cache.add(by_key)


def load_questions(
    names: Sequence[str], *, data: Files | None = None, examples: Files | None = None, settings: Settings | None = None
) -> list[Questions]:
    """Read the rows of tasks, before a model is loaded: of the files that `data` names, else of the datasets on the hub.

    examples: files of rows that few-shot examples are drawn from; a task with rows from a file and no examples draws from the
    rows themselves.

    Raises:
        ValueError: an unknown task; bad rows, by file and row; too few rows to draw from; a task that would run what the model
            wrote, and `settings.allow_code` is not set.
        ImportError: no file, and the package `datasets` is not installed.
    """
    settings = settings or Settings()
    data, examples = data or {}, examples or {}
    unknown = [name for name in [*names, *data, *examples] if name not in ROW_TASKS]
    if unknown:
        raise ValueError(f"unknown task(s) {', '.join(unknown)}; there are {', '.join(ROW_TASKS)}")
    found = []
    for name in names:
        task = ROW_TASKS[name]
        if task.generation is not None and task.generation.runs_code and not settings.allow_code:
            raise ValueError(
                f"task {name} runs code that the model wrote: pass --allow-code-execution, on a machine that may be harmed"
            )
        shots = task.shots if settings.shots is None else settings.shots
        rows = _rows(task, data.get(name), settings.limit)
        pool = _pool(task, data.get(name), examples.get(name)) if shots else None
        try:
            prefixes = few_shot.prefixes(task, rows, pool, shots, settings.seed)
        except ValueError as error:
            raise ValueError(f"task {name}: {error}") from None
        found.append(Questions(name, task, rows, prefixes, shots, str(data.get(name, task.source.path))))
    return found


def _rows(task: RowTask, path: str | Path | None, limit: int | None) -> list[Row]:
    return hub_rows(task, task.source.split, limit) if path is None else read_rows(task, path, limit)


def _pool(task: RowTask, rows: str | Path | None, examples: str | Path | None) -> list[Row] | None:
    if examples is not None:
        return read_rows(task, examples)
    if rows is not None or task.source.examples_split is None:
        return None
    return hub_rows(task, task.source.examples_split)


def evaluate_tasks(
    model: Any,
    tokenizer: Tokenizer,
    names: Sequence[str] | Sequence[Questions],
    *,
    data: Files | None = None,
    examples: Files | None = None,
    settings: Settings | None = None,
    rank: int = 0,
    world_size: int = 1,
    group: Any = None,
    cache: str | Path | None = None,
    model_key: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Ask a model the questions of some tasks: names, or what `load_questions` made of them.

    With world_size > 1 all ranks call this together, and each returns the same. Ranks share the rows, and the scores do not
    depend on how many there are. A model under FSDP2 works: every rank makes the same number of forwards. Where such a model
    generates, every rank writes every answer.

    cache: directory of results that are known; model_key tells models apart in it, and is needed with it.
    progress: draw a bar on stderr (on rank 0).

    Returns:
        `tasks`: by name `rows`, `shots`, `main` (the name of its metric), `chance`, `centred`, every metric and NAME_stderr,
        `origin` and `rows_sha256` (of all texts). `core`: the mean of `centred` over the tasks (Li et al.,
        "DataComp-LM", 2024, call that of their 22 tasks so). `items`: by name, a dict a row: its metrics, and its scores or
        the answer written.

    Raises:
        ValueError: what `load_questions` raises; texts that the model cannot read; a cache without a model_key.
    """
    settings = settings or Settings()
    if cache is not None and model_key is None:
        raise ValueError("a cache needs model_key, which tells the results of this model from those of others")
    ranks = Ranks(rank, world_size, group)
    found: dict[str, Any] = {}
    items: dict[str, list[dict[str, Any]]] = {}
    for each in names:
        questions = (
            load_questions([each], data=data, examples=examples, settings=settings)[0]
            if isinstance(each, str)
            else each
        )
        store = None if cache is None else ResultCache(cache, str(model_key), questions.name, rank)
        with contextlib.closing(store) if store else contextlib.nullcontext():
            by_row, keys = _asked(model, tokenizer, questions, settings, ranks, store, progress)
        items[questions.name] = [_item(questions, row, by_row[at]) for at, row in enumerate(questions.rows)]
        found[questions.name] = _result(questions, keys, items[questions.name])
    core = sum(result["centred"] for result in found.values()) / len(found) if found else None
    return {"tasks": found, "core": core, "items": items}


def _asked(
    model: Any,
    tokenizer: Tokenizer,
    questions: Questions,
    settings: Settings,
    ranks: Ranks,
    store: ResultCache | None,
    progress: bool,
) -> tuple[list[Any], list[str]]:
    """-> (the result of every row, their hashes)."""
    keys = keys_of(questions, settings)
    known = ranks.same({} if store is None or ranks.rank else store.known())
    results = Results(keys, known, store)
    with _bar(questions, enabled=progress and ranks.rank == 0) as bar:
        ask = score_rows if questions.task.generation is None else write_rows
        ask(model, tokenizer, questions, settings, ranks, results, bar.update)
    for added in ranks.gathered(results.added):
        known = {**known, **added}
    return [known[key] for key in keys], keys


def _item(questions: Questions, row: Row, result: Any) -> dict[str, Any]:
    if questions.task.generation is not None:
        return {**result["metrics"], "text": result["text"]}
    scores = [Score(*score) for score in result]
    return {**row_metrics(row, scores), "scores": scores}


def _result(questions: Questions, keys: list[str], items: list[dict[str, Any]]) -> dict[str, Any]:
    task = questions.task
    metrics = [{name: of_row[name] for name in of_row if name not in ("scores", "text")} for of_row in items]
    means = summary(metrics)
    chance = chance_of(questions.rows) if task.chance is None else task.chance
    main = means[task.main]
    assert main is not None
    return {
        "rows": len(items),
        "shots": questions.shots,
        "main": task.main,
        "chance": chance,
        "centred": centred(main, chance),
        **means,
        "origin": questions.origin,
        "rows_sha256": key_of(keys),
    }


@contextlib.contextmanager
def _bar(questions: Questions, *, enabled: bool) -> Iterator[Any]:
    from tqdm import tqdm

    silent = None if enabled else True  # None: silent without a terminal
    with tqdm(total=len(questions.rows), desc=questions.name, unit="row", leave=False, disable=silent) as bar:
        yield bar
