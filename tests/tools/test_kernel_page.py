"""The page of a kernels report: wins and losses are stated as they are, and the picture is small."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

import pytest

from grist_tools.bench_kernels_text import compare, results_table, row_text, share_text
from grist_tools.bench_kernels_times import HOW, add_rates
from grist_tools.kernel_page import main, page, write_page
from grist_tools.timing import Ceilings

LIMITS = Ceilings(1e12, 1e14)


def part(ms: float, flops: float = 0.0, **more) -> dict:
    return {"median_ms": ms, "p20_ms": ms, "p80_ms": ms, "repetitions": 5, "bytes": 8e8, "flops": flops, **more}


def row(
    op: str = "rms_norm", case: str = "wide", *, flops: float = 0.0, peer: dict, large: bool = True, **parts
) -> dict:
    found = {"op": op, "case": case, "large": large, "dtype": "bfloat16", "implementation": "triton"}
    found |= {"error_over_allowed": 0.5, "ok": True, "peers": peer}
    found |= {name: {**value, "flops": flops} for name, value in parts.items()}
    add_rates(found, LIMITS)
    return found


def right(**parts) -> dict:
    return {"error_over_allowed": 0.4, "ok": True, **{name: {"median_ms": ms} for name, ms in parts.items()}}


@pytest.fixture
def report() -> dict:
    rows = [
        row(
            forward=part(1.0, target=0.75),
            backward=part(1.0, target=0.9),
            peer={"eager": right(forward=3.0, backward=0.8), "Liger": {"ok": False, "error_over_allowed": 7.0}},
        ),
        row(case="even", forward=part(1.0), peer={"eager": right(forward=1.02)}),
        row(
            "linear_cross_entropy",
            "loss",
            flops=5e10,
            forward=part(1.0),
            peer={"eager": {"ok": False, "failed": "E: no"}},
        ),
        {"op": "rope", "case": "bad", "dtype": "bfloat16", "large": True, "ok": False, "error_over_allowed": 12.0},
    ]
    return {
        "what": "kernels",
        "command": ["python", "-m", "grist_tools.bench_kernels"],
        "commit": "0123456789abcdef",
        "device": "A device",
        "versions": {"torch": "2.11.0", "triton": None},
        "date": "2030-01-02T03:04:05+00:00",
        "threads": 4,
        "mode": "auto",
        "how": HOW,
        "complete": True,
        "cases_planned": 4,
        "gpu_before": "driver, clock\n1, 2",
        "ceilings": {"bfloat16": {"before": vars(LIMITS), "after": vars(LIMITS), "used": vars(LIMITS)}},
        "rows": rows,
    }


def test_the_page_says_what_was_measured_where_and_how(report):
    text = page(report, "picture.svg")
    assert text.startswith("# Kernels on A device, 2030-01-02")
    for fact in ("0123456789abcdef", "torch 2.11.0", "1,000 GB/s, 100 TFLOP/s (before)", "driver, clock; 1, 2"):
        assert fact in text
    assert "](picture.svg)" in text
    assert all(how in text for how in HOW.values())
    assert "triton" not in text.split("## In short")[0]  # not installed: no version
    assert "Incomplete" not in text
    assert "![" not in page(report, None)
    assert "**Incomplete: stopped after 4 of 9 cases.**" in page(
        {**report, "complete": False, "cases_planned": 9}, None
    )


def test_wins_losses_targets_and_faults_are_stated(report):
    text = page(report, None)
    assert "4 cases compared with float64, 1 wrong and not timed." in text
    assert "rope bad bfloat16: error 12 of what is allowed" in text
    assert "1 of 2 targets reached." in text
    assert "rms_norm wide backward: 80.0% < 90%" in text
    assert "| eager | forward | 2 | 1 | 1 | 0 | 1.75 |" in text  # sqrt(3 * 1.02)
    assert "| eager | backward | 1 | 0 | 0 | 1 | 0.80 |" in text
    assert "rms_norm wide bfloat16 backward: eager 0.8000 ms, ours 1.0000 ms (1.25 times as long)" in text
    assert text.count("times as long") == 1
    assert "Liger, wide bfloat16, not timed: error 7 of what is allowed" in text
    assert "eager, loss bfloat16, not timed: E: no" in text
    assert "| wide bfloat16 | forward | 1.0000 | 800 GB/s | 80.0% (75%) | 3.0000 (3.00) |  |" in text
    assert "| loss bfloat16 | forward | 1.0000 | 50 TFLOP/s | 80% |  |" in text


def test_losses_of_small_cases_are_listed_worst_first_and_counted(report):
    report["rows"] = [
        row(case=f"case_{number}", large=False, forward=part(1.0), peer={"eager": right(forward=0.9 - number / 100)})
        for number in range(25)
    ]
    text = page(report, None)
    assert "| eager | forward | 25 | 0 | 0 | 25 |" in text
    assert text.count("times as long") == 20
    assert text.index("case_24 bfloat16 forward: eager") < text.index("case_23 bfloat16 forward: eager")
    assert "and 5 more, in the tables" in text
    report["rows"] = [{**each, "large": True} for each in report["rows"]]
    assert page(report, None).count("times as long") == 25


def test_no_loss_is_said_too(report):
    report["rows"] = [row(forward=part(1.0), peer={"eager": right(forward=2.0)})]
    assert "Ours is slower in none of these." in page(report, None)


def test_graphs_are_compared_with_graphs_only(report):
    ours = part(1.0, graph_ms=0.5)
    with_graph = {"ok": True, "error_over_allowed": 0.1, "forward": {"median_ms": 3.0, "graph_ms": 1.0}}
    without = {"ok": True, "error_over_allowed": 0.1, "forward": {"median_ms": 3.0}}
    both = row(forward=ours, peer={"a": with_graph, "b": without})
    found = {each.peer: each for each in compare(both)}
    assert (found["a"].ratio, found["a"].by_graph) == (2.0, True)
    assert (found["b"].ratio, found["b"].by_graph) == (3.0, False)
    text = page({**report, "rows": [both]}, None)
    assert (
        "| wide bfloat16 | forward | 1.0000 | 0.5000 | 800 GB/s | 160% | 1.0000 graph (2.00) | 3.0000 (3.00) |" in text
    )


def test_a_share_stands_beside_its_target():
    assert share_text({"fraction_of_ceiling": 0.8, "target": 0.9}) == "80.0% < 90%"
    assert share_text({"fraction_of_ceiling": 0.8, "graph_fraction_of_ceiling": 0.95, "target": 0.9}) == "95.0% (90%)"
    assert share_text({"fraction_of_ceiling": 0.8}) == "80%"
    assert share_text({}) == "-"


def test_rows_for_a_terminal(report):
    text = results_table(report["rows"])
    assert "eager 3.00/0.80, Liger wrong" in text
    assert "eager failed" in text
    assert "WRONG" in text.splitlines()[-1]
    assert row_text(report["rows"][3]) == "rope bad bfloat16: WRONG, error 12 of what is allowed"
    assert results_table([]).startswith("op case")


def test_the_picture_is_small_and_the_same_each_time(report, tmp_path):
    for number in range(60):
        report["rows"].append(row(case=f"case_{number}", forward=part(1.0), peer={"eager": right(forward=2.0)}))
    pictures = []
    for name in ("a.json", "b.json"):
        written = write_page(report, tmp_path / name)
        assert [path.suffix for path in written] == [".md", ".svg"]
        pictures.append(written[1].read_bytes())
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) < 200_000
    texts = {element.text for element in ElementTree.fromstring(pictures[0]).iter() if element.text}
    assert {"rms_norm wide forward", "rms_norm case_59 forward", "ours", "eager", "target"} <= texts
    assert "FLOP per byte (least amounts)" in texts


def test_a_report_of_nothing_has_a_page_and_no_picture(report, tmp_path):
    written = write_page({**report, "rows": [], "complete": False}, tmp_path / "none.json")
    assert written == [tmp_path / "none.md"]
    assert "stopped after 0 of 4" in written[0].read_text(encoding="utf-8")


def test_command_line(report, tmp_path, capsys):
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(report), encoding="utf-8")
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "kernels.md"), str(tmp_path / "kernels.svg")]
    path.write_text('{"what": "latency"}', encoding="utf-8")
    assert main([str(path)]) == 2
    assert 'expected an object with "what": "kernels"' in capsys.readouterr().err
    assert main([str(tmp_path / "missing.json")]) == 2
