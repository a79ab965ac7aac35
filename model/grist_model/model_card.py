"""The README.md of a portable directory: what the model is, how well it does, how to run it, what it cannot do.

The front matter is what huggingface.co reads (https://huggingface.co/docs/hub/model-cards).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grist_model import accounting
from grist_model.config import ModelConfig
from grist_model.hub import PREFIX

FILE = "README.md"
MARK = "<!-- Written by Gristmill, and again whenever this model is saved. Remove this line to keep a text of your own. -->"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class CardFacts:
    """What a directory does not say itself.

    name: of the model. license: identifier as on huggingface.co ("apache-2.0", "mit", "other"). base_model: what the first
    weights were, a name on the hub (with or without hf://) or a path. datasets: names of what it was trained on, on the hub
    or in words. languages: ISO 639 codes. metrics: held-out figures by name, such as {"bits_per_byte": 1.42}, measured on
    `measured_on`. training: lines of a table, such as {"tokens": 10**9, "optimizer": "muon"}. limits: sentences of one's own.
    """

    name: str
    license: str | None = None
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    measured_on: str = "the validation split of its data"
    training: Mapping[str, Any] = field(default_factory=dict)
    limits: tuple[str, ...] = ()


def is_generated(path: Path) -> bool:
    """Whether a file is a card that was written here and that nobody has made their own."""
    return path.name == FILE and path.is_file() and MARK in path.read_text(encoding="utf-8", errors="replace")


def write_card(directory: str | Path, facts: CardFacts) -> bool:
    """Write DIRECTORY/README.md; False, and nothing is written, where there is a text that somebody has made their own.

    Raises what `config_of` raises for a directory without a model.
    """
    path = Path(directory) / FILE
    if path.exists() and not is_generated(path):
        return False
    partial = path.with_name(f".{FILE}.part")
    partial.write_text(model_card(directory, facts), encoding="utf-8")
    partial.replace(path)
    return True


def model_card(directory: str | Path, facts: CardFacts) -> str:
    """The text of the card of a portable directory, front matter included."""
    from grist_model.checkpoint import config_of

    directory = Path(directory)
    config = config_of(directory)
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    family = settings["model_type"]
    chat = (directory / "chat_template.jinja").is_file()
    paragraphs = [
        _front_matter(facts, family, chat),
        MARK,
        f"# {facts.name}",
        _opening(facts, config, family, chat),
        _section("Sizes", _table(_sizes(config, settings))),
        _section("Data", _data(facts)),
        _section("Held-out figures", _metrics(facts)),
        _section("Training", _table(facts.training) if facts.training else ""),
        _section("How to run it", _running(family, chat)),
        _section("Limits", "\n".join(f"- {each}" for each in (*facts.limits, *_limits(config, family, chat)))),
    ]
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def with_type(text: str, dtype: str) -> str:
    """The card of the same weights written in another type, such as "bfloat16"; a text without the line stays as it is."""
    return re.sub(r"^\| weights \| \w+ \|$", f"| weights | {dtype} |", text, flags=re.MULTILINE)


def with_quantization(text: str, facts: Mapping[str, Any]) -> str:
    """The card with a table of how the weights were quantized, in an older one's place, before its limits or at its end."""
    section = _section("Quantization", _table(facts)) + "\n"
    text = re.sub(r"^## Quantization\n.*?(?=^## |\Z)", "", text, flags=re.MULTILINE | re.DOTALL)
    before, limits, after = text.partition("## Limits\n")
    return f"{before.rstrip()}\n\n{section}" + (f"\n{limits}{after}" if limits else "")


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _front_matter(facts: CardFacts, family: str, chat: bool) -> str:
    import yaml

    base = _on_the_hub(facts.base_model)
    tags = ["gristmill", family, *(["conversational"] if chat else []), *facts.tags]
    found = {
        "license": facts.license,
        "library_name": "gristmill" if family == "gristmill" else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": base,
        "datasets": [name for name in map(_on_the_hub, facts.datasets) if name],
        "language": list(facts.languages),
        "tags": list(dict.fromkeys(tags)),
        "metrics": list(facts.metrics),
    }
    kept = {key: value for key, value in found.items() if value}
    return f"---\n{yaml.safe_dump(kept, sort_keys=False, allow_unicode=True).rstrip()}\n---"


def _on_the_hub(name: str | None) -> str | None:
    """owner/name of hf://owner/name@revision or owner/name; None for a path or words."""
    if name is None or not (name.startswith(PREFIX) or name.count("/") == 1):
        return None
    plain = name.removeprefix(PREFIX).partition("@")[0]
    return plain if _HUB_NAME.fullmatch(plain) and not plain.startswith(".") else None


def _opening(facts: CardFacts, config: ModelConfig, family: str, chat: bool) -> str:
    kind = "mixture-of-experts" if config.experts else "dense"
    does = "answers in conversations" if chat else "continues text"
    base = f" Its first weights were those of {facts.base_model}." if facts.base_model else ""
    return (
        f"A {kind} language model of {_number(accounting.parameters(config))} parameters that {does}, "
        f"in the layout of `{family}`.{base}"
    )


def _sizes(config: ModelConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    experts = f"{config.experts}, {config.active_experts} active a token" if config.experts else "none (dense)"
    return {
        "parameters": f"{accounting.parameters(config):,}",
        "active parameters": f"{accounting.active_parameters(config):,} (embedding table left out)",
        "layers": config.layers,
        "width": config.width,
        "heads": f"{config.heads}, {config.kv_heads} of keys and values",
        "experts": experts,
        "context": f"{config.context_length:,} tokens",
        "vocabulary": f"{config.vocab_size:,}",
        "weights": settings.get("dtype", "unknown"),
    }


def _data(facts: CardFacts) -> str:
    return "\n".join(f"- {name}" for name in facts.datasets) or "Not stated."


def _metrics(facts: CardFacts) -> str:
    if not facts.metrics:
        return "None were measured."
    rows = {name.replace("_", " "): f"{value:.4g}" for name, value in facts.metrics.items()}
    return f"On {facts.measured_on}:\n\n{_table(rows)}"


def _table(rows: Mapping[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _number(count: int) -> str:
    for size, unit in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _running(family: str, chat: bool) -> str:
    tool = "chat DIR" if chat else 'generate DIR --prompt "Once"'
    ours = f"With Gristmill:\n\n```sh\npython -m grist_tools.{tool}\n```"
    if family == "gristmill":
        return ours
    asked = '[{"role": "user", "content": "Hello"}]' if chat else '"Once"'
    return f"""With transformers:

```python
from transformers import pipeline

write = pipeline("text-generation", model="DIR")
print(write({asked}, max_new_tokens=50))
```

With vLLM: `vllm serve DIR`. With llama.cpp: `convert_hf_to_gguf.py DIR --outfile model.gguf`, then
`llama-cli -m model.gguf`; the converter knows published tokenizers, and asks for a line of its own for others.

{ours}"""


def _limits(config: ModelConfig, family: str, chat: bool) -> list[str]:
    found = [
        "What it writes can be false, biased or harmful: it repeats what its data hold, and was given no training for safety.",
        f"It sees at most {config.context_length:,} tokens, prompt and answer together.",
    ]
    if not chat:
        found.append("It continues text; it was not trained to follow instructions.")
    if family == "gristmill":
        found.append("Its layout is Gristmill's own, which other programs do not read.")
    if config.yarn is not None and not config.yarn.truncate:
        found.append(
            "llama.cpp rounds the ends of YaRN's ramp, which this model does not: there its answers differ a little."
        )
    if family == "gpt_oss" and config.swiglu_limit != 7.0:
        found.append("transformers before version 5 has a swiglu_limit of 7 built in: use version 5.")
    return found
