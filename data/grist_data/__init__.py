"""Text to token shards to batches: sources, tokenizer, the shard format, and the order in which training reads it.

    python -m grist_data.prepare --source shakespeare --out datasets/shakespeare

    from grist_data import Batches, PrepareConfig, Shards, prepare
    directory = prepare(PrepareConfig(source="shakespeare", out="datasets/shakespeare"))
    batches = Batches(Shards.open(directory), sequence_length=512, global_batch_size=16, seed=0)

Names are imported when first used, so that a command line shows its help without loading PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grist_data.batch import Batch
    from grist_data.batches import Batches
    from grist_data.evaluation import evaluation_batches
    from grist_data.loader import TokenDataset, TokenStream
    from grist_data.mixture import Mixture, Stage
    from grist_data.prepare import PrepareConfig, prepare
    from grist_data.shards import Shards
    from grist_data.sources import SOURCES, Document
    from grist_data.tokenizer import Tokenizer

_HOME = {
    "SOURCES": "sources",
    "Document": "sources",
    "Tokenizer": "tokenizer",
    "PrepareConfig": "prepare",
    "prepare": "prepare",
    "Shards": "shards",
    "Batch": "batch",
    "Batches": "batches",
    "Mixture": "mixture",
    "Stage": "mixture",
    "TokenDataset": "loader",
    "TokenStream": "loader",
    "evaluation_batches": "evaluation",
}

__all__ = [
    "SOURCES",
    "Batch",
    "Batches",
    "Document",
    "Mixture",
    "PrepareConfig",
    "Shards",
    "Stage",
    "TokenDataset",
    "TokenStream",
    "Tokenizer",
    "evaluation_batches",
    "prepare",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'grist_data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"grist_data.{_HOME[name]}"), name)
    globals()[name] = value
    return value
