"""A timm model becomes a VarLenViT: containers are remade, leaf modules and parameters are shared."""

from __future__ import annotations

import copy
from types import MethodType
from typing import TYPE_CHECKING

from torch import nn

from revit_kernels import modules

if TYPE_CHECKING:
    from revit_kernels.models.vit import VarLenViT

CONTAINERS = {  # classes of timm's that we compute ourselves, by their names
    cls.__name__: cls
    for cls in (
        modules.Attention,
        modules.AttentionPoolLatent,
        modules.AttentionPoolPrr,
        modules.Block,
        modules.DiffAttention,
        modules.DiffParallelScalingBlock,
        modules.GluMlp,
        modules.Mlp,
        modules.ParallelScalingBlock,
        modules.ParallelThingsBlock,
        modules.PatchEmbed,
        modules.ResPostBlock,
        modules.SwiGLU,
        nn.ModuleList,
        nn.Sequential,
    )
}
ATTENTION = ("attn", "attns")  # children by which a block computes attention


def _from_timm(module: nn.Module) -> bool:
    return type(module).__module__.split(".")[0] in ("timm", "torch")


def _ours(module: nn.Module) -> type | None:
    """Our class for this module of timm's; None for one to share as it is."""
    ours = CONTAINERS.get(type(module).__name__)
    if ours is None or not _from_timm(module):
        return None
    attention = [m for name in ATTENTION for m in getattr(module, name, nn.Module()).modules()]
    known = [m for m in attention if _ours_by_name(m) or not hasattr(m, "qkv")]
    return ours if len(known) == len(attention) else None  # a block with foreign attention stays whole


def _ours_by_name(module: nn.Module) -> bool:
    return type(module).__name__ in CONTAINERS and _from_timm(module)


def _adopt(module: nn.Module, cls: type | None = None) -> nn.Module:
    cls = cls or _ours(module)
    if cls is None:
        return module
    new = cls.__new__(cls)
    new.__dict__.update({k: copy.copy(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()})
    for name, value in module.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is module:  # somebody's method on the instance
            new.__dict__[name] = MethodType(value.__func__, new)
    for name, child in module._modules.items():
        new._modules[name] = None if child is None else _adopt(child)
    return new


def adopt_model(model: nn.Module) -> VarLenViT:
    """See VarLenViT.from_timm."""
    from revit_kernels.models.distilled import VarLenViTDistilled
    from revit_kernels.models.vit import VarLenViT

    classes = {"VisionTransformer": VarLenViT, "VisionTransformerDistilled": VarLenViTDistilled}
    if isinstance(model, VarLenViT):
        return model
    cls = classes.get(type(model).__name__)
    if cls is None or not type(model).__module__.startswith("timm."):
        raise NotImplementedError(
            f"from_timm takes timm's VisionTransformer and VisionTransformerDistilled, got {type(model).__name__}"
            + (" (rotary position models are not supported yet)" if type(model).__name__ == "Eva" else "")
        )
    new = _adopt(model, cls)
    new._set_preprocessing()
    return new
