"""llama.cpp on our GGUF files, more than tests/tools/test_gguf_llama_cpp.py: every way of splitting text, every kind."""

from __future__ import annotations

import json
import random
import statistics

import pytest
import tiny_house
import tokenizers
import torch
from family_shapes import model_of
from mxfp4_directory import packed_in_mxfp4

import grist_model
from grist_data import Tokenizer
from grist_data.patterns import GPT2, LLAMA3, O200K, QWEN2
from grist_data.tokenizer import END_OF_TEXT, bytes_to_characters
from grist_tools.export_gguf import KINDS, write_gguf

pytest.importorskip("xllamacpp")
from llama_cpp import LlamaCpp, kl_divergence

pytestmark = pytest.mark.clients

TEXTS = 3000
# Of what random texts are made: ASCII, control characters, Latin, combining marks, Cyrillic, Arabic digits, spaces, CJK, emoji.
RANGES = [(32, 127), (9, 14), (0xA0, 0x250), (0x300, 0x370), (0x400, 0x500), (0x660, 0x670), (0x2000, 0x2070)]
RANGES += [(0x4E00, 0x4F00), (0x1F300, 0x1F600)]
# Endings and numbers that the regexes treat alone.
WORDS = ["don't", "WE'LL", "I'm", "1234567", "  \n\n ", "\r\n", "a/b", "HTTPServer", "...", " \t"]


def trained_with(regex, whole):
    """A tokenizer that splits text by this regex, before bytes are merged."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(regex), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=512, special_tokens=[END_OF_TEXT], initial_alphabet=bytes_to_characters(), show_progress=False
    )
    engine.train_from_iterator([*tiny_house.PARAGRAPHS, *WORDS, "1234567 12 345 we'll they've"] * 4, trainer)
    definition = json.loads(engine.to_str())
    definition["model"]["ignore_merges"] = whole
    return Tokenizer(definition, {"eos_token": END_OF_TEXT})


def random_text(draw):
    parts = [
        draw.choice(WORDS) if draw.random() < 0.2 else chr(draw.randrange(*draw.choice(RANGES)))
        for _ in range(draw.randrange(1, 40))
    ]
    return "".join(parts)


@pytest.mark.parametrize(
    ("regex", "whole", "allowed"),
    [(GPT2, False, 0), (LLAMA3, True, 0), (LLAMA3, False, 0), (QWEN2, False, 0), (O200K, False, TEXTS // 25)],
    ids=["gpt-2", "llama-bpe", "dbrx", "qwen2", "gpt-4o"],
)
def test_random_texts_have_our_ids(tmp_path, regex, whole, allowed):
    """o200k's own regex is only approached there, which the warning says."""
    tokenizer = trained_with(regex, whole)
    model = tiny_house.model(512, sinks=False, window=None, window_layers="none", experts=0, **PLAIN)
    assert grist_model.save(model, tmp_path / "model", tokenizer) == "llama"
    written = write_gguf(tmp_path / "model", tmp_path / "model.gguf", "f32")
    server, draw = LlamaCpp(written.path, 512), random.Random(0)
    texts = [random_text(draw) for _ in range(TEXTS)]
    differ = [text for text in texts if server.tokenize(text) != tokenizer.encode(text)]
    assert len(differ) <= allowed, differ[:3]
    assert bool(written.warnings) == bool(allowed)


PLAIN = {"mlp_bias": False, "attention_bias": False, "swiglu_alpha": None, "swiglu_limit": None}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt_oss"])
def test_kinds_are_as_close_as_their_bits_allow(tmp_path, family):
    model = model_of(family, "yarn, truncated" if family == "gpt_oss" else "plain")
    grist_model.save(model, tmp_path / "model", tiny_house.tokenizer(400))
    ids = tiny_house.random_ids(1, 96, 390, seed=5)[0].tolist()
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0].log_softmax(-1)
    medians = {}
    for kind in KINDS:
        if kind == "mxfp4" and family == "llama":
            continue
        server = LlamaCpp(write_gguf(tmp_path / "model", tmp_path / f"{kind}.gguf", kind).path, 512)
        divergences = [kl_divergence(ours[n - 1], server.log_probabilities(ids[:n])) for n in range(1, 96, 5)]
        medians[kind] = statistics.median(divergences)
    bounds = {"f32": 1e-6, "f16": 1e-4, "bf16": 5e-3, "q8_0": 2e-2, "q4_0": 0.3, "mxfp4": 0.3}
    assert all(medians[kind] < bounds[kind] for kind in medians), medians
    assert medians["f16"] < medians["bf16"] < medians["q4_0"]
    assert medians["q8_0"] < medians["q4_0"]


@pytest.mark.parametrize(("kind", "median"), [("f32", 1e-6), ("f16", 2e-2)])
def test_experts_that_came_in_mxfp4_compute_what_ours_do(tmp_path, kind, median):
    """Packed, their inputs are rounded to 8 bits there."""
    grist_model.save(model_of("gpt_oss", "yarn, truncated"), tmp_path / "model", tiny_house.tokenizer(400))
    packed_in_mxfp4(tmp_path / "model")
    model = grist_model.load(tmp_path / "model", dtype=torch.float32)
    ids = tiny_house.random_ids(1, 96, 390, seed=5)[0].tolist()
    with torch.no_grad():
        ours = model(torch.tensor([ids]))[0].log_softmax(-1)
    server = LlamaCpp(write_gguf(tmp_path / "model", tmp_path / "model.gguf", kind).path, 512)
    found = [kl_divergence(ours[n - 1], server.log_probabilities(ids[:n])) for n in range(1, 96, 5)]
    assert statistics.median(found) < median, found
