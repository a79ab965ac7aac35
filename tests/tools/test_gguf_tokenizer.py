from __future__ import annotations

import copy
import json

import pytest
import tiny_house

from grist_data import Tokenizer
from grist_data.patterns import GPT2, LLAMA3, O200K, QWEN2
from grist_data.tokenizer_training import train_bpe, train_wordpiece
from grist_tools.gguf_tokenizer import pre_tokenizer_of, tokenizer_metadata

SPECIALS = ("<|endoftext|>", "<|turn_end|>", "<|call|>", "<|pause|>")
VOCAB = 400


@pytest.fixture(scope="module")
def trained():
    return train_bpe(tiny_house.PARAGRAPHS * 4, VOCAB, SPECIALS)


@pytest.fixture
def written(trained, tmp_path):
    """metadata(changes of tokenizer.json, tokenizer_config.json, generation_config.json) -> (keys, warnings)."""

    def metadata(definition=None, config=None, generation=None, vocab_size=VOCAB, **options):
        tokenizer = Tokenizer({**copy.deepcopy(trained.definition), **(definition or {})}, config or trained.config)
        tokenizer.save(tmp_path)
        if generation is not None:
            (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        return tokenizer_metadata(tmp_path, vocab_size, **options)

    return metadata


def split(regex, **changes):
    first = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False, **changes}
    return {"type": "Sequence", "pretokenizers": [first, byte_level(use_regex=False)]}


def byte_level(**changes):
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **changes}


DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level()]}


@pytest.mark.parametrize(
    ("pre_tokenizer", "whole", "name"),
    [
        (byte_level(), False, "gpt-2"),
        (split(GPT2), False, "gpt-2"),
        (DIGITS, False, "smollm"),
        (split(LLAMA3), True, "llama-bpe"),
        (split(LLAMA3), False, "dbrx"),
        (split(QWEN2), False, "qwen2"),
        (split(O200K), False, "gpt-4o"),
    ],
)
def test_the_name_follows_from_the_regex_and_from_whether_whole_pieces_are_kept(pre_tokenizer, whole, name):
    assert pre_tokenizer_of({"pre_tokenizer": pre_tokenizer, "model": {"ignore_merges": whole}}) == name


@pytest.mark.parametrize(
    ("pre_tokenizer", "whole"),
    [
        (None, False),
        (byte_level(), True),
        (byte_level(add_prefix_space=True), False),
        (split(LLAMA3 + "|x"), False),
        (split(LLAMA3, behavior="Removed"), False),
        (split(LLAMA3, invert=True), False),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, byte_level()]}, False),
        ({"type": "Sequence", "pretokenizers": []}, False),
        ({"type": "Whitespace"}, False),
        ({"type": "Sequence", "pretokenizers": [byte_level(use_regex=False)]}, False),
    ],
)
def test_what_llama_cpp_has_no_name_for_is_refused(pre_tokenizer, whole):
    with pytest.raises(ValueError, match=r"no name for the way tokenizer\.json splits text: .* Known are gpt-2"):
        pre_tokenizer_of({"pre_tokenizer": pre_tokenizer, "model": {"ignore_merges": whole}})


def test_a_name_can_be_forced_and_is_warned_of(written):
    keys, warnings = written({"pre_tokenizer": split(LLAMA3 + "|x")}, pre_tokenizer="llama-bpe")
    assert keys["tokenizer.ggml.pre"] == "llama-bpe"
    assert warnings == ["text is split as 'llama-bpe' because you said so: compare ids before relying on it"]


def test_tokens_types_and_merges_are_those_of_tokenizer_json(written, trained):
    keys, warnings = written(vocab_size=VOCAB + 2)
    tokens, types = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == VOCAB + 2
    assert tokens[:4] == list(SPECIALS)
    assert types[:4] == [3] * 4
    for text, id_ in trained.definition["model"]["vocab"].items():
        assert tokens[id_] == text
    assert types[4 : trained.vocab_size] == [1] * (trained.vocab_size - 4)
    assert tokens[-1] == f"[PAD{VOCAB + 1}]"
    assert types[-1] == 5
    pairs = trained.definition["model"]["merges"]
    assert keys["tokenizer.ggml.merges"] == [pair if isinstance(pair, str) else " ".join(pair) for pair in pairs]
    assert warnings == []


