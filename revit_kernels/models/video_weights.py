"""How models of clips load the weights of files: their own, or those of a model of images."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from revit_kernels.models.checkpoints import resample_positions
from revit_kernels.models.families import PLAINEST, family
from revit_kernels.models.timesformer import VarLenTimeSformer
from revit_kernels.models.video import ClipModel
from revit_kernels.models.weight_files import read_checkpoint, some


def load(model: ClipModel, path, new_head: bool = False) -> None:
    """Load a file of this model, as we, its authors or transformers write it.

    new_head: a head of another number of classes leaves the model's own as it is, with a warning

    Raises ValueError, naming keys, before anything is copied.
    """
    head, kept = read_checkpoint(path).get("head.weight"), None
    if new_head and head is not None and len(head) != model.num_classes:
        warnings.warn(f"the head of {path} has {len(head)} classes: the model's of {model.num_classes} begins anew")
        kept, classes = model.head, model.num_classes
        model.reset_classifier(0)  # a model without a head takes none
    try:
        model.load_pretrained(path)
    finally:
        if kept is not None:
            model.head, model.num_classes = kept, classes


def inflate(model: ClipModel, path, found: dict | None) -> bool:
    """Load the weights of a ViT of images, see `inflated`; whether the file has them and the model takes them.

    found: what the file says of a model of images, if anything
    """
    state = read_checkpoint(path)
    own = found is None and state.keys() == model.state_dict().keys()
    in_time = any("temporal_" in key or key == "time_embed" for key in state)
    if own or in_time or "cls_token" not in state or not isinstance(model, VarLenTimeSformer):
        return False
    if family(state) != PLAINEST:
        return False
    model.load_state_dict(inflated(state, model, path, tuple(found["grid"]) if found else None))
    return True


def inflated(
    state: dict[str, Tensor], model: ClipModel, path, grid: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """The state_dict of a model of clips that gives, of equal frames, what a ViT of images gives of one.

    state: of a ViT with a class token and no other prefix tokens, with timm's keys
    grid:  of its position table, square if not given

    Temporal attention and its norm are copies of the spatial ones behind a projection of zeros, times are zeros, layer
    scales go into the projections before them. The head is the model's own. Raises ValueError for keys without a place.
    """
    wanted, rest = model.state_dict(), {k: v.clone() for k, v in state.items() if not k.startswith("head.")}
    for block in range(len(model.blocks)):
        for scale, layer in (("ls1", "attn.proj"), ("ls2", "mlp.fc2")):
            gamma = rest.pop(f"blocks.{block}.{scale}.gamma", None)
            for key in (f"blocks.{block}.{layer}.weight", f"blocks.{block}.{layer}.bias"):
                if gamma is not None and key in rest:
                    rest[key] = rest[key] * gamma.view(-1, *[1] * (rest[key].ndim - 1))
    for key in [key for key in rest if key.startswith("blocks.") and int(key.split(".")[1]) >= len(model.blocks)]:
        del rest[key]  # a model of fewer blocks takes the first ones
    table = rest.get("pos_embed")
    if table is not None and table.shape != wanted["pos_embed"].shape:
        side = round((table.shape[1] - 1) ** 0.5)
        grid = grid or (side, side)
        if grid[0] * grid[1] != table.shape[1] - 1:
            raise ValueError(f"{path} has {table.shape[1]} positions: they are no square and one of a class token")
        new = tuple(model.patch_embed.grid_size)
        rest["pos_embed"] = resample_positions(table, 1, grid, new, "bicubic", True)
    for key, value in wanted.items():
        if "temporal_fc." in key or key == "time_embed":
            rest[key] = torch.zeros_like(value)
        elif "temporal_attn." in key or "temporal_norm1." in key:
            source = key.replace("temporal_attn.", "attn.").replace("temporal_norm1.", "norm1.")
            if source in rest:
                rest[key] = rest[source].clone()
        elif key.startswith("head."):
            rest[key] = value
    if model.menu is not None:
        model.fill_lengths(rest)
    wrong = [key for key in wanted if key in rest and rest[key].shape != wanted[key].shape]
    if differ := sorted(set(rest) ^ set(wanted)) + wrong:
        raise ValueError(f"{path} does not fit a {type(model).__name__}: they differ in {some(differ)}")
    return rest
