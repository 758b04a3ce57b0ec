"""A timm model becomes a VarLenViT: containers are remade, leaf modules and parameters are shared."""

from __future__ import annotations

import copy
from types import MethodType
from typing import TYPE_CHECKING

from torch import nn

from revit_kernels import modules
from revit_kernels.models.rotary import RotaryPositions

if TYPE_CHECKING:
    from revit_kernels.models.vit import VarLenViT

CONTAINERS = {  # classes of timm's that we compute ourselves, by their names
    cls.__name__: cls
    for cls in (
        modules.Attention,
        modules.AttentionPoolLatent,
        modules.AttentionPoolPrr,
        modules.AttentionRope,
        modules.Block,
        modules.DiffAttention,
        modules.DiffParallelScalingBlock,
        modules.EvaAttention,
        modules.EvaBlock,
        modules.EvaBlockPostNorm,
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


ROPES = {  # classes of timm's, the kinds of rotary positions that they are
    "RotaryEmbeddingCat": "cat",
    "RotaryEmbeddingDinoV3": "dinov3",
    "RotaryEmbeddingMRope": "mrope",
    "RotaryEmbeddingMixed": "mixed",
}


def _adopt_rope(rope: nn.Module) -> RotaryPositions:
    """Raises NotImplementedError for options that no model of timm's eva.py has."""
    kind, told = ROPES[type(rope).__name__], vars(rope)
    pixels = kind == "cat" and told["grid_type"] != "index"
    if pixels or told.get("normalize_coords", "separate") != "separate" or told.get("min_period") is not None:
        raise NotImplementedError(
            f"this {type(rope).__name__} normalizes its positions in a way that is not implemented"
        )
    new = RotaryPositions(
        kind,
        rope.dim // told.get("num_heads", 1),
        temperature=rope.temperature,
        indexing=rope.grid_indexing,
        offset=told.get("grid_offset", 0.0),
        reference=told.get("ref_feat_shape"),
        half=told.get("rotate_half", False),
        section=told.get("mrope_section", (8, 12, 12)),
        augment=(rope.shift_coords, rope.jitter_coords, rope.rescale_coords),
        device="meta",
    )
    if kind == "mixed":
        new.freqs = rope.freqs
    return new.train(rope.training)


def _adopt(module: nn.Module, cls: type | None = None) -> nn.Module:
    if type(module).__name__ in ROPES and _from_timm(module):
        return _adopt_rope(module)
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


def from_timm(model: nn.Module) -> VarLenViT:
    """See VarLenViT.from_timm."""
    from revit_kernels.models import convert_timm
    from revit_kernels.models.distilled import VarLenViTDistilled
    from revit_kernels.models.eva import VarLenEva
    from revit_kernels.models.vit import VarLenViT

    classes = {"VisionTransformer": VarLenViT, "VisionTransformerDistilled": VarLenViTDistilled, "Eva": VarLenEva}
    if isinstance(model, VarLenViT):
        return model
    name, timms = type(model).__name__, type(model).__module__.startswith("timm.")
    if timms and name in convert_timm.TAKEN:
        return convert_timm.from_timm(model)
    cls = classes.get(name)
    if cls is None or not timms:
        raise NotImplementedError(f"from_timm takes timm's {', '.join([*classes, *convert_timm.TAKEN])}, got {name}")
    new = _adopt(model, cls)
    new._set_preprocessing()
    return new
