"""Every row of the launch tables compiles for every architecture, within its kernel's budget; no GPU is needed.

Whatever compiles runs in a process of its own: here, Triton interprets.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grist_kernels import OPS, backend, launch
from grist_kernels.budget import Budget
from grist_kernels.rms_norm import cases as rms_norm_cases
from grist_tools import kernel_builds, kernel_builds_section

pytest.importorskip("triton", reason="builds are Triton's")

from grist_tools import kernel_recorder
from grist_tools.binary_report import BinaryReport, broken
from grist_tools.kernel_recorder import GPUS

TABLES = [op for op in OPS if launch.table_path(op).exists()]
NVIDIA = [architecture for architecture in launch.ARCHITECTURES if architecture.startswith("sm_")]
AMD = [architecture for architecture in launch.ARCHITECTURES if not architecture.startswith("sm_")]


def compiling(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, check=False)


# What the tables build.


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("builds") / "builds.json"
    done = compiling("-m", "grist_tools.kernel_builds", "--json", str(path))
    assert done.returncode in (0, 1), done.stderr[-3000:]
    assert path.exists(), done.stderr[-3000:]
    found = json.loads(path.read_text(encoding="utf-8"))
    assert done.returncode == any(build["broken"] for build in found["builds"])
    return found


@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
@pytest.mark.parametrize("op", TABLES)
def test_every_row_builds_within_its_budget(report, op, architecture):
    builds = [build for build in report["builds"] if (build["op"], build["architecture"]) == (op, architecture)]
    built = {(build["kernel"], use["dtype"], use["size"]) for build in builds for use in build["used_by"]}
    # Rows of their own for narrow windows launch the same kernels.
    rows = {
        (row["kernel"].removesuffix("_window"), row["dtype"], row["size"])
        for row in launch.table(op)
        if row["architecture"] == architecture
    }
    assert rows
    assert rows <= built
    over = [f"{kernel_builds.build_text(build)}: {'; '.join(build['broken'])}" for build in builds if build["broken"]]
    assert not over, "\n".join(over)


def test_the_readme_says_what_was_built(report):
    section, version = kernel_builds_section.written(kernel_builds_section.README.read_text(encoding="utf-8"))
    if version != report["triton"]:
        pytest.skip(f"kernels/README.md has the builds of triton {version}, and this is {report['triton']}")
    assert section == kernel_builds_section.section(report), (
        "renew it: python -m grist_tools.kernel_builds --write-readme"
    )


# The instrument itself, on kernels that are known to be good or bad.


@pytest.fixture(scope="module")
def instrument() -> dict[str, Any]:
    done = compiling(str(Path(__file__).with_name("kernels_to_build.py")))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found(instrument) -> dict[tuple[str, str], BinaryReport]:
    """(kernel, architecture) -> report."""
    derived = ("widest_load", "main_load")
    return {
        (name, architecture): BinaryReport(
            **{key: value for key, value in fields.items() if key not in (*derived, "load_bits")},
            load_bits={int(bits): count for bits, count in fields["load_bits"].items()},
        )
        for name, architecture, fields in instrument["reports"]
    }


@pytest.mark.parametrize("architecture", NVIDIA)
def test_narrow_loads_are_seen(found, architecture):
    assert broken(found["wide", architecture], Budget(), architecture) == []
    narrow = found["narrow", architecture]
    assert set(narrow.load_bits) == {8}
    wanted = ["widest global loads of 8 bits, not 128", "main global loads of 8 bits, not 128"]
    assert broken(narrow, Budget(), architecture) == wanted


def test_the_width_of_amd_loads_is_read(found):
    for architecture in AMD:
        assert found["fits", architecture].main_load == 128
        assert found["narrow", architecture].widest_load == 8


@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_spills_are_seen(found, architecture):
    assert broken(found["fits", architecture], Budget(), architecture) == []
    assert found["spills", architecture].spilled_bytes > 256
    assert any("bytes spilled" in text for text in broken(found["spills", architecture], Budget(), architecture))


@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_tensor_cores_are_seen(found, architecture):
    budget = Budget(tensor_core=True)
    assert found["product", architecture].matrix_instructions >= 4
    assert broken(found["product", architecture], budget, architecture) == []
    assert found["wide", architecture].matrix_instructions == 0
    assert broken(found["wide", architecture], budget, architecture) == ["no tensor-core instruction"]


def test_serialized_products_are_seen(found):
    assert not found["product", "sm_90"].serialized
    assert found["serialized", "sm_90"].serialized
    assert any("serialized" in text for text in broken(found["serialized", "sm_90"], Budget(tensor_core=True), "sm_90"))
    assert not found["serialized", "sm_80"].serialized  # its products are not asynchronous


@pytest.mark.parametrize("architecture", launch.ARCHITECTURES)
def test_too_much_shared_memory_is_seen(found, architecture):
    needs = found["too_much_shared", architecture].shared_bytes
    assert needs > launch.SHARED_MEMORY_BYTES[architecture]
    text = f"{needs} bytes of shared memory, of {launch.SHARED_MEMORY_BYTES[architecture]}"
    assert text in broken(found["too_much_shared", architecture], Budget(), architecture)


def test_registers_are_counted(found):
    few, many = found["wide", "sm_90"], found["product", "sm_90"]
    assert few.registers < 32 < 64 < many.registers
    assert broken(many, Budget(registers=64), "sm_90") == [f"{many.registers} registers, of 64"]


def test_the_main_loads_are_those_that_fetch_most():
    report = BinaryReport(32, 0, 0, {16: 40, 64: 4, 128: 4}, 0, False)
    assert report.widest_load == 128
    assert report.main_load == 16  # 640 bits, against 256 and 512
    assert BinaryReport(32, 0, 0, {}, 0, False).main_load == 0


def test_a_launch_is_specialised_as_the_compiler_would(instrument):
    arguments = instrument["arguments"]
    constant = ("nothing", "one", "BLOCK")
    assert [name for name, kind in arguments["signature"].items() if kind == "constexpr"] == list(constant)
    types = {name: kind for name, kind in arguments["signature"].items() if name not in constant}
    assert types == {
        "x_ptr": "*bf16", "out_ptr": "*fp32", "sixteen": "i32", "seventeen": "i32", "long": "i64", "c": "i32",
        "scale": "fp32", "flag": "u1",
    }  # fmt: skip
    assert arguments["constants"] == [[2, None], [3, 1], [10, 16]]
    assert arguments["divisible"] == [0, 1, 4, 6]  # both tensors, 16 and 2**31; c is 16, but not to be specialised
    assert arguments["options"] == {"num_warps": 2}


# The recorder and the command, without a compiler.


def test_a_recording_launches_nothing_and_ends(monkeypatch):
    def launched(*arguments, **constants):
        pytest.fail("a kernel was launched")

    monkeypatch.setattr(launch, "run", launched)
    case = rms_norm_cases.at_size(64, 32)[0]
    launches, rows = kernel_recorder.record("rms_norm", case, torch.bfloat16, GPUS["sm_80"])
    assert {"forward", "backward"} <= {launch.name for launch in launches}
    assert rows == {("forward", 64), ("backward", 64)}
    assert launch.run is launched
    with kernel_recorder.recorded() as nothing:
        launch.run(None, (0, 1), torch.device("meta"))
    assert nothing == []  # an empty grid is no launch
    with pytest.raises(KeyError), kernel_recorder.recorded():
        raise KeyError
    assert launch.run is launched


@pytest.mark.skipif(not backend.INTERPRETING, reason="needs TRITON_INTERPRET=1")
def test_interpreted_kernels_cannot_be_built(capsys):
    case = rms_norm_cases.at_size(64, 32)[0]
    launches, _ = kernel_recorder.record("rms_norm", case, torch.float32, GPUS["sm_80"])
    with pytest.raises(ValueError, match="TRITON_INTERPRET=0"):
        kernel_recorder.build_of(launches[0], "sm_80")
    assert kernel_builds.main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_a_table_that_is_not_covered_is_refused(monkeypatch):
    monkeypatch.setattr(kernel_recorder, "build_of", lambda launched, architecture: (launched.name, architecture))
    row = {
        "kernel": "forward",
        "architecture": "sm_90",
        "dtype": "float32",
        "size": 64,
        "config": {},
        "source": "formula",
    }
    monkeypatch.setattr(launch, "table", lambda op: [row])
    assert next(iter(kernel_builds.plan("rms_norm"))) == ("forward", "sm_90")
    monkeypatch.setattr(launch, "table", lambda op: [row, {**row, "kernel": "sideways"}])
    with pytest.raises(ValueError, match=r"no call of rms_norm.cases.at_size\(64, 64\) reads the rows \['sideways'\]"):
        kernel_builds.plan("rms_norm")
    monkeypatch.setattr(launch, "table", lambda op: [])
    with pytest.raises(ValueError, match="has no rows"):
        kernel_builds.plan("rms_norm")


def test_a_budget_for_an_unknown_kernel_is_refused(monkeypatch):
    module = backend.triton_kernel("rms_norm")
    monkeypatch.setattr(module, "BUDGETS", {"sideways": Budget()}, raising=False)
    with pytest.raises(ValueError, match=r"BUDGETS names \['sideways'\]"):
        kernel_builds.budgets("rms_norm", {"forward", "backward"})
    assert kernel_builds.budgets("rms_norm", {"forward", "sideways"}) == {"sideways": Budget()}


def invented(broken: list[str]) -> dict[str, Any]:
    figures = {"registers": 40, "spilled_bytes": 0, "shared_bytes": 64, "widest_load": 128, "main_load": 64}
    used_by = [{"dtype": "float32", "size": 64, "case": "width_64"}]
    key = {"op": "rms_norm", "kernel": "forward", "architecture": "sm_90", "used_by": used_by}
    return {"what": "kernel builds", "triton": "3.7.1", "builds": [{**key, **figures, "broken": broken}]}


@pytest.mark.parametrize("broken", [[], ["41 registers, of 40"]])
def test_the_status_tells_whether_a_budget_broke(monkeypatch, capsys, broken):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(kernel_builds, "results", lambda ops: invented(broken))
    assert kernel_builds.main([]) == len(broken)
    shown = capsys.readouterr().out
    assert ("BROKEN rms_norm forward sm_90 float32 64: 41 registers, of 40" in shown) == bool(broken)


def test_the_readme_section_is_replaced_and_found(monkeypatch):
    text = "before\n<!-- kernel_builds: begin -->\nold\n<!-- kernel_builds: end -->\nafter\n"
    new = kernel_builds_section.section(invented([]))
    assert "| rms_norm forward | 1 | 40 / 0 / 64 / 64 |" in new
    replaced = kernel_builds_section.replaced(text, new)
    assert replaced.startswith("before\n")
    assert replaced.endswith("\nafter\n")
    assert kernel_builds_section.written(replaced) == (new, "3.7.1")
    with pytest.raises(ValueError, match="has no lines"):
        kernel_builds_section.replaced("no markers", new)
    with pytest.raises(ValueError, match="has no table"):
        kernel_builds_section.written(text)


def test_wrong_options_are_refused(monkeypatch, capsys):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert kernel_builds.main(["--ops", "sideways"]) == 2
    assert "no launch table for sideways" in capsys.readouterr().err
    assert kernel_builds.main(["--ops", "rms_norm", "--write-readme"]) == 2
    assert "leave --ops out" in capsys.readouterr().err
