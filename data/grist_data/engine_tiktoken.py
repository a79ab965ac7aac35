"""tiktoken as an engine, through `encode_to_numpy`, which makes no Python list of ids."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from grist_data.engine_base import Engine, threads
from grist_data.engine_ranks import ranks_of
from grist_data.engine_unicode import CHARACTERS, classes_of, disputed, holds_any, version_of
from grist_data.tokenizer import Tokenizer, pieces_of

if TYPE_CHECKING:
    import tiktoken

# Its regexes give up (tiktoken 0.8: the process panics) in a run of a quarter of a million spaces; half a million line ends.
_LONGEST_WHITESPACE = 1 << 16
_LONG_WHITESPACE = re.compile(rf"\s{{{_LONGEST_WHITESPACE}}}")
# Without any special token its search for them stops at every character, which makes it a third slower. One that is not
# allowed is text like any other where a text holds it.
_UNUSED = "\x00unused\x00"
_BYTES = {bytes([byte]): byte for byte in range(256)}


def open_tiktoken(tokenizer: Tokenizer) -> Engine:
    """Raises ImportError where tiktoken is missing or too old and UnsupportedTokenizer where it has no ids for a tokenizer."""
    import tiktoken

    if not hasattr(tiktoken.Encoding, "encode_to_numpy"):
        raise ImportError(f"tiktoken {version('tiktoken')} has no encode_to_numpy, 0.9 has")
    ranks = ranks_of(tokenizer.definition)
    encoding = tiktoken.Encoding(
        tokenizer.sha256,
        pat_str=ranks.pattern,
        mergeable_ranks=ranks.id_of,
        special_tokens={_UNUSED: max(ranks.id_of.values()) + 1},
    )
    return Engine(
        name="tiktoken",
        version=version("tiktoken"),
        unicode_version=version_of(lambda code_point: bool(_kept(r"\p{L}", chr(code_point)))),
        reference=tokenizer,
        encode=functools.partial(_encode, encoding),
        is_hard=lambda text: _is_hard(text) or ranks.lack(text),
    )


def _encode(encoding: tiktoken.Encoding, texts: Sequence[str]) -> list[np.ndarray]:
    pieces = [list(pieces_of(text)) for text in texts]  # every known pattern may be cut there
    flat = [piece for of_text in pieces for piece in of_text]
    # No special token is allowed, which is the default, and none is an error.
    encode_piece = functools.partial(encoding.encode_to_numpy, disallowed_special=())
    if (workers := min(threads(), len(flat))) > 1:
        with ThreadPoolExecutor(workers) as pool:
            arrays = iter(list(pool.map(encode_piece, flat)))
    else:
        arrays = map(encode_piece, flat)
    return [next(arrays) if len(p) == 1 else np.concatenate([next(arrays) for _ in p]) for p in pieces]


def _is_hard(text: str) -> bool:
    # A run that is too long covers a multiple of its length, so that looking there alone finds nearly all texts innocent.
    if any(map(str.isspace, text[_LONGEST_WHITESPACE - 1 :: _LONGEST_WHITESPACE])) and _LONG_WHITESPACE.search(text):
        return True
    return not text.isascii() and holds_any(text, _disputed())


@functools.cache
def _disputed() -> np.ndarray:
    return disputed(classes_of(lambda pattern: _kept(pattern, CHARACTERS)))


def _kept(pattern: str, text: str) -> str:
    """What of a text matches a regex: tiktoken leaves out what does not."""
    import tiktoken

    encoding = tiktoken.Encoding("of bytes", pat_str=pattern, mergeable_ranks=_BYTES, special_tokens={})
    return encoding.encode_to_numpy(text, disallowed_special=()).astype(np.uint8).tobytes().decode()
