"""llama.cpp in this process, by the package xllamacpp: its server on a GGUF file, and what it thinks of ids and texts.

Float32 caches and attention without fusion, as the differences that are looked for are smaller than what these round.
"""

from __future__ import annotations

import importlib
import json
import urllib.request
from pathlib import Path
from typing import Any

import torch


class LlamaCpp:
    """n_vocab: rows of the model's embedding."""

    def __init__(self, path: Path, n_vocab: int, context: int = 256, **settings: Any):
        xllamacpp: Any = importlib.import_module("xllamacpp")  # compiled, so nothing tells its types
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.warmup, params.verbosity = context, 1, False, 0
        params.fit_params = False  # would shorten the context to what it thinks fits
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        for name, value in settings.items():
            setattr(params, name, value)
        self.n_vocab = n_vocab
        self._server = xllamacpp.Server(params)

    def log_probabilities(self, ids: list[int]) -> torch.Tensor:
        """(V,) float32: of the token after these ids.

        The server leaves probabilities out where what it says is half a character, so it is made to say something whole; what
        it reports is from before that.
        """
        asked = {"prompt": ids, "n_predict": 1, "n_probs": self.n_vocab, "temperature": 0, "cache_prompt": False}
        answer = self._server.handle_completions(asked | {"logit_bias": [["n", 1e4]]})
        found = torch.full((self.n_vocab,), float("nan"))
        for token in answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            found[token["id"]] = token["logprob"]
        return found

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """The next ids, each the likeliest after all before it."""
        said = list(ids)
        for _ in range(count):
            said.append(int(self.log_probabilities(said).argmax()))
        return said[len(ids) :]

    def tokenize(self, text: str, special: bool = False, begin: bool = False) -> list[int]:
        """special: whether names of special tokens become these. begin: whether what the file puts before a text is put."""
        return self.post("/tokenize", {"content": text, "parse_special": special, "add_special": begin})["tokens"]

    def chat(self, messages: list[dict[str, str]], count: int) -> dict[str, Any]:
        """/v1/chat/completions."""
        asked = {"messages": messages, "max_tokens": count, "temperature": 0, "cache_prompt": False}
        return self.post("/v1/chat/completions", asked)

    def post(self, where: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self._server.listening_address + where, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)


def kl_divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """Of q from p, in nats."""
    return float((log_p.double().exp() * (log_p.double() - log_q.double())).sum())
