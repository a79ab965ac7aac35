"""One process, or several under torchrun that share the rows."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator

# A task of one rank may take hours while the others wait.
_PATIENCE = datetime.timedelta(hours=24)


@contextlib.contextmanager
def process_group(device: str) -> Iterator[tuple[int, int, str]]:
    """-> (rank, world size, device of this rank), in a process group where torchrun started several, else alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1, device
        return
    import torch
    import torch.distributed as dist

    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # gloo everywhere: only results are exchanged, from the host.
    dist.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield dist.get_rank(), dist.get_world_size(), device
    finally:
        dist.destroy_process_group()
