"""Vision Transformers on images of different token lengths: one packed batch, no padding."""

from revit_kernels import ops
from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.clips import ClipPacking
from revit_kernels.models.adopt import from_timm
from revit_kernels.models.hugging_face import from_transformers
from revit_kernels.models.registry import create_model, list_models
from revit_kernels.models.timesformer import VarLenTimeSformer
from revit_kernels.models.video_vit import VarLenVideoViT
from revit_kernels.models.vit import PackedTokens, VarLenViT
from revit_kernels.packing import Packing

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
