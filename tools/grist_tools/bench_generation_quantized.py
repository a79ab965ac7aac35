"""Time generation with quantized weights on this CPU: one model of a hundred million weights, in several precisions.

    python -m grist_tools.bench_generation_quantized
    python -m grist_tools.bench_generation_quantized --contestants bfloat16,int8,int4 --repetitions 15

Before it is timed, each quantized model must have the logits of the same numbers unpacked. Contestants take turns, one prompt,
greedy; whatever the precision, each writes as many tokens. The ratio is to our own bfloat16. A JSON goes to benchmarks/.
"""

from __future__ import annotations

import argparse
import datetime
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grist_tools.bench_generation import HOW, Row, quiet_text, timings
from grist_tools.bench_generation_peers import Contestant, Text, of_model, of_transformers
from grist_tools.console import fail, parser_for, run, table

if TYPE_CHECKING:
    import torch

OURS = "grist_model"
BASE = f"{OURS} bfloat16"
PLAIN, PACKED = ("float32", "bfloat16"), ("int8", "int4", "fp8")
GGUF = {"llama.cpp-bf16": "bf16", "llama.cpp-q8_0": "q8_0", "llama.cpp-q4_0": "q4_0"}
CONTESTANTS = (*PLAIN, *PACKED, "transformers", *GGUF)
TARGETS = {f"{OURS} int8": 1.5, f"{OURS} int4": 2.0}  # times as fast as our bfloat16, decoding
GROUP = 128
NEAR = 1e-4  # of the largest logit: packed and unpacked weights are the same numbers, summed in another order
_SHAPE: dict[str, Any] = {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 2048, "vocab_size": 16384}


def parser() -> argparse.ArgumentParser:
    parser = parser_for("bench_generation_quantized", __doc__)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS), help="default: %(default)s")
    parser.add_argument("--prompt", type=int, default=32, help="tokens (default: %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens after the first (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=9, help="of each contestant (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=300.0, help="seconds to wait in all (default: %(default)s)")
    parser.add_argument("--out", metavar="JSON", help="default: benchmarks/generation-quantized-DEVICE-DATE.json")
    return parser


def check_options(options: argparse.Namespace) -> list[str]:
    """-> the contestants asked for. Raises ValueError for options that make no benchmark."""
    names = options.contestants.split(",")
    if strays := set(names) - set(CONTESTANTS):
        raise ValueError(f"--contestants must be some of {', '.join(CONTESTANTS)}, but has {', '.join(sorted(strays))}")
    if "bfloat16" not in names:
        raise ValueError("--contestants must have bfloat16, which the others are compared with")
    for name in ("prompt", "new", "repetitions"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, but is {getattr(options, name)}")
    return names


def source_model(directory: Path, context: int, shape: dict[str, Any]) -> Any:
    """A random Llama with tied embeddings, written to a directory in bfloat16; transformers' own of it."""
    import torch
    import transformers

    heads = shape["hidden_size"] // 64
    config = transformers.LlamaConfig(
        **shape, num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=context,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.save_pretrained(directory)
    return model


def contestants(
    names: list[str], folder: Path, context: int, shape: dict[str, Any], stack: ExitStack
) -> tuple[dict[str, Contestant], dict[str, int]]:
    """By name, with the bytes of each one's weights; quantized ones are checked. Servers end with `stack`.

    Raises ImportError without transformers, or without xllamacpp where llama.cpp is asked for.
    """
    import torch

    from grist_model import load

    theirs = source_model(folder / "source", context, shape)
    found: dict[str, Contestant] = {}
    sizes: dict[str, int] = {}
    for name in names:
        if name == "transformers":
            found["transformers bfloat16"] = of_transformers(theirs, "dynamic")
            sizes["transformers bfloat16"] = _bytes(theirs)
            continue
        if name in GGUF:
            found[name], sizes[name] = stack.enter_context(llamacpp(folder, GGUF[name], context, shape["vocab_size"]))
            continue
        if name in PACKED:
            quantized_directory(folder / "source", folder / name, name)
            check_packed(folder / name, shape["vocab_size"])
            model = load(folder / name, dtype=torch.bfloat16, quantized=True)
        else:
            model = load(folder / "source", dtype=getattr(torch, name))
        found[f"{OURS} {name}"] = of_model(model.eval())
        sizes[f"{OURS} {name}"] = _bytes(model)
    return found, sizes


@contextmanager
def llamacpp(folder: Path, kind: str, context: int, vocab_size: int) -> Iterator[tuple[Contestant, int]]:
    """llama.cpp on the same weights, and their bytes. Its file must have a tokenizer, which nothing goes through."""
    import torch

    from grist_data.tokenizer_training import train_bpe
    from grist_tools.export_gguf import write_gguf
    from grist_tools.latency_peers import LlamaCpp, llamacpp_server

    source = folder / "source"
    if not (source / "tokenizer.json").exists():
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=8)) for _ in range(vocab_size)]
        train_bpe([" ".join(words)], vocab_size).save(source)
    written = write_gguf(source, folder / f"{kind}.gguf", kind)
    with llamacpp_server(written.path, 1, context, torch.get_num_threads()) as address:
        server = LlamaCpp(address)

        def run(prompt: list[int], count: int) -> Text:
            said = server([prompt], count)
            return Text(said.ids[0], said.seconds)

        yield run, written.bytes


