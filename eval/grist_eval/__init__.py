"""Evaluation of a model on held-out text: bits per byte, text generation scores, samples; and on questions.

`python -m grist_eval DIR --data DATASET` evaluates a portable model directory; the trainer calls the same functions.
"""

from grist_eval.bits_per_byte import bits_per_byte
from grist_eval.questions import Settings, evaluate_tasks
from grist_eval.tasks import ROW_TASKS, TASKS

__all__ = ["ROW_TASKS", "TASKS", "Settings", "bits_per_byte", "evaluate_tasks"]
