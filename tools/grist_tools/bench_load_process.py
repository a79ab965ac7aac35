"""One measurement of bench_load.py, in a process of its own: what loading a directory adds to the memory it holds.

    python -m grist_tools.bench_load_process load DIR --dtype float32

Several processes of `load_into` find each other through torchrun's environment variables.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from grist_tools.console import parser_for, run

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def parser() -> argparse.ArgumentParser:
    parser = parser_for("bench_load_process", __doc__)
    parser.add_argument("how", choices=["load", "load_into"])
    parser.add_argument("directory", metavar="DIR")
    parser.add_argument("--dtype", choices=["stored", "float32", "bfloat16"], default="stored")
    return parser


def resident_bytes(key: str) -> int:
    """VmRSS: what this process holds in memory now, mapped files included. VmHWM: the most since the last reset."""
    found = re.search(rf"^{key}:\s+(\d+) kB", STATUS.read_text(), flags=re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def measure(how: str, directory: str, dtype: str) -> dict[str, Any]:
    """Bytes of the weights that this process holds in the end, the most that it held beside what it began with, and seconds.

    Raises OSError where the system does not keep the figures (they are Linux's).
    """
    import torch

    import grist_model
    from grist_model.local_part import local_part

    kind = None if dtype == "stored" else getattr(torch, dtype)
    if how == "load_into":
        prepare, finish = _sharded()
    else:
        prepare, finish = None, lambda: None
    grist_model.build(
        grist_model.ModelConfig(layers=1, width=8, heads=2, kv_heads=1, experts=0)
    )  # imports what is needed
    RESET.write_text("5")  # VmHWM begins anew: proc(5)
    before, started = resident_bytes("VmRSS"), time.perf_counter()
    if prepare is None:
        model = grist_model.load(directory, dtype=kind)
    else:
        model = prepare(grist_model.config_of(directory), kind)
        grist_model.load_into(model, directory)
    seconds = time.perf_counter() - started
    peak = resident_bytes("VmHWM") - before
    held = sum(part.numel() * part.element_size() for part, _ in map(local_part, model.state_dict().values()))
    finish()
    return {"held_bytes": held, "peak_bytes": peak, "peak_of_held": peak / held, "seconds": seconds}


def _sharded():
    """(config, dtype -> a model with storage, sharded over all processes where there are several; what to do in the end)."""
    import torch

    import grist_model

    world = None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from grist_train.config import ComputeConfig
        from grist_train.distributed import shard, start, stop

        world = start("cpu", threads=1)

    def prepare(config, kind: torch.dtype | None):
        model = grist_model.build(config, device="meta", dtype=kind)
        if world is not None:
            shard(model, world, ComputeConfig())
        return model.to_empty(device="cpu")

    return prepare, stop if world is not None else (lambda: None)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if not RESET.exists():
        print(f"this system has no {RESET}: peaks of memory are measured on Linux", file=sys.stderr)
        return 2
    print(json.dumps(measure(options.how, options.directory, options.dtype)))
    return 0


if __name__ == "__main__":
    run(main)
