"""Check and time the data path on this machine: text to shards, and shards to batches.

    python -m grist_tools.bench_data                            # random ids, made for the purpose and removed again
    python -m grist_tools.bench_data --peers                    # nanoGPT's way and torch's DataLoader on the same file too
    python -m grist_tools.bench_data --dataset datasets/books   # a dataset of your own
    python -m grist_tools.bench_data --tokens 1073741824        # above 2^29 tokens (1 GiB) rows are read ahead one by one

Every batch stream is first compared with the files, read by numpy alone; what is wrong is not timed, and if it is ours the
command ends with status 1. Streams are timed in turns. A JSON goes to benchmarks/ after every part; Ctrl-C keeps what is done.
"""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_tools.bench_data_report import new_report, results_table, value_text
from grist_tools.bench_kernels import default_out
from grist_tools.console import count, fail, parser_for, run

if TYPE_CHECKING:
    from grist_data import Shards
    from grist_tools.bench_data_supply import Sizes
    from grist_tools.bench_data_turns import Row

OURS = ("grist_data", "grist_data.prepare")
TARGETS = {"supply": 500e6, "supply, documents": 190e6, "supply, cold": 100e6}  # tokens/s
START_MS = 50.0
OWN_BYTES = 5e6
PARTS = ("supply", "own memory", "start", "cold", "text")


