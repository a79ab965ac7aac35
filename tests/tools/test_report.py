from __future__ import annotations

import json
import re

import pytest
from report_runs import Page, full_run, row, write_rows

from grist_tools.report import main, write
from grist_tools.report_page import OF_A_RUN

SECTIONS = ["in-short", "curves", "router-health", *(title.lower().replace(" ", "-") for title in OF_A_RUN)]
SECTIONS += ["configuration", "environment"]


def report(*folders, out=None) -> str:
    arguments = [*map(str, folders), *(["--out", str(out)] if out else [])]
    assert main(arguments) == 0
    return (out or folders[0] / "report.html").read_text(encoding="utf-8")


def test_a_whole_run_has_every_section_filled(tmp_path):
    page = Page(report(full_run(tmp_path / "quick")))
    assert page.headings[0] == "Run quick"
    assert [each["id"] for each in page.of("h2")] == SECTIONS
    assert not [each for each in page.of("p") if each.get("class") == "missing"]
    said = {
        "in-short": [
            "0.625",
            "at the end",
            "best 0.25 at step 8",
            "1,280",
            "30.0%",
            "3.00 GiB",
            "503 a rank",
            "flops_per_token",
        ],
        "curves": [
            "Loss",
            "Bits per byte",
            "Gradient norm",
            "Learning rate",
            "Tokens per second",
            "MFU",
            "Memory peak bytes",
        ],
        "router-health": ["Router entropy", "Dead experts by layer", "layer 1: mean"],
        "step-time": ["data", "forward", "sorting", "together", "34"],
        "bad-batches": [
            "step 7: <b>spike</b>, loss 9.5",
            "source plays, window 3",
            "<script>x</script>",
            "no finite number, steps in all: 1 (2).",
        ],
        "stages": ["yes", "128", "256"],
        "evaluation": ["bits_per_byte", "0.625"],
        "samples": ["To be </pre><script>alert('sample')</script> & more"],
        "checkpoints": ["step 8", "0.5 (best)", "not whole", "model/"],
        "configuration": ["model.experts", "optimizer.lr", "0.001"],
        "environment": ["python -m grist_train --name 'a b'", "0123456789abcdef", "2.11.0"],
    }
    for section, texts in said.items():
        for text in texts:
            assert text in page.sections[section], (section, text)


def test_sections_without_a_file_say_so(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "environment.json").write_text("{}")
    page = Page(report(folder))
    assert [each["id"] for each in page.of("h2")] == SECTIONS
    assert "no step is written down yet" in page.sections[""].lower()
    absent = {
        "curves": "no metrics.jsonl",
        "router-health": "none of the router's figures",
        "step-time": "time_*_ms",
        "bad-batches": "no bad_batches.jsonl",
        "stages": "without config.yaml",
        "evaluation": "no evaluation.json",
        "samples": "no samples.txt",
        "checkpoints": "no checkpoint",
        "configuration": "no config.yaml",
        "environment": "environment.json is empty",
    }
    for section, text in absent.items():
        assert text in page.sections[section], section


def test_a_run_that_goes_on_is_reported(tmp_path):
    folder = full_run(tmp_path / "going", steps=40)
    (folder / "evaluation.json").unlink()
    write_rows(folder / "metrics.jsonl", [row(step) for step in range(1, 21)], tail='{"step": 21, "lo')
    page = Page(report(folder))
    assert "20 of 40 steps: going on, or stopped." in page.sections[""]
    assert "metrics.jsonl:21: left out" in page.sections["curves"]
    assert str(tmp_path) not in page.sections["curves"]


