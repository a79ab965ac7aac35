"""Peers of attention and decode_attention: PyTorch's fused attention, by each of its doors. Needs only torch.

B batch, T time (of queries), S cache slots, N query heads, K key heads, H head width.

- SDPA: causal or masked, grouped queries; no window of its own, no sinks, no documents, no lse.
- varlen_attn: FlashAttention with documents and windows. It returns lse but drops its gradient, so that sinks, which are added
  through lse, and a returned lse have a forward only.
- FlexAttention, compiled: windows and documents through a block mask, sinks through lse, whose gradient it has.

Written against torch 2.11. A later version that differs fails its check or raises, and the benchmark says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grist_tools.kernel_peers import Arguments, Peer, Peers, absent

SINKS_NOTE = "sinks by out * sigmoid(lse - sink)"
MASK_NOTE = "block mask made before timing"
CACHE_NOTE = "slots that nobody wrote are zeroed before timing"
NEEDS_CUDA = "needs a CUDA device"


def attention(arguments: Arguments) -> Peers:
    """PyTorch's own ops that can do a call of attention, as they are."""
    found: Peers = {}
    options = ("sinks", "window", "cu_seqlens")
    if not arguments.get("return_lse") and all(arguments.get(name) is None for name in options):
        found = _sdpa_backends(arguments["q"], _sdpa, "", dict)
    return found | {"varlen_attn": _varlen(arguments)}


def decode_attention(arguments: Arguments) -> Peers:
    """PyTorch's own ops that can do a call of decode_attention: none of them reads pages of any size."""
    if arguments.get("block_table") is not None:
        return {}
    found: Peers = {}
    if arguments.get("sinks") is None:
        note = f"a boolean mask, made before timing; {CACHE_NOTE}"
        found = _sdpa_backends(arguments["q"], _sdpa_masked, note, _masked_arguments)
    return found | {"varlen_attn": _varlen_decode(arguments)}


def flex(op: str, arguments: Arguments) -> Peers:
    """FlexAttention under torch.compile, the sinks compiled with it."""
    if arguments.get("block_table") is not None:
        return {}
    if not arguments["q"].is_cuda:
        return {"FlexAttention": absent(f"{NEEDS_CUDA}: it has no backward on a CPU")}
    notes = [MASK_NOTE]
    if arguments.get("sinks") is not None:
        notes.append(SINKS_NOTE)
    if op == "decode_attention":
        notes.append(CACHE_NOTE)
    function, prepare = FLEX[op]
    return {"FlexAttention": Peer(torch.compile(function, dynamic=False), "; ".join(notes), prepare)}


