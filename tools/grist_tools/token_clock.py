"""How fast tokens come: until the first, and after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator


class TokenClock:
    """Starts when made; ids that pass through `of` are counted and timed."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now, self.count = now, 0
        self.started = self.first = self.last = now()

    def of(self, ids: Iterable[int]) -> Iterator[int]:
        for id_ in ids:
            self.last = self.now()
            self.first = self.first if self.count else self.last
            self.count += 1
            yield id_

    def report(self) -> str:
        """`12 tokens, the first after 0.08 s, then 95.3 tokens/s`; the rate is that of what came after the first."""
        if not self.count:
            return "no tokens"
        text = f"{self.count} token{'s' * (self.count > 1)}, the first after {self.first - self.started:.2f} s"
        seconds = self.last - self.first
        return f"{text}, then {(self.count - 1) / seconds:.1f} tokens/s" if seconds > 0 else text
