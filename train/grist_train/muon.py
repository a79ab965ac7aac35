"""Muon: momentum whose update is orthogonalised, for plain and for FSDP2-sharded matrices.

Sources: Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/); Liu et al. 2025, arXiv:2502.16982 (scale and weight
decay); Amsel et al. 2025, arXiv:2505.16932 ("Polar Express", the iteration's coefficients).

Shapes: a parameter is one matrix (rows, columns) or a stack of expert matrices (E, rows, columns).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Placement

# Odd quintics a x + b x^3 + c x^5, each the best for the interval the previous ones leave; the bound of the first is 1e-3, and
# all are damped by 1.01 so that rounding cannot push a singular value out of the interval (Polar Express, algorithm 1).
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
DAMPING = 1.01


def orthogonalize(matrix: torch.Tensor, iterations: int = 5) -> torch.Tensor:
    """Nearest semi-orthogonal matrix, approximately: U V^T of the singular value decomposition U S V^T.

    Args:
        matrix: (..., rows, columns), any float dtype. Computed in bfloat16 on CUDA (the iteration tolerates it), else in
            float32.
        iterations: 1 to 5.

    Returns:
        Same shape, float32; singular values near 1. A zero matrix stays zero.
    """
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    if x.ndim > 3:
        x = x.flatten(0, -3)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x.float(), keepdim=True) * DAMPING + 1e-7).to(x.dtype)
    for a, b, c in POLAR_EXPRESS[:iterations]:
        a, b, c = a / DAMPING, b / DAMPING**3, c / DAMPING**5
        gram = x @ x.mT
        polynomial = _add_product(gram, gram, gram, b, c)
        x = _add_product(x, polynomial, x, a, 1.0)
    return (x.mT if tall else x).float().view_as(matrix)


def _add_product(
    term: torch.Tensor, left: torch.Tensor, right: torch.Tensor, beta: float, alpha: float
) -> torch.Tensor:
    """beta * term + alpha * left @ right, the scaling and the sum inside the matrix product."""
    multiply = torch.addmm if term.ndim == 2 else torch.baddbmm
    return multiply(term, left, right, beta=beta, alpha=alpha)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, with decoupled weight decay.

    Args:
        params: Matrices (2-D) and stacks of matrices (3-D), plain or DTensor; of a stack the matrices may be sharded, their
            rows, or either over a mesh dimension of its own.
        lr: Learning rate; the update is scaled by 0.2 * sqrt(max(rows, columns)), the root mean square of AdamW's.
        momentum, weight_decay, iterations: See `OptimizerConfig`.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = 5,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        )
        for group in self.param_groups:
            for p in group["params"]:
                if p.ndim not in (2, 3):
                    raise ValueError(
                        f"Muon takes matrices or stacks of matrices, but got a parameter of shape {tuple(p.shape)}"
                    )
                if isinstance(p, DTensor) and not all(_keeps_rows(q, p.ndim) for q in p.placements):
                    raise ValueError(
                        f"Muon needs stacks sharded by matrix and matrices sharded by rows, but got {p.placements} of a "
                        f"parameter of shape {tuple(p.shape)}"
                    )

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient; none where `found_inf` is set and not 0 (step_guard.arm)."""
        loss = None if closure is None else closure()
        skip = getattr(self, "found_inf", None)
        applied = 1.0 if skip is None else 1.0 - skip
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            nesterov = [self._momentum(p, group["momentum"], skip) for p in params]
            updates = orthogonalize_all(params, nesterov, group["iterations"])
            for p, update in zip(params, updates, strict=True):
                scale = 0.2 * math.sqrt(max(p.shape[-2:]))
                local = _local(p)
                if group["weight_decay"]:
                    local.mul_(1.0 - applied * (group["lr"] * group["weight_decay"]))
                local.add_(update.to(local.dtype) * applied, alpha=-group["lr"] * scale)
        return loss

    def _momentum(self, p: torch.Tensor, momentum: float, skip: torch.Tensor | None) -> torch.Tensor:
        """Nesterov look-ahead of the averaged gradient: this rank's part of it. The average itself, unchanged, to skip."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        gradient, buffer = _local(p.grad), _local(state["momentum_buffer"])
        if skip is not None:
            gradient = torch.where(skip > 0, buffer, gradient)
        buffer.lerp_(gradient, 1.0 - momentum)
        return gradient.lerp(buffer, momentum)


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def orthogonalize_all(params: list[torch.Tensor], updates: list[torch.Tensor], iterations: int) -> list[torch.Tensor]:
    """Orthogonalise each parameter's update; takes and returns this rank's part of every update.

    A stack of expert matrices is usually sharded by expert, so each rank owns whole matrices and needs nobody. Matrices that
    are sharded by rows are grouped by shape and dealt out over the ranks: every rank gathers its own from all shards, works
    on them, and sends the parts back, so that no matrix is computed twice.
    """
    results: list[torch.Tensor | None] = [None] * len(params)
    whole: dict[tuple, list[int]] = defaultdict(list)
    in_rows: dict[tuple, list[int]] = defaultdict(list)
    for i, p in enumerate(params):
        group = _row_group(p)
        if group is None:
            whole[tuple(updates[i].shape)].append(i)
        else:
            in_rows[(group, tuple(p.shape[-2:]))].append(i)
    for members in whole.values():
        for i, result in zip(members, _batched([updates[i] for i in members], iterations), strict=True):
            results[i] = result
    for (group, (rows, _)), members in in_rows.items():
        stacks = [updates[i] if updates[i].ndim == 3 else updates[i][None] for i in members]
        done = iter(_dealt_out([matrix for stack in stacks for matrix in stack], rows, group, iterations))
        for i in members:
            results[i] = torch.stack([next(done) for _ in updates[i]]) if updates[i].ndim == 3 else next(done)
    return [r for r in results if r is not None]


def _keeps_rows(placement: Placement, ndim: int) -> bool:
    """Whether rows stay whole: a stack cut by matrix (by FSDP2's _StridedShard too, which is no Shard), or a cut into rows."""
    by_matrix = ndim == 3 and getattr(placement, "dim", None) == 0
    return placement.is_replicate() or by_matrix or placement.is_shard(ndim - 2)


def _row_group(p: torch.Tensor) -> dist.ProcessGroup | None:
    """The ranks that the rows of p's matrices are spread over; None when this rank has all rows of those it has."""
    if not isinstance(p, DTensor):
        return None
    dims = [i for i, placement in enumerate(p.placements) if placement.is_shard(p.ndim - 2)]
    if len(dims) > 1:
        raise ValueError(f"Muon supports rows sharded over one mesh dimension, but got {p.placements}")
    if not dims or p.device_mesh.size(dims[0]) == 1:
        return None
    return p.device_mesh.get_group(dims[0])


def _batched(updates: list[torch.Tensor], iterations: int) -> list[torch.Tensor]:
    """Equal shapes in one batched call: on small models the launches would otherwise cost more than the arithmetic."""
    if len(updates) == 1 or updates[0].numel() == 0:
        return [orthogonalize(u, iterations) if u.numel() else u for u in updates]
    return list(orthogonalize(torch.stack(updates), iterations).unbind(0))


def _dealt_out(shards: list[torch.Tensor], rows: int, group: dist.ProcessGroup, iterations: int) -> list[torch.Tensor]:
    """Row-sharded matrices of one shape: rank r orthogonalises every size-th of them, beginning with the r-th."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    columns = shards[0].shape[1]
    chunk = -(-rows // size)  # FSDP2 cuts as torch.chunk does: full chunks first, the last ones short or empty
    rows_of = [max(0, min(rows, (r + 1) * chunk) - r * chunk) for r in range(size)]
    mine = len(shards[rank::size])
    counts = [len(shards[r::size]) for r in range(size)]
    local_numel = rows_of[rank] * columns

    outgoing = torch.cat([shard.reshape(-1) for r in range(size) for shard in shards[r::size]])
    send = [count * local_numel for count in counts]
    receive = [mine * n * columns for n in rows_of]
    incoming = outgoing.new_empty(sum(receive))
    dist.all_to_all_single(incoming, outgoing, receive, send, group=group)

    back = torch.empty_like(incoming)
    if mine:
        parts = incoming.split(receive)
        whole = torch.cat([p.view(mine, n, columns) for p, n in zip(parts, rows_of, strict=True)], dim=1)
        done = orthogonalize(whole, iterations).to(incoming.dtype)
        back = torch.cat([part.reshape(-1) for part in done.split(rows_of, dim=1)])
    returned = torch.empty_like(outgoing)
    dist.all_to_all_single(returned, back, send, receive, group=group)

    results: list[torch.Tensor] = [shards[0]] * len(shards)
    for r, part in enumerate(returned.split(send)):
        for k, piece in enumerate(part.view(counts[r], rows_of[rank], columns)):
            results[r + k * size] = piece
    return results
