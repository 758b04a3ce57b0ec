"""Images that come cut into patches: batches of timm's NaFlex loader and of SigLIP 2's processor, as they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from revit_kernels.grids import Grid

KEYS = ("patches", "patch_coord", "patch_valid"), ("pixel_values", "spatial_shapes", "pixel_attention_mask")


def _grids(batch: Mapping, given: str, valid: Tensor | None, images: int) -> list[Grid]:
    """The grid of each image, of which the host is told once a call."""
    if given == "pixel_values":
        return [tuple(grid) for grid in batch["spatial_shapes"].tolist()]
    coordinates = batch["patch_coord"]
    if valid is not None:
        coordinates = coordinates.masked_fill(~valid[..., None], -1)
    return [tuple(grid) for grid in (coordinates.amax(1) + 1).tolist()] if images else []


def images_of(batch: Mapping, patch_size: tuple[int, int], channels: int) -> tuple[list[Tensor], list[Grid]]:
    """The images (channels, height, width) that were cut into patches, and their grids.

    batch: "pixel_values" (images, patches, rows * columns * channels of a patch), "spatial_shapes" (images, 2) and
           "pixel_attention_mask" (images, patches), as processors of SigLIP 2 give them; or "patches", "patch_coord"
           (images, patches, 2) and "patch_valid", as timm's NaFlex loader. Patches come row by row, padding last.

    Raises ValueError for another dictionary, and where patches were left out or are of another size than the model's.
    """
    found = [keys for keys in KEYS if keys[0] in batch and keys[1] in batch]
    if not found:
        raise ValueError(f"a dictionary of patches needs {KEYS[0][:2]} or {KEYS[1][:2]}, got {tuple(batch)}")
    name, _, mask = found[0]
    patches, valid = batch[name], batch.get(mask)
    images, (rows, columns) = len(patches), patch_size
    size = rows * columns * channels
    if patches.ndim not in (3, 5) or patches[0:1].flatten(2).shape[-1] != size:
        raise ValueError(
            f"{name} must be (images, patches, {size}), of {rows}x{columns} pixels with {channels} channels each, got "
            f"{tuple(patches.shape)}"
        )
    valid = None if valid is None else valid.bool()
    grids = _grids(batch, name, valid, images)
    cells = torch.tensor([h * w for h, w in grids])
    if len(grids) != images or (cells > patches.shape[1]).any():
        raise ValueError(f"{name} has {images} images of at most {patches.shape[1]} patches, got grids {grids}")
    if valid is not None and not torch.equal(valid.sum(1).cpu(), cells):
        raise ValueError(f"{mask} must leave as many patches as the grids have: some were dropped, or are not last")
    flat = patches.flatten(2)
    whole = [
        image[: h * w]
        .view(h, w, rows, columns, channels)
        .permute(4, 0, 2, 1, 3)
        .reshape(channels, h * rows, w * columns)
        for image, (h, w) in zip(flat, grids)
    ]
    return whole, grids


def projection(weight: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """The weight (dim, rows * columns * channels of a patch) of a Linear on patches, as that of a convolution, a copy.

    Returns (dim, channels, rows, columns).
    """
    return weight.unflatten(1, (*patch_size, -1)).permute(0, 3, 1, 2).contiguous()
