from __future__ import annotations

import numpy as np
import pytest

from grist_data.preferences import PreferencePair
from grist_train.preference_batches import ROUND_TO, PairBatch, PreferenceBatches, digest, drawn, pair_batch, split


def made_pair(number: int, prompt: int = 3, chosen: int = 4, rejected: int = 2) -> PreferencePair:
    """Ids that tell where they are from: 1000 * pair + place, +500 in the rejected answer."""
    base = 1000 * number
    prompt_ids = base + np.arange(prompt)
    answers = [prompt_ids[-1] + 1 + np.arange(chosen), base + 500 + np.arange(rejected)]
    sequences = [np.concatenate([prompt_ids, answer]).astype(np.int64) for answer in answers]
    masks = [np.arange(len(ids)) >= prompt for ids in sequences]
    return PreferencePair(sequences[0], masks[0], sequences[1], masks[1])


def some_pairs(n: int) -> list[PreferencePair]:
    return [made_pair(i, prompt=2 + i % 3, chosen=1 + i % 5, rejected=1 + (i * 7) % 4) for i in range(n)]


def batches(n: int = 10, global_size: int = 4, micro_size: int = 2, **options) -> PreferenceBatches:
    reference = np.stack([np.arange(n), np.arange(n) + 0.5], 1).astype(np.float64)
    return PreferenceBatches(some_pairs(n), reference, global_size, micro_size, **{"seed": 3, **options})


def test_sequences_lie_end_to_end_and_only_answers_are_targets():
    batch = pair_batch(
        [made_pair(1), made_pair(2, prompt=1, chosen=1, rejected=5)], np.array([[1, 2], [3, 4.0]]), "cpu"
    )
    assert batch.lengths == (6, 4, 1, 5, ROUND_TO - 16)
    assert batch.ids_BT.shape == batch.targets_BT.shape == (1, ROUND_TO)
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 6, 10, 11, 16, ROUND_TO]
    first_ids, first_targets = batch.ids_BT[0, :6].tolist(), batch.targets_BT[0, :6].tolist()
    assert first_ids == [1000, 1001, 1002, 1003, 1004, 1005]
    assert first_targets == [-100, -100, 1003, 1004, 1005, 1006]
    assert batch.targets_BT[0, 6:10].tolist() == [-100, -100, 1500, 1501]
    assert (batch.targets_BT[0, 16:] == -100).all()
    assert batch.n_valid_tokens == 2
    assert batch.max_seqlen == ROUND_TO - 16
    assert batch.answer_tokens_S is not None
    assert batch.answer_tokens_S.tolist() == [4, 2, 1, 5]
    assert batch.reference_S is not None
    assert batch.reference_S.tolist() == [1, 2, 3, 4]


def test_nothing_is_filled_up_where_nothing_is_missing():
    batch = pair_batch([made_pair(0, prompt=1, chosen=ROUND_TO // 2, rejected=ROUND_TO // 2)], None, "cpu")
    assert batch.lengths == (ROUND_TO // 2, ROUND_TO // 2)
    assert batch.reference_S is not None
    assert not batch.reference_S.any()


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_step_is_the_same_on_any_number_of_ranks(world_size):
    alone = [batch.reference_S for batch in _micro_batches([batches(micro_size=1)], 6)]
    ranks = [batches(micro_size=1, rank=rank, world_size=world_size) for rank in range(world_size)]
    found = [batch.reference_S for batch in _micro_batches(ranks, 6)]
    assert [each.tolist() for each in found if each is not None] == [
        each.tolist() for each in alone if each is not None
    ]


def _micro_batches(ranks: list[PreferenceBatches], steps: int) -> list[PairBatch]:
    out = []
    for _ in range(steps):
        for rank in ranks:
            for batch in next(rank):
                assert isinstance(batch, PairBatch)
                out.append(batch)
    return out


def test_an_epoch_has_every_pair_once_and_the_next_another_order():
    own = batches(n=7)
    first, second = ([own.pair_at(position) for position in range(at, at + 7)] for at in (0, 7))
    assert sorted(first) == sorted(second) == list(range(7))
    assert first != second


def test_the_state_goes_on_with_other_sizes():
    own = batches()
    next(own)
    state = own.state_dict()
    rest = [batch.reference_S for batch in _micro_batches([own], 3)]
    other = batches(global_size=6, micro_size=6)
    other.load_state_dict(state)
    (batch,) = _micro_batches([other], 2)[:1]
    assert batch.reference_S is not None
    wanted = [value for each in rest if each is not None for value in each.tolist()]
    assert batch.reference_S.tolist() == wanted[:12]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n": 9}, "other pairs of answers"),
        ({"seed": 4}, "another seed"),
    ],
)
def test_a_state_of_something_else_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        batches(**change).load_state_dict(batches().state_dict())


def test_a_state_of_tokens_is_refused():
    with pytest.raises(ValueError, match="other data than pairs"):
        batches().load_state_dict({"pos": 3, "dataset_id": "x", "plan": "y"})


def test_masks_are_part_of_what_pairs_are():
    pair = made_pair(1)
    other = PreferencePair(pair.chosen_ids, ~pair.chosen_mask, pair.rejected_ids, pair.rejected_mask)
    assert digest([pair]) != digest([other])


def test_content_decides_what_is_held_out():
    pairs = some_pairs(200)
    train, held_out = split(pairs, 0.2, seed=1)
    assert sorted(train + held_out) == list(range(200))
    assert 20 <= len(held_out) <= 60
    backwards_train, backwards = split(pairs[::-1], 0.2, seed=1)
    assert [199 - i for i in backwards][::-1] == held_out
    assert len(backwards_train) == len(train)
    assert split(pairs, 0.2, seed=2)[1] != held_out


def test_copies_stay_together_and_no_side_is_empty():
    pairs = some_pairs(30)
    train, held_out = split(pairs + pairs, 0.3, seed=0)
    assert {i % 30 for i in train}.isdisjoint({i % 30 for i in held_out})
    for fraction in (1e-9, 1 - 1e-9):
        train, held_out = split(some_pairs(3), fraction, seed=0)
        assert train
        assert held_out
    assert split(pairs, 0.0, seed=0)[1] == []


def test_content_decides_which_pairs_are_drawn():
    pairs = some_pairs(40)
    few = drawn(pairs, 10, seed=1)
    numbers = [next(i for i, pair in enumerate(pairs) if pair is each) for each in few]
    assert numbers == sorted(numbers)
    assert len(numbers) == 10
    assert {id(pair) for pair in drawn(pairs[::-1], 10, seed=1)} == {id(pair) for pair in few}
    assert {id(pair) for pair in few} < {id(pair) for pair in drawn(pairs, 20, seed=1)}
    assert {id(pair) for pair in drawn(pairs, 10, seed=2)} != {id(pair) for pair in few}
    assert drawn(pairs, None, seed=1) == drawn(pairs, 40, seed=1) == pairs
