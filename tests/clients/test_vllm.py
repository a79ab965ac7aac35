"""vLLM on directories of ours, in a Python of its own, which GRIST_VLLM_PYTHON names (docs/how-to/clients.md).

Computing in float32 it writes the ids that we write, in 8 bits too where our activations are rounded as its are. In bfloat16
rounding decides where two ids are almost equally likely, so there each of its ids must be one that ours rates next to the best,
given all before it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import tiny_house
import torch
from family_shapes import SHAPES, model_of

import grist_model
from grist_model.layers import Linear
from grist_tools.export import export

PYTHON = os.environ.get("GRIST_VLLM_PYTHON")
# Standard deviations of the logits: of unrelated ids the worst is 2 or more behind. Rounding may also choose another expert.
LARGEST_DENSE, LARGEST_EXPERTS = 0.1, 0.8
NEW, PROMPT = 24, 12
FAMILIES = list(SHAPES)
DENSE = ["llama", "qwen3"]
# family, format of the export, type that vLLM computes in
CASES = [(family, "float32", "float32") for family in FAMILIES]
CASES += [(family, "bf16", dtype) for family in FAMILIES for dtype in ("float32", "bfloat16")]
CASES += [(family, "int8_dynamic", "float32") for family in DENSE]
CASES += [(family, "int4", "bfloat16") for family in DENSE]  # its kernel knows no float32

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not PYTHON, reason="GRIST_VLLM_PYTHON names no Python with vLLM"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """case -> (directory, prompts, what vLLM wrote or its fault)."""
    folder = tmp_path_factory.mktemp("vllm")
    tokenizer = tiny_house.tokenizer(400)
    directories = {}
    for family, format, _ in CASES:
        source, out = folder / family, folder / f"{family}-{format}"
        if not source.exists():
            assert grist_model.save(model_of(family, next(iter(SHAPES[family]))), source, tokenizer) == family
        if not out.exists():
            export(source, out, format)
        directories[family, format] = out
    prompts = tiny_house.random_ids(2, PROMPT, 390, seed=4).tolist()
    models = [[str(directories[family, format]), dtype] for family, format, dtype in CASES]
    asked, out = folder / "asked.json", folder / "out.json"
    asked.write_text(json.dumps({"new": NEW, "prompts": prompts, "models": models}))
    script = str(Path(__file__).with_name("vllm_greedy.py"))
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(
        [str(PYTHON), script, str(asked), str(out)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=3600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads(out.read_text())["answers"]
    return {case: (directories[case[:2]], prompts, answer) for case, answer in zip(CASES, answers, strict=True)}


def round_activations(model) -> None:
    """What enters a quantized layer becomes 8-bit numbers, with a scale a token, as int8_dynamic has it."""

    def rounded(_module, inputs):
        (x_BTD,) = inputs
        scale_BT1 = x_BTD.abs().amax(-1, keepdim=True) / 127
        return ((x_BTD / scale_BT1).round() * scale_BT1,)

    for name, layer in model.named_modules():
        if isinstance(layer, Linear) and name != "head":
            layer.register_forward_pre_hook(rounded)


def far_from_best(model, prompt: list[int], new: list[int]) -> float:
    """How much less than the best id at its place ours rates the worst of these, in standard deviations of the logits there."""
    with torch.no_grad():
        logits_TV = model(torch.tensor([prompt + new]))[0, len(prompt) - 1 : -1]
    chosen_T = logits_TV.gather(1, torch.tensor(new)[:, None])[:, 0]
    return float(((logits_TV.max(1).values - chosen_T) / logits_TV.std(1)).max())


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_it_writes_what_we_write(written, case):
    directory, prompts, answer = written[case]
    assert not isinstance(answer, str), answer
    model = grist_model.load(directory, dtype=torch.float32).eval()
    assert [len(new) for new in answer] == [NEW] * len(prompts)
    if case[1] == "int8_dynamic":
        round_activations(model)
    if case[2] == "float32":
        assert answer == grist_model.generate(model, prompts, max_new_tokens=NEW, temperature=0)
    else:
        largest = LARGEST_EXPERTS if model.config.experts else LARGEST_DENSE
        assert max(map(far_from_best, [model] * len(prompts), prompts, answer)) < largest


def test_ids_that_are_not_ours_are_far_from_the_best():
    """Else the bounds above would hold of anything."""
    model = model_of("mixtral", "plain")
    prompt, *others = tiny_house.random_ids(9, NEW, 390, seed=6).tolist()
    assert min(far_from_best(model, prompt, new) for new in others) > 2 * LARGEST_EXPERTS
