"""Evaluation of a model on held-out text: bits per byte, text generation scores, samples.

`python -m grist_eval DIR --data DATASET` evaluates a portable model directory; the trainer calls the same functions.
"""

from grist_eval.bits_per_byte import bits_per_byte
from grist_eval.tasks import TASKS

__all__ = ["TASKS", "bits_per_byte"]