def quantized_directory(source: Path, out: Path, format: str) -> None:
    from grist_tools.export_options import Options
    from grist_tools.export_quantized import write_quantized
    from grist_tools.export_schemes import scheme_for

    options = Options(group=GROUP)
    write_quantized(source, out, scheme_for(format, options), options, None)


def check_packed(directory: Path, vocab_size: int) -> None:
    """Raises ValueError if packed weights compute something else than the numbers they stand for."""
    import torch

    from grist_model import load

    ids = torch.randint(vocab_size, (1, 4), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        packed, plain = (load(directory, torch.float32, quantized=quantized).eval()(ids) for quantized in (True, False))
    off = float((packed - plain).abs().max() / plain.abs().max())
    if not off <= NEAR:
        raise ValueError(f"{directory.name}: logits of packed weights are off by {off:.1e} of the largest, not {NEAR}")


def _bytes(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def race(found: dict[str, Contestant], prompt: list[int], count: int, repetitions: int, until: float) -> list[Row]:
    """A row for prefill and one for decode of every contestant."""
    names = list(found)
    texts: dict[str, list[tuple[Text, float | None]]] = {name: [] for name in names}
    for name in names:
        found[name](prompt, count)
    for number in range(repetitions):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            texts[name].append(quiet_text(found[name], prompt, count, until))
    rows = []
    for what, tokens in (("prefill", len(prompt)), ("decode", 1)):
        base_ms = timings(texts[BASE], what, tokens)["ms"]
        for name in names:
            row = timings(texts[name], what, tokens)
            rows.append({"what": what, "who": name, **row, "ratio": base_ms / row["ms"]})
    return rows


def judged(row: Row, sizes: dict[str, int]) -> Row:
    row = {**row, "weights_bytes": sizes[row["who"]]}
    target = TARGETS.get(row["who"]) if row["what"] == "decode" else None
    return row if target is None else {**row, "target": target, "reached": row["ratio"] >= target}


def results_table(rows: list[Row]) -> str:
    header = ["what", "who", "MB", "tokens/s", "ms", "ratio", "target", "reached", "quiet"]
    cells = []
    for row in rows:
        reached = {True: "yes", False: "no", None: "-"}[row.get("reached")]
        quiet = "-" if row["quiet"] is None else f"{row['quiet']}/{row['repetitions']}"
        numbers = [
            f"{row['weights_bytes'] / 1e6:.0f}",
            f"{row['value']:,.1f}",
            f"{row['ms']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        cells.append([row["what"], row["who"], *numbers, str(row.get("target", "-")), reached, quiet])
    return table(header, cells)


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    import torch

    from grist_eval.environment import provenance, write_json
    from grist_kernels import describe, native
    from grist_tools.bench_kernels import commit, default_out

    try:
        names = check_options(options)
        prompt = torch.randint(1, _SHAPE["vocab_size"], (options.prompt,), generator=torch.Generator().manual_seed(1))
        where = provenance("cpu")
        default = default_out(where["device"], datetime.date.today().isoformat(), "generation-quantized")
        with tempfile.TemporaryDirectory(prefix="grist-bench-quantized-") as folder, ExitStack() as stack:
            context = options.prompt + options.new + 1
            found, sizes = contestants(names, Path(folder), context, _SHAPE, stack)
            until = time.perf_counter() + options.patience
            rows = [
                judged(row, sizes) for row in race(found, prompt.tolist(), options.new + 1, options.repetitions, until)
            ]
        report = {
            "what": "generation with quantized weights",
            "command": ["python", "-m", "grist_tools.bench_generation_quantized", *(arguments or sys.argv[1:])],
            "commit": commit(), **where, "cores": os.cpu_count(), "threads": torch.get_num_threads(),
            "kernels": describe("cpu"), "native": native.available(), "shape": _SHAPE, "prompt": options.prompt,
            "new": options.new, "how": {**HOW, "check": "logits of the same numbers unpacked", "ratio": f"to {BASE}"},
            "rows": rows,
        }  # fmt: skip
        out = Path(options.out) if options.out else default
        write_json(report, out)
    except (ValueError, ImportError, OSError) as error:
        return fail("bench_generation_quantized", error)
    print(results_table(rows))
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    run(main)
