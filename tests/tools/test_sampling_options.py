"""Options above generation_config.json above defaults."""

from __future__ import annotations

import argparse
import json

import pytest

from grist_tools.sampling_options import add_sampling_options, ends_of, sampling_of, stored_generation


def options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_sampling_options(parser)
    return parser.parse_args(arguments)


DEFAULTS = {
    "temperature": 0.8,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "repetition_penalty": None,
    "max_new_tokens": 200,
    "seed": None,
}


@pytest.mark.parametrize(
    ("arguments", "stored", "changes"),
    [
        ([], {}, {}),
        ([], {"eos_token_id": 0}, {}),
        ([], {"temperature": 0.3, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}, {
            "temperature": 0.3, "top_k": 40, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2}),
        (["--temperature", "1", "--top-p", "0.5"], {"temperature": 0.3, "top_p": 0.9}, {"temperature": 1, "top_p": 0.5}),
        (["--temperature", "0"], {"temperature": 0.3}, {"temperature": 0}),
        (["--top-k", "0"], {"top_k": 40}, {}),
        ([], {"top_k": -1}, {}),
        ([], {"do_sample": False, "temperature": 0.6}, {"temperature": 0.0}),
        ([], {"do_sample": True}, {}),
        (["--temperature", "0.5"], {"do_sample": False}, {"temperature": 0.5}),
        (["--max-new-tokens", "7", "--seed", "3"], {"max_new_tokens": 9}, {"max_new_tokens": 7, "seed": 3}),
        ([], {"max_new_tokens": 9}, {"max_new_tokens": 9}),
        (["--repetition-penalty", "1.3"], {"repetition_penalty": 1.1}, {"repetition_penalty": 1.3}),
    ],
)  # fmt: skip
def test_what_counts(arguments, stored, changes):
    assert sampling_of(options(*arguments), stored, 1000) == DEFAULTS | changes


def test_a_short_context_is_shared_between_prompt_and_text():
    assert sampling_of(options(), {}, 64)["max_new_tokens"] == 32


def test_ends_are_one_id_or_several(tmp_path):
    assert ends_of({}, [3]) == {3}
    assert ends_of({"eos_token_id": 5}, []) == {5}
    assert ends_of({"eos_token_id": [5, 6]}, [3]) == {3, 5, 6}


def test_the_file_is_read_and_checked(tmp_path):
    assert stored_generation(tmp_path) == {}
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"temperature": 0.5, "transformers_version": "5.0.0"}))
    assert stored_generation(tmp_path)["temperature"] == 0.5
    for stored, fault in (
        ({"temperature": "hot"}, r'generation_config\.json: temperature must be a number, but is "hot"'),
        ({"top_k": True}, "top_k must be a number, but is true"),
        ({"top_k": 1.5}, "top_k must be a number, but is 1.5"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id must be an id or a list of ids"),
    ):
        path.write_text(json.dumps(stored))
        with pytest.raises(ValueError, match=fault):
            stored_generation(tmp_path)
