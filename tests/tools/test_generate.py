from __future__ import annotations

import io
import json
import shutil

import pytest
import tiny_house

import grist_model
from grist_data.chat_template import conversation_ids
from grist_tools import generate
from grist_tools.generate import main, write_continuation
from grist_tools.generate_batch import requests_of

DRAWING = {"max_new_tokens": 8, "temperature": 0.0, "seed": 0}
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


class Recorder(io.StringIO):
    """Remembers what had been written at each flush."""

    def __init__(self) -> None:
        super().__init__()
        self.flushed: list[str] = []

    def flush(self) -> None:
        self.flushed.append(self.getvalue())


@pytest.fixture(scope="module")
def chat_directory(tmp_path_factory):
    """With a chat template, greedy by its own settings."""
    of_text = tiny_house.tokenizer()
    of_text.chat_template = TEMPLATE
    directory = tmp_path_factory.mktemp("chat") / "model"
    model = tiny_house.model(of_text.vocab_size)
    grist_model.save(model, directory, of_text, generation={"do_sample": False, "max_new_tokens": 6})
    return directory


def greedy(directory, ids: list[int], count: int) -> list[int]:
    return grist_model.generate(grist_model.load(directory), ids, max_new_tokens=count, temperature=0)


def test_text_is_shown_token_by_token():
    tokenizer = tiny_house.tokenizer()
    out = Recorder()
    model = tiny_house.model(tokenizer.vocab_size)
    clock = write_continuation(model, tokenizer, tokenizer.encode("The miller"), out, DRAWING)
    assert clock.count == 8
    assert len(out.flushed) > 3
    assert out.getvalue().endswith("\n")


def test_a_stop_text_ends_the_text_and_is_not_shown():
    tokenizer = tiny_house.tokenizer()
    model = tiny_house.model(tokenizer.vocab_size)
    whole, out = Recorder(), Recorder()
    write_continuation(model, tokenizer, tokenizer.encode("The miller"), whole, DRAWING)
    text = whole.getvalue()[:-1]
    stop = text[3:5]
    clock = write_continuation(model, tokenizer, tokenizer.encode("The miller"), out, DRAWING, stops=[stop])
    assert out.getvalue() == text[: text.index(stop)] + "\n"
    assert clock.count < 8


def test_command_line_writes_prompt_and_continuation(model_directory, capsys):
    arguments = [str(model_directory), "--max-new-tokens", "8", "--seed", "1", "--device", "cpu"]
    assert main([*arguments, "--prompt", "The miller"]) == 0
    first = capsys.readouterr()
    assert first.out.startswith("The miller")
    assert len(first.out) > len("The miller\n")
    assert "8 tokens, the first after" in first.err
    assert "tokens/s, on cpu" in first.err
    assert main([*arguments, "--prompt", "The miller"]) == 0
    assert capsys.readouterr().out == first.out


def test_prompt_lookup_and_the_penalty_reach_the_model(model_directory, capsys):
    arguments = [
        str(model_directory),
        "--prompt",
        "The mill, the mill, the",
        "--device",
        "cpu",
        "--max-new-tokens",
        "20",
    ]
    assert main([*arguments, "--temperature", "0"]) == 0
    plain = capsys.readouterr().out
    assert main([*arguments, "--temperature", "0", "--prompt-lookup", "4"]) == 0
    assert capsys.readouterr().out == plain
    assert main([*arguments, "--temperature", "0", "--repetition-penalty", "5"]) == 0
    assert capsys.readouterr().out != plain
    assert main([*arguments, "--prompt-lookup", "4"]) == 2
    assert "prompt_lookup" in capsys.readouterr().err
    assert main([*arguments, "--prompt", "two", "--prompt-lookup", "4"]) == 2
    assert "--prompt-lookup is for one prompt, but there are 2" in capsys.readouterr().err


def test_several_prompts_give_a_line_each_in_their_order(model_directory, capsys, tmp_path):
    prompts = ["The miller", "Water turned the wheel, the wheel turned", "When"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts[1:]) + "\n\n")
    arguments = [
        str(model_directory),
        "--device",
        "cpu",
        "--max-new-tokens",
        "8",
        "--temperature",
        "0",
        "--max-batch",
        "2",
    ]
    assert main([*arguments, "--prompt", prompts[0], "--prompts", str(tmp_path / "prompts.txt")]) == 0
    captured = capsys.readouterr()
    rows = [json.loads(line) for line in captured.out.splitlines()]
    tokenizer = tiny_house.tokenizer()
    ends = {tokenizer.eot_id}
    for row, prompt in zip(rows, prompts, strict=True):
        new = greedy(model_directory, tokenizer.encode(prompt), 8)
        new = new[: next((at for at, id_ in enumerate(new) if id_ in ends), 8)]
        assert (row["prompt"], row["text"]) == (prompt, tokenizer.decode(new))
        assert row["finish"] == ("length" if len(new) == 8 else "stop")
    assert "tokens after 3 prompts in" in captured.err
    stop = rows[0]["text"][2:4]
    assert main([*arguments, "--prompt", prompts[0], "--prompt", "When", "--stop", stop]) == 0
    stopped = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (stopped["text"], stopped["finish"]) == (rows[0]["text"].split(stop)[0], "stop")


