"""What an export can be asked for besides its format."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

GROUP, KIND, CALIBRATION_ROWS = 128, "f16", 128
ACTIVATIONS = ("int8_dynamic", "fp8")  # formats that quantize activations too, while the model runs


@dataclass(frozen=True)
class Options:
    """group, symmetric: of int4. calibration: a token dataset. gptq: int4 calibrated on it. activation_order: of GPTQ. rows: of
    the dataset to calibrate on. text: to measure on. kind, pre_tokenizer: of GGUF."""

    group: int = GROUP
    symmetric: bool = True
    calibration: Path | None = None
    gptq: bool = False
    activation_order: bool = False
    rows: int = CALIBRATION_ROWS
    text: Path | None = None
    kind: str = KIND
    pre_tokenizer: str | None = None

    def check(self, format: str) -> None:
        """Raises ValueError for an option that this format, or the other options, leave without effect."""
        of_int4 = {
            "--group-size": self.group != GROUP,
            "--asymmetric": not self.symmetric,
            "--gptq": self.gptq,
        }
        of_gguf = {"--kind": self.kind != KIND, "--pre-tokenizer": self.pre_tokenizer is not None}
        measured = {"--text": self.text is not None, "--calibration": self.calibration is not None}
        of_gptq = {"--activation-order": self.activation_order, "--calibration-rows": self.rows != CALIBRATION_ROWS}
        wrong = [] if format == "int4" else [f"{each} is of int4" for each, given in of_int4.items() if given]
        wrong += [] if format == "gguf" else [f"{each} is of gguf" for each, given in of_gguf.items() if given]
        wrong += [f"{each} is not used by gguf" for each, given in measured.items() if given and format == "gguf"]
        wrong += [] if self.gptq else [f"{each} needs --gptq" for each, given in of_gptq.items() if given]
        if self.gptq and self.calibration is None:
            wrong.append("--gptq needs --calibration DIR, a token dataset")
        if self.rows < 1:
            wrong.append(f"--calibration-rows must be at least 1, but is {self.rows}")
        if wrong:
            raise ValueError(f"{format}: {'; '.join(wrong)}")

    def notes(self, format: str) -> tuple[str, ...]:
        """What a reader of the figures must know."""
        return ("activations, which the format quantizes too, were left as they are",) if format in ACTIVATIONS else ()

    def described(self, format: str) -> str:
        """The scheme for a reader of the model card."""
        if format != "int4":
            return _DESCRIBED[format]
        kind = "symmetric" if self.symmetric else "with zero points"
        how = "GPTQ" if self.gptq else "rounded to nearest, clipped where that is nearer"
        return f"int4, groups of {self.group}, {kind}, {how} (compressed-tensors pack-quantized)"


_DESCRIBED = {
    "mxfp4": "MXFP4 in the experts (blocks of 32 with a power of two as scale)",
    "int8": "int8 weights, a scale an output channel (compressed-tensors pack-quantized)",
    "int8_dynamic": "int8 weights and activations, a scale an output channel and a token (compressed-tensors int-quantized)",
    "fp8": "fp8 (E4M3) weights and activations, a scale an output channel and a token (compressed-tensors float-quantized)",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to measure the change on (default: random ids)")
    parser.add_argument(
        "--calibration", type=Path, metavar="DATASET", help="token dataset: for --gptq, and to measure the change on"
    )
    int4 = parser.add_argument_group("int4")
    int4.add_argument("--group-size", type=int, default=GROUP, help="inputs that share a scale: 32, 64, 128 (default)")
    int4.add_argument(
        "--asymmetric", dest="symmetric", action="store_false", help="a zero point a group beside its scale"
    )
    int4.add_argument("--symmetric", dest="symmetric", action="store_true", help="zero is code 8 (default)")
    int4.add_argument("--gptq", action="store_true", help="minimise the error of the layers' outputs on --calibration")
    int4.add_argument("--activation-order", action="store_true", help="GPTQ: the largest activations' columns first")
    int4.add_argument(
        "--calibration-rows",
        type=int,
        default=CALIBRATION_ROWS,
        help="rows of the dataset for GPTQ (default: %(default)s)",
    )
    gguf = parser.add_argument_group("gguf")
    gguf.add_argument("--kind", default=KIND, help="f32, f16 (default), bf16, q8_0, q4_0, mxfp4")
    gguf.add_argument("--pre-tokenizer", help="llama.cpp's name of the tokenizer's regex, where it is not known here")
    parser.set_defaults(symmetric=True)


def options_of(given: argparse.Namespace) -> Options:
    return Options(
        group=given.group_size,
        symmetric=given.symmetric,
        calibration=given.calibration,
        gptq=given.gptq,
        activation_order=given.activation_order,
        rows=given.calibration_rows,
        text=given.text,
        kind=given.kind,
        pre_tokenizer=given.pre_tokenizer,
    )
