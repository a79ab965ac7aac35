"""The tree of tokens: each sequence's logits are those it has alone, and nothing that is shared is computed twice."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tiny_house import model

from grist_model.token_tree import TokenTree, shared_length

SHAPES = {
    "windows, sinks and experts": {},
    "full attention": {"window": None, "window_layers": "none"},
    "learned positions, dense": {"positions": "learned", "experts": 0, "window": 3},
}


def sequences(seed: int, groups: int = 4) -> list[list[int]]:
    """Groups that share a beginning; of all groups; some sequences are equal, and some begin others."""
    draw = random.Random(seed)
    base = [draw.randrange(320) for _ in range(12)]
    found = []
    for _ in range(groups):
        context = base[: draw.randrange(12)] + [draw.randrange(320) for _ in range(draw.randrange(1, 9))]
        found += [context + [draw.randrange(2) for _ in range(draw.randrange(9))] for _ in range(draw.randrange(1, 5))]
    return found


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_sequence_gets_the_logits_it_has_alone(shape, seed):
    network, given = model(**SHAPES[shape]), sequences(seed)
    draw = random.Random(seed)
    wanted = [draw.randint(1, len(sequence)) for sequence in given]
    tree = TokenTree(given, wanted)
    with torch.no_grad():
        logits = tree.logits(network)
        assert len(logits) == tree.n_wanted
        first = len(tree.ids) - tree.n_wanted
        for sequence, count, path in zip(given, wanted, tree.paths, strict=True):
            alone = network(torch.tensor([sequence]))[0, -count:]
            torch.testing.assert_close(logits[torch.from_numpy(path[-count:] - first)], alone, atol=3e-5, rtol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_a_token_stands_in_the_stream_once(seed):
    given = sequences(seed, groups=8)
    tree = TokenTree(given, [1] * len(given))
    beginnings = {tuple(sequence[:n]) for sequence in given for n in range(1, len(sequence) + 1)}
    assert len(tree.ids) == len(beginnings)
    for sequence, path in zip(given, tree.paths, strict=True):
        assert tree.ids[path].tolist() == sequence
        assert np.array_equal(tree.positions[path], np.arange(len(sequence)))
    assert {int(path[-1]) for path in tree.paths} == set(range(len(tree.ids) - tree.n_wanted, len(tree.ids)))


def test_shared_length():
    assert shared_length([1, 2, 3], [1, 2, 4, 5]) == 2
    assert shared_length([1, 2], [1, 2, 3]) == 2
    assert shared_length([], [1]) == 0
    assert shared_length([7], [8]) == 0


@pytest.mark.parametrize(("given", "wanted"), [([[1, 2], []], [1, 1]), ([[1, 2]], [3]), ([[1, 2]], [0])])
def test_logits_that_there_cannot_be_are_refused(given, wanted):
    with pytest.raises(ValueError, match="cannot give logits after its last"):
        TokenTree(given, wanted)
