"""The commands of docs/serving.md, run: each server answers as we do, and profile_latency measures it.

GRIST_VLLM_PYTHON and GRIST_SERVE_PYTHON name the Pythons of the servers (docs/how-to/clients.md); llama.cpp's is the one of the
package xllamacpp, in this process.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_house
import torch
from family_shapes import model_of

import grist_model
from grist_data.chat_template import conversation_ids, read_template
from grist_tools.export_gguf import write_gguf
from grist_tools.latency_peers import llamacpp_server
from grist_tools.profile_latency import main

PAGE = (Path(__file__).resolve().parents[2] / "docs/serving.md").read_text(encoding="utf-8")
PYTHONS = {"vllm": os.environ.get("GRIST_VLLM_PYTHON"), "transformers": os.environ.get("GRIST_SERVE_PYTHON")}
STARTS = {"vllm": "python -m vllm.", "transformers": "transformers serve "}
SERVERS = ["transformers", "vllm", "llamacpp"]
NEW = 12
MESSAGES = [{"role": "user", "content": "Who carried the grain?"}]

pytestmark = pytest.mark.clients


def command_of(server: str, directory: Path, port: int) -> list[str]:
    """The page's line, with our directory and a free port, in the server's environment."""
    (line,) = [line for line in PAGE.splitlines() if line.startswith(STARTS[server])]
    program, *rest = shlex.split(line)
    python = PYTHONS[server]
    assert python is not None
    places = {"runs/quickstart/model": str(directory), "8000": str(port)}
    extra = ["--enforce-eager", "--dtype", "float32"] if server == "vllm" else ["--dtype", "float32"]
    return [str(Path(python).with_name(program)), *(places.get(part, part) for part in rest), *extra]


@contextmanager
def child(command: list[str], port: int, log: Path):
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        end = time.monotonic() + 400
        while not healthy(port):
            said = log.read_text(errors="replace")[-3000:]
            assert process.poll() is None, f"{shlex.join(command)} ended:\n{said}"
            assert time.monotonic() < end, f"{shlex.join(command)} is not up:\n{said}"
            time.sleep(0.5)
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A directory that chats, its model and its tokenizer.

    The model says ASCII: of half a character servers show different things. Nor does it end a text: every answer is as long as
    was asked for.
    """
    tokenizer = tiny_house.tokenizer(400)
    tokenizer.chat_template = read_template("plain")
    directory, model = tmp_path_factory.mktemp("served") / "model", model_of("llama", "plain")
    special = set(tokenizer.special_tokens.values())
    assert model.head is not None
    with torch.no_grad():
        for token in range(model.config.vocab_size):
            known = token < tokenizer.vocab_size and token not in special
            if not known or not tokenizer.token_bytes([token]).isalpha():  # bytes: of ASCII letters alone
                model.head.weight[token] = 0  # the best of the others is above 0
    grist_model.save(model, directory, tokenizer)
    return directory, model, tokenizer


@pytest.fixture(scope="module", params=SERVERS)
def served(request, house, tmp_path_factory):
    """(url of the API, what the model is called there)."""
    directory, _, _ = house
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "llamacpp":
        pytest.importorskip("xllamacpp")
        with llamacpp_server(write_gguf(directory, folder / "model.gguf", "f32").path, 2, 200, 1) as address:
            yield f"{address}/v1", "model"
        return
    if not PYTHONS[request.param]:
        pytest.skip("GRIST_VLLM_PYTHON or GRIST_SERVE_PYTHON names no Python with this server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with child(command_of(request.param, directory, port), port, folder / "log"):
        yield f"http://127.0.0.1:{port}/v1", "quickstart" if request.param == "vllm" else str(directory)


def test_a_prompt_is_continued_as_by_us(served, house):
    """With the function that the page shows."""
    url, name = served
    _, model, tokenizer = house
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    page: dict = {}
    exec(code, page)
    prompt = "The miller's daughter carried the"
    ours = grist_model.generate(model, tokenizer.encode(prompt), max_new_tokens=24, temperature=0)
    assert page["ask"](prompt, url, name) == tokenizer.decode(ours)


def test_messages_are_answered_as_by_us(served, house):
    url, name = served
    _, model, tokenizer = house
    body = {"model": name, "messages": MESSAGES, "max_tokens": NEW, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        said = json.load(answer)["choices"][0]["message"]["content"]
    prompt = conversation_ids(tokenizer, tokenizer.chat_template, MESSAGES)
    ours = grist_model.generate(model, prompt, max_new_tokens=NEW, temperature=0)
    assert said == tokenizer.decode(ours)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_it_is_measured(served, tmp_path, api):
    url, name = served
    out = tmp_path / "endpoint.json"
    arguments = ["--endpoint", url, "--model", name, "--api", api, "--rate", "4", "--requests", "4"]
    assert main([*arguments, "--prompts", "6", "--outputs", str(NEW), "--out", str(out)]) == 0
    found = json.loads(out.read_text())["summary"]
    assert (found["answered"], found["errors"]) == (4, {})
    assert found["output_tokens"] == 4 * NEW
    assert found["first_token_ms"]["p50"] > 0
