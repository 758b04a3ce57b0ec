"""What `revit infer` needs before the first image: the model with weights, its device and dtype, and class names."""

from __future__ import annotations

from pathlib import Path

import torch

from revit_kernels.data.class_names import read_class_names
from revit_kernels.models.checkpoints import description
from revit_kernels.models.registry import create_model, model_file, resolve

WEIGHTS = (".pth", ".pt", ".bin", ".npz")  # files of weights that do not say what model they are for


def load_model(
    name: str,
    *,
    checkpoint: str | None = None,
    pretrained: bool = False,
    untrained: bool = False,
    device: torch.device,
    dtype: torch.dtype,
):
    """The model with its weights, in eval mode, on the device.

    name:       of timm, or a .safetensors file that says what model it is for, or the folder of a run
    checkpoint: weights for that name, or `pretrained`: timm's own, or `untrained`: random ones

    Raises ValueError where there are no weights, or they do not fit, and for a model of other images than RGB.
    """
    name = model_file(name)
    is_file = Path(name).suffix == ".safetensors"
    sources = sum((bool(checkpoint), pretrained, untrained, is_file))
    if sources > 1:
        raise ValueError("the weights come from one place: --checkpoint, --pretrained, --untrained or a --model file")
    if Path(name).suffix.lower() in WEIGHTS or (is_file and description(name) is None):
        raise ValueError(f"{name} does not say what model it is for: use --model NAME --checkpoint {name}")
    if not sources:
        resolve(name)  # a name that is wrong is the first thing to say
        raise ValueError(
            f"--model {name} needs weights: --checkpoint FILE, --pretrained (timm's, downloaded), or --untrained "
            "(random, for timing only)"
        )
    model = create_model(name, pretrained=pretrained, checkpoint_path=checkpoint)
    channels = model.patch_embed.proj.in_channels
    if channels != 3:
        raise ValueError(f"--model {name} takes images of {channels} channels; images are decoded to RGB, which has 3")
    return model.to(device, dtype).eval()


def make_engine(model, quantize: str | None):
    """The model's engine. Raises ValueError where it cannot be quantized so."""
    try:
        return model.engine(quantize=quantize)
    except NotImplementedError as why:
        raise ValueError(f"--quantize {quantize}: {why}") from None


def read_labels(path: str | None, model) -> list[str] | None:
    """The names of the model's classes: from a file, see `read_class_names`, or the model's own.

    Raises ValueError for a file that cannot be read or has another number of names than there are classes.
    """
    if path is None:
        names = model.pretrained_cfg.get("label_names")
        return [str(name) for name in names] if names and len(names) == model.num_classes else None
    try:
        return read_class_names(path, model.num_classes)
    except ValueError as error:
        raise ValueError(f"--labels {path} {error}") from None
