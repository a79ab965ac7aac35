from __future__ import annotations

import pytest
from tiny_house import portable


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A portable directory; a test must not write into it."""
    return portable(tmp_path_factory.mktemp("house") / "model")
