"""A run on the Triton kernels, interpreted on a CPU, learns what the references learn."""

from __future__ import annotations

import pytest
from tiny_run import losses, train, write_run

from grist_kernels import backend

pytest.importorskip("triton")


# A step of a layer takes the interpreter five seconds. Of two layers the first has a window.
@pytest.mark.parametrize(("document_masks", "layers"), [(False, 2), (True, 1)], ids=["one stream", "documents"])
def test_three_steps_have_the_losses_of_the_references(document_masks, layers, tmp_path, monkeypatch):
    stderr = {}
    for mode in ("reference", "triton"):
        monkeypatch.setenv("GRIST_KERNELS", mode)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if mode == "triton" else "0")
        folder = tmp_path / mode
        folder.mkdir()
        # The shared expert is what calls swiglu by itself; every other op is in any model.
        small = {"batch": {"global_size": 2}, "evaluate": {"max_tokens": 32}, "sample": {"prompts": []}}
        small |= {
            "data": {"document_masks": document_masks},
            "model": {"shared_expert_width": 16, "heads": 2, "kv_heads": 1, "layers": layers},
        }
        stderr[mode] = train(write_run(folder, steps=3, **small)).stderr
    for op in backend.TRITON_OPS:
        assert f"{op}: triton" in stderr["triton"]
    want, got = losses(tmp_path / "reference"), losses(tmp_path / "triton")
    assert sorted(got) == [1, 2, 3]
    assert want[3] < want[1]
    for step, loss in want.items():
        assert got[step] == pytest.approx(loss, rel=2e-5), f"step {step}"
