"""Muon: updates are orthogonal, and the first steps are the ones its definition gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from grist_train import distributed
from grist_train.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16), (3, 24, 40), (2, 3, 40, 24), (1, 7)])
def test_singular_values_are_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    assert values.min() > 0.8
    assert values.max() < 1.2


def test_keeps_the_singular_vectors():
    matrix = torch.randn(24, 40, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    core = u.mT @ orthogonalize(matrix) @ vh.mT
    assert (core - torch.diag(core.diagonal())).abs().max() < 1e-4


@pytest.mark.parametrize("scale", [1e-12, 1e6])
def test_scale_does_not_matter(scale):
    matrix = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))
    if scale < 1e-7:  # below the guard against division by zero the result shrinks, but must stay finite
        assert torch.isfinite(orthogonalize(matrix * scale)).all()
    else:
        torch.testing.assert_close(orthogonalize(matrix * scale), orthogonalize(matrix), rtol=1e-3, atol=1e-4)


def test_zero_matrix_stays_zero():
    assert not orthogonalize(torch.zeros(4, 6)).any()


def test_first_step_is_the_orthogonal_gradient_scaled_like_adamw():
    p = torch.nn.Parameter(torch.randn(12, 20, generator=torch.Generator().manual_seed(3)))
    before = p.detach().clone()
    p.grad = torch.randn(12, 20, generator=torch.Generator().manual_seed(4))
    Muon([p], lr=0.1, momentum=0.9, weight_decay=0.5).step()
    expected = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * math.sqrt(20) * orthogonalize(p.grad)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)


def test_stack_of_experts_equals_each_alone():
    stack = torch.randn(4, 10, 6, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        orthogonalize(stack), torch.stack([orthogonalize(m) for m in stack]), rtol=1e-4, atol=1e-5
    )


def test_vector_is_refused():
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        Muon([torch.nn.Parameter(torch.zeros(5))], lr=0.1)


def test_columns_on_different_ranks_are_refused():
    distributed.start("cpu", threads=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for shape, cut in (((4, 6), 1), ((3, 4, 6), 2)):
            with pytest.raises(ValueError, match="matrices sharded by rows"):
                Muon([torch.nn.Parameter(distribute_tensor(torch.zeros(shape), mesh, [Shard(cut)]))], lr=0.1)
        for cut in (0, 1):
            Muon([torch.nn.Parameter(distribute_tensor(torch.zeros(3, 4, 6), mesh, [Shard(cut)]))], lr=0.1)
    finally:
        distributed.stop()