def test_nothing_is_fetched_and_only_the_script_of_the_house_runs(tmp_path):
    text = report(full_run(tmp_path / "quick"))
    page = Page(text)
    assert len(page.of("script")) == 1
    assert not {"link", "img", "iframe", "object"} & {name for name, _ in page.elements}
    outward = [
        (name, key)
        for name, given in page.elements
        for key in given
        if key in ("src", "srcset") or key.startswith("on")
    ]
    assert not outward
    assert all((each["href"] or "").startswith("#") for each in page.of("a"))
    assert not re.search(r"url\(|@import|https?:", text)
    policy = next(each["content"] for each in page.of("meta") if each.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_pictures_and_tables_speak_to_those_who_do_not_see(tmp_path):
    page = Page(report(full_run(tmp_path / "quick")))
    assert page.of("html") == [{"lang": "en"}]
    assert len(page.of("svg")) > 15
    assert all(each["role"] == "img" and " over steps" in (each["aria-label"] or "") for each in page.of("svg"))
    assert len(page.of("caption")) == len(page.of("table"))
    assert len({each["id"] for each in page.of("h2")}) == len(page.of("h2"))


def test_several_runs_are_laid_over_each_other(tmp_path):
    first, second = full_run(tmp_path / "a", lr=0.001), full_run(tmp_path / "b", steps=12, lr=0.002)
    page = Page(report(first, second, out=tmp_path / "both.html"))
    assert page.headings[0] == "Runs a, b"
    lines = [each["class"] for each in page.of("path") if (each.get("class") or "").startswith("line ")]
    assert {"line s0", "line s1"} == set(lines)
    assert lines.count("line s0") == lines.count("line s1")
    settings = page.sections["configuration"].split("Settings that differ")[1].split()[:12]
    assert settings == "key a b name a b steps 10 12 optimizer.lr 0.001 0.002".split()
    assert page.headings.count("a") == page.headings.count("b") == len(OF_A_RUN) + 3


def test_equal_configurations_are_called_equal(tmp_path):
    first, second = full_run(tmp_path / "x" / "same"), full_run(tmp_path / "y" / "same")
    page = Page(report(first, second, out=tmp_path / "both.html"))
    assert page.headings[0] == "Runs x/same, y/same"
    assert "equal in every setting" in page.sections["configuration"]


def test_the_same_run_gives_the_same_page_wherever_it_lies(tmp_path):
    texts = [report(full_run(tmp_path / place / "quick")) for place in ("x", "y")]
    assert texts[0] == texts[1]
    assert report(tmp_path / "x" / "quick") == texts[0]  # and the page of before is no part of it


def test_preference_figures_and_sources_are_drawn(tmp_path):
    folder = full_run(tmp_path / "pairs")
    rows = [row(step, preference_accuracy=0.5, reward_margin=0.1 * step) for step in range(1, 5)]
    held_out = {"step": 4, "validation_preference_accuracy": 0.75, "validation_bits_per_byte/books": 1.5}
    write_rows(folder / "metrics.jsonl", [*rows, held_out])
    (folder / "evaluation.json").write_text(
        json.dumps({"preference_accuracy": 0.8, "sources": {"books": {"loss": 3.5}}})
    )
    page = Page(report(folder))
    titles = [heading for heading in page.headings if "re" in heading.lower() or "source" in heading]
    assert {"Preference accuracy", "Reward margin", "Bits per byte, source books"} <= set(titles)
    assert re.search(r"held-out preference accuracy\s+0.8", page.sections["in-short"])
    assert re.search(r"books\s+3.5", page.sections["evaluation"])


def test_a_long_run_is_a_small_page(tmp_path):
    folder = full_run(tmp_path / "long")
    steps, layers = 6_000, 16
    write_rows(folder / "metrics.jsonl", [row(step, layers, extra=float(step % 7)) for step in range(1, steps + 1)])
    bad = {"step": 1, "why": "w" * 10**4, "texts": ["t" * 10**4] * 20, "ids": list(range(10**4))}
    write_rows(folder / "bad_batches.jsonl", [bad] * 60)
    (folder / "samples.txt").write_text("s" * 10**6)
    text = report(folder)
    assert len(text) < 1_000_000
    assert "60 written down. Shown are the first and the last 10" in text
    assert "(the rest is in the file)" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{tmp}/absent"], "no run folder"),
        (["{run}", "{run}/metrics.jsonl", "--out", "{tmp}/both.html"], "given twice"),
        (["{run}", "{run}"], "need --out"),
        (["{run}"] * 9 + ["--out", "{tmp}/both.html"], "at most 8"),
    ],
)
def test_bad_input_is_told_and_fails(tmp_path, capsys, arguments, says):
    run = full_run(tmp_path / "quick")
    assert main([each.format(tmp=tmp_path, run=run) for each in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("report: ")
    assert says in error
    assert not list(tmp_path.rglob("*.html"))


def test_a_page_is_written_whole_or_not_at_all(tmp_path):
    page = tmp_path / "report.html"
    write("before", page)
    with pytest.raises(UnicodeEncodeError):
        write("a\ud800", page)
    assert page.read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
