"""Write a model directory again in another precision, and prove it before it appears.

    python -m grist_tools.export runs/quickstart/model --format bf16 --out exported

The new directory has the layout of the model's family, as transformers reads it. It is written beside its final place,
loaded from there and compared with the source, and only then renamed; a failed export leaves nothing behind.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from grist_tools.console import fail, parser_for, run, size
from grist_tools.sampling_options import stored_generation

if TYPE_CHECKING:
    import torch

FORMATS = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}
PROBE_TOKENS = 64  # of random ids, on which source and export must agree


class Exported(NamedTuple):
    """What an export changed: bytes of all weights, and logits against the source in its own precision."""

    source_bytes: int
    bytes: int
    largest_logit_change: float
    same_best_token: float


def export(source: str | Path, out: str | Path, format: str) -> Exported:
    """Convert the model in `source` and publish it as `out`.

    The written files must reload to exactly the logits of the source converted in memory; how far the conversion itself
    moves the logits is measured and returned.

    Raises:
        ValueError: unknown format; values that the format cannot hold (float16 ends at 65,504); a failed comparison.
        FileNotFoundError: `source` is no portable model directory.
        FileExistsError: `out` exists.
    """
    import torch

    import grist_model
    from grist_data import Tokenizer
    from grist_model.hub import local_directory

    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    source, out = local_directory(source), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; export into a new directory")
    dtype = getattr(torch, FORMATS[format])
    original = grist_model.load(source)
    ids_BT = probe_ids(original.config)
    before_BTV = logits(original, ids_BT)
    del original
    converted = grist_model.load(source, dtype=dtype)
    _refuse_infinite(converted, format)
    expected_BTV = logits(converted, ids_BT)
    tokenizer = Tokenizer.load(source) if (source / "tokenizer.json").is_file() else None
    with _published_at(out) as draft:
        generation = {key: value for key, value in stored_generation(source).items() if value is not None}
        grist_model.save(converted, draft, tokenizer=tokenizer, generation=generation)
        _copy_along(source, draft, FORMATS[format])
        del converted
        _require_equal(logits(grist_model.load(draft), ids_BT), expected_BTV)
    return Exported(
        _weight_bytes(source),
        _weight_bytes(out),
        (before_BTV - expected_BTV).abs().max().item(),
        (before_BTV.argmax(-1) == expected_BTV.argmax(-1)).double().mean().item(),
    )


def _copy_along(source: Path, draft: Path, dtype: str) -> None:
    """The card, which then states the new type, licenses and templates."""
    from grist_model.model_card import with_type

    for pattern in ("LICENSE*", "NOTICE*", "*.jinja"):
        for extra in source.glob(pattern):
            shutil.copy2(extra, draft / extra.name)
    card = source / "README.md"
    if card.is_file():
        (draft / card.name).write_text(with_type(card.read_text(encoding="utf-8"), dtype), encoding="utf-8")


def probe_ids(config) -> torch.Tensor:
    """The same random ids (1, T) for every model of a vocabulary."""
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (1, min(PROBE_TOKENS, config.context_length)), generator=generator)


def logits(model, ids_BT: torch.Tensor) -> torch.Tensor:
    """Logits (B, T, V) in float32."""
    import torch

    with torch.no_grad():
        return model.eval()(ids_BT).float()


def _require_equal(found_BTV: torch.Tensor, expected_BTV: torch.Tensor) -> None:
    import torch

    if not torch.equal(found_BTV, expected_BTV):
        worst = (found_BTV - expected_BTV).abs().max().item()
        raise ValueError(f"the written files do not reload to the model they were made from: logits differ by {worst}")


def _refuse_infinite(model, format: str) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} has values that {format} cannot hold; export as bf16 or float32")


@contextmanager
def _published_at(out: Path) -> Iterator[Path]:
    """A place to write to, which becomes `out` when the block ends well and is removed when it does not."""
    draft = out.with_name(f".{out.name}.exporting")
    if draft.exists():  # of an export that was killed
        shutil.rmtree(draft)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield draft
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _weight_bytes(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.glob("*.safetensors"))


def parser() -> argparse.ArgumentParser:
    parser = parser_for("export", __doc__)
    parser.add_argument("directory", metavar="DIR", help="portable model directory, as runs/NAME/model")
    parser.add_argument("--format", required=True, choices=FORMATS, help="precision of the weights")
    parser.add_argument("--out", required=True, metavar="DIR2", help="directory to write; must not exist")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        done = export(options.directory, options.out, options.format)
    except (ValueError, OSError) as error:
        return fail("export", error)
    print(f"{options.out}: {size(done.bytes)} of weights in {options.format}, {size(done.source_bytes)} before")
    print("reloaded: logits identical to the converted model's")
    print(f"against the source: largest change of a logit {done.largest_logit_change:.3g}, ", end="")
    print(f"same best token at {done.same_best_token:.1%} of positions")
    return 0


if __name__ == "__main__":
    run(main)
