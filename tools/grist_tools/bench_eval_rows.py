"""Invented rows of the evaluation tasks, in the columns of their datasets and of about their length: for benchmarks and tests.

Sentences are drawn from a small grammar by a seed; nothing is taken from the datasets, and the right answers are random.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

_NOUNS = """mill wheel river stone grain flour sack baker oven bridge farmer cart horse valley winter harvest market lantern
ladder roof beam rope barrel cellar window garden fence orchard apple spring
meadow shepherd wool loom weaver cloth needle thread candle table letter
teacher pupil slate chalk school bell tower clock gear axle lever pulley engine boiler steam valve pipe
well bucket pump field furrow plough seed rain cloud wind sail harbour boat net fisher salt
copper iron hammer anvil forge""".split()
_VERBS = """turns carries lifts holds follows drives fills empties repairs watches measures weighs grinds pulls pushes crosses
reaches leaves opens closes mends paints counts sells buys stores cools warms cuts joins lowers""".split()
_QUALITIES = """old heavy narrow bright quiet cold dry broken wooden round tall early slow sharp smooth empty full distant
narrow steady rough clean dark warm loose naïve""".split()
_PLACES = """by the river|near the old mill|in the morning|before the harvest|under the bridge|after the rain|at the market
behind the school|during winter|on the hill|across the valley|without a sound""".replace("\n", "|").split("|")


class _Writer:
    def __init__(self, seed: int):
        self.draw = random.Random(seed)

    def noun(self) -> str:
        return self.draw.choice(_NOUNS)

    def clause(self) -> str:
        draw = self.draw
        return f"the {draw.choice(_QUALITIES)} {self.noun()} {draw.choice(_VERBS)} the {self.noun()}"

    def sentence(self) -> str:
        return f"{self.clause().capitalize()} {self.draw.choice(_PLACES)}."

    def sentences(self, least: int, most: int) -> str:
        return " ".join(self.sentence() for _ in range(self.draw.randint(least, most)))

    def phrase(self) -> str:
        """One to five words, as short answers are."""
        draw = self.draw
        word = self.noun()
        return draw.choice([word, f"{draw.choice(_QUALITIES)} {word}", self.clause()])

    def phrases(self, count: int) -> list[str]:
        found: list[str] = []
        while len(found) < count:
            phrase = self.phrase()
            if phrase not in found:
                found.append(phrase)
        return found

    def question(self) -> str:
        return f"What happens when {self.clause()}, and {self.clause()} {self.draw.choice(_PLACES)}?"


def _hellaswag(write: _Writer, number: int) -> Row:
    return {
        "activity_label": f"Working at the [step] {write.noun()}",
        "ctx_a": write.sentences(3, 5) + " [title] How it goes on",
        "ctx_b": "then the " + write.noun(),
        "endings": [f"{write.draw.choice(_VERBS)} the {write.noun()}. {write.sentences(1, 2)}" for _ in range(4)],
        "label": str(write.draw.randrange(4)),
    }


def _labelled(write: _Writer, column: str, labels: str, counts: tuple[int, ...]) -> Row:
    count = write.draw.choice(counts)
    return {
        column: write.question(),
        "choices": {"text": write.phrases(count), "label": list(labels[:count])},
        "answerKey": write.draw.choice(labels[:count]),
    }


def _arc(write: _Writer, number: int) -> Row:
    return _labelled(write, "question", write.draw.choice(["ABCDE", "12345"]), (3, 4, 4, 4, 5))


def _openbookqa(write: _Writer, number: int) -> Row:
    return _labelled(write, "question_stem", "ABCD", (4,))


def _commonsense_qa(write: _Writer, number: int) -> Row:
    return _labelled(write, "question", "ABCDE", (5,))


def _piqa(write: _Writer, number: int) -> Row:
    start = write.clause().capitalize()
    return {
        "goal": f"How to see that {write.clause()}",
        "sol1": f"{start}; {write.sentence()}",
        "sol2": f"{start if number % 2 else write.clause().capitalize()}; {write.sentences(1, 2)}",
        "label": write.draw.randrange(2),
    }


def _winogrande(write: _Writer, number: int) -> Row:
    one, other = write.draw.sample(_NOUNS, 2)
    return {
        "sentence": f"{write.clause().capitalize()} so that the {one} left the {other} {write.draw.choice(_PLACES)}, "
        f"because the _ was {write.draw.choice(_QUALITIES)} and {write.draw.choice(_QUALITIES)}.",
        "option1": one,
        "option2": other,
        "answer": write.draw.choice("12"),
    }


def _boolq(write: _Writer, number: int) -> Row:
    return {
        "passage": f"{write.noun().capitalize()} -- {write.sentences(6, 12)}",
        "question": f"is it true that {write.clause()}",
        "label": write.draw.randrange(2),
    }


def _sciq(write: _Writer, number: int) -> Row:
    wrong = write.phrases(4)
    return {
        "support": "" if number % 7 == 0 else " " + write.sentences(4, 8),
        "question": write.question(),
        **{f"distractor{k}": wrong[k] for k in (1, 2, 3)},
        "correct_answer": wrong[0],
    }


def _mmlu(write: _Writer, number: int) -> Row:
    subject = ("milling_and_baking", "river_studies", "mechanics")[number % 3]
    choices = write.phrases(4)
    return {"question": write.question(), "subject": subject, "choices": choices, "answer": write.draw.randrange(4)}


def _lambada(write: _Writer, number: int) -> Row:
    return {"text": f"{write.sentences(4, 7)} “Look,” said the {write.noun()}, “it is only the {write.noun()}"}


def _gsm8k(write: _Writer, number: int) -> Row:
    a, b = write.draw.randint(2, 90), write.draw.randint(2, 90)
    asked = (
        f"A {write.noun()} holds {a} sacks and gets {b} more {write.draw.choice(_PLACES)}. How many sacks are there?"
    )
    return {"question": asked, "answer": f"There are {a} + {b} = <<{a}+{b}={a + b}>>{a + b} sacks.\n#### {a + b}"}


def _triviaqa(write: _Writer, number: int) -> Row:
    answer = write.noun()
    return {
        "question": f"Which word names what {write.draw.choice(_VERBS)} the {write.noun()}",
        "answer": {"value": answer, "aliases": [answer, answer.capitalize(), f"The {answer}"]},
    }


def _humaneval(write: _Writer, number: int) -> Row:
    name, add = f"add_{write.noun()}", write.draw.randint(1, 9)
    return {
        "task_id": f"invented/{number}",
        "prompt": f'def {name}(x: int) -> int:\n    """Add {add} to x."""\n',
        "test": f"def check(candidate):\n    assert candidate(1) == {1 + add}\n    assert candidate(-3) == {add - 3}\n",
        "entry_point": name,
        "canonical_solution": f"    return x + {add}\n",
    }


def _mbpp(write: _Writer, number: int) -> Row:
    name, factor = f"scale_{write.noun()}", write.draw.randint(2, 9)
    return {
        "task_id": number,
        "text": f"Write a function that multiplies a number by {factor}.",
        "code": f"def {name}(x):\n    return x * {factor}",
        "test_list": [f"assert {name}({x}) == {x * factor}" for x in (1, 5, -2)],
    }


_ROWS: dict[str, Callable[[_Writer, int], Row]] = {
    "hellaswag": _hellaswag,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "piqa": _piqa,
    "winogrande": _winogrande,
    "boolq": _boolq,
    "openbookqa": _openbookqa,
    "sciq": _sciq,
    "commonsense_qa": _commonsense_qa,
    "mmlu": _mmlu,
    "lambada_openai": _lambada,
    "gsm8k": _gsm8k,
    "triviaqa": _triviaqa,
    "humaneval": _humaneval,
    "mbpp": _mbpp,
}


def invented_rows(task: str, count: int, seed: int = 0) -> list[Row]:
    """Rows of a task by its name. The same seed gives the same rows; the first ones do not depend on the count."""
    write = _Writer(seed)
    return [_ROWS[task](write, number) for number in range(count)]


def write_rows(directory: Path, task: str, count: int, seed: int = 0) -> Path:
    """invented_rows as directory/TASK.jsonl."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{task}.jsonl"
    rows = invented_rows(task, count, seed)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def invented_text(sentences: int = 4000, seed: int = 99) -> str:
    """Text of the same words, for a tokenizer to be trained on."""
    write = _Writer(seed)
    return "\n".join(f"Question: {write.question()}\nAnswer: {write.sentence()}" for _ in range(sentences))
