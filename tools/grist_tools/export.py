"""Write a model directory again in another format, and prove it before it appears.

    python -m grist_tools.export runs/quickstart/model --format bf16 --out exported
    python -m grist_tools.export runs/quickstart/model --format mxfp4 --text book.txt --out exported-mxfp4
    python -m grist_tools.export model --format int4 --gptq --calibration datasets/stories --out exported-int4
    python -m grist_tools.export model --format gguf --kind q8_0 --out model.gguf

The new directory has the layout of the model's family, as transformers and vLLM read it; gguf is one file for llama.cpp. It is
written beside its final place, loaded from there and compared with the source, and only then renamed; a failed export leaves
nothing behind. int8, int4 and fp8 are compressed-tensors' formats, mxfp4 is that of GPT-OSS.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from grist_tools.console import fail, parser_for, run, size

if TYPE_CHECKING:
    from grist_data import Tokenizer
    from grist_tools.export_compare import Agreement
    from grist_tools.export_options import Options


@dataclass(frozen=True)
class Exported:
    """bytes: of all weights. bits_per_weight: over all of the model's numbers. agreement: with the source, None where the
    format's own check is another."""

    source_bytes: int
    bytes: int
    bits_per_weight: float
    agreement: Agreement | None
    notes: tuple[str, ...] = ()

    @property
    def same_best_token(self) -> float | None:
        return None if self.agreement is None else self.agreement.same_best_token

    @property
    def largest_logit_change(self) -> float | None:
        return None if self.agreement is None else self.agreement.largest_logit_change


def export(source: str | Path, out: str | Path, format: str, options: Options | None = None) -> Exported:
    """Convert the model in `source` and publish it as `out`.

    Plain formats must reload to exactly the logits of the source converted in memory; quantized ones to logits near the
    source's, and their tensors to numbers near its own, by bounds that a broken file is beyond.

    Raises:
        ValueError: unknown format; a model that the format cannot hold; values that it cannot hold (float16 ends at 65,504,
            nothing quantizes NaN); options that do not fit; a failed comparison.
        FileNotFoundError: `source` is no portable model directory.
        FileExistsError: `out` exists.
    """
    from grist_model.hub import local_directory
    from grist_tools.export_options import Options

    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    options = options or Options()
    options.check(format)
    source, out = local_directory(source), Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; export into a new directory")
    return FORMATS[format](source, out, format, options)


def _plain(source: Path, out: Path, format: str, options: Options) -> Exported:
    from grist_model import checkpoint
    from grist_tools.export_compare import compare, measured_rows
    from grist_tools.export_files import published_at, weight_bytes
    from grist_tools.export_plain import write_plain

    tokenizer = _tokenizer(source)
    with published_at(out) as draft:
        found = write_plain(source, draft, format, tokenizer)
        if options.text or options.calibration:
            rows = measured_rows(checkpoint.config_of(source), tokenizer, options.text, options.calibration)
            found = compare(source, draft, rows)
    return Exported(weight_bytes(source), weight_bytes(out), _bits_per_weight(out), found)


def _quantized(source: Path, out: Path, format: str, options: Options) -> Exported:
    from grist_model import checkpoint
    from grist_tools.calibration import dataset_rows
    from grist_tools.export_compare import check_weights, compare, measured_rows
    from grist_tools.export_files import copy_along, published_at, weight_bytes
    from grist_tools.export_quantized import write_quantized
    from grist_tools.export_schemes import scheme_for

    config, tokenizer = checkpoint.config_of(source), _tokenizer(source)
    scheme = scheme_for(format, options)
    measured = measured_rows(config, tokenizer, options.text, options.calibration)
    rows_BT = None
    if options.gptq and options.calibration:
        rows_BT = dataset_rows(options.calibration, tokenizer, config, options.rows)
    with published_at(out) as draft:
        write_quantized(source, draft, scheme, options, rows_BT)
        copy_along(source, draft, "bfloat16", tokenizer=True)
        check_weights(source, draft, scheme.packs, scheme.largest_error)
        found = compare(source, draft, measured)
        _require_near(found, format, scheme.largest_kl)
        bits = _bits_per_weight(draft)
        _note_in_card(draft, format, options, bits, found)
    return Exported(weight_bytes(source), weight_bytes(out), bits, found, options.notes(format))


