"""Where a number was measured: device, versions, date; and the JSON file it is written to."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any


def pick_device(name: str) -> str:
    """`auto` means CUDA, else MPS, else the CPU.

    Raises:
        ValueError: torch knows no such device, or this machine has none.
    """
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(kind for kind in ("cuda", "mps", "cpu") if present[kind])
    try:
        kind = torch.device(name).type
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; expected auto, cpu, mps, cuda or cuda:N") from None
    if not present.get(kind, False):
        raise ValueError(
            f"device {name!r} is not there; this machine has {', '.join(k for k in present if present[k])}"
        )
    return name


def device_name(device: str) -> str:
    """The name of a GPU, or of the processor."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return "Apple MPS" if device.startswith("mps") else processor_name()


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def provenance(device: str) -> dict[str, Any]:
    """Device, versions and date, as every JSON of results holds them."""
    packages = {name: _version(name) for name in ("gristmill", "torch", "triton", "numpy", "tokenizers")}
    return {
        "device": device_name(device),
        "versions": {**packages, "python": platform.python_version()},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:  # running from a checkout, or an optional package
        return None


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def write_json(report: dict[str, Any], path: Path) -> None:
    """Write under a temporary name in the same folder, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        partial.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
