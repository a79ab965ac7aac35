"""What a variant of a model is, how large, how good, how fast; and the table of several."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from grist_tools.console import size

Row = dict[str, Any]
# As safetensors names them -> as torch does.
_TYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

Reports = dict[str, tuple[Path, dict[str, Any]]]


def measured(variant: str, options: argparse.Namespace, known: Reports) -> Row:
    """One row. known: reports of earlier evaluations, by `weights_sha256`.

    Raises FileNotFoundError for what is no variant, ValueError for options that do not fit it.
    """
    if variant.endswith(".gguf"):
        return {"variant": variant, **gguf_facts(Path(variant))}
    from grist_model.hub import local_directory

    directory = local_directory(variant)
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} is not a portable model directory: it holds no config.json")
    row: Row = {"variant": variant, **directory_facts(directory)}
    mine = argparse.Namespace(**{**vars(options), "directory": str(directory)})
    tasks = [*(["bits_per_byte"] if options.data or options.text else []), *filter(None, options.tasks.split(","))]
    found = dict(known[row["weights_sha256"]][1]["tasks"]) if row["weights_sha256"] in known else {}
    if tasks:
        from grist_eval.__main__ import evaluate

        mine.tasks = ",".join(dict.fromkeys(tasks))
        found |= evaluate(mine)["tasks"]
    if found:
        row["tasks"] = found
    if options.repetitions:
        row["latency"] = _latency(mine)
    if "bits_per_byte" in found.get("bits_per_byte", {}):
        row["bits_per_byte"] = found["bits_per_byte"]["bits_per_byte"]
    return row


def directory_facts(directory: Path) -> Row:
    """Read from the files alone."""
    from grist_eval.environment import sha256
    from grist_model import accounting, checkpoint
    from grist_tools.export_files import weight_bytes

    checkpoint.check_directory(directory)
    parameters = accounting.parameters(checkpoint.config_of(directory))
    n_bytes = weight_bytes(directory)
    hashes = {file.name: sha256(file) for file in sorted(directory.glob("*.safetensors"))}
    return {
        "format": format_of(directory),
        "bytes": n_bytes,
        "parameters": parameters,
        "bits_per_weight": 8 * n_bytes / parameters,
        "weights_sha256": _combined(hashes),
    }


def format_of(directory: Path) -> str:
    """As the quantization in config.json names itself, else the type of most of the weights."""
    from safetensors import safe_open

    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    quantization = config.get("quantization_config")
    if quantization:
        groups = quantization.get("config_groups") or {}
        parts = [quantization.get("quant_method"), quantization.get("format")]
        for group in groups.values():
            weights, activations = group.get("weights") or {}, group.get("input_activations")
            kind = {"int": "int", "float": "fp"}[weights["type"]]
            parts.append(
                f"{kind}{weights['num_bits']}" + (f" x {kind}{activations['num_bits']}" if activations else "")
            )
        return ", ".join(dict.fromkeys(filter(None, parts)))
    numbers_of: Counter[str] = Counter()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                part = opened.get_slice(name)
                numbers_of[part.get_dtype()] += math.prod(part.get_shape())
    (most, _), *_ = numbers_of.most_common()
    return _TYPES.get(most, most)


def gguf_facts(path: Path) -> Row:
    """Raises FileNotFoundError, ImportError without the gguf package."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}")
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading GGUF needs the gguf package: pip install gristmill[export]") from error
    tensors = GGUFReader(path).tensors
    kinds: Counter[str] = Counter()
    for tensor in tensors:
        kinds[tensor.tensor_type.name] += int(tensor.n_bytes)
    numbers, n_bytes = sum(int(tensor.n_elements) for tensor in tensors), sum(kinds.values())
    return {
        "format": f"GGUF {kinds.most_common(1)[0][0]}",
        "bytes": path.stat().st_size,
        "parameters": numbers,
        "bits_per_weight": 8 * n_bytes / numbers,
    }


def _latency(options: argparse.Namespace) -> Row:
    """A short profile."""
    from grist_tools.latency import Shape, measure
    from grist_tools.loading import open_model

    model, _, device = open_model(options)
    shape = Shape(*options.latency)
    if shape.prompt + shape.output > model.config.context_length:
        raise ValueError(
            f"--latency {shape.batch},{shape.prompt},{shape.output} does not fit the context of {options.directory}, "
            f"{model.config.context_length} tokens"
        )
    return measure(model, shape, device, options.repetitions)


def reports_by_weights(paths: list[Path]) -> Reports:
    """Reports of grist_eval by the checksum over all weight files. Raises ValueError for what is no such report."""
    found: Reports = {}
    for path in paths:
        try:
            report = json.loads(path.read_text(encoding="utf-8"))
            key = _combined(report["model"]["files_sha256"])
            report["tasks"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no report of grist_eval: {error!r}") from error
        if key in found:
            raise ValueError(f"{path} and {found[key][0]} are both of the same weights; give one")
        found[key] = path, report
    return found


def _combined(hashes: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def markdown(rows: list[Row]) -> str:
    """A line a variant; columns that none has are left out."""
    metrics = list(dict.fromkeys(name for row in rows for name in _task_values(row)))
    header = ["variant", "format", "size", "of the first", "bits a weight"]
    header += ["bits per byte"] if any("bits_per_byte" in row for row in rows) else []
    header += metrics
    speed = {
        "first token ms": "first_token_ms",
        "between tokens p50 ms": "between_tokens_p50_ms",
        "tokens/s": "tokens_per_second",
    }
    timed = any("latency" in row for row in rows)
    header += list(speed) if timed else []
    lines = ["| " + " | ".join(header) + " |", "|---|---|" + "---:|" * (len(header) - 2)]
    for row in rows:
        cells = [row["variant"], row["format"], size(row["bytes"]), f"{row['bytes'] / rows[0]['bytes']:.0%}"]
        cells.append(f"{row['bits_per_weight']:.2f}")
        if "bits per byte" in header:
            cells.append(_number(row.get("bits_per_byte"), ".4f"))
        cells += [_number(_task_values(row).get(name), ".4f") for name in metrics]
        if timed:
            cells += [_number(row.get("latency", {}).get(key), ".1f") for key in speed.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _task_values(row: Row) -> dict[str, float]:
    """The main number of each task of questions; bits per byte has a column of its own."""
    return {name: found[found["main"]] for name, found in row.get("tasks", {}).items() if "main" in found}


def _number(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)
