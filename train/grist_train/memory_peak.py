"""The most memory that a rank has held."""

from __future__ import annotations

import sys

import torch

GIB = 2**30


def memory_peak(device: torch.device) -> dict[str, float]:
    """Peaks in GiB of this process; waits for nothing.

    CUDA: `memory_allocated_gib`, held by tensors, and `memory_reserved_gib`, taken from the device, since the last call.
    Elsewhere `memory_resident_gib`, of the whole process since it began: what MPS allocates is not in it.
    """
    if device.type == "cuda":
        allocated, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"memory_allocated_gib": round(allocated / GIB, 4), "memory_reserved_gib": round(reserved / GIB, 4)}
    import resource  # not on Windows, where nothing of ours runs

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    return {"memory_resident_gib": round(peak_bytes / GIB, 4)}
