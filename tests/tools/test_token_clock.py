from __future__ import annotations

from grist_tools.token_clock import TokenClock


def clock_of(*times: float) -> TokenClock:
    ticks = iter(times)
    return TokenClock(lambda: next(ticks))


def test_first_token_and_rate_after_it():
    clock = clock_of(10.0, 10.5, 10.6, 10.7, 10.75)
    assert list(clock.of([7, 8, 9, 7])) == [7, 8, 9, 7]
    assert clock.report() == "4 tokens, the first after 0.50 s, then 12.0 tokens/s"


def test_one_token_has_no_rate_and_none_no_time():
    clock = clock_of(1.0, 1.25)
    list(clock.of([7]))
    assert clock.report() == "1 token, the first after 0.25 s"
    assert clock_of(1.0).report() == "no tokens"