def test_messages_go_through_the_chat_template(chat_directory, capsys, tmp_path):
    tokenizer = tiny_house.tokenizer()
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who grinds?"}]
    answer = tokenizer.decode(greedy(chat_directory, conversation_ids(tokenizer, TEMPLATE, messages), 6))
    arguments = [str(chat_directory), "--device", "cpu", "--chat"]
    assert main([*arguments, "--system", "Be kind.", "--prompt", "Who grinds?"]) == 0
    assert capsys.readouterr().out == answer + "\n"  # the answer alone, drawn as generation_config.json says
    file = tmp_path / "asked.jsonl"
    file.write_text(json.dumps({"messages": messages}) + '\n"Who grinds?"\n{"prompt": "When?"}\n')
    assert main([*arguments, "--prompts", str(file)]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[0] == {"messages": messages, "text": answer, "tokens": 6, "finish": "length"}
    assert [row["messages"] for row in rows[1:]] == [[{"role": "user", "content": x}] for x in ("Who grinds?", "When?")]


def test_the_prompt_may_come_on_standard_input(model_directory, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("When the river"))
    assert main([str(model_directory), "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("When the river")


def test_an_id_that_ends_the_text_is_not_shown(monkeypatch):
    tokenizer = tiny_house.tokenizer()
    letters = tokenizer.encode("flour")
    monkeypatch.setattr("grist_model.stream", lambda *_, **__: iter([*letters, 7, *letters]))
    assert list(generate.new_ids(None, [1], {7}, DRAWING)) == letters


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 3}\n', r"p\.jsonl:2: expected a text, "),
        ("p.jsonl", '"a"\n\n{"messages": []}\n', r"p\.jsonl:3: expected a text, "),
        ("p.jsonl", '{"messages": [{"role": "user"}]}', r"p\.jsonl:1: expected a text, "),
        ("p.jsonl", '"a"\n{oops\n', r"p\.jsonl:2 is not valid JSON"),
        ("p.jsonl", '{"messages": [{"role": "user", "content": "a"}]}', "holds messages: --chat puts them"),
        ("p.txt", "\n\n", r"p\.txt holds no prompts"),
    ],
)
def test_files_of_prompts_that_are_none(tmp_path, name, content, fault):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=fault):
        requests_of(None, tmp_path / name, False, None, io.StringIO())


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["{absent}", "--prompt", "x"], "is not a portable model directory"),
        (["{model}", "--prompt", "x", "--max-new-tokens", "64"], "must be 1 to 63"),
        (["{model}", "--prompt", "x", "--temperature", "-1"], "temperature must be 0"),
        (["{model}", "--prompt", "x", "--device", "toaster"], "unknown device 'toaster'"),
        (["{model}", "--prompt", "x", "--chat"], "--chat needs a model with a chat template"),
        (["{model}", "--prompt", "x", "--system", "y"], "--system needs --chat"),
        (["{model}", "--prompts", "{absent}"], "No such file"),
        (["{model}", "--prompt", "x", "--prompt", "y", "--stop", ""], "a stop string is empty"),
        (["{model}", "--prompt", "x", "--stop", ""], "a stop string is empty"),
        (["{bare}", "--prompt", "x"], "no tokenizer"),
    ],
)
def test_bad_input_is_told(model_directory, tmp_path, capsys, arguments, fault):
    bare = tmp_path / "bare"
    shutil.copytree(model_directory, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    places = {"absent": tmp_path / "absent", "model": model_directory, "bare": bare}
    arguments = [argument.format(**places) for argument in arguments]
    assert main([*arguments, *([] if "--device" in arguments else ["--device", "cpu"])]) == 2
    assert fault in capsys.readouterr().err


def test_a_name_on_the_hub_is_a_directory(model_directory, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("grist_model.hub.local_directory", lambda name: asked.append(name) or model_directory)
    assert main(["hf://me/mill", "--prompt", "x", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert asked == ["hf://me/mill"] * 2
