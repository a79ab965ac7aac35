"""Which operations prefill and decoding spend their time in, in words, by torch.profiler."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from grist_tools.console import table
from grist_tools.latency import Shape, random_prompts, wait_for

if TYPE_CHECKING:
    import torch

REST = "between the operations: Python, launches, native steps"
# The first that is found in the name of an ATen operation or of a CUDA kernel says what it does.
_WORDS = (
    (r"attention|fmha|flash|attn", "attention"),
    (r"moe|expert|grouped", "products of experts"),
    (r"mm\b|matmul|linear|gemm|gemv|cutlass|cublas|nvjet|addmv|splitk|\bmv\b|dot", "matrix products"),
    (r"rms|norm", "norms"),
    (r"rope|rotary", "rotary embedding"),
    (r"swiglu|silu|gelu|sigmoid", "activations"),
    (r"softmax", "softmax"),
    (r"topk|sort|argmax|max\b", "choosing: top-k, sorting, argmax"),
    (r"index|gather|scatter|embedding|select", "picking rows"),
    (r"copy|cat\b|memcpy|memset|_to_copy|clone|contiguous", "copies"),
    (r"empty|resize|fill|zero", "making tensors"),
    (r"view|reshape|transpose|expand|slice|split|squeeze|permute|as_strided|\bt\b", "views"),
    (r"add|mul|sub|div|pow|sum|mean|cumsum|elementwise|reduce|where|compare|eq\b|lt\b|ge\b|clamp", "arithmetic"),
)


class Part(NamedTuple):
    """share: of the time of the whole phase. operations: the ones that took most of it, by torch's or the kernel's name."""

    words: str
    share: float
    ms: float
    calls: int
    operations: list[str]


def words_of(operation: str) -> str:
    """What an operation does; its own name where that says more than this file knows."""
    name = operation.removeprefix("aten::").lower()
    return next((words for pattern, words in _WORDS if re.search(pattern, name)), operation)


def breakdown(model, shape: Shape, device: str, top: int) -> dict[str, list[Part]]:
    """The `top` parts of prefill, and of the decoding steps together. On CUDA the time is the kernels', elsewhere the host's.

    The profiler slows what it watches: shares are to be compared, not times with those of other tables.
    """
    import torch

    from grist_model.prompts import prefill

    prompts = random_prompts(shape, model.config.vocab_size)
    with torch.no_grad():
        prefill(model, prompts, shape.output)  # what only the first call does is no part of it
        parts = {"prefill": _profiled(lambda: prefill(model, prompts, shape.output), device, top)}
        if shape.output > 1:
            cache, logits_BV = prefill(model, prompts, shape.output)

            def decode() -> None:
                ids_B1 = logits_BV.argmax(-1, keepdim=True)
                for _ in range(shape.output - 1):
                    ids_B1 = model(ids_B1, cache=cache)[:, -1].argmax(-1, keepdim=True)
                    ids_B1.tolist()

            parts["decode"] = _profiled(decode, device, top)
    return parts


def _profiled(work: Callable[[], Any], device: str, top: int) -> list[Part]:
    import torch
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    where = torch.device(device)
    with profile(activities=activities) as found:
        wait_for(where)
        started = time.perf_counter()
        work()
        wait_for(where)
        whole_ms = 1e3 * (time.perf_counter() - started)
    times = _kernel_times(found) if on_gpu else _host_times(found)
    return _parts(times, whole_ms, top)


def _host_times(found: torch.profiler.profile) -> dict[str, tuple[float, int]]:
    """Operation -> (milliseconds without those of operations inside it, calls)."""
    return {e.key: (e.self_cpu_time_total / 1e3, e.count) for e in found.key_averages() if e.self_cpu_time_total > 0}


def _kernel_times(found: torch.profiler.profile) -> dict[str, tuple[float, int]]:
    from torch.autograd import DeviceType

    return {
        e.key: (e.self_device_time_total / 1e3, e.count)
        for e in found.key_averages()
        if e.device_type == DeviceType.CUDA and e.self_device_time_total > 0
    }


def _parts(times: dict[str, tuple[float, int]], whole_ms: float, top: int) -> list[Part]:
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    operations: dict[str, Counter[str]] = defaultdict(Counter)
    for name, (ms, count) in times.items():
        words = words_of(name)
        spent[words] += ms  # pyright: ignore[reportArgumentType]
        calls[words] += count
        operations[words][name] += ms  # pyright: ignore[reportArgumentType]
    spent[REST] += max(0.0, whole_ms - sum(spent.values()))  # pyright: ignore[reportArgumentType]
    return [
        Part(words, ms / whole_ms, ms, calls[words], [name for name, _ in operations[words].most_common(3)])
        for words, ms in spent.most_common(top)
    ]


def parts_table(parts: dict[str, list[Part]]) -> str:
    rows = [
        [
            f"{phase}: {part.words}",
            f"{part.share:.0%}",
            f"{part.ms:.2f}",
            f"{part.calls:,}",
            ", ".join(part.operations)[:60],
        ]
        for phase, found in parts.items()
        for part in found
    ]
    return table(["where the time goes", "share", "ms", "calls", "most of it"], rows)
