"""What a compiled kernel takes and does, read from the machine code itself, and what of a budget that breaks.

NVIDIA's disassembler takes longer to start than to read a hundred kernels. So a build is first reduced to a Binary, wherever it
was made, and then all of an architecture are disassembled at once.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any

from grist_kernels.budget import Budget
from grist_kernels.launch import SHARED_MEMORY_BYTES

#         /*0080*/              @P0 LDG.E.128 R4, desc[UR4][R2.64] ;
_SASS = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
_MATRIX = re.compile(r"^(?:HMMA|IMMA|DMMA|QMMA|OMMA|[HIQB]GMMA|UTC\w*MMA)$")
_TMA_BITS = 128  # what a bulk copy counts as: its width is the hardware's own affair
_AMD_LOAD = re.compile(r"\b(?:global|buffer)_load_(?:lds_)?(ubyte|sbyte|ushort|sshort|short|dword(?:x[234])?)")
_AMD_BITS = {
    "ubyte": 8, "sbyte": 8, "ushort": 16, "sshort": 16, "short": 16,
    "dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128,
}  # fmt: skip


@dataclass(frozen=True)
class Binary:
    """A build, with its machine code: instructions as they are on NVIDIA, assembly text in UTF-8 on AMD."""

    architecture: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    code: bytes


@dataclass(frozen=True)
class BinaryReport:
    """What a build takes, and what its instructions are.

    registers: of a thread; on gfx942 vector registers, those for accumulation included.
    spilled_bytes: local (scratch) memory of a thread.
    shared_bytes: shared memory (LDS) of a program.
    load_bits: width of a global load instruction -> how many there are.
    matrix_instructions: how many instructions use the matrix units.
    serialized: Hopper's asynchronous products are each waited for before the next begins.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    load_bits: dict[int, int]
    matrix_instructions: int
    serialized: bool

    @property
    def widest_load(self) -> int:
        """Bits; 0 without loads."""
        return max(self.load_bits, default=0)

    @property
    def main_load(self) -> int:
        """Bits of the loads whose instructions, each counted once, fetch most together; 0 without loads."""
        return max(self.load_bits, key=lambda bits: (bits * self.load_bits[bits], bits), default=0)

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "widest_load": self.widest_load, "main_load": self.main_load}


def binary_of(compiled: Any, architecture: str) -> Binary:
    """Reduce Triton's CompiledKernel."""
    shared = compiled.metadata.shared
    if architecture.startswith("sm_"):
        cubin = compiled.asm["cubin"]
        return Binary(architecture, *_resource_usage(cubin), shared, b"".join(_text_sections(cubin)))
    text = compiled.asm["amdgcn"]
    scratch, spilled_registers = _amd_number(text, "private_segment_fixed_size"), _amd_number(text, "vgpr_spill_count")
    # A register spilled into an accumulation register takes no scratch memory, but is a spill all the same.
    # .vgpr_count includes .agpr_count from gfx90a on.
    spilled_bytes = max(scratch, 4 * spilled_registers)
    return Binary(architecture, _amd_number(text, "vgpr_count"), spilled_bytes, shared, text.encode())


def _resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of local memory) of a thread, as the driver will read them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = _output(knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name)
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump printed no resource usage, but: {text[:500]!r}")
    return int(usage[1]), int(usage[2]) + int(usage[3])


