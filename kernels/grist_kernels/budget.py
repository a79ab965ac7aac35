"""What the compiled code of a kernel may take. Stated in an op's triton_kernel.py, checked by grist_tools.kernel_builds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Limits for every build of one kernel: each architecture, type and size of the launch table.

    registers: at most this many a thread. 255 is all that NVIDIA has; on gfx942 accumulation registers are included.
    spilled_bytes: at most this much local (scratch) memory a thread, in 16-bit types.
    float32_spilled_bytes: the same in float32, whose rows and products take twice the registers and more.
    load_bits: on NVIDIA, the widest global loads, and those that fetch most of the bytes, are at least this wide: 128 is a
        vector of 16 bytes. It is asked of aligned sizes, which are those of the table.
    tensor_core: in 16-bit types the matrix units must be used, and no product may wait for the one before it.

    Shared memory has no budget of its own: what an architecture has (launch.SHARED_MEMORY_BYTES) is the limit.
    """

    registers: int = 255
    spilled_bytes: int = 0
    float32_spilled_bytes: int = 0
    load_bits: int = 128
    tensor_core: bool = False
