"""Scores are those of EleutherAI's lm_eval, item by item: as make_lm_eval_golden.py wrote them; live with `-m clients`."""

# pyright: reportMissingImports=false
# (lm_eval is nobody's dependency here.)

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
from lm_eval_subject import ANSWER_TOKENS, PARTS, differences, our_items, portable, subject, write_part

GOLDEN = json.loads(Path(__file__).with_name("lm_eval_golden.json").read_text(encoding="utf-8"))
# Sums of up to 60 log-probabilities of about 8 nats each, in float32 on both sides, and the golden ones rounded to 1e-4.
TOLERANCE_NATS = 1e-3

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm_eval: pip install 'lm_eval[hf]'")


@pytest.mark.parametrize("part", PARTS)
def test_scores_are_those_of_lm_eval(part, tmp_path):
    theirs = GOLDEN["parts"][part]
    ours = our_items(*subject(), tmp_path, part)
    tasks, rows, _ = PARTS[part]
    assert list(theirs) == list(ours) == list(tasks)
    for task in tasks:
        assert len(theirs[task]) == rows
        assert differences(theirs[task], ours[task], TOLERANCE_NATS) == [], task


def test_a_difference_is_seen(tmp_path):
    ours = our_items(*subject(), tmp_path, "two")["piqa"]
    theirs = GOLDEN["parts"]["two"]["piqa"]
    (total, greedy), *others = theirs[3]["scores"]
    moved = {**theirs[3], "scores": [(total + 2 * TOLERANCE_NATS, greedy), *others]}
    assert len(differences([*theirs[:3], moved, *theirs[4:]], ours, TOLERANCE_NATS)) == 1
    other_metric = {**theirs[3], "metrics": {"acc,none": 1 - theirs[3]["metrics"]["acc,none"]}}
    assert len(differences([*theirs[:3], other_metric, *theirs[4:]], ours, TOLERANCE_NATS)) == 1


@pytest.mark.clients
@needs_lm_eval
def test_lm_eval_itself_says_the_same(tmp_path):
    from grist_tools import bench_eval_peers

    lm = bench_eval_peers.transformers_lm(portable(tmp_path / "model"), batch_size=16)
    rows, examples = write_part(tmp_path, "zero")
    tasks = PARTS["zero"][0]
    theirs = bench_eval_peers.evaluate(lm, tasks, rows, examples, tmp_path / "tasks", 0)
    ours = our_items(*subject(), tmp_path, "zero")
    for task in tasks:
        assert differences(theirs[task], ours[task], TOLERANCE_NATS) == [], task


@pytest.mark.clients
@needs_lm_eval
def test_our_model_in_lm_eval_is_its_own_of_the_same_weights(tmp_path):
    from grist_eval.lm_eval_adapter import GristLM
    from grist_tools import bench_eval_peers

    directory = portable(tmp_path / "model")
    rows, examples = write_part(tmp_path, "two")
    options = {"shots": 2, "gen_kwargs": {"max_gen_toks": ANSWER_TOKENS}}
    ours, theirs = (
        bench_eval_peers.evaluate(lm, ["piqa", "mmlu", "triviaqa"], rows, examples, tmp_path / name, **options)
        for name, lm in (
            ("ours", GristLM(directory, device="cpu")),
            ("theirs", bench_eval_peers.transformers_lm(directory, batch_size=4)),
        )
    )
    assert list(ours) == list(theirs)
    for task, of_task in theirs.items():
        for a, b in zip(of_task, ours[task], strict=True):
            assert (a["metrics"], a.get("text")) == (b["metrics"], b.get("text"))
            for (total, greedy), (own, own_greedy) in zip(a.get("scores", []), b.get("scores", []), strict=True):
                assert own == pytest.approx(total, abs=TOLERANCE_NATS)
                assert own_greedy == greedy


@pytest.mark.clients
@needs_lm_eval
def test_rolling_log_likelihoods_are_those_of_lm_eval(tmp_path):
    from lm_eval.api.instance import Instance

    from grist_eval.lm_eval_adapter import GristLM
    from grist_tools import bench_eval_peers
    from grist_tools.bench_eval_rows import invented_text

    directory = portable(tmp_path / "model")
    text = invented_text(60)
    requests = [Instance("loglikelihood_rolling", {}, (each,), 0) for each in (text, text[:300], "The mill")]
    theirs = bench_eval_peers.transformers_lm(directory, batch_size=2).loglikelihood_rolling(requests)
    ours = GristLM(directory, device="cpu").loglikelihood_rolling(requests)
    assert len(ours) == 3
    for own, total in zip(ours, theirs, strict=True):
        assert math.isfinite(total)
        assert own == pytest.approx(total, rel=1e-5)


@pytest.mark.clients
@needs_lm_eval
def test_generation_kwargs_are_read_as_lm_eval_reads_them():
    from grist_eval.lm_eval_adapter import _how

    assert _how({}) == ([], 256, {"temperature": 0.0})
    assert _how({"until": "\n", "max_gen_toks": 9, "do_sample": False, "temperature": 0.7}) == (
        ["\n"], 9, {"temperature": 0.0},
    )  # fmt: skip
    assert _how({"temperature": 0.7, "top_p": 0.9}) == ([], 256, {"temperature": 0.7, "top_p": 0.9})
    with pytest.raises(ValueError, match="generation_kwargs has num_beams"):
        _how({"num_beams": 4})
