"""Code that a model wrote: what passes, what does not, and what it is kept from."""

from __future__ import annotations

import os
import sys

import pytest

from grist_eval.sandbox import network_guard, passes
from grist_eval.tasks import ROW_TASKS
from grist_tools.bench_eval_rows import invented_rows

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limits are Linux's")


@pytest.mark.parametrize(
    "program",
    ["assert 1 + 1 == 2", "import json, math\nassert json.dumps([math.floor(1.5)]) == '[1]'", "print('x' * 100000)"],
)
def test_a_program_that_ends_well_passes(program):
    assert passes(program)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 + 1 == 3",
        "def (",
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "x = bytearray(2**31)",
        "open('file', 'wb').write(b'0' * 2**25)",
        "input()",
    ],
)
def test_a_program_that_does_not_reach_its_end_fails(program):
    assert not passes(program)


def test_a_program_that_does_not_end_is_stopped():
    assert not passes("while True: pass", seconds=1)
    assert not passes("import time; time.sleep(60)", seconds=1)


def test_it_sees_no_environment_and_a_folder_of_its_own(monkeypatch):
    monkeypatch.setenv("SECRET", "1")
    assert passes("import os\nassert 'SECRET' not in os.environ and os.listdir('.') == []")
    assert passes(f"import os\nassert os.getcwd() != {os.getcwd()!r}")


@pytest.mark.skipif(not network_guard(), reason="this system lets no user make a network namespace")
def test_it_has_no_network():
    assert not passes(
        "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\n"
        "socket.create_connection(s.getsockname(), timeout=2)"
    )


@pytest.mark.parametrize("name", ["humaneval", "mbpp"])
def test_right_code_scores_one_and_wrong_code_none(name):
    task = ROW_TASKS[name]
    columns = invented_rows(name, 1)[0]
    row = task.read(columns)
    assert task.generation is not None
    right = columns["canonical_solution"] if name == "humaneval" else columns["code"]
    assert task.generation.metrics(right, row.reference) == {"pass_at_1": 1.0}
    assert task.generation.metrics(right.replace("return x", "return 1 + x"), row.reference) == {"pass_at_1": 0.0}
