"""Our models in EleutherAI's lm_eval.

    python -m grist_eval.lm_eval_adapter --model grist --model_args directory=DIR --tasks ...

The command is lm_eval's own, with its options; importing this module registers the model. One process; of the tasks' requests
it takes log-likelihoods, rolling ones too, and generation. lm_eval refuses a chat template (--apply_chat_template), since this
class has none.
"""

# pyright: reportMissingImports=false
# (lm_eval is nobody's dependency here.)

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grist_eval.answers import GREEDY, encode_prompts, write_answers
from grist_eval.encoding import Bos, Encoded, encode_pairs, front_ids, rolling_windows, start_id
from grist_eval.environment import pick_device
from grist_eval.scoring import BATCH_TOKENS, Score, plan, score_groups

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError("the adapter needs lm_eval: pip install 'lm_eval[hf]'") from error

_MAX_NEW_TOKENS = 256  # lm_eval's own, where a task names none
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("grist")
class GristLM(LM):
    """A portable model directory, or a model and its tokenizer in memory (`GristLM.of`).

    bos: `encoding.Bos`. batch_tokens: tokens of a batch; batch_size and max_batch_size, which lm_eval passes to every model,
    count rows, of which a batch here has as many as fit. seed: of tasks that sample.
    """

    def __init__(
        self,
        directory: str | Path,
        device: str = "auto",
        dtype: str = "float32",
        bos: Bos = "tokenizer",
        batch_tokens: int = BATCH_TOKENS,
        seed: int = 0,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ):
        import torch

        from grist_data import Tokenizer
        from grist_model import load

        model = load(directory, dtype=getattr(torch, dtype), device=pick_device(device))
        self._set(model, Tokenizer.load(directory), bos, batch_tokens, seed)

    @classmethod
    def of(
        cls, model: Any, tokenizer: Any, bos: Bos = "tokenizer", batch_tokens: int = BATCH_TOKENS, seed: int = 0
    ) -> GristLM:
        made = cls.__new__(cls)
        made._set(model, tokenizer, bos, batch_tokens, seed)
        return made

    def _set(self, model: Any, tokenizer: Any, bos: Bos, batch_tokens: int, seed: int) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.bos: Bos = bos
        self.batch_tokens, self.seed = batch_tokens, seed
        self._device = model.embedding.weight.device

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        encoded = encode_pairs(self.tokenizer, pairs, self.model.config.context_length, self.bos)
        groups: dict[str, list[int]] = {}
        for at, (context, _) in enumerate(pairs):
            groups.setdefault(context, []).append(at)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        for of_group, scores in zip(
            groups.values(),
            self._scores([[encoded[at] for at in of_group] for of_group in groups.values()]),
            strict=True,
        ):
            for at, score in zip(of_group, scores, strict=True):
                answers[at] = (score.log_likelihood, score.greedy)
                self.cache_hook.add_partial("loglikelihood", requests[at].args, answers[at])
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        front, start = front_ids(self.tokenizer, self.bos), start_id(self.tokenizer)
        texts = [request.args[0] for request in requests]
        windows = [
            list(rolling_windows([*front, *ids.tolist()], start, self.model.config.context_length))
            for ids in self.tokenizer.encode_batch(texts)
        ]
        totals = [sum(score.log_likelihood for score in scores) for scores in self._scores(windows)]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = [""] * len(requests)
        alike: dict[str, list[int]] = {}
        for at, request in enumerate(requests):
            alike.setdefault(repr(request.args[1]), []).append(at)
        for places in alike.values():
            until, cut, sampling = _how(requests[places[0]].args[1])
            prompts = encode_prompts(self.model, self.tokenizer, [requests[at].args[0] for at in places], cut, self.bos)

            def done(number: int, text: str, places: list[int] = places) -> None:
                texts[places[number]] = text

            seeded = {**sampling, "seed": self.seed}
            write_answers(self.model, self.tokenizer, prompts, until, cut, done, sampling=seeded)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _scores(self, groups: Sequence[Sequence[Encoded]]) -> list[list[Score]]:
        found: list[list[Score]] = [[] for _ in groups]
        batches = plan(groups, self.model.config.vocab_size, self.batch_tokens)
        score_groups(self.model, groups, batches, done=found.__setitem__)
        return found


def _how(options: Mapping[str, Any]) -> tuple[list[str], int, Mapping[str, Any]]:
    """lm_eval's generation_kwargs -> (strings that end a text, most tokens, sampling).

    Raises:
        ValueError: an option that generation here does not have.
    """
    unknown = set(options) - {"until", "do_sample", *_LENGTHS, *_SAMPLING}
    if unknown:
        raise ValueError(f"generation_kwargs has {', '.join(sorted(unknown))}, which this model does not know")
    until = options.get("until") or []
    cut = next((int(options[name]) for name in _LENGTHS if options.get(name) is not None), _MAX_NEW_TOKENS)
    sampling = {name: options[name] for name in _SAMPLING if options.get(name) is not None}
    # As lm_eval reads them: a temperature alone asks for samples, do_sample False for none whatever the temperature.
    if not options.get("do_sample", sampling.get("temperature", 0.0) > 0):
        kept = {name: value for name, value in sampling.items() if name == "repetition_penalty"}
        sampling = {**kept, **GREEDY}
    return [until] if isinstance(until, str) else list(until), cut, sampling


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
