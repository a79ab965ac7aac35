"""A model directory in another precision: bf16, fp16, float32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grist_tools.export_compare import Agreement, agreement, random_rows
from grist_tools.export_files import copy_along
from grist_tools.sampling_options import stored_generation

if TYPE_CHECKING:
    import torch

    from grist_data import Tokenizer

TYPES = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32"}


def write_plain(source: Path, draft: Path, format: str, tokenizer: Tokenizer | None) -> Agreement:
    """Write `source` as `draft` in another type, which must reload to exactly the logits of the source converted in memory.

    How far the conversion itself moves the logits is measured on random ids, and returned.

    Raises ValueError for values that the type cannot hold, and for a failed comparison.
    """
    import torch

    import grist_model

    original = grist_model.load(source)
    rows = random_rows(original.config)
    before_BTV = logits(original, rows.ids_BT)
    del original
    converted = grist_model.load(source, dtype=getattr(torch, TYPES[format]))
    _refuse_infinite(converted, format)
    expected_BTV = logits(converted, rows.ids_BT)
    generation = {key: value for key, value in stored_generation(source).items() if value is not None}
    grist_model.save(converted, draft, tokenizer=tokenizer, generation=generation)
    copy_along(source, draft, TYPES[format])
    del converted
    _require_equal(logits(grist_model.load(draft), rows.ids_BT), expected_BTV)
    return agreement([(before_BTV, expected_BTV)], rows)


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
