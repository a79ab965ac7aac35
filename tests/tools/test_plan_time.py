"""Predicted times: limits that must hold whatever is assumed, volumes as a trace counts them, and data sheets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from grist_model.accounting import flops_per_token
from grist_tools.plan_gpus import GPUS
from grist_tools.plan_layout import layout_of
from grist_tools.plan_links import Assumptions, Group, all_to_all_s, group, message_s, ring_s
from grist_tools.plan_time import forward_flops, muon_flops, projection_flops, ring_visits, step_time
from grist_train.config import EveryBlocks, TrainConfig, load
from grist_train.metrics import PEAK_FLOPS

RUNS = Path(__file__).parents[2] / "train" / "runs"
H100 = GPUS["h100"]
IDEAL = Assumptions(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 1.0)


def run(name: str, **overrides) -> TrainConfig:
    return load(RUNS / f"{name}.yaml", **overrides)


def test_peaks_are_those_that_training_reports():
    assert {gpu.device: gpu.peak_flops for gpu in GPUS.values()} == {
        gpu.device: PEAK_FLOPS[gpu.device] for gpu in GPUS.values()
    }


def test_groups_of_ranks():
    assert group(64, 1, 8) == Group(8, 8)
    assert group(8, 8, 8) == Group(1, 8)  # peers of the same experts: one a machine
    assert group(4, 2, 8) == Group(4, 1)
    assert group(2, 1, 8) == Group(2, 1)


def test_a_ring_inside_a_machine_moves_all_but_ones_own_part():
    assert ring_s(8e9, Group(8, 1), H100, IDEAL) == pytest.approx(7e9 / 450e9)
    assert ring_s(8e9, Group(1, 1), H100, IDEAL) == 0


def test_a_ring_over_machines_is_as_fast_as_their_cards():
    # 8 GB enter each machine but for its own eighth, over eight cards; over one card where one rank of it takes part.
    assert ring_s(8e9, Group(8, 8), H100, IDEAL) == pytest.approx(7e9 / 400e9)
    assert ring_s(8e9, Group(1, 8), H100, IDEAL) == pytest.approx(7e9 / 50e9)


def test_every_step_of_a_ring_has_its_latency():
    slow = replace(IDEAL, link_hop_s=1.0, network_hop_s=100.0)
    assert ring_s(0.0, Group(8, 4), H100, slow) == 28 * 1.0 + 3 * 100.0


def test_a_message_goes_as_fast_as_the_slowest_link_of_its_ring():
    assert message_s(9e9, Group(8, 1), H100, IDEAL) == pytest.approx(9 / 450)
    assert message_s(9e9, Group(8, 2), H100, IDEAL) == pytest.approx(9 / 50)
    assert message_s(9e9, Group(1, 1), H100, IDEAL) == 0


def test_an_exchange_keeps_ones_own_part():
    assert all_to_all_s(8e9, Group(8, 1), H100, IDEAL) == pytest.approx(7e9 / 450e9)
    assert all_to_all_s(16e9, Group(8, 2), H100, IDEAL) == pytest.approx(8e9 / 50e9)
    assert all_to_all_s(8e9, Group(1, 1), H100, IDEAL) == 0


@pytest.mark.parametrize("name", ["gpt_oss_20b", "moe_1b", "quickstart"])
def test_the_parts_of_the_flops_are_the_whole(name):
    model = run(name).model
    parts = forward_flops(model, 512)
    whole = parts.products + parts.experts + parts.attention + parts.head
    assert whole == pytest.approx(flops_per_token(model, 512) / 3)
    assert min(parts.products, parts.attention, parts.head) > 0


def test_one_ideal_gpu_is_bound_by_flops_alone():
    config = run("moe_1b", **{"optimizer.name": "adamw"})
    endless = replace(H100, memory_rate=float("inf"))
    time = step_time(config, layout_of(config, 1, 8), endless, IDEAL)
    tokens = config.batch.global_size * config.data.sequence_length
    assert time.total == pytest.approx(tokens * flops_per_token(config.model, 4096) / H100.peak_flops)
    assert time.bound_by == "compute"
    assert time.communication == 0


def test_recomputation_costs_a_forward_without_the_head():
    config = run("moe_1b")
    own = layout_of(config, 8, 8)
    endless = replace(H100, memory_rate=float("inf"))
    plain = step_time(config, own, endless, IDEAL).compute
    again = step_time(config, replace(own, activation_checkpointing="block"), endless, IDEAL).compute
    parts = forward_flops(config.model, 4096)
    blocks = parts.products + parts.experts + parts.attention
    assert again / plain == pytest.approx((4 * blocks + 3 * parts.head) / (3 * blocks + 3 * parts.head))


@pytest.mark.parametrize("experts", [64, 0])
def test_what_is_recomputed_costs_what_it_is(experts):
    """Some blocks in proportion; selective less than all, and in a dense model on a GPU nothing but attention."""
    config = run("moe_1b", **{"model.experts": experts})
    own = replace(layout_of(config, 8, 8), activation_checkpointing="none")
    endless = replace(H100, memory_rate=float("inf"))

    def more(kind) -> float:
        taken = step_time(config, replace(own, activation_checkpointing=kind), endless, IDEAL)
        return taken.compute - step_time(config, own, endless, IDEAL).compute

    assert more(EveryBlocks(1)) == pytest.approx(more("block"))
    assert more(EveryBlocks(2)) == pytest.approx(more("block") / 2)
    parts = forward_flops(config.model, config.data.sequence_length)
    again = parts.attention
    if config.model.experts:
        again += parts.experts + parts.products - projection_flops(config.model)
    blocks = parts.products + parts.experts + parts.attention
    assert more("selective") / more("block") == pytest.approx(again / blocks)
    assert 0 < more("selective") < more("block")


def test_keys_and_values_go_around_behind_attention():
    config = run("gpt_oss_20b", **{"batch.global_size": 64, "batch.micro_size": 1, "compute.expert_parallel": 1})
    own = layout_of(config, 8, 8)
    shared = replace(own, context_parallel=8, micro_batches=8 * own.micro_batches)
    slow = replace(H100, link_rate=H100.link_rate / 1e3)
    assert step_time(config, shared, H100, IDEAL).exchange < 0.01 * step_time(config, shared, H100, IDEAL).total
    assert step_time(config, shared, slow, IDEAL).exchange > step_time(config, own, slow, IDEAL).exchange == 0
    compute = [step_time(config, layout, H100, IDEAL).compute for layout in (own, shared)]
    assert compute[0] == pytest.approx(compute[1])


def test_a_window_ends_the_ring():
    assert ring_visits(4096, 8, None) == 8
    assert ring_visits(4096, 8, 128) == 3  # itself and, for the pieces before its two, a rank on either side
    assert ring_visits(4096, 1, None) == 1


def test_more_communication_is_never_faster():
    config = run("gpt_oss_20b")
    own = layout_of(config, 64, 8)
    both = [replace(own, reduce_every_micro_batch=every) for every in (False, True)]
    time = [step_time(config, layout, H100, Assumptions()) for layout in both]
    assert time[True].communication > time[False].communication
    assert time[True].total >= time[False].total
    kept = step_time(config, replace(own, reshard_after_forward=False), H100, Assumptions())
    assert kept.communication < step_time(config, own, H100, Assumptions()).communication
    slower = replace(H100, network_rate=H100.network_rate / 10)
    assert step_time(config, own, slower, Assumptions()).total > step_time(config, own, H100, Assumptions()).total


def test_a_token_takes_longer_on_more_gpus_with_the_same_batch():
    config = run("gpt_oss_20b", **{"batch.micro_size": 1})
    seconds = {}
    for gpus in (8, 64, 512):
        seconds[gpus] = step_time(config, layout_of(config, gpus, 8), H100, Assumptions()).total * gpus
    assert seconds[8] < seconds[64] < seconds[512]


def test_copies_gather_over_fewer_ranks():
    config = run("moe_1b", **{"batch.global_size": 512, "batch.micro_size": 1})
    plain = layout_of(config, 512, 8)
    copies = replace(plain, replicate=64)
    seconds = [step_time(config, layout, H100, Assumptions()).communication for layout in (plain, copies)]
    assert seconds[1] < seconds[0] / 2


def test_muon_multiplies_as_orthogonalize_does():
    from torch.utils.flop_counter import FlopCounterMode

    import grist_model
    from grist_train.muon import orthogonalize
    from grist_train.optimizer import roles

    config = run("quickstart", **{"model.layers": 1})
    with FlopCounterMode(display=False) as counter:
        for matrix in roles(grist_model.build(config.model, device="meta")).matrices:
            orthogonalize(matrix, 3)
    assert counter.get_total_flops() == muon_flops(config.model, 3)
