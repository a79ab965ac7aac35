"""vLLM in a process of another Python, asked a line at a time; latency_vllm.py is what runs there."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

from grist_tools.latency import Answer

_SCRIPT = Path(__file__).with_name("latency_vllm.py")
_SHOWN = 3000  # characters of its log, where it failed


class VllmProcess:
    """python: has vLLM. tokens: of the longest prompt and answer. batch: sequences at once."""

    def __init__(self, python: str, directory: Path, dtype: str, tokens: int, batch: int, threads: int):
        settings = {
            "model": str(Path(directory).resolve()), "dtype": dtype, "max_model_len": tokens, "max_num_seqs": batch,
            "enforce_eager": True, "enable_prefix_caching": False, "skip_tokenizer_init": True, "seed": 0,
            "gpu_memory_utilization": 0.4,
        }  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        # Its own choice of cores would be another number than ours.
        environment |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_KVCACHE_SPACE": "1",
        }
        environment |= {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed with the process
        self._process = subprocess.Popen(
            [python, str(_SCRIPT), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=environment,
            text=True,
        )

    def __enter__(self) -> VllmProcess:
        try:
            self._read()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def answer(self, prompts: list[list[int]], output: int) -> Answer:
        """Raises OSError if the process ended, with the end of its log."""
        assert self._process.stdin is not None
        try:
            print(json.dumps({"prompts": prompts, "output": output}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            self._raise_ended()
        said = self._read()
        return Answer(said["ids"], said["seconds"])

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._raise_ended()
        return json.loads(line)

    def _raise_ended(self) -> None:
        status = self._process.wait()
        self._log.seek(0)
        log = self._log.read().decode("utf-8", "replace")[-_SHOWN:]
        raise OSError(f"vLLM in {self._process.args[0]} ended with status {status}; its log ends so:\n{log}")  # pyright: ignore

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
