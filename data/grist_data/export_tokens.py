"""A dataset as token files of other programs: nanoGPT's .bin, Megatron-LM's .bin and .idx.

    python -m grist_data.export nanogpt datasets/stories --out nanogpt/stories      # train.bin, val.bin, tokenizer.json
    python -m grist_data.export megatron datasets/stories --out megatron/stories    # train_text_document.bin and .idx, ...

The directory appears when it is complete.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Literal

from grist_data.run_command import parser_for, run_command

FORMATS = ("nanogpt", "megatron")


def export_tokens(
    dataset: str | Path,
    out: str | Path,
    format: Literal["nanogpt", "megatron"],
    dtype: str = "uint16",
    drop_loss_mask: bool = False,
) -> Path:
    """Write all splits of a dataset, and its tokenizer, into a new directory; every MiB is checked as it is read.

    dtype: (nanogpt) of the ids. drop_loss_mask: write a dataset with a loss mask without it: the formats have no place for one.
    Raises FileExistsError for an `out` that is there, ValueError for a damaged dataset, a vocabulary that does not fit, or a
    loss mask.
    """
    from grist_data.foreign import megatron, nanogpt
    from grist_data.manifest import read_manifest
    from grist_data.new_directory import new_directory
    from grist_data.shards import Shards
    from grist_data.tokenizer import Tokenizer

    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: expected one of {', '.join(FORMATS)}")
    if format != "nanogpt" and dtype != "uint16":
        raise ValueError(f"dtype is an option of nanogpt; {format} chooses its own")
    splits = {split: Shards.open(dataset, split, verify="lazy") for split in read_manifest(Path(dataset))["splits"]}
    if not drop_loss_mask and any(shards.has_loss_mask for shards in splits.values()):
        raise ValueError(
            f"{dataset} has a loss mask, for which {format} has no place: with drop_loss_mask all tokens are exported alike"
        )
    with new_directory(Path(out)) as directory:
        Tokenizer.load(dataset).save(directory)
        for split, shards in splits.items():
            if format == "nanogpt":
                nanogpt.write(directory / f"{split}.bin", shards, dtype)
            else:
                megatron.write(directory / f"{split}_text_document", shards)
    return Path(out)


def parser() -> argparse.ArgumentParser:
    parser = parser_for("export", __doc__)
    parser.add_argument("format", choices=FORMATS)
    parser.add_argument("dataset", metavar="DATASET")
    parser.add_argument("--out", required=True, metavar="DIR", help="directory to make; must not exist")
    parser.add_argument("--dtype", default="uint16", help="(nanogpt) type of the ids; it reads uint16 [%(default)s]")
    parser.add_argument(
        "--drop_loss_mask", action="store_true", help="export a dataset of conversations without its mask"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)

    def action() -> int:
        out = export_tokens(options.dataset, options.out, options.format, options.dtype, options.drop_loss_mask)
        print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}", file=sys.stderr)
        return 0

    return run_command(action)