def _text_sections(elf: bytes) -> Iterator[bytes]:
    """The instructions of a 64-bit ELF file: its sections called .text.<function>."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    entry_bytes, count, names_index = struct.unpack_from("<HHH", elf, 0x3A)
    entries = [struct.unpack_from("<IIQQQQ", elf, table + i * entry_bytes) for i in range(count)]
    names = entries[names_index][4]
    for name, _, _, _, offset, n_bytes in entries:
        if elf.startswith(b".text.", names + name):
            yield elf[offset : offset + n_bytes]


def _amd_number(amdgcn: str, name: str) -> int:
    found = re.search(rf"\.{name}:\s+(\d+)", amdgcn)
    if found is None:
        raise RuntimeError(f"the assembly has no .{name} in its metadata")
    return int(found[1])


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def reports(binaries: Iterable[Binary]) -> list[BinaryReport]:
    """Read binaries of any architectures: a report for each, in their order."""
    binaries = list(binaries)
    found: dict[int, BinaryReport] = {}
    for architecture in {binary.architecture for binary in binaries}:
        places = [i for i, binary in enumerate(binaries) if binary.architecture == architecture]
        if architecture.startswith("sm_"):
            opcodes = _disassembled([binaries[i].code for i in places], architecture)
            found |= {i: _nvidia_report(binaries[i], names) for i, names in zip(places, opcodes, strict=True)}
        else:
            found |= {i: _amd_report(binaries[i]) for i in places}
    return [found[i] for i in range(len(binaries))]


def _disassembled(codes: list[bytes], architecture: str) -> list[list[str]]:
    """The opcodes of each code, by one call of the disassembler over all of them laid end to end."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        which = architecture.upper().replace("_", "")
        text = _output(knobs.nvidia.nvdisasm.path, "--binary", which, "--no-dataflow", file.name)
    ends = list(accumulate(len(code) for code in codes))
    found: list[list[str]] = [[] for _ in codes]
    for offset, opcode in _SASS.findall(text):
        found[bisect_right(ends, int(offset, 16))].append(opcode)
    if not all("EXIT" in opcodes for opcodes in found):
        raise RuntimeError(f"nvdisasm left out kernels, or their ends, of {len(codes)} for {which}: {text[:500]!r}")
    return found


def _nvidia_report(binary: Binary, opcodes: list[str]) -> BinaryReport:
    names = Counter(opcode.split(".")[0] for opcode in opcodes)
    products, waits = names["HGMMA"], sum(opcode.startswith("WARPGROUP.DEPBAR") for opcode in opcodes)
    return BinaryReport(
        binary.registers,
        binary.spilled_bytes,
        binary.shared_bytes,
        load_bits=dict(sorted(Counter(_load_bits(opcodes)).items())),
        matrix_instructions=sum(count for name, count in names.items() if _MATRIX.match(name)),
        serialized=products > 1 and waits >= products,
    )


def _load_bits(opcodes: list[str]) -> Iterator[int]:
    """A width is a part of its own, as in LDG.E.128, LDG.E.U16 and LDGSTS.E.BYPASS.LTC128B.128; without one it is 32."""
    for name, *parts in (opcode.split(".") for opcode in opcodes):
        if name == "UTMALDG":
            yield _TMA_BITS
        elif name in ("LDG", "LDGSTS"):
            yield next((int(part.lstrip("US")) for part in parts if re.fullmatch(r"[US](8|16)|64|128|256", part)), 32)


def _amd_report(binary: Binary) -> BinaryReport:
    text = binary.code.decode()
    loads = Counter(_AMD_BITS[kind] for kind in _AMD_LOAD.findall(text))
    return BinaryReport(
        binary.registers,
        binary.spilled_bytes,
        binary.shared_bytes,
        load_bits=dict(sorted(loads.items())),
        matrix_instructions=len(re.findall(r"\bv_s?mfmac?_", text)),
        serialized=False,
    )


def broken(found: BinaryReport, budget: Budget, architecture: str) -> list[str]:
    """What of a budget, and of the architecture's shared memory, a build breaks, as sentences; empty if nothing."""
    limit = SHARED_MEMORY_BYTES[architecture]
    problems = [
        (found.registers > budget.registers, f"{found.registers} registers, of {budget.registers}"),
        (found.spilled_bytes > budget.spilled_bytes, f"{found.spilled_bytes} bytes spilled, of {budget.spilled_bytes}"),
        (found.shared_bytes > limit, f"{found.shared_bytes} bytes of shared memory, of {limit}"),
        (budget.tensor_core and found.matrix_instructions == 0, "no tensor-core instruction"),
        (budget.tensor_core and found.serialized, "serialized tensor-core products: each waits for the one before"),
    ]
    if architecture.startswith("sm_"):
        widths = {"widest": found.widest_load, "main": found.main_load}
        problems += [
            (bits < budget.load_bits, f"{name} global loads of {bits} bits, not {budget.load_bits}")
            for name, bits in widths.items()
        ]
    return [text for wrong, text in problems if wrong]
