"""Prompt lookup: greedy decoding of several tokens a step, by guessing that the text repeats itself.

G tokens guessed and one more, V vocabulary.

Saxena, "Prompt Lookup Decoding", 2023: speculative decoding (Leviathan et al., 2023) whose draft model is a search for the last
few tokens in the text so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grist_model.sampling import Sampling
    from grist_model.transformer import Transformer

NGRAMS = (3, 2, 1)  # sizes searched for, the longest first: a longer match guesses better


def check_lookup(model: Transformer, prompts: int, sampling: Sampling, most: int) -> None:
    """Raises ValueError unless prompt lookup gives exactly what plain decoding would."""
    if most < 1:
        raise ValueError(f"prompt_lookup must be at least 1 token a step (or None), but is {most}")
    if prompts != 1:
        raise ValueError(f"prompt_lookup is for one prompt, but got {prompts}: pass them one by one")
    if sampling.temperature != 0:
        raise ValueError(
            f"prompt_lookup verifies greedy choices: pass temperature=0 with it, but it is {sampling.temperature}"
        )
    if sampling.repetition_penalty is not None:
        raise ValueError("prompt_lookup speeds up repeated text, which repetition_penalty avoids: pass one of the two")
    scaling = model.config.rope_scaling
    if scaling is not None and scaling.kind == "dynamic":
        raise ValueError(
            'prompt_lookup does not go with "dynamic" rotary scaling: its angles depend on how many tokens a step takes'
        )


def lookup_ids(model: Transformer, prompt: list[int], most_new: int, most_guessed: int) -> Iterator[int]:
    """Greedy ids after the prompt, most_new of them; up to most_guessed are guessed and verified in one forward pass."""
    import torch

    from grist_model.attention import KVCache

    device = model.embedding.weight.device
    cache = KVCache(model.config, 1, len(prompt) + most_new, device, rollback=most_guessed)
    text = RepeatedText(prompt)
    unread, guess = prompt, []  # ids that the cache has not seen yet: those certain, then those guessed
    count = 0
    while count < most_new:
        with torch.no_grad():
            logits_1GV = model(torch.tensor([unread + guess], device=device), cache=cache, last=len(guess) + 1)
            best = logits_1GV[0].argmax(-1).tolist()
        agreed = next((i for i, (g, b) in enumerate(zip(guess, best, strict=False)) if g != b), len(guess))
        cache.truncate(cache.used - (len(guess) - agreed))
        new = best[: agreed + 1]  # the model's own id after the last guess it agrees with is certain too
        for token in new:
            text.append(token)
            yield token
        count += len(new)
        unread, guess = new[-1:], text.guess(min(most_guessed, most_new - count - 1))


class RepeatedText:
    """A growing text that knows where each of its n-grams came last, at the price of len(NGRAMS) table entries an id."""

    def __init__(self, ids: list[int]):
        self.ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # n-gram -> index of the id that followed it, the last time
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        end = len(self.ids)
        for size in NGRAMS:
            if size <= end:
                self._next[tuple(self.ids[end - size :])] = end
        self.ids.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to `most` ids: what followed the last earlier occurrence of the text's longest trailing n-gram, if any.

        Where that runs into the end of the text it goes on with the guess itself, as a loop would.
        """
        end = len(self.ids)
        sizes = (size for size in NGRAMS if size <= end)
        at = next((self._next[key] for size in sizes if (key := tuple(self.ids[end - size :])) in self._next), None)
        if at is None:
            return []
        guess: list[int] = []
        for i in range(at, at + most):
            guess.append(self.ids[i] if i < end else guess[i - end])
        return guess
