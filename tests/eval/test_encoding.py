"""The border between context and continuation, and what a model cannot read."""

from __future__ import annotations

import math

import pytest
from tiny_house import tokenizer

from grist_eval.encoding import encode_pairs, front_ids, rolling_windows, start_id

PAIRS = [("The miller", " sat by the fire"), ("Water turned the wheel", ", the wheel"), ("The", " mill")]


def texts(of_text, encoded):
    return of_text.decode(encoded.ids[: -encoded.scored]), of_text.decode(encoded.ids[-encoded.scored :])


def test_context_and_continuation_are_encoded_together():
    of_text = tokenizer()
    for pair, encoded in zip(PAIRS, encode_pairs(of_text, PAIRS, 64), strict=True):
        assert encoded.ids == of_text.encode("".join(pair))
        assert texts(of_text, encoded) == pair


def test_spaces_at_the_border_go_to_the_continuation():
    of_text = tokenizer()
    (encoded,) = encode_pairs(of_text, [("The miller ", "sat")], 64)
    assert encoded == encode_pairs(of_text, [("The miller", " sat")], 64)[0]
    assert texts(of_text, encoded) == ("The miller", " sat")


def test_a_token_across_the_border_belongs_to_the_context():
    """ "mill" + "er's" may be one token " miller" or so: the continuation begins where the context's own ids end."""
    of_text = tokenizer()
    (encoded,) = encode_pairs(of_text, [("The mil", "ler's daughter")], 64)
    assert encoded.ids == of_text.encode("The miller's daughter")
    assert encoded.scored == len(encoded.ids) - len(of_text.encode("The mil"))


def test_an_empty_context_is_the_token_between_documents():
    of_text = tokenizer()
    (encoded,) = encode_pairs(of_text, [("", "The miller")], 64)
    assert encoded.ids == [of_text.eot_id, *of_text.encode("The miller")]
    assert encoded.scored == len(encoded.ids) - 1
    of_text.bos_id = of_text.encode("The")[0]
    (encoded,) = encode_pairs(of_text, [("", "The miller")], 64)  # begins with that token already
    assert encoded.ids == of_text.encode("The miller")
    assert encoded.scored == len(encoded.ids) - 1
    of_text.bos_id = of_text.eot_id = None
    with pytest.raises(ValueError, match="no begin- or end-of-text token"):
        encode_pairs(of_text, [("", "The miller")], 64)


def test_what_is_too_long_loses_its_beginning():
    of_text = tokenizer()
    whole = encode_pairs(of_text, PAIRS[:1], 64)[0]
    (cut,) = encode_pairs(of_text, PAIRS[:1], whole.scored)
    assert cut.ids == whole.ids[-(whole.scored + 1) :]
    with pytest.raises(ValueError, match=f"is {whole.scored} tokens after 'The miller', but must be 1 to"):
        encode_pairs(of_text, PAIRS[:1], whole.scored - 1)


def test_a_continuation_without_tokens_is_refused():
    with pytest.raises(ValueError, match="is 0 tokens after"):
        encode_pairs(tokenizer(), [("The miller", "")], 64)


def test_a_begin_of_text_token_stands_where_the_files_say():
    of_text = tokenizer()
    assert front_ids(of_text) == []
    with pytest.raises(ValueError, match="needs a begin-of-text token"):
        front_ids(of_text, "always")
    of_text.bos_id = 0
    assert (front_ids(of_text), front_ids(of_text, "always"), front_ids(of_text, "never")) == ([], [0], [])
    of_text.config = {"add_bos_token": True}
    assert (front_ids(of_text), front_ids(of_text, "never")) == ([0], [])
    (encoded,) = encode_pairs(of_text, PAIRS[:1], 64)
    assert encoded.ids == [0, *of_text.encode("".join(PAIRS[0]))]
    assert texts(of_text, encoded)[1] == PAIRS[0][1]
    assert start_id(of_text) == 0


@pytest.mark.parametrize("n", [1, 5, 6, 11, 23])
def test_windows_score_every_id_once(n):
    ids = list(range(100, 100 + n))
    windows = list(rolling_windows(ids, 7, 5))
    assert [id_ for window in windows for id_ in window.ids[-window.scored :]] == ids
    assert len(windows) == math.ceil(n / 5)
    assert windows[0].ids[0] == 7
    assert all(len(window.ids) == 6 for window in windows[1:])
