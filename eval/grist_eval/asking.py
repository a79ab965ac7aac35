"""The work on the rows of one task: what is not known yet is scored, or written, by this rank and the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from grist_eval.answers import encode_prompts, write_answers
from grist_eval.encoding import encode_pairs
from grist_eval.result_cache import key_of
from grist_eval.scoring import Score, plan, score_groups

if TYPE_CHECKING:
    from grist_data import Tokenizer
    from grist_eval.questions import Questions, Ranks, Results, Settings
    from grist_eval.row_task import Generation


def keys_of(questions: Questions, settings: Settings) -> list[str]:
    """The hash of each row: of everything that its result depends on beside the model."""
    generation = questions.task.generation
    rows = range(len(questions.rows))
    if generation is None:
        return [key_of([settings.bos, questions.pairs(at)]) for at in rows]
    how = [settings.bos, generation.until, _cut(generation, settings)]
    return [key_of([*how, questions.prompt(at), questions.rows[at].reference]) for at in rows]


def _cut(generation: Generation, settings: Settings) -> int:
    return generation.max_new_tokens if settings.max_new_tokens is None else settings.max_new_tokens


def score_rows(
    model: Any,
    tokenizer: Tokenizer,
    questions: Questions,
    settings: Settings,
    ranks: Ranks,
    results: Results,
    tick: Callable[[int], Any],
) -> None:
    """Log-likelihoods. Batches are planned over all rows and those with anything unknown are run whole: a run that goes on
    where another stopped gives the same bits."""
    lengths = [len(row.contexts) for row in questions.rows]
    pairs = [pair for at in range(len(lengths)) for pair in questions.pairs(at)]
    encoded = iter(encode_pairs(tokenizer, pairs, model.config.context_length, settings.bos))
    groups = [[next(encoded) for _ in range(length)] for length in lengths]
    batches = plan(groups, model.config.vocab_size, settings.batch_tokens)
    unknown = [batch for batch in batches if any(results.keys[at] not in results.known for at in batch)]
    tick(len(groups) - sum(map(len, unknown)))
    left = {at: len(batch) for batch in unknown for at in batch}
    waiting: dict[int, list[Score]] = {}

    def done(at: int, scores: list[Score]) -> None:
        waiting[at] = scores
        if len(waiting) == left[at]:  # the batch is complete
            results.add(waiting)
            waiting.clear()
            tick(left[at] * ranks.world_size)

    score_groups(model, groups, unknown, rank=ranks.rank, world_size=ranks.world_size, done=done)


def write_rows(
    model: Any,
    tokenizer: Tokenizer,
    questions: Questions,
    settings: Settings,
    ranks: Ranks,
    results: Results,
    tick: Callable[[int], Any],
) -> None:
    """Answers and their metrics. A model that is sharded needs all ranks in every forward, so there each writes all answers,
    and the first one judges them."""
    generation = questions.task.generation
    assert generation is not None
    unknown = [at for at, key in enumerate(results.keys) if key not in results.known]
    tick(len(results.keys) - len(unknown))
    together = _is_sharded(model)
    mine = unknown if together else unknown[ranks.rank :: ranks.world_size]
    cut = _cut(generation, settings)
    prompts = encode_prompts(model, tokenizer, [questions.prompt(at) for at in mine], cut, settings.bos)

    def done(number: int, text: str) -> None:
        at = mine[number]
        if not together or ranks.rank == 0:
            metrics = generation.metrics(text, questions.rows[at].reference)
            results.add({at: {"text": text, "metrics": metrics}})
        tick(1 if together else ranks.world_size)

    write_answers(model, tokenizer, prompts, generation.until, cut, done)


def _is_sharded(model: Any) -> bool:
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())
