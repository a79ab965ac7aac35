"""The steps of a preparation, each on a share of the work: what processes on one machine and tasks on many are given to do.

    survey a span      reads it, writes survey/NUMBER.rec
    plan               merges the surveys: units and split, into the journal; then the tokenizer
    encode units       reads their span, writes parts/NUMBER.rec
    write a shard      joins parts

Every share ends with a file that has its name when it is whole. So what was done is found, and what was not is done again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from grist_data.atomic import canonical_json
from grist_data.cleaning import Cleaner
from grist_data.document import Document
from grist_data.duplicates import later_reasons
from grist_data.encode import CHANGED, Job, encode_units, is_encoded, part_file
from grist_data.encoder import Encoder
from grist_data.join import ShardPlan, write_planned
from grist_data.journal import Journal
from grist_data.manifest import PARTS_DIRECTORY, SURVEY_DIRECTORY
from grist_data.plan import Plan, Split, decide_split, make_plan
from grist_data.prepare_config import PrepareConfig
from grist_data.record_file import read_facts, read_record, write_record
from grist_data.shard_header import Encoding
from grist_data.shard_writer import token_bytes_for
from grist_data.spans import Reader, Span, digest_of
from grist_data.survey import KEPT, Survey, survey_documents
from grist_data.tokenizer import Tokenizer

Task = dict[str, Any]


class Preparation:
    """A dataset on its way. out: its directory, which exists. Raises ValueError when it holds other settings' work."""

    def __init__(self, config: PrepareConfig, writer: str = "") -> None:
        self.config, self.out = config, Path(config.out)
        self.settings = config.settings()
        self.journal = Journal(self.out, self.settings, writer)
        self.reader = Reader(config.source, config.source_options(), config.unit_bytes, self.out)
        for name in (SURVEY_DIRECTORY, PARTS_DIRECTORY):
            (self.out / name).mkdir(exist_ok=True)

    # Survey.

    @cached_property
    def spans(self) -> list[Span]:
        return self.reader.spans()

    def survey_tasks(self, numbers: Sequence[int] | None = None) -> list[Task]:
        """Of the spans that are not surveyed yet, all or those of these numbers."""
        chosen = range(len(self.spans)) if numbers is None else numbers
        return [
            {"step": "survey", "span": number, "pieces": self.spans[number].to_json()}
            for number in chosen
            if not self._is_surveyed(number)
        ]

    def _is_surveyed(self, number: int) -> bool:
        try:
            facts, _ = read_record(self._survey_file(number))
        except (FileNotFoundError, ValueError):
            return False
        return facts["origin"] == self._origin(self.spans[number])

    def _origin(self, span: Span) -> str:
        """What a survey has to agree with to be this span's under these settings; other releases of what cleans begin anew."""
        return hashlib.sha256(canonical_json([span.digest, self.settings, self._cleaned_by])).hexdigest()

    @cached_property
    def _cleaned_by(self) -> dict[str, str]:
        return {} if self.cleaner is None else self.cleaner.versions()

    def _survey_file(self, number: int) -> Path:
        return self.out / SURVEY_DIRECTORY / f"{number:06d}.rec"

    def _dropped_file(self, number: int) -> Path:
        return self.out / SURVEY_DIRECTORY / f"{number:06d}-dropped.rec"

    def _survey(self, number: int, span: Span) -> None:
        survey = survey_documents(self.reader.documents(span), self.config.seed, self.cleaner)
        write_record(
            self._survey_file(number), {"origin": self._origin(span), "reasons": survey.names}, survey.arrays()
        )

    @cached_property
    def cleaner(self) -> Cleaner | None:
        return Cleaner(self.config.clean) if self.config.clean.enabled else None

    def read_survey(self, number: int) -> Survey:
        """Raises FileNotFoundError for a span that is not surveyed."""
        return Survey.from_record(*read_record(self._survey_file(number)))

    def reasons(self, number: int, survey: Survey) -> np.ndarray:
        """(n,) why each document of the span is left out, with what the plan decided."""
        file = self._dropped_file(number)
        return read_record(file)[1]["reasons"] if file.is_file() else survey.reasons

    # Plan.

    def make_plan(self) -> None:
        """Merge the surveys, once all are there. Raises ValueError for a corpus without a document."""
        if self.journal.plan is not None:
            return
        if missing := [task["span"] for task in self.survey_tasks()]:
            raise ValueError(
                f"{len(missing)} of {len(self.spans)} spans are not surveyed yet (the first is number {missing[0]}): run that"
                " step again"
            )
        for left in (self.out / SURVEY_DIRECTORY).glob("*-dropped.rec"):  # of a plan that was not finished
            left.unlink()

        def surveys() -> Iterator[Survey]:
            return map(self.read_survey, range(len(self.spans)))

        exact = self.config.deduplicate == "exact"
        plan = make_plan(
            surveys,
            digest_of(self.spans),
            self.config.unit_bytes,
            later_reasons(surveys, exact, self.config.clean, self.out / SURVEY_DIRECTORY),
            lambda number, reasons: write_record(self._dropped_file(number), {}, {"reasons": reasons}),
        )
        decide_split(plan, self.config.val_fraction, self.config.seed)  # raises where it cannot
        packages = {"cleaned_by": self._cleaned_by} if self.config.clean.enabled else {}
        self.journal.record_plan(plan.to_json() | {"facts": self.reader.facts() | packages})

    @cached_property
    def plan(self) -> Plan:
        if self.journal.plan is None:
            self.journal.read_again()
        if self.journal.plan is None:
            raise ValueError(f"{self.out} has no plan yet: run that step before")
        return Plan.from_json({key: value for key, value in self.journal.plan.items() if key != "facts"})

    @property
    def source_facts(self) -> dict[str, Any]:
        assert self.journal.plan is not None, "there is a plan"
        return self.journal.plan["facts"]

    @cached_property
    def split(self) -> Split:
        return decide_split(self.plan, self.config.val_fraction, self.config.seed)

    def training_documents(self) -> Iterator[tuple[bytes, Document]]:
        """Hash and document of all that stays in the training split."""
        self.check_spans()
        for number, span in enumerate(self.spans):
            survey = self.read_survey(number)
            wanted = (self.reasons(number, survey) == KEPT) & ~self.split.held_out(survey.split_hashes)
            for k, document in enumerate(self.reader.documents(span)):
                if k < len(wanted) and wanted[k]:
                    yield survey.hashes[k].tobytes(), document

    # Encode.

    def check_spans(self) -> None:
        if digest_of(self.spans) != self.plan.spans:
            raise ValueError(CHANGED.format(what="its files or their sizes are others"))

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one saved in the directory, when it is the one of the journal."""
        if self.journal.tokenizer_sha256 is None:
            self.journal.read_again()
        if self.journal.tokenizer_sha256 is None:
            raise ValueError(f"{self.out} has no tokenizer yet: run the step that plans before")
        saved = Tokenizer.load(self.out)
        if saved.sha256 != self.journal.tokenizer_sha256:
            raise ValueError(
                f"{self.out}/tokenizer.json is not the one this preparation began with: start over with overwrite"
            )
        return saved

    @cached_property
    def job(self) -> Job:
        encoding = Encoding(
            token_bytes=token_bytes_for(self.tokenizer.vocab_size, self.config.token_dtype),
            vocab_size=self.tokenizer.vocab_size,
            eot_id=self.tokenizer.eot_id,
            bos_id=self.tokenizer.bos_id,
            eot_appended=self.config.append_eot,
            tokenizer_sha256=self.tokenizer.sha256,
            manifest_sha256=self.plan.digest(),
        )
        return Job(self.out, encoding, self.plan, self.split, self.chat)

    @property
    def chat(self) -> tuple[str, str] | None:
        """For conversations: sha256 of the template, and what is trained. Raises ValueError where the file is another."""
        if not self.config.holds_conversations:
            return None
        template = self.tokenizer.chat_template or ""
        found, asked = hashlib.sha256(template.encode()).hexdigest(), self.settings["chat_template_sha256"]
        if found != asked:
            raise ValueError(
                f"{self.out}/chat_template.jinja is not the template this preparation began with: start over with overwrite"
            )
        return found, self.config.train_on

    @cached_property
    def encoder(self) -> Encoder:
        train_on = self.config.train_on if self.config.holds_conversations else None
        return Encoder(self.tokenizer, self.config.engine, self.plan.text_bytes, train_on)

    def encode_tasks(self, units: Sequence[int], shares: int = 1) -> list[Task]:
        """Of the given units those that are not encoded yet, by span. shares: into how many tasks at least, where it can be.

        A share that does not begin with its span reads what is before it, too, without encoding it.
        """
        self.check_spans()
        of_span: dict[int, list[int]] = {}
        for number in units:
            of_span.setdefault(self.plan.units[number].span, []).append(number)
        each = -(-shares // max(len(of_span), 1))
        return [
            {"step": "encode", "span": span, "pieces": self.spans[span].to_json(), "units": share.tolist()}
            for span, numbers in of_span.items()
            for share in np.array_split(np.array(numbers), min(each, len(numbers)))
        ]

    def missing_units(self, units: Sequence[int]) -> list[int]:
        return [number for number in units if not is_encoded(number, self.job)]

    def n_encoded(self) -> int:
        """Units before the first that is not encoded."""
        n = len(self.plan.units)
        return next((number for number in range(n) if not is_encoded(number, self.job)), n)

    def _encode(self, number: int, span: Span, units: list[int]) -> Iterator[dict[str, Any]]:
        survey = self.read_survey(number)
        documents = self.reader.documents(span)
        reasons = self.reasons(number, survey)
        for unit in encode_units(documents, survey, reasons, units, self.job, self.encoder):
            splits = read_facts(part_file(self.out, unit))["splits"]
            yield {"unit": unit, "tokens": sum(counts["tokens"] for counts in splits.values())}

    # Any of it.

    def perform(self, task: Task) -> Iterator[dict[str, Any]]:
        """Do a task; yields what is done as it is done, as JSON values."""
        if task["step"] == "join":
            root = write_planned(ShardPlan(**task["shard"]), self.job, Path(task["directory"]))
            yield {"index": task["index"], "root": root}
            return
        span = Span.from_json(task["pieces"])
        if task["step"] == "survey":
            self._survey(task["span"], span)
            yield {"span": task["span"]}
        else:
            yield from self._encode(task["span"], span, task["units"])


def describe(task: Task) -> str:
    """The task in an error's message."""
    if task["step"] == "join":
        return f"while writing {ShardPlan(**task['shard']).file}"
    span = Span.from_json(task["pieces"])
    if task["step"] == "survey":
        return f"while reading span {task['span']}, {span}"
    return f"while encoding units {task['units'][0]} to {task['units'][-1]}, of span {task['span']}, {span}"
