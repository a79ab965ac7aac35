"""A preparation on many machines that share a directory: four steps, of which two are dealt out to any number of tasks.

    python -m grist_data.spread survey --config prepare.yaml --rank 3 --world 64    # any number of tasks, in any order
    python -m grist_data.spread plan   --config prepare.yaml                        # once, when all of them are done
    python -m grist_data.spread encode --config prepare.yaml --rank 3 --world 200   # again any number of tasks
    python -m grist_data.spread finish --config prepare.yaml                        # once

The file of --config holds fields of PrepareConfig (YAML or JSON); options on the command line come before it. A task that
failed or was killed is run again, alone; what it had done is found. The dataset is that of `grist_data.prepare`, byte for
byte, for any number of tasks. `finish --partial DIR` makes a dataset of the units before the first that is not encoded.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from grist_data.atomic import PART_SUFFIX
from grist_data.lock import exclusive
from grist_data.prepare import checked, clear_work, is_finished, refuse_foreign
from grist_data.prepare_config import PrepareConfig
from grist_data.run_command import parser_for, run_command

STEPS = ("survey", "plan", "encode", "finish")


def survey(config: PrepareConfig, rank: int = 0, world: int = 1) -> None:
    """Task `rank` of `world`: survey every world-th span of the source.

    Raises ValueError for a stream on more than one task: it is read once, by one.
    """
    from grist_data import work
    from grist_data.preparation import Preparation
    from grist_data.workers import Workers

    _check_share(rank, world)
    if _is_finished(config):
        return
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    refuse_foreign(out)
    preparation = Preparation(config, writer=f".{rank}")
    if preparation.reader.is_stream:
        if world > 1:
            raise ValueError(
                "a stream is read once, by one task: survey with --world 1 (it is stored in the directory), then plan and"
                " encode with as many tasks as you like"
            )
        preparation.reader.store_stream()
    with Workers(preparation) as workers:
        work.survey(preparation, workers, range(rank, len(preparation.spans), world))


def plan(config: PrepareConfig) -> None:
    """Merge the surveys and obtain the tokenizer. Raises ValueError when a span is not surveyed."""
    from grist_data import work
    from grist_data.preparation import Preparation

    if _is_finished(config):
        return
    with _alone(config) as out:
        _refuse_unbegun(out)
        work.plan(Preparation(config))


def encode(config: PrepareConfig, rank: int = 0, world: int = 1) -> None:
    """Task `rank` of `world`: encode its share of the units, neighbours all of them. Raises ValueError without a plan."""
    from grist_data import work
    from grist_data.preparation import Preparation
    from grist_data.workers import Workers

    _check_share(rank, world)
    if _is_finished(config):
        return
    _refuse_unbegun(Path(config.out))
    preparation = Preparation(config)
    n = len(preparation.plan.units)
    with Workers(preparation) as workers:
        work.encode(preparation, workers, range(n * rank // world, n * (rank + 1) // world))


def finish(config: PrepareConfig, partial: str | None = None) -> None:
    """Join the parts and write dataset.json.

    partial: instead, make a dataset in this new directory of the units before the first that is not encoded; nothing else
    changes. Raises ValueError when a unit (with `partial`, the first) is not encoded.
    """
    from grist_data import work
    from grist_data.finish import summary
    from grist_data.new_directory import new_directory
    from grist_data.preparation import Preparation
    from grist_data.workers import Workers

    if _is_finished(config):
        if partial is not None:
            raise ValueError(f"{config.out} is finished: there is no part of it to make a dataset of")
        return
    _refuse_unbegun(Path(config.out))
    if partial is not None:
        preparation = Preparation(config)
        units = range(preparation.n_encoded())
        if not units:
            raise ValueError("the first unit is not encoded yet: there is nothing to make a dataset of")
        with new_directory(Path(partial)) as directory, Workers(preparation) as workers:
            preparation.tokenizer.save(directory)
            splits = work.finish(preparation, workers, units, directory)
        print(f"{partial}: {len(units)} of {len(preparation.plan.units)} units; {summary(splits)}", file=sys.stderr)
        return
    with _alone(config) as out:
        preparation = Preparation(config)
        units = range(len(preparation.plan.units))
        if missing := preparation.missing_units(units):
            raise ValueError(
                f"{len(missing)} of {len(units)} units are not encoded (the first is number {missing[0]}): run those tasks"
                " again"
            )
        for unfinished in out.rglob(f"*{PART_SUFFIX}"):  # of tasks that were killed
            unfinished.unlink()
        with Workers(preparation) as workers:
            splits = work.finish(preparation, workers, units, out)
        clear_work(out)
    print(f"{out}: {summary(splits)}", file=sys.stderr)


def run_step(step: str, config: PrepareConfig, rank: int, world: int) -> None:
    """One task of a step by its name. Raises ValueError for one of several tasks of a step that is a single one."""
    _check_share(rank, world)
    if step in ("survey", "encode"):
        {"survey": survey, "encode": encode}[step](config, rank, world)
        return
    if world > 1:
        raise ValueError(f"{step} is a step for one task, but world is {world}")
    {"plan": plan, "finish": finish}[step](config)


def _is_finished(config: PrepareConfig) -> bool:
    return is_finished(checked(config), config.settings())


def _refuse_unbegun(out: Path) -> None:
    from grist_data.manifest import JOURNAL_FILE

    if not (out / JOURNAL_FILE).is_file():
        raise ValueError(f"nothing is begun in {out}: survey first")


@contextlib.contextmanager
def _alone(config: PrepareConfig) -> Iterator[Path]:
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with exclusive(out):
        yield out


def _check_share(rank: int, world: int) -> None:
    if not 0 <= rank < world:
        raise ValueError(f"rank must be at least 0 and below world ({world}), but is {rank}")


def parser() -> argparse.ArgumentParser:
    from grist_data.command_line import add_options

    found = parser_for("spread", __doc__)
    found.add_argument("step", choices=STEPS)
    found.add_argument("--config", metavar="FILE", help="YAML or JSON of the settings")
    found.add_argument("--rank", type=int, default=0, help="number of this task, from 0 [0]")
    found.add_argument("--world", type=int, default=1, help="number of tasks [1]")
    found.add_argument("--partial", metavar="DIR", help="(finish) make a dataset of what is encoded, in this directory")
    add_options(found)
    return found


def main(arguments: list[str] | None = None) -> int:
    from grist_data.command_line import read_config, with_underscores

    given = parser().parse_args(with_underscores(sys.argv[1:] if arguments is None else arguments))

    def act() -> int:
        values = dict(vars(given))
        step, rank, world, partial, file = (values.pop(name) for name in ("step", "rank", "world", "partial", "config"))
        config = read_config(file, values)
        if partial is None:
            run_step(step, config, rank, world)
        elif step == "finish":
            finish(config, partial)
        else:
            raise ValueError(f"--partial belongs to the step finish, not to {step}")
        return 0

    return run_command(act)


if __name__ == "__main__":
    sys.exit(main())
