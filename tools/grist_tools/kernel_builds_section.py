"""The table in kernels/README.md that says what the kernels' builds take: made from kernel_builds' results, never by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

README = Path(__file__).parents[2] / "kernels" / "README.md"
BEGIN = "<!-- kernel_builds: begin -->"
END = "<!-- kernel_builds: end -->"
_SECTION = re.compile(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", re.DOTALL)


class Worst(NamedTuple):
    """The worst of each figure among the builds of one kernel for one architecture."""

    builds: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    widest_load: int
    main_load: int


def summary(report: dict[str, Any]) -> dict[tuple[str, str, str], Worst]:
    """(op, kernel, architecture) -> the worst of its builds, in the report's order."""
    groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for build in report["builds"]:
        groups.setdefault((build["op"], build["kernel"], build["architecture"]), []).append(build)
    return {key: _worst(builds) for key, builds in groups.items()}


def _worst(builds: list[dict[str, Any]]) -> Worst:
    most = (max(build[name] for build in builds) for name in ("registers", "spilled_bytes", "shared_bytes"))
    least = (min(build[name] for build in builds) for name in ("widest_load", "main_load"))
    return Worst(len(builds), *most, *least)


def section(report: dict[str, Any]) -> str:
    """The text between the markers, markers included: a line for each kernel, a column for each architecture."""
    worst = summary(report)
    architectures = list(dict.fromkeys(architecture for _, _, architecture in worst))
    lines = ["| kernel | builds | " + " | ".join(architectures) + " |", "|---|---:|" + "---:|" * len(architectures)]
    for op, kernel in dict.fromkeys((op, kernel) for op, kernel, _ in worst):
        found = [worst.get((op, kernel, architecture)) for architecture in architectures]
        cells = [
            "-" if it is None else f"{it.registers} / {it.spilled_bytes} / {it.shared_bytes} / {it.main_load}"
            for it in found
        ]
        builds = sum(it.builds for it in found if it is not None)
        lines.append(f"| {op} {kernel} | {builds} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    return (
        f"{BEGIN}\n"
        f"Built by triton {report['triton']}: registers of a thread (gfx942: vector registers) / bytes that it spills /\n"
        "bytes of shared memory of a program / bits of the loads that fetch most. The worst of all builds.\n\n"
        f"{text}\n"
        f"{END}"
    )


def replaced(text: str, new: str) -> str:
    """A README's text with its section replaced. Raises ValueError if it has no markers."""
    if not _SECTION.search(text):
        raise ValueError(f"{README} has no lines {BEGIN} and {END} for the table to stand between")
    return _SECTION.sub(lambda _: new, text)


def written(text: str) -> tuple[str, str]:
    """(section, version of triton that it names) of a README's text. Raises ValueError if there is none."""
    found = _SECTION.search(text)
    version = re.search(r"Built by triton (\S+):", found[0]) if found else None
    if found is None or version is None:
        raise ValueError(
            f"{README} has no table of builds; `python -m grist_tools.kernel_builds --write-readme` writes it"
        )
    return found[0], version[1]
