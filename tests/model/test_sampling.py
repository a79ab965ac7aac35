from __future__ import annotations

import pytest
import torch

from grist_model.sampling import Sampling, penalize_seen, probabilities, row_generator, row_seed, sample, seen_ids

ROWS, VOCAB = 60, 37

# The 99.9 % quantile of the chi-square distribution, by degrees of freedom (Abramowitz and Stegun, table 26.8).
CHI_SQUARE = {3: 16.266, 4: 18.467, 5: 20.515, 9: 27.877}


@pytest.fixture
def logits_BV() -> torch.Tensor:
    return 2 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(5))


def enumerated(logits: list[float], options: Sampling) -> set[int]:
    """The ids that the filters leave, found by walking down the sorted list, in double precision."""
    weights = torch.tensor(logits, dtype=torch.float64).div(options.temperature).exp().tolist()
    order = sorted(range(len(logits)), key=lambda v: -weights[v])[: options.top_k]
    total = sum(weights[v] for v in order)
    if options.top_p is not None:
        kept, held = [], 0.0
        for v in order:
            if held >= options.top_p * total:
                break
            kept.append(v)
            held += weights[v]
        order = kept
    if options.min_p is not None:
        order = [v for v in order if weights[v] >= options.min_p * weights[order[0]]]
    return set(order)


@pytest.mark.parametrize(
    "options",
    [
        Sampling(),
        Sampling(top_k=1),
        Sampling(top_k=7),
        Sampling(top_k=VOCAB + 1),
        Sampling(top_p=0.01),
        Sampling(top_p=0.5),
        Sampling(top_p=0.97, temperature=3.0),
        Sampling(top_p=1.0),
        Sampling(min_p=0.05),
        Sampling(min_p=1.0),
        Sampling(temperature=0.6, top_k=12, top_p=0.9, min_p=0.02),
    ],
    ids=str,
)
def test_filters_leave_exactly_the_enumerated_ids(logits_BV, options):
    p_BV = probabilities(logits_BV, options)
    for p_V, logits_V in zip(p_BV, logits_BV.tolist(), strict=True):
        kept = enumerated(logits_V, options)
        assert set(p_V.nonzero().flatten().tolist()) == kept
        whole_V = (torch.tensor(logits_V) / options.temperature).softmax(-1)
        ids = sorted(kept)
        torch.testing.assert_close(p_V[ids] / p_V.sum(), whole_V[ids] / whole_V[ids].sum())


def test_penalty_and_filters_are_those_of_transformers_in_their_order(logits_BV):
    transformers = pytest.importorskip("transformers")
    options = Sampling(temperature=0.7, top_k=20, top_p=0.9, min_p=0.03, repetition_penalty=1.7)
    prompts = torch.randint(0, VOCAB, (ROWS, 15), generator=torch.Generator().manual_seed(6))
    seen_BV = seen_ids(prompts.tolist(), options, VOCAB, torch.device("cpu"))
    penalized_BV = penalize_seen(logits_BV, options, seen_BV)
    theirs_BV = transformers.RepetitionPenaltyLogitsProcessor(1.7)(prompts, logits_BV.clone())
    assert torch.equal(penalized_BV, theirs_BV)
    assert bool((penalized_BV != logits_BV).any())
    for warper in (
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(20),
        transformers.TopPLogitsWarper(0.9),
        transformers.MinPLogitsWarper(0.03),
    ):
        theirs_BV = warper(prompts, theirs_BV)
    p_BV = probabilities(penalized_BV, options)
    torch.testing.assert_close(p_BV / p_BV.sum(-1, keepdim=True), theirs_BV.softmax(-1))


def test_a_penalty_needs_to_know_what_was_seen(logits_BV):
    with pytest.raises(ValueError, match="needs seen_BV"):
        sample(logits_BV, Sampling(repetition_penalty=1.1))
    assert seen_ids([[1]], Sampling(), VOCAB, torch.device("cpu")) is None


def test_greedy_takes_the_best_after_the_penalty():
    logits_BV = torch.tensor([[2.0, 1.5, -1.0], [-0.5, -0.6, -9.0]])
    seen_BV = torch.tensor([[True, False, False], [True, False, True]])
    assert sample(logits_BV, Sampling(0.0)).tolist() == [0, 0]
    assert sample(logits_BV, Sampling(0.0, repetition_penalty=1.5), seen_BV=seen_BV).tolist() == [1, 1]
    assert sample(logits_BV, Sampling(0.0, repetition_penalty=1.0), seen_BV=seen_BV).tolist() == [0, 0]


@pytest.mark.parametrize(
    "options",
    [Sampling(), Sampling(top_k=5), Sampling(temperature=1.7, top_p=0.8), Sampling(min_p=0.1, temperature=0.5)],
    ids=str,
)
def test_draws_follow_the_probabilities(options):
    """Pearson's chi-square test."""
    draws = 40_000
    logits_V = torch.linspace(0, 3, 10)
    p_V = probabilities(logits_V[None], options)[0].double()
    p_V = p_V / p_V.sum()
    drawn = sample(logits_V.expand(draws, 10), options, torch.Generator().manual_seed(0))
    counts_V = torch.bincount(drawn, minlength=10).double()
    kept = p_V > 0
    assert counts_V[~kept].sum() == 0
    statistic = ((counts_V - draws * p_V).square() / (draws * p_V))[kept].sum()
    assert statistic < CHI_SQUARE[int(kept.sum()) - 1]


def test_one_generator_draws_what_torch_multinomial_draws(logits_BV):
    ours = sample(logits_BV, Sampling(), torch.Generator().manual_seed(8))
    theirs = torch.multinomial(logits_BV.softmax(-1), 1, generator=torch.Generator().manual_seed(8))
    assert ours.tolist() == theirs.flatten().tolist()


def test_a_row_with_its_own_generator_does_not_see_the_others(logits_BV):
    device = torch.device("cpu")
    together = sample(logits_BV, Sampling(2.0), [row_generator(3, row, device) for row in range(ROWS)]).tolist()
    for row in range(ROWS):
        alone = torch.Generator().manual_seed(row_seed(3, row))
        assert sample(logits_BV[row : row + 1], Sampling(2.0), alone).tolist() == [together[row]]
    assert row_seed(3, 0) == 3
    assert len({row_seed(seed, row) for seed in range(30) for row in range(1, 30)}) == 30 * 29


def test_logits_that_are_not_numbers_are_refused(logits_BV):
    logits_BV[4, 5] = float("nan")
    with pytest.raises(ValueError, match="logits are not numbers"):
        sample(logits_BV, Sampling())
