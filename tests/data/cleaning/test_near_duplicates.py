"""Near-duplicates: signatures of rensa where it is installed, and what is left out given signatures."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from cleaning_texts import SENTENCES, prose
from hypothesis import given
from hypothesis import strategies as st

from grist_data.cleaning import CleanConfig, Cleaner, near_duplicates
from grist_data.cleaning.near_duplicates import _rows_per_band
from grist_data.cleaning.words import tokens

CONFIG = CleanConfig(near_duplicates=True)
FIRST_NUMBERS = [3400158218, 3792681949, 3444214908, 3565964589]


@pytest.fixture(scope="module")
def cleaner():
    pytest.importorskip("rensa")
    return Cleaner(CONFIG)


def signature(cleaner: Cleaner, text: str) -> np.ndarray:
    found = cleaner.signature(text)
    assert found is not None
    assert (found.shape, found.dtype) == ((128,), np.uint32)
    return found


def estimate(cleaner: Cleaner, one: str, other: str) -> float:
    return float((signature(cleaner, one) == signature(cleaner, other)).mean())


def jaccard(one: str, other: str, size: int = 5) -> float:
    sets = [{tuple(t[k : k + size]) for k in range(len(t) - size + 1)} for t in map(tokens, (one, other))]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


@pytest.mark.parametrize("changed", [1, 5, 20, 60])
def test_estimate_is_near_the_jaccard_similarity(cleaner, changed):
    words = prose(2000).split()
    other = list(words)
    other[100 : 100 + 20 * changed : 20] = [f"changed{k}" for k in range(changed)]
    exact = jaccard(" ".join(words), " ".join(other))
    assert 0.3 < exact < 1
    # Four standard errors of sqrt(J (1 - J) / 128).
    assert abs(estimate(cleaner, " ".join(words), " ".join(other)) - exact) < 4 * (exact * (1 - exact) / 128) ** 0.5


def test_case_punctuation_and_white_space_do_not_matter(cleaner):
    assert estimate(cleaner, prose(), prose().upper().replace(" ", ",\n ")) == 1


@pytest.mark.parametrize("language", SENTENCES)
def test_every_script_has_shingles(cleaner, language):
    text = SENTENCES[language]
    assert 0.4 < estimate(cleaner, text, text + " " + text[:10]) < 1
    assert estimate(cleaner, text, SENTENCES["en" if language != "en" else "de"]) < 0.1


@pytest.mark.parametrize(
    ("one", "other"), [("one", "two"), ("!!", "??"), ("a b", "b a"), ("", "x"), ("a b c d", "a b c")]
)
def test_short_texts_are_alike_only_when_they_are_the_same(cleaner, one, other):
    assert estimate(cleaner, one, one) == 1
    assert estimate(cleaner, one, other) < 0.1


def test_signatures_are_the_same_in_every_process_and_with_any_number_of_threads(cleaner):
    code = (
        "from cleaning_texts import prose\nfrom grist_data.cleaning import CleanConfig, Cleaner\n"
        "print(Cleaner(CleanConfig(near_duplicates=True)).signature(prose()).tolist())"
    )
    here = str(signature(cleaner, prose()).tolist())
    for number in ("1", "3"):
        env = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": number, "RAYON_NUM_THREADS": number}
        assert subprocess.check_output([sys.executable, "-c", code], env=env, text=True).strip() == here


def test_signatures_are_those_of_rensa_0_5(cleaner):
    """Stored beside a survey: when these numbers change, a survey cannot be continued."""
    assert signature(cleaner, "The mill by the river grinds the grain.")[:4].tolist() == FIRST_NUMBERS
    seeded = Cleaner(CleanConfig(near_duplicates=True, minhash_seed=1))
    assert signature(seeded, "The mill by the river grinds the grain.")[:4].tolist() != FIRST_NUMBERS


def test_the_first_of_each_cluster_stays(cleaner):
    a, b = prose(300, seed=1), prose(300, seed=2)
    texts = [a, b, a + "more", "another text altogether, of other words", b.replace("of ", "of a ", 1), "b " + a, b]
    signatures = np.stack([signature(cleaner, text) for text in texts])
    assert near_duplicates(signatures, CONFIG).tolist() == [False, False, True, False, True, True, True]
    kept = np.array([False, True, True, True, True, True, True])
    assert near_duplicates(signatures, CONFIG, kept).tolist() == [False, False, False, False, True, True, True]


def rows(*shares: float, width: int = 128) -> np.ndarray:
    """Signatures that agree with that of zeros in the share given, spread over the width; elsewhere with none."""
    signatures = np.zeros((len(shares), width), np.uint32)
    for k, share in enumerate(shares):
        differs = np.random.default_rng(k).permutation(width)[: width - round(share * width)]
        signatures[k, differs] = 1 + k * width + differs
    return signatures


def test_threshold_is_inclusive():
    config = CleanConfig(near_duplicates=True, threshold=0.75)
    assert near_duplicates(rows(1, 96 / 128, 95 / 128), config).tolist() == [False, True, False]


def test_likeness_to_what_was_left_out_does_not_count():
    """The third resembles the second alone, which goes: it stays, or nothing like it would be left."""
    first = np.zeros(128, np.uint32)
    second, third = first.copy(), first.copy()
    second[:20], third[:40] = 1, 1
    signatures = np.stack([first, second, third])
    assert near_duplicates(signatures, CONFIG).tolist() == [False, True, False]
    assert near_duplicates(signatures, CONFIG, np.array([False, True, True])).tolist() == [False, False, True]


@given(st.integers(0, 2**32 - 1), st.integers(0, 60))
def test_what_goes_resembles_an_earlier_one_that_stays(seed, n):
    draw = np.random.default_rng(seed)
    signatures = draw.integers(0, 2**32, (n, 32), dtype=np.uint32)
    for k in range(1, n):  # copies of earlier ones, in a random part
        source = draw.integers(k)
        same = draw.random(32) < draw.choice([0.0, 0.7, 0.95, 1.0])
        signatures[k, same] = signatures[source, same]
    config = CleanConfig(near_duplicates=True, num_perm=32)
    kept = draw.random(n) < 0.8
    dropped = near_duplicates(signatures, config, kept)
    alike = (signatures[:, None] == signatures[None]).mean(axis=2) >= config.threshold
    assert not dropped[~kept].any()
    for k in np.flatnonzero(kept):
        earlier = np.flatnonzero(kept[:k] & ~dropped[:k])
        assert not dropped[k] or alike[k, earlier].any()
        identical = (signatures[earlier] == signatures[k]).all(axis=1).any()
        assert dropped[k] or not identical


def test_pairs_at_the_threshold_are_found():
    """0.95 of them are promised."""
    found = 0
    for k in range(300):
        signatures = rows(*[1.0] * (k + 1), 0.8)[[0, -1]]
        found += near_duplicates(signatures, CleanConfig(near_duplicates=True, threshold=0.79)).sum()
    assert found >= 280


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
@pytest.mark.parametrize("num_perm", [16, 64, 128, 1024])
def test_bands_find_a_pair_at_the_threshold(threshold, num_perm):
    per_band = _rows_per_band(CleanConfig(threshold=threshold, num_perm=num_perm))

    def recall(rows: int) -> float:
        return 1 - (1 - threshold**rows) ** (num_perm // rows)

    assert recall(per_band) >= 0.95
    assert per_band == num_perm or recall(per_band + 1) < 0.95


@pytest.mark.parametrize("n", [0, 1])
def test_few_documents(n):
    assert near_duplicates(np.zeros((n, 128), np.uint32), CONFIG).tolist() == [False] * n


def test_read_only_memory_maps_are_accepted(tmp_path):
    path = tmp_path / "signatures.npy"
    np.save(path, rows(1, 1, 0))
    assert near_duplicates(np.load(path, mmap_mode="r"), CONFIG).tolist() == [False, True, False]


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"signatures must have the shape \(n, num_perm 128\), but have \(2, 64\)"):
        near_duplicates(np.zeros((2, 64), np.uint32), CONFIG)
    with pytest.raises(ValueError, match=r"kept must have the shape \(2,\), but has \(3,\)"):
        near_duplicates(np.zeros((2, 128), np.uint32), CONFIG, np.ones(3, bool))
