"""A results file of bench_kernels as a page to read: what was measured where and how, what is faster, what is slower.

    python -m grist_tools.kernel_page benchmarks/kernels-DEVICE-DATE.json

Writes FILE.md, and FILE.svg where matplotlib is installed, beside the JSON. bench_kernels does so by itself.
"""

from __future__ import annotations

import argparse
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from grist_tools.bench_kernels_text import DIRECTIONS, EVEN, Comparison, Row, compare, share, share_text, why
from grist_tools.console import fail, parser_for, run

SMALL_LOSSES = 20  # listed where there are only small cases


def page(report: dict[str, Any], picture: str | None) -> str:
    """A report of bench_kernels as Markdown; picture is the file beside it to show."""
    rows = report["rows"]
    timed = [row for row in rows if row["ok"]]
    parts = [f"# Kernels on {report['device']}, {report['date'][:10]}", _where(report)]
    if not report["complete"]:
        parts.append(f"**Incomplete: stopped after {len(rows)} of {report['cases_planned']} cases.**")
    parts += ["## In short", _in_short(rows, [found for row in timed for found in compare(row)])]
    if picture is not None:
        parts.append(f"![Achieved rates against this device's ceilings]({picture})")
    if timed:
        parts.append("In the tables a peer's time stands in ms, and in brackets over ours: above 1 ours is faster.")
    for op in dict.fromkeys(row["op"] for row in timed):
        parts += [f"## {op}", _op_table([row for row in timed if row["op"] == op]), _notes(rows, op)]
    parts += ["## How it was measured", "\n".join(f"- **{name}**: {text}." for name, text in report["how"].items())]
    return "\n\n".join(part for part in parts if part) + "\n"


def _where(report: dict[str, Any]) -> str:
    lines = [
        f"- commit: {report['commit'] or 'unknown (no checkout)'}",
        f"- command: `{' '.join(report['command'])}`",
        f"- date: {report['date']}",
        "- versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version),
        f"- kernels: mode {report['mode']}; CPU threads {report['threads']}",
    ]
    for dtype, found in report["ceilings"].items():
        rates = [
            f"{found[when]['copy_bytes_per_second'] / 1e9:,.0f} GB/s, "
            f"{found[when]['matmul_flops_per_second'] / 1e12:.3g} TFLOP/s ({when})"
            for when in ("before", "after")
            if when in found
        ]
        lines.append(f"- ceilings for {dtype}, copy and matrix product in this run: {'; '.join(rates)}")
    lines += [f"- GPU {when}: `{text}`" for when in ("before", "after") if (text := _one_line(report, f"gpu_{when}"))]
    return "\n".join(lines)


def _one_line(report: dict[str, Any], key: str) -> str:
    return "; ".join((report.get(key) or "").splitlines())


def _in_short(rows: list[Row], found: list[Comparison]) -> str:
    wrong = [f"{row['op']} {row['case']} {row['dtype']}: {why(row)}" for row in rows if not row["ok"]]
    lines = [f"- {len(rows)} cases compared with float64, {len(wrong)} wrong and not timed."]
    lines += [f"  - {text}" for text in wrong]
    aims = [(row, name, row[name]) for row in rows for name in DIRECTIONS if "target" in row.get(name, {})]
    if aims:
        missed = [aim for aim in aims if (share(aim[2]) or 0) < aim[2]["target"]]
        lines.append(f"- {len(aims) - len(missed)} of {len(aims)} targets reached. Missed:" + (" none." * (not missed)))
        lines += [f"  - {row['op']} {row['case']} {name}: {share_text(part)}" for row, name, part in missed]
    text = "\n".join(lines)
    large = [each for each in found if each.row["large"]]
    small = [each for each in found if not each.row["large"]]
    for title, some in (("Large cases", large), ("Small cases, which say what a call costs", small)):
        if some:
            text += f"\n\n{title}:\n\n{_score(some)}"
    return text + _losses(large or small, every=bool(large)) if found else text


def _losses(found: list[Comparison], every: bool) -> str:
    """Where ours is slower, worst first; of small cases only some, since each stands in the tables."""
    slower = sorted((each for each in found if each.ratio < 1 - EVEN), key=lambda each: each.ratio)
    if not slower:
        return "\n\nOurs is slower in none of these."
    shown = slower if every else slower[:SMALL_LOSSES]
    rest = f"\n- and {len(slower) - len(shown)} more, in the tables" if len(shown) < len(slower) else ""
    return "\n\nOurs is slower in:\n\n" + "\n".join(map(_loss, shown)) + rest


