"""Run by a Python that has vLLM, and nothing of ours:

    PYTHON latency_vllm.py '{"model": DIR, "dtype": "float32", ...}'

The arguments of vllm.LLM come as JSON. Then a request a line on stdin, {"prompts": [[id, ...], ...], "output": N}, and an
answer a line on the descriptor that was stdout: {"ids": [[...], ...], "seconds": [...]}, when the n-th id of every prompt was
there. What vLLM prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time


def answer(engine, prompts, output):
    from vllm import SamplingParams  # pyright: ignore[reportMissingImports]

    settings = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    for row, prompt in enumerate(prompts):
        engine.add_request(f"{started}-{row}", {"prompt_token_ids": prompt}, settings)
    ids, seconds = {}, []
    while engine.has_unfinished_requests():
        for said in engine.step():
            ids[int(said.request_id.rsplit("-", 1)[1])] = list(said.outputs[0].token_ids)
        there = min(map(len, ids.values())) if len(ids) == len(prompts) else 0
        seconds += [time.perf_counter() - started] * (there - len(seconds))
    return {"ids": [ids[row] for row in range(len(prompts))], "seconds": seconds}


def serve(settings):
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from vllm import LLM  # pyright: ignore[reportMissingImports]

    engine = LLM(**settings).llm_engine
    print("{}", file=answers, flush=True)  # ready
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answer(engine, request["prompts"], request["output"])), file=answers, flush=True)


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
