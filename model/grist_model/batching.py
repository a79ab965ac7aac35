"""Continuous batching: many prompts through one cache, where a waiting prompt takes the row of one that has finished.

B rows of the cache, R rows of a call, V vocabulary. Yu et al., "Orca", 2022 (iteration-level scheduling).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from grist_model.prompts import as_prompts, check_prompts, prefill
from grist_model.sampling import Sampling, row_generator, sample, seed_or_fresh, seen_ids
from grist_model.stopping import RowEnd, StopRules

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from grist_model.transformer import Transformer


def generate_many(
    model: Transformer,
    prompts: Sequence[Sequence[int]] | Tensor,
    *,
    max_new_tokens: int,
    max_batch: int = 32,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop_ids: Iterable[int] = (),
    stop_strings: Sequence[str] = (),
    token_bytes: Callable[[list[int]], bytes] | None = None,
    on_token: Callable[[int, int], None] | None = None,
    seed: int | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """(index of the prompt, its new ids) for every prompt, in the order in which they finish.

    The ids are those of `generate` for all prompts in one batch, and the options are its, but at most max_batch rows are in
    memory, and none is computed on after its end. Prompts begin in the order given: long ones first leave less
    waiting at the end. The cache has max_batch rows of the longest prompt and max_new_tokens (layers with a window: of
    twice the window). Arguments are checked at once.

    Raises ValueError as `generate` does, for a single prompt, for max_batch below 1, and for "dynamic" rotary scaling, whose
    angles depend on the longest row of a batch.
    """
    listed, single = as_prompts(prompts)
    if single:
        raise ValueError("generate_many takes a batch of prompts, but got one; use generate")
    if max_batch < 1:
        raise ValueError(f"max_batch must be at least 1, but is {max_batch}")
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        raise ValueError(
            'generate_many does not go with "dynamic" rotary scaling: angles would depend on the other rows'
        )
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    rules = StopRules.of(max_new_tokens, stop_ids, stop_strings, token_bytes)
    check_prompts(model.config, listed, max_new_tokens)
    return _run(_Batch(model, listed, sampling, rules, seed_or_fresh(seed), max_batch), on_token)


@dataclass
class _Row:
    """A prompt at work: its index, its new ids and what watches for their end."""

    index: int
    end: RowEnd
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)


def _run(batch: _Batch, on_token: Callable[[int, int], None] | None) -> Iterator[tuple[int, list[int]]]:
    import torch

    while batch.waiting or any(batch.rows):
        # Entered anew at every step: a generator must not leave gradients off in its caller between two results.
        with torch.no_grad():
            at_R, drawn_R = batch.join() if batch.waiting and None in batch.rows else batch.step()
        for at, token in zip(at_R, drawn_R, strict=True):
            row = batch.rows[at]
            assert row is not None
            row.ids.append(token)
            if on_token is not None:
                on_token(row.index, token)
            if row.end.after(token):
                batch.rows[at] = None
                yield row.index, row.ids


class _Batch:
    """The cache and what stands in its rows, None where a prompt has finished."""

    def __init__(
        self, model: Transformer, prompts: list[list[int]], sampling: Sampling, rules: StopRules, seed: int, most: int
    ):
        from grist_model.attention import KVCache

        self.model, self.prompts, self.sampling, self.rules, self.seed = model, prompts, sampling, rules, seed
        self.device = model.embedding.weight.device
        self.waiting = deque(range(len(prompts)))
        self.rows: list[_Row | None] = [None] * min(most, len(prompts))
        slots = max(map(len, prompts)) + rules.max_new_tokens
        self.cache = KVCache(model.config, len(self.rows), slots, self.device, rollback=0)
        self.seen_BV = seen_ids([[]] * len(self.rows), sampling, model.config.vocab_size, self.device)

    def join(self) -> tuple[list[int], list[int]]:
        """Waiting prompts take the free rows -> (those rows, the first id of each)."""
        at_R = [at for at, row in enumerate(self.rows) if row is None][: len(self.waiting)]
        for at in at_R:
            index = self.waiting.popleft()
            self.rows[at] = _Row(index, RowEnd(self.rules), row_generator(self.seed, index, self.device))
        joining = [self.prompts[self._row(at).index] for at in at_R]
        cache, logits_RV = prefill(self.model, joining, 0)
        self.cache.replace(at_R, cache)
        seen_RV = seen_ids(joining, self.sampling, self.model.config.vocab_size, self.device)
        if self.seen_BV is not None and seen_RV is not None:
            self.seen_BV[at_R] = seen_RV
        self._give_back_slots()
        return at_R, self._draw(at_R, logits_RV)

    def step(self) -> tuple[list[int], list[int]]:
        """-> (all rows, the next id of each). Free rows, for which nothing waits, leave the batch before."""
        import torch

        if None in self.rows:
            at_R = [at for at, row in enumerate(self.rows) if row is not None]
            self.rows = [self.rows[at] for at in at_R]
            self.cache.keep(at_R)
            self.seen_BV = None if self.seen_BV is None else self.seen_BV[at_R]
            self._give_back_slots()
        at_R = list(range(len(self.rows)))
        newest_B1 = torch.tensor([self._row(at).ids[-1:] for at in at_R], device=self.device)
        return at_R, self._draw(at_R, self.model(newest_B1, cache=self.cache)[:, -1])

    def _draw(self, at_R: list[int], logits_RV: Tensor) -> list[int]:
        import torch

        seen_RV = None if self.seen_BV is None else self.seen_BV[at_R]
        new_R = sample(logits_RV, self.sampling, [self._row(at).generator for at in at_R], seen_RV)
        if self.seen_BV is not None:
            self.seen_BV[torch.tensor(at_R, device=self.device), new_R] = True
        return new_R.tolist()

    def _give_back_slots(self) -> None:
        """The cache counts slots by the longest row that it has held: by the longest that it holds, from here on."""
        running = [row for row in self.rows if row is not None]
        # The newest id is in the cache only after the next step, and a row that has just joined has none.
        self.cache.recount(max(len(self.prompts[row.index]) + max(0, len(row.ids) - 1) for row in running))

    def _row(self, at: int) -> _Row:
        row = self.rows[at]
        assert row is not None
        return row