def parser() -> argparse.ArgumentParser:
    parser = parser_for("bench_data", __doc__)
    parser.add_argument("--tokens", type=int, default=2**26, help="of the dataset that is made (default: %(default)s)")
    parser.add_argument("--dataset", metavar="DIR", help="a prepared dataset instead, read and never written")
    parser.add_argument(
        "--text", metavar="PATH", action="append", default=[], help="texts to encode (default: the offline sample)"
    )
    parser.add_argument(
        "--text-mb", type=float, default=12.0, help="repeat them up to this size (default: %(default)s)"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=8192, help="of the BPE that is trained (default: %(default)s)"
    )
    parser.add_argument("--sequence-length", type=int, default=2048, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="sequences (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each contestant, in all (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant (default: %(default)s)")
    parser.add_argument("--peers", action="store_true", help="nanoGPT's way and torch's DataLoader too")
    parser.add_argument(
        "--folder", metavar="DIR", help="make the data in here (default: the system's temporary folder)"
    )
    parser.add_argument("--out", metavar="JSON", help="default: benchmarks/data-DEVICE-DATE.json")
    return parser


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError for sizes that make no benchmark."""
    for name in ("sequence_length", "batch", "rounds", "seconds", "text_mb"):
        if getattr(options, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, but is {getattr(options, name)}")
    # Of the mixture's parts, one has a quarter of the tokens; an epoch has to hold a few batches.
    fewest = 16 * options.batch * (options.sequence_length + 1)
    if options.tokens < fewest:
        raise ValueError(f"--tokens must be at least {fewest:,} for these batches, but is {options.tokens:,}")


def parts_of(
    options: argparse.Namespace, folder: Path, report: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], list[Row]]]]:
    """The parts of the benchmark, by name, in order; what they read is made on the way."""
    from grist_data import Shards, Tokenizer
    from grist_data.tokenizer_training import train_bpe
    from grist_tools import bench_data_sets, bench_data_start
    from grist_tools.bench_data_supply import Sizes
    from grist_tools.bench_data_text import text_rows
    from grist_tools.bench_data_turns import judged

    sizes = Sizes(options.batch, options.sequence_length)
    texts = bench_data_sets.texts_of(options.text)
    trained = train_bpe(texts, options.vocab_size)
    tokenizer = Tokenizer.load(options.dataset) if options.dataset else trained
    directory = Path(options.dataset or folder / "main")
    if not options.dataset:
        say(f"making {count(options.tokens)} random ids in {folder}")
        bench_data_sets.make_dataset(directory, tokenizer, options.tokens, seed=0)
    others = {
        name: bench_data_sets.make_dataset(folder / name, tokenizer, options.tokens // 4, seed)
        for seed, name in enumerate(("second", "third"), 1)
    }
    main_split = Shards.open(directory)
    report["dataset"] = bench_data_sets.facts(main_split)
    del main_split  # the cold part needs the files unmapped

    def supply() -> list[Row]:
        splits = {name: Shards.open(path) for name, path in {"main": directory, **others}.items()}
        return supply_rows(splits, sizes, options)

    def own_memory() -> list[Row]:
        row = bench_data_start.own_memory_row(directory, sizes)
        return [{"what": "own memory", "who": "grist_data", **judged(row, OWN_BYTES, "lower")}]

    def start() -> list[Row]:
        found = bench_data_start.start_rows(directory, sizes, options.rounds)
        return [{"what": n, "who": "grist_data", **judged(row, START_MS, "lower")} for n, row in found.items()]

    def cold() -> list[Row]:
        row = bench_data_start.cold_row(directory, sizes, options.seconds, min(3, options.rounds))
        return [{"what": "supply, cold", "who": "grist_data", **judged(row, TARGETS["supply, cold"])}]

    def text() -> list[Row]:
        many = bench_data_sets.repeated(texts, int(1e6 * options.text_mb))
        found = text_rows(many, trained, folder / "text", min(3, options.rounds))
        return [{"what": "text to shards", "who": who, **row} for who, row in found.items()]

    yield from zip(PARTS, (supply, own_memory, start, cold, text), strict=True)


def supply_rows(splits: dict[str, Shards], sizes: Sizes, options: argparse.Namespace) -> list[Row]:
    """All streams from the page cache, in turns."""
    from grist_tools import bench_data_peers, bench_data_supply
    from grist_tools.bench_data_turns import judged, race

    main_split = splits["main"]
    contestants = {
        ("supply", "grist_data"): bench_data_supply.plain(main_split, sizes),
        ("supply, documents", "grist_data"): bench_data_supply.with_documents(main_split, sizes),
        ("supply, mixture of three", "grist_data"): bench_data_supply.mixed(splits, sizes),
        ("supply", "copy of the bytes"): bench_data_peers.copy_limit(sizes),
    }
    if options.peers:
        for name, peer in bench_data_peers.peers(main_split, sizes).items():
            contestants["supply", name] = peer
    found = race(contestants, options.seconds, options.rounds)
    rows = []
    for (what, who), row in found.items():
        if who in OURS and what in TARGETS:
            row = judged(row, TARGETS[what])
        rows.append({"what": what, "who": who, **row})
    return rows


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(report: dict[str, Any], options: argparse.Namespace, save: Callable[[], None]) -> None:
    """Fill a report with the rows of all parts; save() after each."""
    with tempfile.TemporaryDirectory(prefix="grist-bench-data-", dir=options.folder) as folder:
        for number, (name, work) in enumerate(parts_of(options, Path(folder), report), 1):
            say(f"[{number}/{len(PARTS)}] {name}")
            for row in work():
                report["rows"].append(row)
                say(f"  {row['what']}, {row['who']}: {value_text(row) if row['ok'] else 'WRONG, ' + row['wrong']}")
            save()
    report["complete"] = True


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    from grist_eval.environment import write_json

    try:
        check_options(options)
        report = new_report(options, sys.argv[1:] if arguments is None else arguments)
        out = (
            Path(options.out)
            if options.out
            else default_out(report["device"], datetime.date.today().isoformat(), "data")
        )
        write_json(report, out)  # an unusable path is found before the work, not after it
    except (ValueError, OSError) as error:
        return fail("bench_data", error)
    stopped = False
    # SIGTERM ends like Ctrl-C: the data that was made is removed on the way out.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        measure(report, options, lambda: write_json(report, out))
    except KeyboardInterrupt:
        stopped = True
    except (ValueError, ImportError, OSError) as error:
        if not report["rows"]:
            out.unlink(missing_ok=True)  # it says nothing
        return fail("bench_data", error)
    finally:
        signal.signal(signal.SIGTERM, before)
    write_json(report, out)
    print(results_table(report["rows"]))
    print(f"written to {out}")
    if stopped:
        say(f"stopped after {len(report['rows'])} rows")
        return 130
    return 0 if all(row["ok"] for row in report["rows"] if row["who"] in OURS) else 1


if __name__ == "__main__":
    run(main)
