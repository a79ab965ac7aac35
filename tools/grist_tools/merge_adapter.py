"""Fold a LoRA adapter in PEFT's format into the model that it belongs to, and write that as a portable directory.

    python -m grist_tools.merge_adapter runs/finetune_lora/adapter --out merged
    python -m grist_tools.merge_adapter someone/adapter --base models/SmolLM2-135M --out merged

The sums are made in float32 and rounded once, to the type that the base is stored in unless --dtype names another.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from grist_tools.console import fail, parser_for, run
from grist_tools.loading import DTYPES


def merge_adapter(adapter: str | Path, out: str | Path, base: str | None = None, dtype: str | None = None) -> str:
    """Returns the family of the directory that was written.

    Args:
        base: directory, or hf://owner/name, of the base model; default what adapter_config.json names.
        dtype: of the weights in `out`; default the base's own.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: the adapter or the base is not there.
        ValueError: the adapter is another model's or no plain LoRA, or names no base.
    """
    import torch

    import grist_model
    from grist_data import Tokenizer
    from grist_model.adapters import read_adapter_config
    from grist_model.hub import local_directory

    adapter, out = Path(adapter), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; merge into a new directory")
    stated = read_adapter_config(adapter)
    directory = local_directory(base or _base_of(stated, adapter))
    model = grist_model.load(directory, dtype=torch.float32)
    grist_model.merge(grist_model.load_adapter(model, adapter))
    tokenizer = Tokenizer.load(directory) if (directory / "tokenizer.json").is_file() else None
    return grist_model.save(model, out, tokenizer=tokenizer, dtype=getattr(torch, dtype or _stored_type(directory)))


def _base_of(stated: dict, adapter: Path) -> str:
    name, revision = stated.get("base_model_name_or_path"), stated.get("revision")
    if not name:
        raise ValueError(f"{adapter} does not say which model it belongs to: give it with --base")
    if Path(name).is_dir():
        return name
    return f"hf://{name}@{revision}" if revision else f"hf://{name}"


def _stored_type(directory: Path) -> str:
    stored = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return stored.get("dtype") or stored.get("torch_dtype") or "float32"


def parser() -> argparse.ArgumentParser:
    parser = parser_for("merge_adapter", __doc__)
    parser.add_argument("adapter", metavar="ADAPTER", help="directory with adapter_config.json, as runs/NAME/adapter")
    parser.add_argument("--base", metavar="DIR", help="base model, or hf://owner/name (default: the adapter's own)")
    parser.add_argument("--out", required=True, metavar="DIR2", help="directory to write; must not exist")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the base's own)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        family = merge_adapter(options.adapter, options.out, options.base, options.dtype)
    except (ValueError, OSError, ImportError) as error:
        return fail("merge_adapter", error)
    print(f"{options.out}: a model of the family {family}, with the adapter folded in")
    return 0


if __name__ == "__main__":
    run(main)
