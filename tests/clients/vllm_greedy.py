"""Run by a Python that has vLLM, and nothing of ours:

    PYTHON vllm_greedy.py ASKED.json OUT.json

ASKED holds the new tokens to write, the prompts as ids, and a list of [directory, dtype]. OUT gets, for each of these, the new
ids of every prompt, or a text where it failed.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import traceback

# Importing takes ten seconds: once, here. An engine does not go without traces: each has a process, forked from this one.
import vllm  # pyright: ignore[reportMissingImports]

SHOWN = 3000


def write(asked, directory, dtype, answers):
    try:
        engine = vllm.LLM(
            model=directory,
            dtype=dtype,
            max_model_len=64,
            max_num_seqs=4,
            enforce_eager=True,
            seed=0,
            disable_log_stats=True,
        )
        settings = vllm.SamplingParams(temperature=0.0, max_tokens=asked["new"], ignore_eos=True)
        said = engine.generate([{"prompt_token_ids": ids} for ids in asked["prompts"]], settings, use_tqdm=False)
        answers.put([list(each.outputs[0].token_ids) for each in said])
    except Exception:  # each is reported by its name, and none hides the others
        answers.put(traceback.format_exc()[-SHOWN:])


def main(asked_file, out_file):
    with open(asked_file) as file:
        asked = json.load(file)
    fork = multiprocessing.get_context("fork")
    found = []
    for directory, dtype in asked["models"]:
        answers = fork.SimpleQueue()
        process = fork.Process(target=write, args=(asked, directory, dtype, answers))
        process.start()
        process.join()
        found.append(f"ended with status {process.exitcode}" if answers.empty() else answers.get())
    with open(out_file, "w") as file:
        json.dump({"version": vllm.__version__, "answers": found}, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
