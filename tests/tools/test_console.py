from __future__ import annotations

import pytest

from grist_tools.console import count, fail, run, size, table


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (15 * 2**20, "15.0 MiB"), (150 * 2**30, "150 GiB")],
)
def test_size(n_bytes, text):
    assert size(n_bytes) == text


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0"), (999, "999"), (1234, "1.23 k"), (20_914_757_184, "20.9 B"), (117e9, "117 B")]
)
def test_count(n, text):
    assert count(n) == text


def test_table_sets_the_first_column_left_and_the_rest_right():
    lines = table(["name", "ms"], [["a", "1.5"], ["longer", "22.0"]]).splitlines()
    assert lines == ["name      ms", "------  ----", "a        1.5", "longer  22.0"]


def test_a_fault_is_one_line_on_stderr(capsys):
    assert fail("plot", ValueError("no such run")) == 2
    assert capsys.readouterr() == ("", "plot: no such run\n")


def test_ctrl_c_ends_quietly_and_a_status_is_passed_on(capsys):
    def stopped() -> int:
        raise KeyboardInterrupt

    for main, status in ((stopped, 130), (lambda: 2, 2), (lambda: 0, 0)):
        with pytest.raises(SystemExit) as end:
            run(main)
        assert end.value.code == status
    assert capsys.readouterr().err == "\nstopped\n"


def test_table_keeps_leading_spaces_of_the_first_column():
    assert table(["token", "n"], [[" the", "3"]]).splitlines()[2] == " the   3"