def _sdpa_backends(q: Tensor, function: Callable[..., Any], note: str, prepare: Callable) -> Peers:
    """On CUDA one peer for each fused backend, alone: PyTorch's own choice between them would hide the other."""
    from torch.nn.attention import SDPBackend

    if not q.is_cuda:
        own = Peer(lambda **given: function(None, **given), note, prepare)
        return {"SDPA": own, "SDPA flash": absent(NEEDS_CUDA), "SDPA cuDNN": absent(NEEDS_CUDA)}
    backends = {"SDPA flash": SDPBackend.FLASH_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    if prepare is not dict:  # PyTorch's flash attention takes no mask
        backends = {"SDPA efficient": SDPBackend.EFFICIENT_ATTENTION, "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION}
    return {
        name: Peer(lambda backend=backend, **given: function(backend, **given), note, prepare)
        for name, backend in backends.items()
    }


def _with_backend(backend: Any):
    from torch.nn.attention import sdpa_kernel

    return nullcontext() if backend is None else sdpa_kernel(backend)


def _sdpa(backend: Any, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, **_: Any) -> Tensor:
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    with _with_backend(backend):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def _sdpa_masked(
    backend: Any, q: Tensor, k_cache: Tensor, v_cache: Tensor, mask: Tensor, scale: float | None = None, **_: Any
) -> Tensor:
    q, k, v = (heads.transpose(1, 2) for heads in (q, k_cache, v_cache))
    with _with_backend(backend):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


def _written_only(arguments: Arguments) -> Arguments:
    """The call with zeros in the slots that nobody wrote: these peers multiply what they hide by zero, and that may be NaN."""
    slots = torch.arange(arguments["k_cache"].shape[1], device=arguments["lengths"].device)
    unwritten = (slots >= arguments["lengths"][:, None])[:, :, None, None]
    return arguments | {name: arguments[name].masked_fill(unwritten, 0.0) for name in ("k_cache", "v_cache")}


def _masked_arguments(arguments: Arguments) -> Arguments:
    sees = _sees_slot(arguments)
    q, k_cache = arguments["q"], arguments["k_cache"]
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    query = torch.arange(q.shape[1], device=q.device)[:, None]
    slot = torch.arange(k_cache.shape[1], device=q.device)
    return _written_only(arguments) | {"mask": sees(batch, 0, query, slot)[:, None]}


def _sees_slot(arguments: Arguments) -> Callable[..., Tensor]:
    """(sequence, head, query, slot) -> does the query see the slot: grist_kernels.decode_attention."""
    lengths, T, window = arguments["lengths"], arguments["q"].shape[1], arguments.get("window")

    def sees(batch, head, query, slot):
        distance = lengths[batch] - T + query - slot
        return (distance >= 0) if window is None else (distance >= 0) & (distance < window)

    return sees


def _sees_key(arguments: Arguments) -> Callable[..., Tensor]:
    """(sequence, head, query, key) -> does the query see the key: grist_kernels.attention."""
    cu_seqlens, window = arguments.get("cu_seqlens"), arguments.get("window")
    document = None
    if cu_seqlens is not None:
        tokens = torch.arange(arguments["q"].shape[0], device=cu_seqlens.device, dtype=cu_seqlens.dtype)
        document = torch.searchsorted(cu_seqlens, tokens, right=True)

    def sees(batch, head, query, key):
        seen = key <= query
        if window is not None:
            seen = seen & (query - key < window)
        return seen if document is None else seen & (document[query] == document[key])

    return sees


def _flex_arguments(arguments: Arguments) -> Arguments:
    from torch.nn.attention.flex_attention import create_block_mask

    q = arguments["q"]
    T = q.shape[-3]
    mask = create_block_mask(_sees_key(arguments), None, None, T, T, device=str(q.device))
    return arguments | {"block_mask": mask}


def _flex_decode_arguments(arguments: Arguments) -> Arguments:
    from torch.nn.attention.flex_attention import create_block_mask

    q, S = arguments["q"], arguments["k_cache"].shape[1]
    mask = create_block_mask(_sees_slot(arguments), q.shape[0], None, q.shape[1], S, device=str(q.device))
    return _written_only(arguments) | {"block_mask": mask}


def flex_attention(
    q: Tensor, k: Tensor, v: Tensor, block_mask: Any, sinks: Tensor | None = None, scale: float | None = None,
    return_lse: bool = False, **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """attention by FlexAttention, with the mask of _flex_arguments."""
    from torch.nn.attention import flex_attention as module

    packed = q.dim() == 3
    q, k, v = ((x.unsqueeze(0) if packed else x).transpose(1, 2) for x in (q, k, v))
    if sinks is None and not return_lse:
        out = module.flex_attention(q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True).transpose(1, 2)
        return out.squeeze(0) if packed else out
    out, aux = module.flex_attention(
        q, k, v, block_mask=block_mask, scale=scale, enable_gqa=True, return_aux=module.AuxRequest(lse=True)
    )
    lse = aux.lse
    assert lse is not None  # it was asked for
    if sinks is not None:
        out, lse = _with_sinks(out, lse, sinks[:, None])
    out, lse = (x.squeeze(0) if packed else x for x in (out.transpose(1, 2), lse))
    return (out, lse) if return_lse else out


def flex_decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, block_mask: Any, **options: Any) -> Any:
    """decode_attention by FlexAttention, with the mask of _flex_decode_arguments."""
    return flex_attention(q, k_cache, v_cache, block_mask, **options)


FLEX: dict[str, tuple[Callable[..., Any], Callable[[Arguments], Arguments]]] = {
    "attention": (flex_attention, _flex_arguments),
    "decode_attention": (flex_decode_attention, _flex_decode_arguments),
}


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """out (..., H) and lse (...) with a sink in the denominator; sinks broadcast against lse."""
    weighted = (out.float() * torch.sigmoid(lse - sinks).unsqueeze(-1)).to(out.dtype)
    return weighted, torch.logaddexp(lse, sinks.to(lse.dtype))


def _varlen_parameters() -> set[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return set()
    return set(inspect.signature(varlen_attn).parameters)


def _varlen_missing(q: Tensor, *needed: str) -> str:
    """Why varlen_attn cannot run here; empty if it can."""
    if not q.is_cuda:
        return NEEDS_CUDA
    missing = [name for name in needed if name not in _varlen_parameters()]
    return f"varlen_attn of torch {torch.__version__} has no {missing[0]}" if missing else ""


def varlen(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, sinks: Tensor | None, window: int | None,
    scale: float | None, return_lse: bool, **more: Any,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Causal varlen_attn of packed q (T, N, H), k and v (T, K, H), whose sequences end at `ends`, with sinks added.

    more: ends_k and longest_k where the keys' differ, and what else varlen_attn takes.
    """
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    if "enable_gqa" in _varlen_parameters():  # torch 2.13 asks; before, more query heads than key heads were enough
        more["enable_gqa"] = True
    ends_k, longest_k = more.pop("ends_k", ends), more.pop("longest_k", longest)
    out, lse = varlen_attn(
        q, k, v, ends, ends_k, longest, longest_k, return_aux=AuxRequest(lse=True), scale=scale,
        window_size=(-1 if window is None else window - 1, 0), **more,
    )  # fmt: skip
    if sinks is not None:
        # lse is (N, T), whatever its documentation says.
        out, lse_TN = _with_sinks(out, lse.transpose(0, 1), sinks)
        lse = lse_TN.transpose(0, 1)
    return (out, lse) if return_lse else out


def _varlen(arguments: Arguments) -> Peer:
    if missing := _varlen_missing(arguments["q"], "window_size"):
        return absent(missing)
    one_way = arguments.get("sinks") is not None or bool(arguments.get("return_lse"))
    note = f"{SINKS_NOTE}; no backward: its lse has no gradient" if one_way else ""

    def prepare(arguments: Arguments) -> Arguments:
        q, ends = arguments["q"], arguments.get("cu_seqlens")
        if ends is None:
            B, T = q.shape[:2]
            ends = torch.arange(0, B * T + 1, T, device=q.device)
        return {"sinks": None, "window": None, "scale": None, "return_lse": False} | {
            name: value for name, value in arguments.items() if name != "cu_seqlens"
        } | {"ends": ends.int(), "longest": int(ends.diff().max())}  # fmt: skip

    def function(q, k, v, **options):
        if q.dim() == 3:
            return varlen(q, k, v, **options)
        B, T = q.shape[:2]
        found = varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), **options)
        if isinstance(found, tuple):
            return found[0].unflatten(0, (B, T)), found[1].unflatten(1, (B, T)).transpose(0, 1)
        return found.unflatten(0, (B, T))

    return Peer(function, note, prepare, forward_only=one_way)


def _varlen_decode(arguments: Arguments) -> Peer:
    if missing := _varlen_missing(arguments["q"], "window_size", "seqused_k"):
        return absent(missing)

    def prepare(arguments: Arguments) -> Arguments:
        (B, T), S, lengths = arguments["q"].shape[:2], arguments["k_cache"].shape[1], arguments["lengths"]
        starts = torch.arange(B + 1, device=lengths.device, dtype=torch.int32)
        return {"sinks": None, "window": None, "scale": None, **_written_only(arguments)} | {
            "ends": starts * T, "longest": T, "ends_k": starts * S, "longest_k": S, "seqused_k": lengths.int(),
        }  # fmt: skip

    def function(q, k_cache, v_cache, lengths, **options):
        out = varlen(q.flatten(0, 1), k_cache.flatten(0, 1), v_cache.flatten(0, 1), return_lse=False, **options)
        assert isinstance(out, Tensor)
        return out.unflatten(0, q.shape[:2])

    notes = [CACHE_NOTE, *([SINKS_NOTE] if arguments.get("sinks") is not None else [])]
    return Peer(function, "; ".join(notes), prepare)