def _score(found: list[Comparison]) -> str:
    """How often ours is faster and slower than each peer, and the geometric mean of its times over ours."""
    cells = []
    for peer in dict.fromkeys(each.peer for each in found):
        for direction, title in DIRECTIONS.items():
            ratios = [each.ratio for each in found if (each.peer, each.direction) == (peer, direction)]
            if ratios:
                faster, slower = sum(r > 1 + EVEN for r in ratios), sum(r < 1 - EVEN for r in ratios)
                mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
                even = len(ratios) - faster - slower
                cells.append([peer, title, *map(str, (len(ratios), faster, even, slower)), f"{mean:.2f}"])
    return _markdown(["peer", "direction", "compared", "ours faster", "even", "ours slower", "its time / ours"], cells)


def _loss(found: Comparison) -> str:
    how = ", by CUDA graphs" if found.by_graph else ""
    return (
        f"- {found.row['op']} {found.row['case']} {found.row['dtype']} {DIRECTIONS[found.direction]}: {found.peer} "
        f"{found.peer_ms:.4f} ms, ours {found.ours_ms:.4f} ms ({1 / found.ratio:.2f} times as long{how})"
    )


def _op_table(rows: list[Row]) -> str:
    """Every timed case and direction of an op; a peer's cell is its time and, in brackets, that over ours."""
    names = list(dict.fromkeys(name for row in rows for name in row.get("peers", {})))
    found = {(id(each.row), each.direction, each.peer): each for row in rows for each in compare(row)}
    header = ["case", "direction", "ours ms", "graph ms", "host µs", "rate", "of ceiling (target)", *names]
    cells = []
    for row in sorted(rows, key=lambda row: not row["large"]):
        for direction in (direction for direction in DIRECTIONS if direction in row):
            part = row[direction]
            line = [f"{row['case']} {row['dtype']}", DIRECTIONS[direction], f"{part['median_ms']:.4f}"]
            line += [f"{part['graph_ms']:.4f}" if "graph_ms" in part else "", f"{part.get('host_us', '')}"]
            teraflops = part.get("teraflops")
            line += [
                f"{teraflops:.3g} TFLOP/s" if teraflops else f"{part['gigabytes_per_second']:.0f} GB/s",
                share_text(part),
            ]
            for name in names:
                each = found.get((id(row), direction, name))
                graph = " graph" if each is not None and each.by_graph else ""
                line.append("" if each is None else f"{each.peer_ms:.4f}{graph} ({each.ratio:.2f})")
            cells.append(line)
    used = [i for i, title in enumerate(header) if i < 3 or any(line[i] for line in cells) or title in names]
    return _markdown([header[i] for i in used], [[line[i] for i in used] for line in cells])


def _notes(rows: list[Row], op: str) -> str:
    """What a reader of an op's peers has to know: what each is, and which were wrong or failed and so have no time."""
    notes, left_out = {}, []
    for row in (row for row in rows if row["op"] == op):
        for name, peer in row.get("peers", {}).items():
            notes.setdefault(name, peer.get("note"))
            if not peer["ok"]:
                left_out.append(f"- {name}, {row['case']} {row['dtype']}, not timed: {why(peer)}")
        left_out += [
            f"- no graph of {row['case']} {name}: {row[name]['no_graph']}"
            for name in DIRECTIONS
            if "no_graph" in row.get(name, {})
        ]
    return "\n".join([*(f"- {name}: {note}" for name, note in notes.items() if note), *left_out])


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in [header, rule, *rows]
    )


def write_page(report: dict[str, Any], json_path: Path) -> list[Path]:
    """Write the page and its picture beside the JSON, and return them. No picture where matplotlib is not installed, or
    where nothing was timed."""
    written = []
    picture = json_path.with_suffix(".svg")
    if find_spec("matplotlib") is None:
        print("no picture: matplotlib is not installed")
    elif any(row["ok"] for row in report["rows"]):
        from grist_tools.kernel_page_plot import draw

        draw(report, picture)
        written.append(picture)
    target = json_path.with_suffix(".md")
    target.write_text(page(report, picture.name if written else None), encoding="utf-8")
    return [target, *written]


def parser() -> argparse.ArgumentParser:
    parser = parser_for("kernel_page", __doc__)
    parser.add_argument("results", metavar="JSON", help="what bench_kernels wrote")
    return parser


def main(arguments: list[str] | None = None) -> int:
    path = Path(parser().parse_args(arguments).results)
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict) or report.get("what") != "kernels":
            raise ValueError(f'{path} is no result of bench_kernels: expected an object with "what": "kernels"')
        for written in write_page(report, path):
            print(written)
    except (OSError, ValueError) as error:
        return fail("kernel_page", error)
    return 0


if __name__ == "__main__":
    run(main)
