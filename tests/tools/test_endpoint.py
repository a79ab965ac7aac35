from __future__ import annotations

import json
import statistics
from itertools import pairwise

import pytest
from streaming_server import STEP_SECONDS, WAIT_SECONDS, WORDS, chunk, streaming_server, whole_answer

from grist_tools.endpoint import summary
from grist_tools.endpoint_load import Heard, address, schedule
from grist_tools.profile_latency import main


def run(server, tmp_path, *arguments):
    out = tmp_path / "endpoint.json"
    status = main(["--endpoint", server.url, "--model", "mill", "--rate", "inf", "--out", str(out), *arguments])
    return status, json.loads(out.read_text())


def test_times_are_those_of_the_server(tmp_path, capsys):
    with streaming_server() as server:
        status, report = run(server, tmp_path, "--requests", "6", "--outputs", "8", "--prompts", "5")
    found = report["summary"]
    assert status == 0
    assert (found["answered"], found["errors"]) == (6, {})
    assert found["output_tokens"] == 6 * len(WORDS)
    assert found["prompt_tokens"] == 6 * 7
    assert found["tokens_counted_by"] == "the server"
    # A loaded machine is late, never early; what a role without text brings is no token.
    assert found["first_token_ms"]["p50"] >= 1e3 * WAIT_SECONDS
    assert found["per_token_ms"]["mean"] >= 1e3 * STEP_SECONDS
    assert found["end_to_end_ms"]["p50"] >= 1e3 * (WAIT_SECONDS + STEP_SECONDS * (len(WORDS) - 1))
    assert all(row["text_seconds"][0] >= WAIT_SECONDS and len(row["text_seconds"]) == 3 for row in report["rows"])
    assert "6 of 6 requests answered" in capsys.readouterr().out


@pytest.mark.parametrize(("api", "path"), [("chat", "/v1/chat/completions"), ("completions", "/v1/completions")])
def test_requests_say_what_was_asked_for(tmp_path, monkeypatch, api, path):
    monkeypatch.setenv("OPENAI_API_KEY", "a-key")
    with streaming_server() as server:
        run(
            server,
            tmp_path,
            "--api",
            api,
            "--requests",
            "2",
            "--outputs",
            "8",
            "--prompts",
            "5",
            "--body",
            '{"ignore_eos": true}',
        )
    assert len(server.asked) == 3  # the first is not timed
    for asked_path, headers, body in server.asked:
        assert asked_path == path
        assert headers["Authorization"] == "Bearer a-key"
        text = body["messages"][0]["content"] if api == "chat" else body["prompt"]
        assert len(text.split()) == 5
        assert body["stream"] is True
        assert (body["model"], body["max_tokens"], body["temperature"], body["ignore_eos"]) == ("mill", 8, 0, True)


def test_the_key_is_not_in_the_report(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "a-secret-key")
    with streaming_server() as server:
        run(server, tmp_path, "--requests", "1")
    assert "a-secret-key" not in (tmp_path / "endpoint.json").read_text()


def refusing(handler, body):
    handler.send_error(503, "no room")


def breaking_off(handler, body):
    handler.begin()
    handler.send_event(chunk(delta={"content": "The "}))


def failing(handler, body):
    handler.begin()
    handler.send_event({"error": {"message": "out of memory"}})


def babbling(handler, body):
    handler.begin()
    handler.send_line("{no json")


def silent(handler, body):
    handler.begin()
    handler.send_event(chunk(delta={}, finish_reason="stop"))


FAULTS = [
    (refusing, "status 503"),
    (breaking_off, "ended early"),
    (failing, "error in the stream"),
    (babbling, "malformed event"),
    (silent, "no text"),
]


@pytest.mark.parametrize(("answer", "kind"), FAULTS, ids=[kind for _, kind in FAULTS])
def test_a_server_that_fails_at_once_is_told(tmp_path, capsys, answer, kind):
    with streaming_server(answer) as server:
        assert main(["--endpoint", server.url, "--model", "mill", "--out", str(tmp_path / "out.json")]) == 2
    assert kind in capsys.readouterr().err
    assert not (tmp_path / "out.json").exists()


