from __future__ import annotations

import pytest
import tiny_house


@pytest.fixture(scope="session")
def dataset_directory(tmp_path_factory):
    """A prepared dataset; a test must not write into it."""
    return tiny_house.dataset(tmp_path_factory.mktemp("house") / "dataset", val_fraction=0.3)


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory):
    """A portable directory with the dataset's tokenizer; a test must not write into it."""
    return tiny_house.portable(tmp_path_factory.mktemp("house") / "model")
