"""transformers.pipeline on directories of ours: the code that the model card shows, and the same answers as ours."""

from __future__ import annotations

import re

import pytest
import tiny_house
import torch

import grist_model
from grist_data.chat_template import conversation_ids, read_template, stop_ids
from grist_model.model_card import CardFacts, model_card

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.clients

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who carried the grain?"}]


@pytest.fixture(scope="module")
def chat_directory(tmp_path_factory):
    tokenizer = tiny_house.tokenizer()
    tokenizer.chat_template = read_template("plain")
    directory = tmp_path_factory.mktemp("chat") / "model"
    generation = {"eos_token_id": sorted(stop_ids(tokenizer)), "do_sample": False}
    grist_model.save(tiny_house.model(tokenizer.vocab_size), directory, tokenizer, generation=generation)
    return directory


def test_messages_are_answered_as_by_us(chat_directory):
    from grist_data import Tokenizer

    tokenizer = Tokenizer.load(chat_directory)
    write = transformers.pipeline("text-generation", model=str(chat_directory), dtype=torch.float32)
    (answer,) = write(MESSAGES, max_new_tokens=12)
    assert tokenizer.chat_template is not None
    prompt = conversation_ids(tokenizer, tokenizer.chat_template, MESSAGES)
    assert write.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True)["input_ids"] == prompt
    model = grist_model.load(chat_directory)
    new = grist_model.generate(model, prompt, max_new_tokens=12, temperature=0, stop_ids=stop_ids(tokenizer))
    ended = new[-1] in stop_ids(tokenizer)
    assert answer["generated_text"][-1]["role"] == "assistant"
    assert answer["generated_text"][-1]["content"] == tokenizer.decode(new[:-1] if ended else new)


@pytest.mark.parametrize("chat", [False, True])
def test_the_code_of_the_card_runs(chat_directory, tmp_path, capsys, chat):
    directory = chat_directory if chat else tiny_house.portable(tmp_path / "base")
    card = model_card(directory, CardFacts("Miller"))
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    exec(code.replace('model="DIR"', f'model="{directory}"').replace("max_new_tokens=50", "max_new_tokens=4"), {})
    assert "generated_text" in capsys.readouterr().out
