from __future__ import annotations

import subprocess
import sys

import pytest

import grist_model
import grist_model.generate  # binds the submodule's name in the package, unless the function was there before


def test_import_is_quick_because_it_loads_no_torch():
    program = f"import sys; sys.path[:0] = {sys.path!r}; import grist_model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_every_public_name_is_there_and_generate_is_the_function():
    for name in grist_model.__all__:
        assert getattr(grist_model, name) is not None
    assert callable(grist_model.generate)
    with pytest.raises(AttributeError, match="no attribute 'train'"):
        _ = grist_model.train  # pyright: ignore[reportAttributeAccessIssue]
