from __future__ import annotations

import tiny_house

from grist_model.lora_config import LoraConfig
from grist_model.model_card import model_card
from grist_train.card import card_facts
from grist_train.config import OptimizerConfig, TrainConfig
from grist_train.data_config import DataConfig, SourceConfig
from grist_train.preference_config import PreferenceConfig

RESULT = {"loss": 2.5, "perplexity": 12.18, "bits_per_byte": 1.25, "tokens": 999, "bytes": 1999}


def test_a_card_says_what_the_run_knows(tmp_path):
    tiny_house.dataset(tmp_path / "books", licence="CC0")
    tiny_house.dataset(tmp_path / "plays")
    sources = {name: SourceConfig(str(tmp_path / name)) for name in ("books", "plays")}
    config = TrainConfig(name="miller", steps=1200, data=DataConfig(sources=sources), seed=7)
    facts = card_facts(config, RESULT, 2_457_600)
    assert facts.datasets == ("files (CC0)", "files")
    assert facts.metrics == {"bits_per_byte": 1.25, "loss": 2.5, "perplexity": 12.18}
    text = model_card(tiny_house.portable(tmp_path / "model"), facts)
    for words in ("# miller", "2,457,600", "1,200", "muon, wsd schedule", "bits per byte | 1.25", "files (CC0)"):
        assert words in text, words


def test_a_tuned_model_names_what_it_began_with_and_how():
    cached = "cache/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f097"
    config = TrainConfig(
        initial=cached,
        preferences=PreferenceConfig(("pairs.jsonl",), beta=0.3),
        lora=LoraConfig(rank=4, targets=("attention",)),
        optimizer=OptimizerConfig(name="adamw"),
    )
    facts = card_facts(config, None, 5)
    assert facts.base_model == "HuggingFaceTB/SmolLM2-135M"
    assert facts.datasets == ("pairs.jsonl",)
    assert facts.metrics == {}
    assert facts.training["method"] == "direct preference optimization, beta 0.3"
    assert facts.training["adapters"] == "LoRA of rank 4 on attention, folded in"
