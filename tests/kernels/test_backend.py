"""Who decides which implementation runs, and what it says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from assertions import assert_close

import grist_kernels
from grist_kernels import OPS, backend
from grist_kernels.cases import run

PACKAGE = Path(grist_kernels.__file__).parent


def _python(code: str, value: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"GRIST_KERNELS": value, "PYTHONPATH": str(PACKAGE.parent)}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


def test_a_typo_says_what_was_expected():
    result = _python("import grist_kernels", "tritn")
    assert result.returncode != 0
    assert "GRIST_KERNELS must be one of auto, triton or reference, but is 'tritn'" in result.stderr


def test_no_triton_and_no_gpu_are_needed():
    code = """
import importlib.util, sys
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "triton" else real(name, *rest)
sys.modules["triton"] = None  # importing it fails
import torch
torch.cuda.is_available = lambda: False
from grist_kernels import OPS, attention, decode_attention, describe, grouped_matmul, linear_cross_entropy, moe
from grist_kernels import rms_norm, rope, swiglu
print(sorted(set(describe("cpu").values())), sorted(set(describe("cuda").values())))
print(rms_norm(torch.ones(2, 8), torch.ones(8)).sum().item())
"""
    result = _python(code, "auto")
    assert result.returncode == 0, result.stderr
    assert "triton" not in result.stdout
    assert result.stdout.strip().splitlines()[-1].startswith("15.99")


def test_the_environment_is_obeyed():
    result = _python("import grist_kernels; print(sorted(set(grist_kernels.describe('cpu').values())))", "reference")
    assert result.stdout.strip() == "['reference']", result.stderr


def test_the_environment_is_read_where_choices_are_made():
    """GRIST_KERNELS in backend.py, GRIST_NATIVE in native/, and there the compiler and the user's cache."""
    readers = [path for path in PACKAGE.rglob("*.py") if "environ" in path.read_text(encoding="utf-8")]
    names = {path.relative_to(PACKAGE).as_posix() for path in readers}
    assert names == {"backend.py", "native/__init__.py", "native/build.py"}


def test_describe_names_every_op():
    for device in ("cpu", "cuda", "mps"):
        described = grist_kernels.describe(device)
        assert set(described) == set(OPS)
        assert set(described.values()) <= {"triton", "pytorch", "reference"}
    assert "triton" not in grist_kernels.describe("cpu").values()


def test_an_op_without_a_kernel_says_so_once(monkeypatch):
    monkeypatch.setattr(backend, "TRITON_OPS", frozenset({"rope"}))
    monkeypatch.setattr(backend, "INTERPRETING", True)
    monkeypatch.setattr(backend, "_said", set())
    x, w = torch.randn(2, 8), torch.ones(8)
    with backend.using("triton"):
        with pytest.warns(RuntimeWarning, match=r"rms_norm has no Triton kernel yet .* \(ops that have one: rope\)"):
            grist_kernels.rms_norm(x, w)
        assert backend.implementation("rope", "cpu") == "triton"
        assert backend.implementation("rms_norm", "cpu") == "pytorch"


def test_triton_never_falls_back_silently(monkeypatch):
    monkeypatch.setattr(backend, "TRITON_OPS", frozenset({"rms_norm"}))
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    monkeypatch.setattr(backend, "INTERPRETING", False)
    x, w = torch.randn(2, 8), torch.ones(8)
    with backend.using("triton"):
        with pytest.raises(RuntimeError, match="rms_norm was called on a cpu tensor and Triton needs a GPU"):
            grist_kernels.rms_norm(x, w)
        monkeypatch.setattr(backend, "INTERPRETING", True)
        with pytest.raises(RuntimeError, match=r"takes float32, bfloat16 and float16, but got torch\.float64"):
            grist_kernels.rms_norm(x.double(), w.double())
        with pytest.raises(RuntimeError, match="rows of at most 16384 columns"):
            grist_kernels.rms_norm(torch.zeros(2, 16385), torch.zeros(16385))
        monkeypatch.setattr(backend, "TRITON_INSTALLED", False)
        with pytest.raises(RuntimeError, match="triton is not installed"):
            grist_kernels.rms_norm(x, w)


def test_auto_takes_triton_on_cuda_only(monkeypatch):
    monkeypatch.setattr(backend, "TRITON_OPS", frozenset({"rope"}))
    monkeypatch.setattr(backend, "TRITON_INSTALLED", True)
    assert backend.implementation("rope", "cuda") == "triton"
    assert backend.implementation("rope", "cpu") != "triton"
    assert backend.implementation("rope", "mps") != "triton"
    monkeypatch.setattr(backend, "TRITON_INSTALLED", False)
    assert backend.implementation("rope", "cuda") != "triton"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", OPS)
def test_every_door_leads_to_its_triton_kernel(name, compiled, monkeypatch, tmp_path):
    """A file <op>/triton_kernel.py is all that a new kernel needs: same name, same arguments."""
    op, case = OPS[name], OPS[name].cases[0]
    (tmp_path / "triton_kernel.py").write_text(f"from grist_kernels.{name}.reference import {name}\n", encoding="utf-8")
    monkeypatch.setattr(op_module(name), "__path__", [str(tmp_path)])
    module = f"grist_kernels.{name}.triton_kernel"
    monkeypatch.setitem(sys.modules, module, None)  # so that what is there now, if only nothing, comes back afterwards
    del sys.modules[module]
    monkeypatch.setattr(op_module(name), "triton_kernel", None, raising=False)  # the import below sets it too
    monkeypatch.setattr(backend, "TRITON_OPS", frozenset({name}))
    monkeypatch.setattr(op_module(name), "reference", None)  # whoever takes another way stumbles
    torch._dynamo.reset()
    door = torch.compile(op.door, fullgraph=True, backend="eager") if compiled else op.door
    arguments = case.arguments(torch.float32)
    with backend.using("triton"):
        got = run(door, arguments, ())
    for key, value in run(op.reference, arguments, ()).items():
        assert_close(key, got[key], value, atol=1e-6)


def op_module(name: str) -> ModuleType:
    """The module of an op's folder; the package's attribute of that name is the door."""
    return sys.modules[f"grist_kernels.{name}"]


def _fail_under(mode: str) -> None:
    with backend.using(mode):
        assert backend.mode() == mode
        raise ZeroDivisionError


def test_using_restores_the_mode():
    before = backend.mode()
    with pytest.raises(ZeroDivisionError):
        _fail_under("reference")
    assert backend.mode() == before
    with pytest.raises(ValueError, match="must be one of auto, triton or reference"), backend.using("fast"):
        pass
