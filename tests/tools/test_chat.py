"""The conversation at a terminal, with a scripted user."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import tiny_house

from grist_data.chat_template import conversation_ids, find_template, stop_ids
from grist_data.tokenizer_training import train_bpe
from grist_tools.chat import HELP, Chat

SAMPLING = {"max_new_tokens": 6, "temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "seed": 0}
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class User:
    """Types the lines of a script; an exception in it is raised, and the end of the script is Ctrl-D."""

    def __init__(self, *script: str | type[BaseException]) -> None:
        self.script = iter(script)
        self.screen = ""

    def read(self, prompt: str) -> str:
        self.screen += prompt
        line = next(self.script, EOFError)
        if isinstance(line, str):
            self.screen += line + "\n"
            return line
        raise line

    def write(self, text: str) -> None:
        self.screen += text


@pytest.fixture
def talk(monkeypatch):
    """A chat whose model is replaced by scripted replies; returns (chat, prompts the model was given)."""

    def start(user: User, *replies, template=None, tokenizer=None, **options) -> tuple[Chat, list[list[int]]]:
        of_text = tokenizer or tiny_house.tokenizer()
        prompts: list[list[int]] = []
        left = iter(replies)

        def stream(model, ids, *, stop_ids, **sampling) -> Iterator[int]:
            prompts.append(list(ids))
            for id_ in next(left):
                if id_ is KeyboardInterrupt:
                    raise KeyboardInterrupt
                yield id_

        monkeypatch.setattr("grist_model.stream", stream)
        model = tiny_house.model(of_text.vocab_size)
        sampling = {**SAMPLING, **options}
        return Chat(model, of_text, sampling, template=template, read=user.read, write=user.write), prompts

    return start


def test_a_base_model_continues_one_growing_text(talk):
    of_text = tiny_house.tokenizer()
    flour, again = of_text.encode(" flour"), of_text.encode(" again")
    user = User("The mill", "", "The end", "/quit")
    chat, prompts = talk(user, flour, again, flour)
    chat.run()
    begin = [of_text.eot_id, *of_text.encode("The mill")]
    assert prompts == [begin, begin + flour, begin + flour + again + of_text.encode("\nThe end")]
    assert "> The mill\n flour\n> \n again\n" in user.screen


def test_the_real_model_writes_and_its_seed_moves_on():
    of_text = tiny_house.tokenizer()
    model = tiny_house.model(of_text.vocab_size)
    screens = []
    for _ in range(2):
        user = User("The mill", "/reset", "The mill")
        Chat(model, of_text, SAMPLING, read=user.read, write=user.write).run()
        screens.append(user.screen)
    assert screens[0] == screens[1]
    first, second = screens[0].split("> The mill\n")[1:]
    assert first.split("\n> ")[0] != second.split("\n> ")[0]


def test_reset_forgets(talk):
    of_text = tiny_house.tokenizer()
    user = User("one", "/reset", "two")
    chat, prompts = talk(user, of_text.encode("a"), of_text.encode("b"))
    chat.run()
    assert prompts[1] == [of_text.eot_id, *of_text.encode("two")]
    assert "(forgotten)" in user.screen


def test_commands_are_told_and_unknown_ones_too(talk):
    user = User("/help", "/dance now")
    talk(user)[0].run()
    assert user.screen.count(HELP) == 2
    assert "unknown command /dance" in user.screen


def test_ctrl_d_leaves_and_ctrl_c_at_the_prompt_does_not(talk):
    of_text = tiny_house.tokenizer()
    user = User(KeyboardInterrupt, "on", EOFError)
    chat, prompts = talk(user, of_text.encode("x"))
    chat.run()
    assert len(prompts) == 1
    assert "(Ctrl-D or /quit leaves)" in user.screen


def test_ctrl_c_while_the_model_writes_keeps_what_came(talk):
    of_text = tiny_house.tokenizer()
    came = of_text.encode(" gr")
    user = User("The mill", "on")
    chat, prompts = talk(user, [*came, KeyboardInterrupt], of_text.encode("x"))
    chat.run()
    assert " gr (stopped)\n" in user.screen
    assert prompts[1] == [of_text.eot_id, *of_text.encode("The mill"), *came, *of_text.encode("\non")]


def test_a_text_longer_than_the_context_keeps_its_end(talk):
    of_text = tiny_house.tokenizer()
    line = "grain " * 60
    chat, prompts = talk(User(line), of_text.encode("x"))
    chat.run()
    assert prompts[0] == of_text.encode(line)[-(64 - SAMPLING["max_new_tokens"]) :]


def chat_tokenizer():
    of_text = train_bpe(tiny_house.PARAGRAPHS * 4, 330, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    of_text.config = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    return of_text


def test_a_template_becomes_special_ids_and_what_people_type_stays_text():
    of_text = chat_tokenizer()
    start, end = of_text.special_tokens["<|im_start|>"], of_text.special_tokens["<|im_end|>"]
    ids = conversation_ids(of_text, TEMPLATE, [{"role": "user", "content": "<|im_end|> is a name"}])
    plain = of_text.encode
    assert ids == [
        start, *plain("user\n"), *plain("<|im_end|> is a name"), end, *plain("\n"), start, *plain("assistant\n")
    ]  # fmt: skip
    assert ids.count(end) == 1


def test_answers_become_part_of_the_conversation(talk):
    of_text = chat_tokenizer()
    end = of_text.special_tokens["<|im_end|>"]
    user = User("Who grinds?", "What?")
    chat, prompts = talk(
        user, [*of_text.encode("The mill"), end], [end], template=TEMPLATE, tokenizer=of_text, max_new_tokens=2
    )
    chat.room = 1000
    chat.run()
    assert "> Who grinds?\nThe mill\n" in user.screen
    messages = [("user", "Who grinds?"), ("assistant", "The mill"), ("user", "What?")]
    expected = [{"role": role, "content": content} for role, content in messages]
    assert prompts[1] == conversation_ids(of_text, TEMPLATE, expected)
    assert chat.messages == [*expected, {"role": "assistant", "content": ""}]


def test_the_end_of_a_message_is_a_stop(tmp_path):
    of_text = chat_tokenizer()
    assert stop_ids(of_text) == {of_text.special_tokens["<|im_end|>"], of_text.special_tokens["<|endoftext|>"]}
    assert find_template(tmp_path, of_text) == TEMPLATE
    (tmp_path / "chat_template.jinja").write_text("file first")
    assert find_template(tmp_path, of_text) == "file first"
    assert find_template(tmp_path / "elsewhere", tiny_house.tokenizer()) is None


@pytest.mark.parametrize(
    "template", ["{% for x %}", "{{ raise_exception('roles must alternate') }}", "{{ ''.__class__.x() }}"]
)
def test_a_template_that_fails_is_told(template):
    with pytest.raises(ValueError, match="chat template fails"):
        conversation_ids(chat_tokenizer(), template, [{"role": "user", "content": "hi"}])


def test_a_system_message_needs_a_template():
    of_text = tiny_house.tokenizer()
    with pytest.raises(ValueError, match="--system needs a model with a chat template"):
        Chat(tiny_house.model(of_text.vocab_size), of_text, SAMPLING, system="Be brief.")
