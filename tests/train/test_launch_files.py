"""The Slurm script and the Kubernetes manifest: they parse, agree with themselves, and stop without losing work."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "train" / "launch"
SBATCH = LAUNCH / "slurm.sbatch"

# Stands in for srun: says what it was asked to run, then lives until a signal, which ends it with the given status.
FAKE_SRUN = """#!/bin/bash
trap 'echo got TERM >> "$LOG"; exit {on_signal}' TERM
echo "srun $*" >> "$LOG"
for i in $(seq {lives}); do sleep 0.05; done
exit {at_end}
"""
FAKE_SCONTROL = """#!/bin/bash
[ "$1" = show ] && printf 'node-a\\nnode-b\\n' || echo "scontrol $*" >> "$LOG"
"""


def start(tmp_path: Path, *arguments: str, on_signal: int = 1, lives: int = 600, at_end: int = 0) -> subprocess.Popen:
    for name, text in {
        "srun": FAKE_SRUN.format(on_signal=on_signal, lives=lives, at_end=at_end),
        "scontrol": FAKE_SCONTROL,
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "run.yaml").write_text("steps: 1\n")
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "1234567", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_GPUS_ON_NODE": "4", "PYTHON": "python3"}
    return subprocess.Popen(
        ["bash", str(SBATCH), *arguments],
        env={**os.environ, **slurm, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(tmp_path / "log")},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def log(tmp_path: Path) -> str:
    path = tmp_path / "log"
    return path.read_text() if path.exists() else ""


def wait_for(tmp_path: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in log(tmp_path):
        assert time.monotonic() < deadline, f"{text!r} never came, only {log(tmp_path)!r}"
        time.sleep(0.02)


def test_slurm_script_is_valid_bash():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)


def test_slurm_script_starts_one_torchrun_a_machine_that_meet_at_the_first(tmp_path):
    process = start(tmp_path, "run.yaml", "--steps", "5", lives=1)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    (line,) = log(tmp_path).splitlines()
    assert "--nnodes=2 --nproc-per-node=4 --rdzv-id=1234567 --rdzv-backend=c10d --rdzv-endpoint=node-a:30067" in line
    assert line.endswith("-m grist_train --config run.yaml --steps 5")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_run_and_the_job_requeues_itself(tmp_path, number):
    process = start(tmp_path, "run.yaml", on_signal=1)
    wait_for(tmp_path, "srun")
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert "signal received" in out
    assert log(tmp_path).splitlines()[1:] == ["got TERM", "scontrol requeue 1234567"]


def test_a_run_that_finishes_during_the_grace_time_is_not_requeued(tmp_path):
    process = start(tmp_path, "run.yaml", on_signal=0)
    wait_for(tmp_path, "srun")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert "requeue" not in log(tmp_path)


def test_a_run_that_fails_by_itself_fails_the_job(tmp_path):
    process = start(tmp_path, "run.yaml", lives=1, at_end=3)
    process.communicate(timeout=30)
    assert process.returncode == 3
    assert "requeue" not in log(tmp_path)


@pytest.mark.parametrize("arguments", [[], ["absent.yaml"]])
def test_slurm_script_without_a_run_file_says_how_to_call_it(tmp_path, arguments):
    process = start(tmp_path, *arguments)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 2
    assert err.startswith("usage: sbatch")
    assert log(tmp_path) == ""


def test_manifest_counts_its_pods_and_gives_the_trainer_every_variable():
    job = yaml.safe_load((LAUNCH / "pytorchjob.yaml").read_text(encoding="utf-8"))
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert set(replicas) == {"Master", "Worker"}
    for spec in replicas.values():
        (container,) = spec["template"]["spec"]["containers"]
        env = {entry["name"]: entry["value"] for entry in container["env"]}
        assert container["name"] == "pytorch"
        assert int(env["NNODES"]) == sum(each["replicas"] for each in replicas.values())
        assert int(env["NPROC"]) == container["resources"]["limits"]["nvidia.com/gpu"]
        assert int(env["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < spec["template"]["spec"]["terminationGracePeriodSeconds"]
        (command,) = container["args"]
        assert command.startswith("exec make train ")
        for variable in ("RUN", "NPROC", "NNODES", "NODE_RANK", "RDZV"):
            assert f" {variable}=" in command
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["template"]["spec"]["volumes"]}


def test_make_passes_the_signal_on_and_waits(tmp_path):
    """The manifest makes `make` the first process of its pod: when it ends, everything in the pod is killed."""
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/bash\ntrap 'sleep 0.3; echo saved >> {tmp_path}/log; exit 0' TERM\necho started > {tmp_path}/log\n"
        "for i in $(seq 600); do sleep 0.05; done\n"
    )
    python.chmod(0o755)
    root = LAUNCH.parents[1]
    process = subprocess.Popen(
        ["make", "train", "SETUP=0", f"PYTHON={python}"], cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_for(tmp_path, "started")
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)
    assert log(tmp_path).splitlines() == ["started", "saved"]
