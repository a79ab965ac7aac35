"""Evaluation tasks by name. A new one is a file beside these that ends in a `TASK`, and a line here."""

from grist_eval.task import Task
from grist_eval.tasks import bits_per_byte, generation, samples

TASKS: dict[str, Task] = {
    "bits_per_byte": bits_per_byte.TASK,
    "samples": samples.TASK,
    "generation": generation.TASK,
}
