"""The definition of the op, in plain PyTorch: every other backend is tested against this file."""

import torch
import torch.nn.functional as F


def refusal(step, args):
    return None


def resized(x, size, interpolation):
    """x: (images, channels, height, width) -> (images, channels, *size), with antialias."""
    how = {"mode": interpolation, "antialias": True, "align_corners": False}
    if size[1] == 1:  # PyTorch 2.11 resizes the rows of a single column wrongly
        return F.interpolate(x.mT, size[::-1], **how).mT
    return F.interpolate(x, size, **how)


def _patches(image, h, w, weight, mean, std, interpolation):
    """(h * w, channels * patch_h * patch_w): the image resized to its grid, normalised and cut."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    ph, pw = weight.shape[2:]
    x = image.to(wide)
    if x.shape[1:] != (h * ph, w * pw):
        x = resized(x[None], (h * ph, w * pw), interpolation)[0]
    x = x / 255 if image.dtype == torch.uint8 else x
    x = x if mean is None else x - x.new_tensor(mean)[:, None, None]
    x = x if std is None else x / x.new_tensor(std)[:, None, None]
    return x.unflatten(2, (w, pw)).unflatten(1, (h, ph)).permute(1, 3, 0, 2, 4).reshape(h * w, -1).to(weight.dtype)


def _entries(cu_seqlens, placement, prefix_tokens):
    """Of each image that has tokens: its number, its grid, its first patch, its first row of `pos`."""
    cu_seqlens = cu_seqlens.tolist()
    for i, (h, w, cell) in enumerate(placement.tolist()):
        if cu_seqlens[i] < cu_seqlens[i + 1]:
            yield i, h, w, cu_seqlens[i] + prefix_tokens, cell


def forward(
    images,
    weight,
    bias,
    cu_seqlens,
    placement,
    image,
    pos,
    prefix,
    mean,
    std,
    interpolation,
    channels_last,
    resize,
    prefix_tokens,
    keep,
):
    images = [x for batch in images for x in (batch if batch.ndim == 4 else [batch])]
    y = weight.new_zeros(image.shape[0], weight.shape[0])
    kept = weight.new_zeros(image.shape[0] if keep else 0, weight[0].numel())
    for i, h, w, row, cell in _entries(cu_seqlens, placement, prefix_tokens):
        x = images[i].permute(2, 0, 1) if channels_last else images[i]
        patches = _patches(x, h, w, weight, mean, std, interpolation)
        tokens = F.linear(patches, weight.flatten(1), bias)
        y[row : row + h * w] = tokens if pos is None else tokens + pos[cell : cell + h * w]
        if prefix is not None:
            y[row - prefix_tokens : row] = prefix
        if keep:
            kept[row : row + h * w] = patches
    return y, kept


def backward(grad, patches, cu_seqlens, placement, image, prefix_tokens, cells):
    wide = torch.promote_types(grad.dtype, torch.float32)
    sums = torch.zeros(prefix_tokens + cells, grad.shape[1], dtype=wide, device=grad.device)
    dweight = torch.zeros(grad.shape[1], patches.shape[1], dtype=wide, device=grad.device)
    for _, h, w, row, cell in _entries(cu_seqlens, placement, prefix_tokens):
        part = grad[row : row + h * w].to(wide)
        sums[:prefix_tokens] += grad[row - prefix_tokens : row]
        sums[prefix_tokens + cell : prefix_tokens + cell + h * w] += part
        if len(patches):
            dweight += part.T @ patches[row : row + h * w].to(wide)
    return dweight.to(grad.dtype), sums