def test_an_added_token_that_is_text_is_one_of_the_users(written, trained):
    first = trained.definition["added_tokens"][0]
    added = [*trained.definition["added_tokens"], {**first, "id": 398, "content": "zzz", "special": False}]
    keys, _ = written({"added_tokens": added})
    assert (keys["tokenizer.ggml.tokens"][398], keys["tokenizer.ggml.token_type"][398]) == ("zzz", 4)


def test_ids_that_end_a_text_have_three_places(written):
    keys, warnings = written(generation={"eos_token_id": [2, 1, 0, 3]})
    named = {name: keys[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom", "bos", "padding")}
    assert named == {"eos": 0, "eot": 2, "eom": 1, "bos": 0, "padding": 0}
    assert warnings == ["GGUF has room for three ids that end a text: [3] are left out"]
    keys, warnings = written(generation={"eos_token_id": 0})
    assert "tokenizer.ggml.eot_token_id" not in keys
    assert warnings == []


def test_a_tokenizer_that_ends_no_text_is_refused(written, trained):
    added = [token for token in trained.definition["added_tokens"] if token["content"] != "<|endoftext|>"]
    with pytest.raises(ValueError, match=r"names no id that ends a text, and llama\.cpp would take token 11"):
        written({"added_tokens": added}, config={"clean_up_tokenization_spaces": False})


def test_a_beginning_is_put_where_tokenizer_json_or_its_config_puts_it(written):
    begin = {"bos_token": "<|pause|>", "eos_token": "<|endoftext|>"}
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|pause|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|pause|>": {"id": "<|pause|>", "ids": [3], "tokens": ["<|pause|>"]}},
    }
    both = {"type": "Sequence", "processors": [byte_level(), template]}
    cases = [
        ({}, begin, False),
        ({"post_processor": template}, begin, True),
        ({"post_processor": both}, begin, True),
        ({"post_processor": template}, begin | {"add_bos_token": False}, False),
        ({}, begin | {"add_bos_token": True}, True),
        ({"post_processor": template}, {"eos_token": "<|endoftext|>"}, False),
    ]
    for definition, config, puts in cases:
        keys, _ = written(definition, config)
        assert keys["tokenizer.ggml.add_bos_token"] is puts, (definition, config)
        assert keys["tokenizer.ggml.bos_token_id"] == (3 if "bos_token" in config else 0)
        assert keys["tokenizer.ggml.add_eos_token"] is False


def test_a_chat_template_goes_along(trained, tmp_path):
    trained = Tokenizer(trained.definition, trained.config, chat_template="{{ messages }}")
    trained.save(tmp_path)
    assert tokenizer_metadata(tmp_path, VOCAB)[0]["tokenizer.chat_template"] == "{{ messages }}"


def test_normal_forms_are_warned_of_and_other_normalizers_refused(written):
    _, warnings = written({"normalizer": {"type": "NFC"}})
    assert warnings == ["llama.cpp does not bring text to Unicode's form NFC, as tokenizer.json says: do so before"]
    with pytest.raises(ValueError, match=r'no normalizer, but tokenizer\.json has \{"type": "Lowercase"\}'):
        written({"normalizer": {"type": "Lowercase"}})


def test_other_kinds_of_tokenizers_are_refused(tmp_path):
    train_wordpiece(tiny_house.PARAGRAPHS, 600).save(tmp_path)
    with pytest.raises(ValueError, match=r"only byte-level BPE .* but tokenizer.json is wordpiece"):
        tokenizer_metadata(tmp_path, 600)


def test_a_vocabulary_that_is_too_small_is_told(written):
    with pytest.raises(ValueError, match=r"has an id 3\d\d, but the model's vocab_size is 300"):
        written(vocab_size=300)
