from __future__ import annotations

import mmap

import pytest
from tiny_house import model, random_ids

import grist_model
from grist_model import accounting
from grist_tools.latency import Answer, Shape, figures, grid, in_turns, measure, memory_of, ours, same_ids
from grist_tools.latency_roofline import prefill_flops, shares, step_bytes
from grist_tools.latency_text import latency_table
from grist_tools.timing import Ceilings


def test_the_grid_leaves_out_what_does_not_fit_the_context():
    assert grid([1, 2], [16, 60], [8], 64) == [Shape(1, 16, 8), Shape(2, 16, 8)]
    with pytest.raises(ValueError, match="context of 64 tokens"):
        grid([1], [64], [1], 64)


def test_every_token_is_timed_and_is_what_generate_writes():
    network, prompts = model(), random_ids(3, 10).tolist()
    answer = ours(network)(prompts, 5)
    assert answer.ids == grist_model.generate(network, prompts, max_new_tokens=5, temperature=0)
    assert len(answer.seconds) == 5
    assert answer.seconds[0] > 0
    assert answer.seconds == sorted(answer.seconds)


def test_contestants_take_turns_after_one_answer_that_is_not_kept():
    asked = []

    def contestant(name):
        def answer(prompts, output):
            asked.append(name)
            return Answer([[len(asked)]], [float(len(asked))])

        return answer

    answers = in_turns({name: contestant(name) for name in "abc"}, [[1]], 1, 3)
    assert "".join(asked) == "abc" + "abc" + "bca" + "cab"
    assert [answer.seconds for answer in answers["a"]] == [[4.0], [9.0], [11.0]]


def test_figures_of_known_times():
    answers = [
        Answer([[1]], [0.5, 0.6, 0.7, 0.8]),
        Answer([[1]], [0.7, 0.7, 1.1, 1.2]),
        Answer([[1]], [0.6, 0.7, 0.8, 0.9]),
    ]
    row = figures(Shape(2, 12, 4), answers)
    assert row["first_token_ms"] == pytest.approx(600)
    assert row["prefill_tokens_per_second"] == pytest.approx(2 * 12 / 0.6)
    assert row["between_tokens_p50_ms"] == pytest.approx(100)
    assert row["between_tokens_p99_ms"] > 350
    assert row["tokens_per_second"] == pytest.approx(2 * 4 / 0.9)
    assert row["decode_step_ms"] == pytest.approx(100)
    assert row["decode_tokens_per_second"] == pytest.approx(2 / 0.1)


def test_one_token_has_no_time_between_tokens():
    row = measure(model(), Shape(1, 8, 1), "cpu", 1)
    assert "decode_tokens_per_second" not in row
    assert latency_table([row]).splitlines()[-1].split()[4:7] == ["-", "-", "-"]


def test_how_far_answers_agree():
    assert same_ids([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 3, 4], [5, 6, 0, 8]]) == 0.75
    assert same_ids([[1]], [[1]]) == 1.0
    with pytest.raises(ValueError, match="zip"):
        same_ids([[1, 2]], [[1]])


def _touch_fresh_memory() -> None:
    """128 MiB from the system, and back: an allocator may have as much at hand."""
    with mmap.mmap(-1, 128 * 2**20) as room:
        for page in range(0, len(room), mmap.PAGESIZE):
            room[page] = 1


def test_memory_is_that_of_the_work_and_not_of_what_was_before():
    """A peak that was is forgotten; a new one is seen."""
    _touch_fresh_memory()
    small, new = memory_of(lambda: None, "cpu"), memory_of(_touch_fresh_memory, "cpu")
    (name,) = small
    if name == "peak_process_since_start_bytes":
        assert new[name] >= 128 * 2**20
    else:
        assert new[name] - small[name] > 100 * 2**20


DENSE = {
    "experts": 0,
    "sinks": False,
    "window_layers": "none",
    "window": None,
    "mlp_bias": False,
    "attention_bias": False,
}
DENSE |= {"swiglu_alpha": None, "swiglu_limit": None}


def test_a_step_reads_the_weights_and_the_cache():
    network = model(**DENSE)
    config = network.config
    weights = 4 * (accounting.parameters(config) - config.vocab_size * config.width)
    weights += sum(buffer.nbytes for buffer in network.buffers())
    # Steps see 9, 10 and 11 keys.
    cache = 10 * accounting.kv_bytes_per_token(config, 4)
    assert step_bytes(network, Shape(1, 8, 4)) == pytest.approx(weights + cache)
    assert step_bytes(network, Shape(3, 8, 4)) == pytest.approx(weights + 3 * cache)
    tied = model(**DENSE, tied_embeddings=True)
    assert step_bytes(tied, Shape(1, 8, 4)) == pytest.approx(weights + cache)


def test_a_step_reads_the_experts_that_its_tokens_choose():
    network = model(active_experts=1, experts=4, sinks=False)
    one, two, many = (step_bytes(network, Shape(batch, 8, 2)) for batch in (1, 2, 200))
    of_experts = sum(p.nbytes for name, p in network.named_parameters() if ".experts." in name)
    cache = step_bytes(network, Shape(2, 8, 2)) - step_bytes(network, Shape(1, 8, 2)) - of_experts * (7 / 16 - 1 / 4)
    assert two - one == pytest.approx(of_experts * (7 / 16 - 1 / 4) + cache)
    assert many - one == pytest.approx(of_experts * 3 / 4 + 199 * cache)
    assert cache == pytest.approx(9 * accounting.kv_bytes_per_token(network.config, 4))


def test_a_window_bounds_what_is_read_of_the_cache():
    network = model(**DENSE | {"window": 4, "window_layers": "all"})
    assert step_bytes(network, Shape(1, 40, 8)) == step_bytes(network, Shape(1, 4, 8))
    assert step_bytes(model(**DENSE), Shape(1, 40, 8)) > step_bytes(network, Shape(1, 40, 8))


def test_prefill_counts_one_row_of_logits_a_prompt():
    network = model(**DENSE)
    D, V, T = network.config.width, network.config.vocab_size, 16
    whole = 2 * T * accounting.flops_per_token(network.config, T) / 3
    assert prefill_flops(network, Shape(2, T, 4)) == pytest.approx(whole - 2 * 2 * (T - 1) * D * V)


def test_shares_of_the_ceilings():
    best = Ceilings(copy_bytes_per_second=1e9, matmul_flops_per_second=1e10)
    found = shares({"first_token_ms": 10.0, "decode_step_ms": 2.0}, 1e6, 5e7, best)
    assert found["decode_share_of_copy"] == pytest.approx(0.5)
    assert found["prefill_share_of_matmul"] == pytest.approx(0.5)
    assert "decode_share_of_copy" not in shares({"first_token_ms": 10.0}, 1e6, 5e7, best)
