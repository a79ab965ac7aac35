"""From the sums of documents to figures: bits per byte and perplexity, and how far other documents would have moved them.

Shape letters: D documents, K figures.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 1000
# Of 100: what lies below the interval, and what below its upper end.
PERCENTILES = (2.5, 97.5)


def report(nll_nats: float, tokens: int, n_bytes: int | None) -> dict[str, float | int]:
    """`bits_per_byte` and `bytes` (where these are known), `perplexity`, `loss` in nats a token, and `tokens`."""
    loss = nll_nats / tokens
    found = {"perplexity": perplexity_of(loss), "loss": loss, "tokens": tokens}
    if n_bytes is None:
        return found
    return {"bits_per_byte": nll_nats / math.log(2) / n_bytes, **found, "bytes": n_bytes}


def perplexity_of(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:  # a diverged model: above 709 nats a token
        return math.inf


def intervals(nats_D: np.ndarray, tokens_D: np.ndarray, bytes_D: np.ndarray, seed: int = 0) -> dict[str, float | int]:
    """`documents`, and of two or more: NAME_stderr, NAME_low and NAME_high of bits per byte and of perplexity.

    The bootstrap over documents (Efron, 1979; the percentile interval of 95 %): documents are drawn as many times as there
    are, and both figures are ratios of the sums over what was drawn. Same seed, same figures.
    """
    import numpy as np

    found: dict[str, float | int] = {"documents": len(nats_D)}
    if len(nats_D) < 2:
        return found
    sums_DK = np.stack([nats_D, tokens_D, bytes_D], axis=1, dtype=np.float64)
    nats_R, tokens_R, bytes_R = _resampled(sums_DK, seed).T
    drawn = {
        "bits_per_byte": nats_R / math.log(2) / bytes_R,
        "perplexity": np.array([perplexity_of(loss) for loss in (nats_R / tokens_R).tolist()]),
    }
    for name, values_R in drawn.items():
        if np.isfinite(values_R).all():
            low, high = np.percentile(values_R, PERCENTILES).tolist()
            found |= {f"{name}_stderr": float(values_R.std(ddof=1)), f"{name}_low": low, f"{name}_high": high}
    return found


def _resampled(sums_DK: np.ndarray, seed: int) -> np.ndarray:
    """Sums over documents of each resample: (resamples, K)."""
    import numpy as np

    draw = np.random.default_rng(seed)
    n = len(sums_DK)
    # How often each was drawn, then one product: memory for one resample. Of sums that are not finite nothing is.
    with np.errstate(invalid="ignore"):
        return np.stack([np.bincount(draw.integers(n, size=n), minlength=n) @ sums_DK for _ in range(RESAMPLES)])


def figures(nats_D: np.ndarray, tokens_D: np.ndarray, bytes_D: np.ndarray) -> dict[str, float | int]:
    """`report` and `intervals` of some documents: nats float64, tokens and bytes int64, (D,) each."""
    whole = report(math.fsum(nats_D.tolist()), int(tokens_D.sum()), int(bytes_D.sum()))
    return {**whole, **intervals(nats_D, tokens_D, bytes_D)}


def together(results: list[dict[str, float | int]]) -> dict[str, float | int]:
    """The report on several splits as if they were one, from the reports on each; bits per byte where all have them.

    Splits are drawn apart, so the standard error of bits per byte is that of a sum of independent parts.
    """
    nll_nats = sum(result["loss"] * result["tokens"] for result in results)
    n_bytes = None
    if all("bytes" in result for result in results):
        n_bytes = int(sum(result["bytes"] for result in results))
    whole = report(nll_nats, int(sum(result["tokens"] for result in results)), n_bytes)
    if all("documents" in result for result in results):
        whole["documents"] = int(sum(result["documents"] for result in results))
    if n_bytes and all("bits_per_byte_stderr" in result for result in results):
        parts = [result["bits_per_byte_stderr"] * result["bytes"] / n_bytes for result in results]
        whole["bits_per_byte_stderr"] = math.hypot(*parts)
    return whole
