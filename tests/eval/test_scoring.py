"""Scores are the model's, whatever shares a batch with them."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_house import model

from grist_eval.encoding import Encoded
from grist_eval.scoring import plan, score_batch, score_groups
from grist_model.config import RopeScaling


def groups(count: int = 12, seed: int = 0) -> list[list[Encoded]]:
    draw = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(320) for _ in range(draw.randint(least, most))]

    found = []
    for _ in range(count):
        context = ids(1, 30)
        answers = [ids(1, 8) for _ in range(draw.randint(1, 4))]
        found.append([Encoded(context + answer, len(answer)) for answer in answers])
    return found


def alone(network, request: Encoded) -> tuple[float, bool]:
    with torch.no_grad():
        of_next = network(torch.tensor([request.ids[:-1]]))[0].double().log_softmax(-1)[-request.scored :]
    targets = torch.tensor(request.ids[-request.scored :])
    return float(of_next.gather(1, targets[:, None]).sum()), bool((of_next.argmax(-1) == targets).all())


def scores(network, given, batch_tokens=60, **ranks):
    found: dict[int, list] = {}
    score_groups(network, given, plan(given, 320, batch_tokens), done=found.__setitem__, **ranks)
    return found


def test_scores_are_those_of_each_request_alone():
    network, given = model(), groups()
    found = scores(network, given)
    assert sorted(found) == list(range(len(given)))
    for at, group in enumerate(given):
        for score, request in zip(found[at], group, strict=True):
            total, greedy = alone(network, request)
            assert score.log_likelihood == pytest.approx(total, abs=2e-4)
            assert (score.greedy, score.tokens) == (greedy, request.scored)


def test_the_likeliest_continuation_is_greedy():
    network = model()
    ids = [5, 9, 2]
    for _ in range(4):
        with torch.no_grad():
            ids.append(int(network(torch.tensor([ids]))[0, -1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 320]
    right, wrong = score_batch(network, [Encoded(ids, 4), Encoded(other, 4)])
    assert right.greedy
    assert not wrong.greedy
    assert right.log_likelihood > wrong.log_likelihood


@pytest.mark.parametrize("world_size", [2, 3, 7, 20])
def test_any_number_of_ranks_gives_the_same_bits(world_size):
    network, given = model(), groups()
    one = scores(network, given)
    parts = [scores(network, given, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sum(map(len, parts)) == len(one)
    assert {at: each for part in parts for at, each in part.items()} == one


def test_every_rank_makes_the_same_number_of_forwards():
    network, given = model(), groups()
    calls = []
    network.register_forward_hook(lambda *_: calls.append(1))
    counts = []
    for rank in range(5):
        calls.clear()
        scores(network, given, rank=rank, world_size=5)
        counts.append(len(calls))
    assert len(set(counts)) == 1
    assert counts[0] == -(-len(plan(given, 320, 60)) // 5)


def test_batches_hold_every_group_once_and_long_ones_first():
    given = groups(40)
    batches = plan(given, 320, 100)
    assert sorted(at for batch in batches for at in batch) == list(range(40))
    longest = [max(len(request.ids) for request in given[batch[0]]) for batch in batches]
    assert longest[0] == max(longest)
    assert len(plan(given, 320, 1)) == 40
    assert len(plan(given, 2**25, 10**9)) > 1  # the logits of all would be too many


def test_the_mode_of_the_model_is_left_as_it_was():
    network = model().train()
    scores(network, groups(2))
    assert network.training


def test_what_a_model_cannot_read_is_refused():
    network = model()
    with pytest.raises(ValueError, match="id 320 is outside the model's vocabulary of 320"):
        scores(network, [[Encoded([1, 320], 1)]])
    dynamic = model(rope_scaling=RopeScaling("dynamic", 2.0, original_context=8))
    with pytest.raises(
        ValueError, match='a sequence of 9 tokens exceeds the original context of 8, and with "dynamic"'
    ):
        scores(dynamic, [[Encoded([1] * 10, 1)]])
    assert scores(dynamic, [[Encoded([1] * 9, 1)]])
    with pytest.raises(ValueError, match="batch_tokens must be at least 1, but is 0"):
        plan(groups(1), 320, 0)
