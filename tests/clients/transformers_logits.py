"""Run by another Python, which has torch and some version of transformers, and nothing of ours:

    PYTHON transformers_logits.py IDS.safetensors OUT.safetensors DIR...

The logits of every directory on the ids, and the ids of a text by its tokenizer where it has one.
"""

from __future__ import annotations

import json
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file


def main(ids_file: str, out_file: str, *directories: str) -> None:
    given = load_file(ids_file)
    text = bytes(given["text"].tolist()).decode()
    found, faults = {}, {}
    for number, directory in enumerate(directories):
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, torch_dtype=torch.float32, attn_implementation="eager"
            ).eval()
            with torch.no_grad():
                found[f"logits-{number}"] = model(given["ids"]).logits.contiguous()
            tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
            found[f"ids-{number}"] = torch.tensor(tokenizer.encode(text, add_special_tokens=False))
        except Exception as error:  # each is reported by its name, and none hides the others
            faults[number] = f"{type(error).__name__}: {error}"[:2000]
    save_file(found, out_file, metadata={"version": transformers.__version__, "faults": json.dumps(faults)})


if __name__ == "__main__":
    main(*sys.argv[1:])
