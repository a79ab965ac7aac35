"""The native kernels for a step of generation on a CPU: which layers they take whole. None says: go the usual way.

A layer is taken only if every part of it is the plain one: an adapter or a hook wants its own turn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn.modules.module import _has_any_global_hook

from grist_kernels import native
from grist_kernels.native import packed, step
from grist_model.layers import Linear, RMSNorm
from grist_model.quantized_layers import QuantizedLinear

if TYPE_CHECKING:
    from grist_model.attention import Attention
    from grist_model.cache import KVCache
    from grist_model.moe import DenseMLP


def attention(layer: Attention, x_BTD: Tensor, angles: tuple[Tensor, Tensor] | None, cache: KVCache) -> Tensor | None:
    """The whole of Attention.forward for a few new tokens, the cache included."""
    if not _few(x_BTD):
        return None
    place = cache.place(layer.layer)
    if place is None or place.k_cache.dtype != x_BTD.dtype:
        return None
    projections = _projections(layer.q, layer.k, layer.v, layer.o)
    if projections is None or not native.holds(layer.sinks):
        return None
    norms = []
    for norm in (layer.q_norm, layer.k_norm):
        if norm is not None and (not _bare(norm, RMSNorm) or not native.holds(norm.weight)):
            return None
        norms.append(None if norm is None else step.Norm(norm.weight, norm.eps))
    if angles is not None:
        angles = (angles[0].contiguous(), angles[1].contiguous())
    return step.attention_step(
        x_BTD, projections, (norms[0], norms[1]), angles, place, layer.head_width, layer.window, layer.sinks
    )


def mlp(layer: DenseMLP, x_BTD: Tensor) -> Tensor | None:
    """The whole of DenseMLP.forward."""
    if not _few(x_BTD):
        return None
    projections = _projections(layer.gate_up, layer.down)
    if projections is None:
        return None
    gate_up, down = projections
    return step.mlp(x_BTD, gate_up, down, layer.alpha, layer.limit)


def _few(x_BTD: Tensor) -> bool:
    return 0 < x_BTD.numel() <= step.MOST_ROWS * x_BTD.shape[-1] and native.takes(x_BTD)


def _projections(*linears: Linear | QuantizedLinear) -> list[step.Projection] | None:
    if _has_any_global_hook():
        return None
    found = []
    for linear in linears:
        projection = _projection(linear)
        if projection is None:
            return None
        found.append(projection)
    return found


def _projection(linear: Linear | QuantizedLinear) -> step.Projection | None:
    if linear._forward_hooks or linear._forward_pre_hooks:
        return None
    if type(linear) is Linear:
        # Past nn.Module's __getattr__, which takes longer than all of the rest.
        weight, bias = linear._parameters["weight"], linear._parameters["bias"]
        return step.Projection(weight, bias) if weight is not None and native.holds(weight, bias) else None
    if type(linear) is not QuantizedLinear:
        return None
    weight, bias = linear.packed, linear.bias
    return step.Projection(weight, bias) if native.holds(bias) and packed.holds(weight) else None


def _bare(module, kind: type) -> bool:
    """Exactly of this kind, and nobody listens to it."""
    return type(module) is kind and not (module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook())
