"""A piece of work that counts only if other processes left the machine alone meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from grist_tools.quiet import QUIET_CORES, cores_of_others, usage, wait_until_quiet

Result = TypeVar("Result")


def undisturbed(work: Callable[[], Result], until: float) -> tuple[Result, float | None]:
    """What the work returns, and how many cores others used meanwhile, None where nobody can tell. Work that was disturbed is
    done again, as long as there is time. until: on time.perf_counter()."""
    while True:
        wait_until_quiet(until)
        before = usage()
        result = work()
        others = cores_of_others(before, usage())
        if others is None or others <= QUIET_CORES or time.perf_counter() >= until:
            return result, others
