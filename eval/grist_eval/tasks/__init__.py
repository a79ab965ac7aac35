"""Evaluation tasks by name. A new one is a file beside these that ends in a `TASK`, and a line here."""

from grist_eval.row_task import RowTask
from grist_eval.task import Task
from grist_eval.tasks import (
    arc,
    bits_per_byte,
    boolq,
    commonsense_qa,
    generation,
    gsm8k,
    hellaswag,
    humaneval,
    lambada,
    mbpp,
    mmlu,
    openbookqa,
    piqa,
    samples,
    sciq,
    triviaqa,
    winogrande,
)

TASKS: dict[str, Task] = {
    "bits_per_byte": bits_per_byte.TASK,
    "samples": samples.TASK,
    "generation": generation.TASK,
}

# Tasks of questions, which run together: their options are those of `benchmark.py`.
ROW_TASKS: dict[str, RowTask] = {
    "hellaswag": hellaswag.TASK,
    "arc_easy": arc.EASY,
    "arc_challenge": arc.CHALLENGE,
    "piqa": piqa.TASK,
    "winogrande": winogrande.TASK,
    "boolq": boolq.TASK,
    "openbookqa": openbookqa.TASK,
    "sciq": sciq.TASK,
    "commonsense_qa": commonsense_qa.TASK,
    "mmlu": mmlu.TASK,
    "lambada_openai": lambada.TASK,
    "gsm8k": gsm8k.TASK,
    "triviaqa": triviaqa.TASK,
    "humaneval": humaneval.TASK,
    "mbpp": mbpp.TASK,
}
