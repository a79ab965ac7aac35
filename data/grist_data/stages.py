"""Position in a run -> which source, which window, which epoch; and back. One integer of state, any mixture, any stages.

Every source is a line of tokens without end: its epochs one behind the other, each a shuffle of its units (order.py). A leg is
a stretch of positions with the same shares and sequence length. It reads every source's line on from where the leg before
left it, so that stages neither repeat nor lose anything; the places where legs begin are found by arithmetic.

Where sequences become longer, a source's line may stand inside a new, longer window. That window is read whole, and the targets
that were trained already are masked: one row for each source and change, at most.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from grist_data.deal import Deal
from grist_data.joined import Joined
from grist_data.mixture import Mixture, Setting, identity, slots_of
from grist_data.order import Order, Plan
from grist_data.shards import Shards


class Samples(NamedTuple):
    """Where samples come from, arrays of int64: index of the source in `StagedOrder.names`, epoch of that source, window (unit)
    in it, first token in the window, and targets at the beginning that were trained before.
    """

    source: np.ndarray
    epoch: np.ndarray
    window: np.ndarray
    token: np.ndarray
    masked: np.ndarray


@dataclass(frozen=True)
class _Leg:
    """Positions from `start` on.

    sequence_length: T. members: index of each source that is drawn. begun: (sources,) int64, tokens of each line read before.
    """

    start: int
    sequence_length: int
    deal: Deal
    members: np.ndarray
    begun: np.ndarray

    def begun_after(self, positions: int) -> np.ndarray:
        """`begun` as it is after so many positions of the leg."""
        T, drawn = self.sequence_length, self.deal.drawn(positions)
        after = self.begun.copy()
        after[self.members] = np.where(drawn > 0, (after[self.members] // T + drawn) * T, after[self.members])
        return after


class StagedOrder:
    """The order of a run. names: of the sources, by identity. rows: what offsets refer to. masked: position -> targets at the
    beginning of its row that were trained before.

    Raises ValueError for a source without a single window.
    """

    def __init__(self, mixture: Mixture, settings: Sequence[Setting], plan: Plan) -> None:
        self.plan = plan
        self.names = tuple(sorted(mixture.sources, key=lambda name: identity(mixture.sources[name])))
        self._splits = [mixture.sources[name] for name in self.names]
        self._orders = [_source_order(split, plan) for split in self._splits]
        self.rows = self._splits[0] if len(self._splits) == 1 else Joined(self._splits)
        self._first_token = self.rows.starts if isinstance(self.rows, Joined) else np.zeros(1, np.int64)
        self._legs = self._walk(mixture, settings)
        self._starts = np.array([leg.start for leg in self._legs], np.int64)
        self.masked = dict(self._masked())

    def offsets(self, positions: np.ndarray) -> np.ndarray:
        """First token of each position's row, int64, as `rows` numbers them. Cheap in blocks of thousands."""
        out = np.empty(len(positions), np.int64)
        for leg, k, chosen, numbers in self._numbers(positions):
            pieces = self.plan.sequence_length // leg.sequence_length
            out[chosen] = self._first_token[k] + self._orders[k].offsets(numbers, pieces)
        return out

    def samples(self, positions: np.ndarray) -> Samples:
        """Where the sample of each position comes from."""
        out = Samples(*(np.zeros(len(positions), np.int64) for _ in Samples._fields))
        unit = self.plan.sequence_length
        for leg, k, chosen, numbers in self._numbers(positions):
            place, token = np.divmod(numbers * leg.sequence_length, unit)
            out.source[chosen], out.token[chosen] = k, token
            out.epoch[chosen], out.window[chosen] = self._orders[k].ids(place)
        for position, targets in self.masked.items():
            out.masked[positions == position] = targets
        return out

    def positions(self, source: str, windows: np.ndarray, epoch: int, token: int = 0) -> np.ndarray:
        """At which position each window (unit) of a source is read in one of its epochs, int64; -1 for never.

        token: of the window; where sequences are shorter than it, its parts are read at several positions.
        Raises ValueError for an unknown source, and windows, epochs or tokens that it does not have.
        """
        if source not in self.names:
            raise ValueError(f"no source {source!r} in the mixture; it has {', '.join(self.names)}")
        unit = self.plan.sequence_length
        if epoch < 0 or not 0 <= token < unit:
            raise ValueError(f"need epoch >= 0 and a token in [0, {unit}), but got {epoch} and {token}")
        k = self.names.index(source)
        line = self._orders[k].numbers(windows, epoch) * unit + token
        legs = np.searchsorted([leg.begun[k] for leg in self._legs], line, side="right") - 1
        out = np.full(len(line), -1, np.int64)
        for number in np.unique(legs).tolist():
            leg, chosen = self._legs[number], legs == number
            if k in leg.members:
                out[chosen] = leg.start + self._slots(leg, k, line[chosen] // leg.sequence_length)
        return out

    def epochs(self, position: int) -> dict[str, float]:
        """Passes over each source that are finished when `position` is read next."""
        leg = self._leg(position)
        read = leg.begun_after(position - leg.start).tolist()
        return {name: read[k] / (n * self.plan.sequence_length) for k, (name, n) in enumerate(self.windows().items())}

    def windows(self) -> dict[str, int]:
        """Windows (units) of each source, which is its epoch."""
        return {name: len(order.windows) for name, order in zip(self.names, self._orders, strict=True)}

    def identity(self, position: int) -> tuple[str, str]:
        """What the samples before `position` depend on: the datasets, and a digest of the plan. Later stages do not occur."""
        legs = [leg for leg in self._legs if leg.start < position] or self._legs[:1]
        members = sorted({int(k) for leg in legs for k in leg.members})
        if len(members) > 1:
            datasets = ",".join(identity(self._splits[k]) for k in members)
        else:
            datasets = self._splits[members[0]].dataset_id
        if len(members) == len(legs) == 1 and legs[0].sequence_length == self.plan.sequence_length:
            return datasets, self.plan.digest()  # a mixture of one is that dataset, and a run may begin so and go on
        facts = []
        for leg in legs:
            shares = {identity(self._splits[k]): int(n) for k, n in zip(leg.members, leg.deal.counts, strict=True)}
            facts.append([leg.start, leg.sequence_length, shares])
        return datasets, self.plan.digest(facts)

    def _walk(self, mixture: Mixture, settings: Sequence[Setting]) -> list[_Leg]:
        legs: list[_Leg] = []
        begun = np.zeros(len(self.names), np.int64)
        for setting in settings:
            slots = slots_of(setting.weights, mixture.sources)
            deal = Deal.of(tuple(slots.values()))
            members = np.array([self.names.index(name) for name in slots], np.int64)
            T = setting.sequence_length
            if legs:
                last = legs[-1]
                same_shares = members.tolist() == last.members.tolist() and (deal.counts == last.deal.counts).all()
                if same_shares and last.sequence_length == T:
                    continue  # only the batch size changes, which is no part of the order
                begun = last.begun_after(setting.start - last.start)
            legs.append(_Leg(setting.start, T, deal, members, begun))
        return legs

    def _masked(self) -> Iterator[tuple[int, int]]:
        ends = [leg.start for leg in self._legs[1:]]
        for leg, end in zip(self._legs, [*ends, None], strict=True):
            for k in leg.members.tolist():
                skip = int(leg.begun[k]) % leg.sequence_length
                position = leg.start + int(self._slots(leg, k, leg.begun[k : k + 1] // leg.sequence_length)[0])
                if skip and (end is None or position < end):
                    yield position, skip

    def _numbers(self, positions: np.ndarray) -> Iterator[tuple[_Leg, int, np.ndarray, np.ndarray]]:
        """By leg and source: which positions, and the numbers of their samples on the source's line, in samples of the leg."""
        of = np.searchsorted(self._starts, positions, side="right") - 1
        for number in np.unique(of).tolist():
            leg, in_leg = self._legs[number], np.flatnonzero(of == number)
            sources, draws = leg.deal.draws(positions[in_leg] - leg.start)
            for member, k in enumerate(leg.members.tolist()):
                chosen = np.flatnonzero(sources == member)
                if len(chosen):
                    yield leg, k, in_leg[chosen], draws[chosen] + int(leg.begun[k]) // leg.sequence_length

    def _slots(self, leg: _Leg, k: int, numbers: np.ndarray) -> np.ndarray:
        """The inverse of `_numbers`: slots of the leg."""
        member = int(np.flatnonzero(leg.members == k)[0])
        return leg.deal.slots(member, numbers - int(leg.begun[k]) // leg.sequence_length)

    def _leg(self, position: int) -> _Leg:
        return self._legs[int(np.searchsorted(self._starts, position, side="right")) - 1]


def _source_order(source: Shards, plan: Plan) -> Order:
    windows = source.windows(plan.sequence_length, plan.stride, plan.jitter)
    if not len(windows):
        raise ValueError(
            f"the {source.split} split of {source.directory} is shorter than one sample: it has {source.n_tokens:,} tokens,"
            f" and sequence_length {plan.sequence_length} needs {plan.sequence_length + 1:,} in one shard; use a shorter"
            " sequence_length or more text"
        )
    return Order(windows, plan, identity(source))
