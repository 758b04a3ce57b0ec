"""Vision Transformers on images of different token lengths: one packed batch, no padding."""

from importlib import import_module
from typing import TYPE_CHECKING

from revit_kernels import ops
from revit_kernels.clips import ClipPacking
from revit_kernels.packing import PackedTokens, Packing

if TYPE_CHECKING:
    from revit_kernels.adaptive.assigner import TokenLengthAssigner
    from revit_kernels.adaptive.model import AdaptiveViT
    from revit_kernels.models.adopt import from_timm
    from revit_kernels.models.hugging_face import from_transformers
    from revit_kernels.models.registry import create_model, list_models
    from revit_kernels.models.timesformer import VarLenTimeSformer
    from revit_kernels.models.video_vit import VarLenVideoViT
    from revit_kernels.models.vit import VarLenViT

__version__ = "0.1.0"
__all__ = [
    "AdaptiveViT",
    "ClipPacking",
    "PackedTokens",
    "Packing",
    "TokenLengthAssigner",
    "VarLenTimeSformer",
    "VarLenViT",
    "VarLenVideoViT",
    "create_model",
    "from_timm",
    "from_transformers",
    "list_models",
    "ops",
]

_MODULE_OF = {  # imported when the name is first asked for: a program that uses the ops does not wait for the models
    "AdaptiveViT": "adaptive.model",
    "TokenLengthAssigner": "adaptive.assigner",
    "VarLenTimeSformer": "models.timesformer",
    "VarLenViT": "models.vit",
    "VarLenVideoViT": "models.video_vit",
    "create_model": "models.registry",
    "from_timm": "models.adopt",
    "from_transformers": "models.hugging_face",
    "list_models": "models.registry",
}


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'revit_kernels' has no attribute {name!r}")
    return getattr(import_module(f"revit_kernels.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