def _gguf(source: Path, out: Path, format: str, options: Options) -> Exported:
    from grist_tools.export_files import weight_bytes
    from grist_tools.export_gguf import write_gguf

    done = write_gguf(source, out, options.kind, options.pre_tokenizer)
    notes = (
        [f"kept in f16, for their rows are no multiple of a block: {', '.join(done.kept_f16)}"] if done.kept_f16 else []
    )
    return Exported(weight_bytes(source), done.bytes, done.bits_per_weight, None, (*notes, *done.warnings))


# The one place where a format is named: what writes, proves and publishes it.
FORMATS: dict[str, Callable[[Path, Path, str, Options], Exported]] = {
    "bf16": _plain,
    "fp16": _plain,
    "float32": _plain,
    "mxfp4": _quantized,
    "int8": _quantized,
    "int8_dynamic": _quantized,
    "int4": _quantized,
    "fp8": _quantized,
    "gguf": _gguf,
}


def _tokenizer(source: Path) -> Tokenizer | None:
    from grist_data import Tokenizer

    return Tokenizer.load(source) if (source / "tokenizer.json").is_file() else None


def _require_near(found: Agreement, format: str, largest_kl: float) -> None:
    if not found.mean_kl <= largest_kl:  # NaN as well
        raise ValueError(
            f"the written files are not the source in {format}: their mean KL divergence from it on {found.measured_on} is "
            f"{found.mean_kl:.3g} nats a token, and more than {largest_kl} is taken for broken. If the source itself is sound, "
            "its predictions do not survive so few bits: take a wider format"
        )


def _bits_per_weight(directory: Path) -> float:
    from grist_model import accounting, checkpoint
    from grist_tools.export_files import weight_bytes

    return 8 * weight_bytes(directory) / accounting.parameters(checkpoint.config_of(directory))


def _note_in_card(draft: Path, format: str, options: Options, bits: float, found: Agreement) -> None:
    from grist_model.model_card import FILE, with_quantization
    from grist_tools.export_files import weight_bytes

    card = draft / FILE
    if not card.is_file():
        return
    facts = {
        "scheme": options.described(format),
        "size": f"{size(weight_bytes(draft))}, {bits:.2f} bits a weight",
        "measured on": "; ".join([found.measured_on, *options.notes(format)]),
        "mean KL divergence": f"{found.mean_kl:.3g} nats a token",
        "same best token": f"{found.same_best_token:.1%}",
    }
    if found.bits_per_byte is not None:
        facts["bits per byte"] = "{:.4f}, before {:.4f}".format(*reversed(found.bits_per_byte))
    card.write_text(with_quantization(card.read_text(encoding="utf-8"), facts), encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    from grist_tools.export_options import add_options

    parser = parser_for("export", __doc__)
    parser.add_argument("directory", metavar="DIR", help="portable model directory, as runs/NAME/model")
    parser.add_argument("--format", required=True, choices=FORMATS, help="of the weights")
    parser.add_argument("--out", required=True, metavar="OUT", help="directory (gguf: file) to write; must not exist")
    add_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    from grist_tools.export_options import options_of

    given = parser().parse_args(arguments)
    try:
        done = export(given.directory, given.out, given.format, options_of(given))
    except (ValueError, OSError, ImportError) as error:
        return fail("export", error)
    bits = f"{done.bits_per_weight:.2f} bits a weight"
    print(f"{given.out}: {size(done.bytes)} of weights in {given.format}, {bits}; {size(done.source_bytes)} before")
    if FORMATS[given.format] is _plain:
        print("reloaded: logits identical to the converted model's")
    if done.agreement is not None:
        print(done.agreement.text())
    for note in done.notes:
        print(note)
    return 0


if __name__ == "__main__":
    run(main)
