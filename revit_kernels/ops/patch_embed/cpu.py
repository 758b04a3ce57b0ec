"""The op on a CPU: in one sweep at inference; for a backward, patches, the vendor's product, and positions apart."""

import torch
from torch.utils.weak import WeakIdKeyDictionary

from revit_kernels import native
from revit_kernels.gemm import linear
from revit_kernels.layouts import Layouts, panels

native.load("cpu")
_embed = torch.ops.revit_kernels.patch_embed_cpu.default
_patchify = torch.ops.revit_kernels.patchify_cpu.default
_place = torch.ops.revit_kernels.place_cpu.default
_sums = torch.ops.revit_kernels.patch_embed_sums_cpu.default
_weight_gradient = torch.ops.revit_kernels.patch_embed_weight_cpu.default

_flat = WeakIdKeyDictionary()  # parameter: the same memory as (dim, width), whose packed layout `linear` keeps
_packed = Layouts(lambda weight, bias: panels(weight.flatten(1), bias, None, weight.dtype))


def refusal(step, args):
    return _refusal(args.weight if step == "forward" else args.patches)


def _refusal(tensor):
    if tensor.device.type != "cpu":
        return f"needs CPU tensors, got one on {tensor.device}"
    if tensor.dtype not in (torch.float32, torch.bfloat16):
        return f"no kernel for {tensor.dtype}"
    return None


def _fits(weight):
    """Whether the product takes the weight packed."""
    return weight.shape[1:].numel() % 4 == 0


def _flatten(weight):
    if type(weight) is not torch.nn.Parameter or not weight.is_contiguous():
        return weight.flatten(1)
    flat = _flat.get(weight)
    if flat is None or flat.data_ptr() != weight.data_ptr() or flat.dtype != weight.dtype:
        flat = _flat[weight] = torch.nn.Parameter(weight.detach().flatten(1), requires_grad=False)
    return flat


def _affine(images, channels, mean, std):
    """What to multiply a pixel of each channel with, and what to add then."""
    std = [1.0] * channels if std is None else std
    mean = [0.0] * channels if mean is None else mean
    unit = 255 if images and images[0].dtype == torch.uint8 else 1
    return [1 / (s * unit) for s in std], [-m / s for m, s in zip(mean, std)]


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
    places, affine = (cu_seqlens, placement), _affine(images, weight.shape[1], mean, std)
    how = (interpolation == "bicubic", channels_last, prefix_tokens, image.shape[0])
    pos, prefix = (x if x is None else x.contiguous() for x in (pos, prefix))
    packed = _packed.get(weight, bias) if not keep and _fits(weight) else None
    if packed is not None:
        y = _embed(images, weight, packed, *places, pos, prefix, *affine, *how)
        return y, weight.new_empty(0, weight[0].numel())
    patches = _patchify(images, weight, *places, *affine, *how)
    y = linear(patches, _flatten(weight), bias)
    _place(y, *places, pos, prefix, prefix_tokens)
    return y, patches if keep else patches.new_empty(0, patches.shape[1])


def prepack(weight, bias) -> None:
    """Pack the weight now, where a forward would, and see no more whether it changed but by its version."""
    if _refusal(weight) is None and _fits(weight):
        _packed.trust(weight, bias)


def backward(grad, patches, cu_seqlens, placement, image, prefix_tokens, cells):
    grad = grad.contiguous()
    sums = _sums(grad, cu_seqlens, placement, prefix_tokens, cells)
    if len(patches):
        return _weight_gradient(grad, patches, cu_seqlens), sums
    return grad.new_zeros(grad.shape[1], patches.shape[1]), sums
