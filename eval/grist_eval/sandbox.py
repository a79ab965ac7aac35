"""Run code that a model wrote, in a process of its own that is kept from the worst. This is no security boundary.

What is done, on Linux: an empty environment, a temporary working directory that is removed, no standard input, limits on
processor time, wall time, memory, size of files, open files and (unless root runs it) new processes, and, where the kernel
lets a user make one (`unshare --user --net`), a network namespace without a network. What is not: the process reads and
writes whatever its user may, one that it leaves in another session outlives it, and where no such namespace can be made it
has the network; on other systems most of the limits are missing. So use it on a machine, or in a container, that holds
nothing of value.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile

SECONDS = 10.0
MEMORY_BYTES = 2**30
_FILE_BYTES = 2**24
_OUTPUT_BYTES = 2**16

# What the process runs: limits first, then the program, then the word that shows that its end was reached. Neither an exit
# with status 0 from within nor a print can stand for that, since the program is not told the word.
_BOOT = """
import json, sys
given = json.loads(sys.stdin.readline())
try:
    import resource
except ImportError:
    pass
else:
    for name, most in given["limits"].items():
        resource.setrlimit(getattr(resource, name), (most, most))
program, word = compile(given["program"], "program.py", "exec"), given["word"]
del given, sys.modules["json"]
exec(program, {"__name__": "__main__"})
sys.stderr.write(word)
"""


def passes(program: str, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> bool:
    """Whether a program runs to its end without an error, within the limits."""
    word = secrets.token_hex(16)
    limits = {
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_CPU": max(1, round(seconds)),
        "RLIMIT_FSIZE": _FILE_BYTES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,
        "RLIMIT_CORE": 0,
    }
    given = json.dumps({"program": program, "word": word, "limits": limits}) + "\n"
    with tempfile.TemporaryDirectory(prefix="grist-eval-", ignore_cleanup_errors=True) as folder:
        return _run([*network_guard(), sys.executable, "-I", "-X", "utf8", "-c", _BOOT], given, folder, seconds, word)


def _run(command: list[str], given: str, folder: str, seconds: float, word: str) -> bool:
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=said,
            cwd=folder,
            env={"PATH": os.defpath},
            start_new_session=True,
        )
        try:
            process.communicate(given.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # what the program started may outlive it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        size = said.seek(0, os.SEEK_END)
        said.seek(max(0, size - _OUTPUT_BYTES))
        return process.returncode == 0 and said.read().endswith(word.encode())


@functools.cache
def network_guard() -> tuple[str, ...]:
    """The command that runs another one without a network, or nothing where this system does not let us."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return ()
    guard = (unshare, "--user", "--net")
    tried = subprocess.run([*guard, sys.executable, "-I", "-c", ""], capture_output=True, check=False, timeout=60)
    return guard if tried.returncode == 0 else ()
