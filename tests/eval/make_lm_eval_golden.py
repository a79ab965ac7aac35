"""Write lm_eval_golden.json: what EleutherAI's lm_eval makes of invented rows, by transformers, on a tiny model.

    PYTHONPATH=kernels:model:data:train:eval:tools:tests python tests/eval/make_lm_eval_golden.py

Needs lm_eval[hf]. Log-likelihoods are rounded to 1e-4 nats.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path
from typing import Any

from lm_eval_subject import ANSWER_TOKENS, PARTS, portable, write_part

from grist_tools import bench_eval_peers

GOLDEN = Path(__file__).with_name("lm_eval_golden.json")


def truth(lm: Any, folder: Path, part: str) -> dict[str, list[dict[str, Any]]]:
    """lm_eval's results of a part, by task a dict a row."""
    tasks, _, shots = PARTS[part]
    rows, examples = write_part(folder, part)
    options = {"gen_kwargs": {"max_gen_toks": ANSWER_TOKENS}}
    return bench_eval_peers.evaluate(lm, tasks, rows, examples, folder / "tasks", shots, **options)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lm = bench_eval_peers.transformers_lm(portable(folder / "model"), batch_size=16)
        parts = {part: truth(lm, folder / part, part) for part in PARTS}
    for rows in (rows for tasks in parts.values() for rows in tasks.values()):
        for row in rows:
            if "scores" in row:
                row["scores"] = [(round(total, 4), int(greedy)) for total, greedy in row["scores"]]
            row["metrics"] = {metric: _rounded(value) for metric, value in row["metrics"].items()}
    versions = {package: importlib.metadata.version(package) for package in ("lm_eval", "transformers", "torch")}
    text = json.dumps({"versions": versions, "parts": parts}, ensure_ascii=False, separators=(",", ":"))
    GOLDEN.write_text(text.replace('},{"metrics"', '},\n{"metrics"') + "\n", encoding="utf-8")


def _rounded(value: float) -> float:
    return int(value) if value == int(value) else round(value, 4)


if __name__ == "__main__":
    main()
