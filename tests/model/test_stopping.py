from __future__ import annotations

import random

import pytest

from grist_model.stopping import RowEnd, StopRules


def end_of(pieces: list[bytes], strings: list[str], most: int = 1000) -> int | None:
    """How many tokens, spelled as `pieces`, a row takes before it ends."""
    end = RowEnd(StopRules.of(most, (), strings, lambda ids: b"".join(pieces[id_] for id_ in ids)))
    return next((count for count, id_ in enumerate(range(len(pieces)), start=1) if end.after(id_)), None)


@pytest.mark.parametrize(
    ("pieces", "strings", "count"),
    [
        ([b"a", b"b", b"c"], ["b"], 2),
        ([b"He said", b" st", b"op", b" it"], ["stop"], 3),
        ([b"x\n", b"\ny"], ["\n\n"], 2),
        ([b"aa", b"ab", b"b"], ["aab"], 2),
        ([b"", b"E", b"", b"N", b"", b"D", b"!"], ["END"], 6),
        (["é".encode()[:1], "é".encode()[1:], b"x"], ["é"], 2),
        (["日".encode()[:2], "日".encode()[2:] + "本".encode()[:1], "本".encode()[1:]], ["日本"], 3),
        ([b"ab", b"cd"], ["zz", "abc", "d"], 2),
        ([b"ab", b"a", b"b"], ["ba b", "abb"], None),
        ([b"long text that holds stop and more"], ["stop"], 1),
    ],
)
def test_strings_end_a_row_across_the_borders_of_tokens(pieces, strings, count):
    assert end_of(pieces, strings) == count


def test_a_row_ends_where_the_whole_text_first_holds_a_string():
    rng = random.Random(0)
    ended = 0
    for _ in range(3000):
        pieces = ["".join(rng.choices("ab", k=rng.randrange(4))).encode() for _ in range(12)]
        strings = ["".join(rng.choices("ab", k=rng.randint(1, 9))) for _ in range(rng.randint(1, 3))]
        texts = [b"".join(pieces[:count]).decode() for count in range(1, 13)]
        holds = (count for count, text in enumerate(texts, start=1) if any(string in text for string in strings))
        expected = next(holds, None)
        assert end_of(pieces, strings) == expected
        ended += expected is not None
    assert 500 < ended < 2900


def test_counts_and_ids_end_a_row():
    assert end_of([b"a"] * 9, [], most=4) == 4
    end = RowEnd(StopRules.of(5, [7, 8], [], None))
    assert [end.after(token) for token in (1, 2, 8)] == [False, False, True]


@pytest.mark.parametrize(
    ("strings", "message"),
    [(["a", ""], "a stop string is empty"), ("END", r"pass \['END'\]"), (["a"], "stop_strings need token_bytes")],
)
def test_bad_stop_strings_are_named(strings, message):
    with pytest.raises(ValueError, match=message):
        StopRules.of(3, (), strings, None)