def test_errors_are_counted_and_leave_the_figures_alone(tmp_path):
    calls = []

    def every_other(handler, body):
        calls.append(body)
        (breaking_off if len(calls) % 2 == 0 else whole_answer)(handler, body)

    with streaming_server(every_other) as server:
        status, report = run(server, tmp_path, "--requests", "4")
    assert status == 0
    assert report["summary"]["answered"] == 2
    assert report["summary"]["errors"] == {"ended early": 2}
    assert report["summary"]["output_tokens"] == 2 * len(WORDS)


def test_nobody_listens(tmp_path, capsys):
    with streaming_server() as server:
        gone = server.url
    assert main(["--endpoint", gone, "--model", "mill", "--out", str(tmp_path / "out.json")]) == 2
    assert "Connection" in capsys.readouterr().err


def test_arrivals_are_a_poisson_process_of_the_seed():
    requests = schedule(4000, 8.0, [3, 9], [16, 32], seed=5)
    gaps = [b.at_seconds - a.at_seconds for a, b in pairwise(requests)]
    # Exponential: mean and standard deviation alike, and a share of exp(-1) of gaps above the mean.
    assert statistics.mean(gaps) == pytest.approx(1 / 8, rel=0.06)
    assert statistics.stdev(gaps) == pytest.approx(1 / 8, rel=0.08)
    assert sum(gap > 1 / 8 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.03)
    assert {len(request.words.split()) for request in requests} == {3, 9}
    assert {request.tokens for request in requests} == {16, 32}
    assert requests == schedule(4000, 8.0, [3, 9], [16, 32], seed=5)
    assert requests != schedule(4000, 8.0, [3, 9], [16, 32], seed=6)
    assert {request.at_seconds for request in schedule(5, float("inf"), [3], [8], seed=0)} == {0.0}


def test_figures_of_known_times():
    heard = [
        Heard(0.0, 0.0, [0.1, 0.2, 0.4], 0.5, 4, 3, True, None),
        Heard(1.0, 0.0, [0.3, 0.3], 0.5, None, 2, False, None),
        Heard(1.5, 0.2, [0.1], 2.0, None, 1, False, "timeout: silent"),
    ]
    row = summary(heard, 2.0)
    assert (row["requests"], row["answered"], row["errors"]) == (3, 2, {"timeout": 1})
    assert row["output_tokens_per_second"] == pytest.approx(2.5)
    assert row["tokens_counted_by"] == "events with text"
    assert row["first_token_ms"]["mean"] == pytest.approx(200)
    assert row["between_tokens_ms"]["p50"] == pytest.approx(100)
    assert row["per_token_ms"]["mean"] == pytest.approx((150 + 0) / 2)
    assert row["latest_start_ms"] == pytest.approx(200)
    assert "prompt_tokens" not in row
    assert summary(heard[2:], 2.0) == {"requests": 1, "answered": 0, "errors": {"timeout": 1}, "seconds": 2.0}


def test_the_address_has_its_version_once():
    assert address("http://host:8000", "chat") == "http://host:8000/v1/chat/completions"
    assert address("http://host:8000/v1/", "completions") == "http://host:8000/v1/completions"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--endpoint", "http://localhost:1"], "--model NAME"),
        (["--endpoint", "http://localhost:1", "--model", "m", "--rate", "0"], "--rate"),
        (["--endpoint", "http://localhost:1", "--model", "m", "--requests", "0"], "--requests"),
        (["--endpoint", "http://localhost:1", "--model", "m", "--against", "vllm"], "--against"),
        (["--endpoint", "localhost:8000", "--model", "m"], "no address of a server"),
        (["DIR", "--endpoint", "http://localhost:1", "--model", "m"], "a model directory, or --endpoint"),
        ([], "a model directory, or --endpoint"),
    ],
)
def test_options_that_make_no_measurement_are_told(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_body_that_is_no_object_is_told(capsys):
    with pytest.raises(SystemExit):
        main(["--endpoint", "http://localhost:1", "--model", "m", "--body", "[1]"])
    assert "expected a JSON object" in capsys.readouterr().err
