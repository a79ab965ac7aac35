"""Records: what was written comes back, and any byte that is wrong is noticed."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest

from grist_data.record_file import read_facts, read_record, write_record

FACTS = {"name": "小麦", "numbers": [1, 2.5, None]}
ARRAYS = {
    "tokens": np.arange(7, dtype=np.uint16),
    "empty": np.zeros((0, 16), np.uint8),
    "flags": np.array([True, False]),
    "rows": np.arange(6, dtype="<u8").reshape(2, 3),
    "strided": np.arange(20, dtype=np.uint32)[::3],
}


@pytest.fixture
def record(tmp_path):
    write_record(tmp_path / "a.rec", FACTS, ARRAYS)
    return tmp_path / "a.rec"


def test_what_was_written_comes_back(record):
    facts, arrays = read_record(record)
    assert facts == read_facts(record) == FACTS
    assert list(arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(arrays[name], array)


def test_equal_content_gives_equal_bytes(record, tmp_path):
    write_record(tmp_path / "b.rec", FACTS, ARRAYS)
    assert (tmp_path / "b.rec").read_bytes() == record.read_bytes()


def test_every_byte_counts(record):
    data = record.read_bytes()
    for place in range(len(data)):
        record.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(ValueError, match=r"a\.rec (is damaged|does not match its checksum)"):
            read_record(record)
    for length in range(len(data)):
        record.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"a\.rec (is damaged|does not match its checksum)"):
            read_record(record)


def test_nothing_is_left_of_a_record_that_could_not_be_written(tmp_path, monkeypatch):
    with pytest.raises(TypeError):
        write_record(tmp_path / "a.rec", {"what": object()}, {})

    def replace(*names):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(
        OSError, match=r"no space left while writing .*a\.rec; free some and run the same command again"
    ):
        write_record(tmp_path / "a.rec", FACTS, ARRAYS)
    assert list(tmp_path.iterdir()) == []
