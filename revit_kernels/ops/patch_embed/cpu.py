"""The op on a CPU: in one sweep at inference; for a backward, patches, the vendor's product, and positions apart."""

import torch

from revit_kernels import native
from revit_kernels.ops.linear import linear
from revit_kernels.ops.linear.panels import pack_weight
from revit_kernels.ops.patch_embed.normalisation import affine

native.load("cpu")
_embed = torch.ops.revit_kernels.patch_embed_cpu.default
_patchify = torch.ops.revit_kernels.patchify_cpu.default
_place = torch.ops.revit_kernels.place_cpu.default
_sums = torch.ops.revit_kernels.patch_embed_sums_cpu.default
_weight_gradient = torch.ops.revit_kernels.patch_embed_weight_cpu.default


def refusal(step, args):
    return native.cpu_refusal(args.weight if step == "forward" else args.patches)


def pack(weight, bias):
    """The weight and its bias as the one sweep reads them."""
    return pack_weight(weight.flatten(1), bias, None, weight.dtype)


def forward_packed(
    images,
    weight,
    packed,
    cu_seqlens,
    placement,
    image,
    pos,
    prefix,
    mean,
    std,
    interpolation,
    channels_last,
    prefix_tokens,
):
    """The op in one sweep at inference. packed: what `pack` made of the weight and the bias"""
    pos, prefix = (x if x is None else x.contiguous() for x in (pos, prefix))
    scale_and_shift = affine(images, weight.shape[1], mean, std)
    how = (interpolation == "bicubic", channels_last, prefix_tokens, image.shape[0])
    return _embed(images, weight, packed, cu_seqlens, placement, pos, prefix, *scale_and_shift, *how)


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
    if not keep:
        places, how = (cu_seqlens, placement, image), (interpolation, channels_last, prefix_tokens)
        y = forward_packed(images, weight, pack(weight, bias), *places, pos, prefix, mean, std, *how)
        return y, weight.new_empty(0, weight[0].numel())
    pos, prefix = (x if x is None else x.contiguous() for x in (pos, prefix))
    scale_and_shift = affine(images, weight.shape[1], mean, std)
    how = (interpolation == "bicubic", channels_last, prefix_tokens, image.shape[0])
    patches = _patchify(images, weight, cu_seqlens, placement, *scale_and_shift, *how)
    y = linear(patches, weight.flatten(1), bias)
    _place(y, cu_seqlens, placement, pos, prefix, prefix_tokens)
    return y, patches


def backward(grad, patches, cu_seqlens, placement, image, prefix_tokens, cells):
    grad = grad.contiguous()
    sums = _sums(grad, cu_seqlens, placement, prefix_tokens, cells)
    if len(patches):
        return _weight_gradient(grad, patches, cu_seqlens), sums
    return grad.new_zeros(grad.shape[1], patches.shape[1]), sums
