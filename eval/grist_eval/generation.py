"""Scores of generated text: BLEU and ROUGE against references, and how varied or repetitive the text is.

Input is a JSONL file of prompts with reference continuations:

    {"prompt": "Once upon", "references": [" a time", " a midnight dreary"]}
    {"prompt": "To be,", "reference": " or not to be"}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm import tqdm

from grist_eval.completion import GREEDY, complete, describe
from grist_eval.faults import sifted
from grist_eval.text_documents import json_object
from grist_model.generate import Sampling

if TYPE_CHECKING:
    from grist_data import Tokenizer


class Example(NamedTuple):
    prompt: str
    references: list[str]


def read_examples(path: str | Path) -> list[Example]:
    """Read prompts and references.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: naming `file:line` of every bad row (the first ten), or that there are no rows.
    """
    examples = list(sifted(_found(path)))
    if not examples:
        raise ValueError(f"{path}: no rows; expected JSON lines with a 'prompt' and 'references'")
    return examples


def _found(path: str | Path) -> Iterator[Example | ValueError]:
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if line.strip():
            try:
                yield _parse(line)
            except ValueError as error:
                yield ValueError(f"{path}:{number}: {error}")


def _parse(line: bytes) -> Example:
    row = json_object(line)
    prompt = row.get("prompt")
    if not isinstance(prompt, str):
        raise ValueError(f"expected 'prompt' to be a string, got {prompt!r}")
    if ("references" in row) == ("reference" in row):
        raise ValueError("expected exactly one of 'references' (a list of strings) and 'reference' (a string)")
    references = row["references"] if "references" in row else [row["reference"]]
    if not isinstance(references, list) or not references or not all(_is_text(text) for text in references):
        raise ValueError(f"expected references to be strings that are not blank, at least one, got {references!r}")
    return Example(prompt, references)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def evaluate_generation(
    model,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    *,
    sampling: Sampling = GREEDY,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 16,
    progress: bool = False,
) -> dict[str, Any]:
    """Complete every prompt and score the completions; the result also holds them, in the order of the examples.

    Raises:
        ValueError: a setting is out of range, or `max_new_tokens` leaves no room for a prompt in the context.
        ImportError: sacrebleu or rouge-score is not installed.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    completions: list[str] = []
    with tqdm(
        total=len(examples), desc="generation", unit="prompt", leave=False, disable=None if progress else True
    ) as bar:
        for start in range(0, len(examples), batch_size):
            prompts = [example.prompt for example in examples[start : start + batch_size]]
            completions += complete(model, tokenizer, prompts, sampling, max_new_tokens=max_new_tokens, seed=seed)
            bar.update(len(prompts))
    scores = score_texts(completions, [example.references for example in examples])
    return {**scores, "sampling": describe(sampling), "max_new_tokens": max_new_tokens, "completions": completions}


def score_texts(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    """BLEU (0 to 100, corpus level), ROUGE F1 (0 to 1, mean over texts, best reference), distinct-n and repetition.

    Sources: sacrebleu (Post 2018, its signature is part of the result), rouge-score (Lin 2004, with Porter stemming),
    distinct-n (Li et al. 2016), repetition as `rep-4` of Welleck et al. 2020.

    Raises:
        ValueError: no texts, or not one list of references a text.
        ImportError: sacrebleu or rouge-score is not installed.
    """
    if not texts or len(texts) != len(references):
        raise ValueError(f"expected one list of references a text, got {len(texts)} texts, {len(references)} lists")
    return {
        **_bleu(texts, references),
        **_rouge(texts, references),
        "distinct_1": distinct(texts, 1),
        "distinct_2": distinct(texts, 2),
        "repetition_4": sum(repetition(text, 4) for text in texts) / len(texts),
        "examples": len(texts),
    }


def _bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Any]:
    try:
        from sacrebleu.metrics.bleu import BLEU
    except ImportError as error:
        raise ImportError("BLEU needs sacrebleu: pip install 'gristmill[dev]'") from error

    most = max(len(each) for each in references)
    # sacrebleu wants reference streams, not reference lists: stream i holds every text's i-th reference, or None.
    streams: list[Any] = [[each[i] if i < len(each) else None for each in references] for i in range(most)]
    metric = BLEU()
    return {"bleu": metric.corpus_score(list(texts), streams).score, "bleu_signature": str(metric.get_signature())}


def _rouge(texts: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("ROUGE needs rouge-score: pip install 'gristmill[dev]'") from error

    kinds = ["rouge1", "rouge2", "rougeL"]
    scorer = RougeScorer(kinds, use_stemmer=True)
    each = [scorer.score_multi(list(refs), text) for text, refs in zip(texts, references, strict=True)]
    return {
        kind.replace("rouge", "rouge_"): sum(scores[kind].fmeasure for scores in each) / len(each) for kind in kinds
    }


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.split()
    return list(zip(*(words[i:] for i in range(n)), strict=False))


def distinct(texts: Sequence[str], n: int) -> float:
    """Distinct word n-grams over all texts / all their word n-grams: 1 is never repeating, 0 when there are none."""
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repetition(text: str, n: int) -> float:
    """Share of a text's word n-grams that occurred before in it: 0 is never repeating (also when it has none)."""
    grams = _ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
