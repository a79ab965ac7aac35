"""How much memory it takes to load a model directory, against what the model holds in the end, and how long it takes.

    python -m grist_tools.bench_load                        # models of 1 GB, made for the purpose and removed again
    python -m grist_tools.bench_load --directory runs/quickstart/model

Every figure is of a fresh process: the most resident memory since just before the call, mapped files included, less what it
held then. Files come from the page cache. A JSON goes to benchmarks/; above 1.2 times the weights the status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from grist_tools.console import fail, parser_for, run, size, table

MOST = 1.2  # times what is held
_DENSE = {
    "sinks": False,
    "window": None,
    "window_layers": "none",
    "swiglu_alpha": None,
    "swiglu_limit": None,
    "experts": 0,
}
# Shapes of about the same depth as real ones; widths are set by the size that is asked for.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_DENSE, "attention_bias": False, "mlp_bias": False, "kv_heads": 2},
    "gpt2": {
        **_DENSE, "positions": "learned", "norm": "layer", "activation": "gelu_tanh", "kv_heads": 4, "tied_embeddings": True,
    },
    "qwen3_moe": {
        **_DENSE, "attention_bias": False, "mlp_bias": False, "router_bias": False, "kv_heads": 2, "qk_norm": "head",
        "experts": 16, "active_experts": 4,
    },
    "gpt_oss": {"kv_heads": 2, "experts": 16, "active_experts": 4},
}  # fmt: skip
# How it is read, the type asked for ("stored": none), processes.
WAYS = (
    ("load", "stored", 1),
    ("load", "float32", 1),
    ("load", "bfloat16", 1),
    ("load_into", "float32", 1),
    ("load_into", "float32", 2),
)


def parser() -> argparse.ArgumentParser:
    parser = parser_for("bench_load", __doc__)
    parser.add_argument("--directory", metavar="DIR", help="a model of your own instead of one of each family")
    parser.add_argument(
        "--gigabytes", type=float, default=1.0, help="of each model that is made (default: %(default)s)"
    )
    parser.add_argument("--stored", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"])
    parser.add_argument(
        "--repetitions", type=int, default=3, help="fresh processes for each figure (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", metavar="DIR", help="make the models in here (default: the system's temporary folder)"
    )
    parser.add_argument("--out", metavar="JSON", help="default: benchmarks/load-DEVICE-DATE.json")
    return parser


def config_of_size(family: str, n_bytes: float, itemsize: int):
    """The narrowest shape of 16 layers whose weights have at least that many bytes."""
    from grist_model import ModelConfig, accounting

    for width in range(64, 1 << 16, 64):
        config = ModelConfig(
            vocab_size=8192, context_length=1024, layers=16, width=width, expert_width=2 * width, **FAMILIES[family]
        )
        if accounting.parameters(config) * itemsize >= n_bytes:
            return config
    raise ValueError(f"no shape of {n_bytes:.3g} bytes: ask for fewer gigabytes")


def made(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, str, Path]]:
    """(family, type of the weights, directory) of each model, which is removed when the next is asked for."""
    import torch

    import grist_model

    for stored in options.stored:
        dtype = getattr(torch, stored)
        for family in FAMILIES:
            directory = folder / f"{family}-{stored}"
            config = config_of_size(family, 1e9 * options.gigabytes, dtype.itemsize)
            model = grist_model.build(config, device="meta", dtype=dtype).to_empty(device="cpu")
            written = grist_model.save(model, directory)
            if written != family:
                raise AssertionError(f"a model meant for {family} was written as {written}")
            yield family, stored, directory
            for file in directory.glob("*.safetensors"):
                file.unlink()


def measured(how: str, directory: Path, dtype: str, ranks: int) -> list[dict[str, Any]]:
    """What each process reports. Raises RuntimeError with its last words where one fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "grist_tools.bench_load_process", how, str(directory), "--dtype", dtype]
    processes = []
    for rank in range(ranks):
        environment = {
            **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        processes.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    ended = [process.communicate() for process in processes]
    for process, (_, words) in zip(processes, ended, strict=True):
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}:\n{words[-2000:]}")
    return [json.loads(out.splitlines()[-1]) for out, _ in ended]


def row_of(family: str, stored: str, directory: Path, way: tuple[str, str, int], repetitions: int) -> dict[str, Any]:
    how, dtype, ranks = way
    runs = [measured(how, directory, dtype, ranks) for _ in range(repetitions)]
    worst = max((each for run in runs for each in run), key=lambda each: each["peak_of_held"])
    return {
        "family": family,
        "stored": stored,
        "how": how,
        "dtype": dtype,
        "ranks": ranks,
        "file_bytes": sum(file.stat().st_size for file in directory.glob("*.safetensors")),
        **worst,
        "seconds": median(max(each["seconds"] for each in run) for run in runs),
        "most": MOST,
        "ok": worst["peak_of_held"] <= MOST,
    }


def results_table(rows: list[dict[str, Any]]) -> str:
    header = ["family", "stored", "call", "as", "ranks", "held", "peak", "peak/held", "s"]
    return table(
        header,
        [
            [
                row["family"], row["stored"], row["how"], row["dtype"], str(row["ranks"]), size(row["held_bytes"]),
                size(row["peak_bytes"]), f"{row['peak_of_held']:.2f}{'' if row['ok'] else ' !'}", f"{row['seconds']:.2f}",
            ]
            for row in rows
        ],
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from grist_eval.environment import provenance, write_json
    from grist_tools.bench_kernels import commit, default_out

    rows: list[dict[str, Any]] = []
    report = {
        "what": "load",
        "command": ["python", "-m", "grist_tools.bench_load", *(sys.argv[1:] if arguments is None else arguments)],
        "commit": commit(),
        **provenance("cpu"),
        "repetitions": options.repetitions,
        "complete": False,
        "rows": rows,
    }
    out = Path(options.out) if options.out else default_out(report["device"], datetime.date.today().isoformat(), "load")
    try:
        with tempfile.TemporaryDirectory(prefix="grist-bench-load-", dir=options.folder) as folder:
            own = [("own", "stored", Path(options.directory))] if options.directory else None
            for family, stored, directory in own or made(options, Path(folder)):
                for way in WAYS:
                    rows.append(row_of(family, stored, directory, way, options.repetitions))
                    print(results_table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
                write_json(report, out)
        report["complete"] = True
        write_json(report, out)
    except (ValueError, OSError, RuntimeError) as error:
        return fail("bench_load", error)
    print(results_table(rows))
    print(f"written to {out}")
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    run(main)
