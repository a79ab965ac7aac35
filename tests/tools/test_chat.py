"""The conversation at a terminal, with a scripted user."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import tiny_house

import grist_model
from grist_data.chat_template import conversation_ids
from grist_data.tokenizer_training import train_bpe
from grist_tools import chat as chat_module
from grist_tools.chat import HELP, Chat, main
from grist_tools.chat_history import Messages

DRAWING = {"max_new_tokens": 6, "temperature": 1.0, "seed": 0}
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


def without_times(screen: str) -> str:
    return re.sub(r"\n\((no tokens|\d+ tokens?, .*)\)", "", screen)


@pytest.fixture
def talk(monkeypatch):
    """A chat whose model is replaced by scripted replies; returns (chat, prompts the model was given)."""

    def start(user: User, *replies, tokenizer=None, system=None, context=64, stops=(), **options):
        of_text = tokenizer or tiny_house.tokenizer()
        prompts: list[list[int]] = []
        left = iter(replies)

        def stream(model, ids, *, stop_ids, **drawing) -> Iterator[int]:
            prompts.append(list(ids))
            for id_ in next(left):
                if id_ is KeyboardInterrupt:
                    raise KeyboardInterrupt
                yield id_

        monkeypatch.setattr("grist_model.stream", stream)
        model = tiny_house.model(of_text.vocab_size, context_length=context)
        drawing = {**DRAWING, **options}
        chat = Chat(model, of_text, drawing, system=system, stops=stops, read=user.read, write=user.write)
        return chat, prompts

    return start


def chat_tokenizer():
    of_text = train_bpe(tiny_house.PARAGRAPHS * 4, 330, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    of_text.chat_template = TEMPLATE
    return of_text


def test_a_base_model_continues_one_growing_text(talk):
    of_text = tiny_house.tokenizer()
    flour, again = of_text.encode(" flour"), of_text.encode(" again")
    user = User("The mill", "", "The end", "/quit")
    chat, prompts = talk(user, flour, again, flour)
    chat.run()
    begin = [of_text.eot_id, *of_text.encode("The mill")]
    assert prompts == [begin, begin + flour, begin + flour + again + of_text.encode("\nThe end")]
    assert "> The mill\n flour\n> \n again\n" in without_times(user.screen)


def test_the_real_model_writes_and_its_seed_moves_on():
    of_text = tiny_house.tokenizer()
    model = tiny_house.model(of_text.vocab_size)
    screens = []
    for _ in range(2):
        user = User("The mill", "/reset", "The mill")
        Chat(model, of_text, DRAWING, read=user.read, write=user.write).run()
        screens.append(without_times(user.screen))
    assert screens[0] == screens[1]
    first, second = screens[0].split("> The mill\n")[1:]
    assert first.split("\n> ")[0] != second.split("\n> ")[0]


def test_every_answer_is_timed(talk):
    of_text = tiny_house.tokenizer()
    user = User("on", "on")
    chat, _ = talk(user, of_text.encode(" grain and flour"), [])
    chat.run()
    assert re.search(
        r"\(\d+ tokens, the first after \d+\.\d\d s, then \d+\.\d tokens/s\)\n> on\n\n\(no tokens\)", user.screen
    )


def test_reset_forgets(talk):
    of_text = tiny_house.tokenizer()
    user = User("one", "/reset", "two")
    chat, prompts = talk(user, of_text.encode("a"), of_text.encode("b"))
    chat.run()
    assert prompts[1] == [of_text.eot_id, *of_text.encode("two")]
    assert "(forgotten)" in user.screen


def test_commands_are_told_and_unknown_ones_too(talk):
    user = User("/help", "/dance now", "/system Be brief.")
    talk(user)[0].run()
    assert user.screen.count(HELP) == 2
    assert "unknown command /dance" in user.screen
    assert "(a base model has no system message)" in user.screen


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
    user = User(line)
    chat, prompts = talk(user, of_text.encode("x"))
    chat.run()
    assert prompts[0] == of_text.encode(line)[-(64 - DRAWING["max_new_tokens"]) :]
    assert "(only the last 58 tokens fit into the context)" in user.screen


def test_answers_become_part_of_the_conversation(talk):
    of_text = chat_tokenizer()
    end = of_text.special_tokens["<|im_end|>"]
    user = User("Who grinds?", "What?")
    chat, prompts = talk(user, [*of_text.encode("The mill"), end], [end], tokenizer=of_text, context=1000)
    chat.run()
    assert "> Who grinds?\nThe mill\n" in without_times(user.screen)
    messages = [("user", "Who grinds?"), ("assistant", "The mill"), ("user", "What?")]
    expected = [{"role": role, "content": content} for role, content in messages]
    assert prompts[1] == conversation_ids(of_text, TEMPLATE, expected)
    assert isinstance(chat.history, Messages)
    assert chat.history.messages == [*expected, {"role": "assistant", "content": ""}]


def test_a_system_message_can_be_set_and_begins_anew(talk):
    of_text = chat_tokenizer()
    end = of_text.special_tokens["<|im_end|>"]
    user = User("/system", "hi", "/system Be brief.", "/system", "hello")
    chat, prompts = talk(user, [end], [end], tokenizer=of_text, system="Be kind.", context=1000)
    chat.run()
    assert "> /system\n(Be kind.)\n" in user.screen
    assert "> /system Be brief.\n(a new conversation)\n> /system\n(Be brief.)\n" in user.screen
    both = [("Be kind.", "hi"), ("Be brief.", "hello")]
    for prompt, (system, line) in zip(prompts, both, strict=True):
        messages = [{"role": "system", "content": system}, {"role": "user", "content": line}]
        assert prompt == conversation_ids(of_text, TEMPLATE, messages)


def test_the_oldest_turns_are_forgotten_whole_and_the_system_message_stays(talk):
    of_text = chat_tokenizer()
    end = of_text.special_tokens["<|im_end|>"]
    lines = ["The river froze.", "The wheel stood.", "The miller sat.", "Again?"]
    user = User(*lines)
    system = "Be brief."

    def ids(*contents: str) -> list[int]:
        roles = ["system", *["user", "assistant"] * len(contents)]
        messages = [
            {"role": role, "content": content} for role, content in zip(roles, (system, *contents), strict=False)
        ]
        return conversation_ids(of_text, TEMPLATE, messages)

    answer = of_text.encode("Yes.")
    two_turns = ids(lines[1], "Yes.", lines[2])
    context = len(two_turns) + DRAWING["max_new_tokens"]
    replies = [[*answer, end]] * 4
    chat, prompts = talk(user, *replies, tokenizer=of_text, system=system, context=context)
    chat.run()
    assert prompts[0] == ids(lines[0])
    assert prompts[2] == two_turns
    assert prompts[3] == ids(lines[2], "Yes.", lines[3])
    assert user.screen.count("(the oldest turn no longer fit into the context: 2 messages are forgotten)") >= 2


def test_a_message_that_alone_is_too_long_is_refused_and_forgotten(talk):
    of_text = chat_tokenizer()
    user = User("The mill " * 40, "hi")
    chat, prompts = talk(user, [], tokenizer=of_text, context=64)
    chat.run()
    assert re.search(r"\(that makes a prompt of \d+ tokens, but only 58 fit beside the answer: shorten it", user.screen)
    assert prompts == [conversation_ids(of_text, TEMPLATE, [{"role": "user", "content": "hi"}])]


def test_a_template_that_refuses_is_told_and_the_conversation_goes_on(talk):
    of_text = chat_tokenizer()
    of_text.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('never') }}{% endif %}" + TEMPLATE
    user = User("hi", "/system Be brief.", "hi", "/help")
    chat, prompts = talk(user, [], tokenizer=of_text, context=200)
    chat.run()
    assert re.search(r"\(.*never.*\)", user.screen)
    assert len(prompts) == 1
    assert user.screen.count(HELP) == 1
    assert isinstance(chat.history, Messages)
    assert chat.history.turns == []


def test_a_stop_text_ends_the_answer_unseen(talk):
    of_text = chat_tokenizer()
    user = User("hi")
    chat, _ = talk(user, of_text.encode("The mill. The wheel"), tokenizer=of_text, stops=[". The"], context=200)
    chat.run()
    assert "The mill\n" in without_times(user.screen)
    assert "wheel" not in user.screen
    assert isinstance(chat.history, Messages)
    assert chat.history.turns[-1]["content"] == "The mill"


def test_a_system_message_needs_a_template():
    of_text = tiny_house.tokenizer()
    with pytest.raises(ValueError, match="--system needs a model with a chat template"):
        Chat(tiny_house.model(of_text.vocab_size), of_text, DRAWING, system="Be brief.")


def test_the_command_line_passes_everything_on(tmp_path, monkeypatch, capsys):
    of_text = chat_tokenizer()
    model = tiny_house.model(of_text.vocab_size)
    generation = {"eos_token_id": [0, 7], "top_p": 0.5, "temperature": 0.3}
    grist_model.save(model, tmp_path / "model", of_text, generation=generation)
    made = []

    class Recorder(Chat):
        def run(self) -> None:
            made.append(self)

    monkeypatch.setattr(chat_module, "Chat", Recorder)
    assert (
        main([str(tmp_path / "model"), "--device", "cpu", "--temperature", "0", "--stop", "x", "--system", "Be kind."])
        == 0
    )
    (chat,) = made
    assert chat.drawing["temperature"] == 0
    assert chat.drawing["top_p"] == 0.5
    assert chat.ends == {0, 7, *(of_text.special_tokens[name] for name in ("<|endoftext|>", "<|im_end|>"))}
    assert chat.stops == ["x"]
    assert chat.history.messages == [{"role": "system", "content": "Be kind."}]
    assert main([str(tmp_path), "--device", "cpu"]) == 2
    assert "is not a portable model directory" in capsys.readouterr().err
