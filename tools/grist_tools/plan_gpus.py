"""The GPUs that a run is planned for: one table, from the vendors' data sheets. Needs no torch, so that --help is quick.

All rates are of one GPU, in one direction, as on the sheet; what of them is reached is an assumption (plan_time.py).

    memory     what torch reports as total memory (the sheet's figure less what the driver keeps)
    peak       dense bfloat16, as in grist_train.metrics.PEAK_FLOPS; a test holds the two against each other
    link       to the other GPUs of the machine: half of what the sheets call NVLink or Infinity Fabric bandwidth, which counts
               both directions; PCI Express where there is neither
    network    a GPU's share of the machine's network cards in the vendor's own eight-GPU system, or as said

A100      NVIDIA A100 80GB SXM data sheet (2.0 TB/s, NVLink 600 GB/s); DGX A100: eight 200 Gb/s cards
H100      NVIDIA H100 SXM data sheet (3.35 TB/s, NVLink 900 GB/s); DGX H100: eight 400 Gb/s ConnectX-7
H200      NVIDIA H200 SXM data sheet (4.8 TB/s, NVLink 900 GB/s); DGX H200: eight 400 Gb/s ConnectX-7
B200      NVIDIA DGX B200 data sheet and user guide (8 TB/s, NVLink 1.8 TB/s a GPU; eight 400 Gb/s ConnectX-7)
MI300X    AMD Instinct MI300X data sheet (5.3 TB/s, seven links of 128 GB/s); 400 Gb/s a GPU assumed
L40S      NVIDIA L40S data sheet (864 GB/s, PCIe 4.0 x16); 100 Gb/s a GPU assumed
RTX 4090  NVIDIA Ada whitepaper (1,008 GB/s, PCIe 4.0 x16); 25 Gb/s a GPU assumed
"""

from __future__ import annotations

import os
from dataclasses import dataclass

GB, GIB, TERA = 1e9, 2**30, 1e12


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        device: Its name in grist_train.metrics.PEAK_FLOPS.
        architecture, processors: What Triton compiles for, and multiprocessors or compute units. None is a CPU.
        memory_bytes, peak_flops, memory_rate, link_rate, network_rate: See the table above; rates in bytes a second.
    """

    device: str
    architecture: str | None
    processors: int
    memory_bytes: float
    peak_flops: float
    memory_rate: float
    link_rate: float
    network_rate: float


GPUS = {
    "a100": Gpu("A100", "sm_80", 108, 79.2 * GIB, 312 * TERA, 2039 * GB, 300 * GB, 25 * GB),
    "h100": Gpu("H100", "sm_90", 132, 79.1 * GIB, 989 * TERA, 3350 * GB, 450 * GB, 50 * GB),
    "h200": Gpu("H200", "sm_90", 132, 139.7 * GIB, 989 * TERA, 4800 * GB, 450 * GB, 50 * GB),
    "b200": Gpu("B200", "sm_100", 148, 178.3 * GIB, 2250 * TERA, 8000 * GB, 900 * GB, 50 * GB),
    "mi300x": Gpu("MI300X", "gfx942", 304, 191.5 * GIB, 1307 * TERA, 5300 * GB, 448 * GB, 50 * GB),
    "l40s": Gpu("L40S", "sm_89", 142, 44.4 * GIB, 362 * TERA, 864 * GB, 32 * GB, 12.5 * GB),
    "rtx4090": Gpu("RTX 4090", "sm_89", 128, 23.6 * GIB, 165 * TERA, 1008 * GB, 32 * GB, 3.1 * GB),
}
NAMES = (*GPUS, "cpu")


def this_cpu(processes: int) -> Gpu:
    """One of so many processes on this machine: its share of the memory, and of a matrix product measured now.

    10 GB/s of memory bandwidth and 1 GB/s between processes are assumed for each.
    """
    import torch

    from grist_train.metrics import peak_flops

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    measured, _ = peak_flops(torch.device("cpu"))
    return Gpu("CPU", None, 0, memory / processes, measured, 10 * GB, 1 * GB, 1 * GB)
