"""The op on NVIDIA GPUs from Ampere on: csrc/patch_embed/cuda.cu, one launch from pixels to tokens.

Ran on one H200 (benchmarks/results/NVIDIA_H200.md), and thread by thread on a CPU (tests/cuda_on_host).
"""

from functools import cache

import torch
import torch.nn.functional as F

from revit_kernels import native
from revit_kernels.device_cache import host_buffer, to_device
from revit_kernels.ops.patch_embed.normalisation import affine

native.load("cuda")
_forward = torch.ops.revit_kernels.patch_embed_cuda.default
_images = torch.ops.revit_kernels.patch_embed_images_cuda.default
_sums = torch.ops.revit_kernels.patch_embed_sums_cuda.default
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MOST_NUMBERS, MOST_ROWS, MOST_CHANNELS = 3392, 32, 64  # of a patch: what fits in shared memory, and in the arguments
SHARED = 164  # KiB of shared memory on a multiprocessor: a block may use nearly all


@cache
def _shared(device):
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor // 1024


def refusal(step, args):
    tensor = args.weight if step == "forward" else args.patches
    if why := native.gpu_refusal(DTYPES, tensor):
        return why
    if tensor.is_cuda and (found := _shared(tensor.device)) < SHARED:
        return f"needs {SHARED} KiB of shared memory on a multiprocessor, {tensor.device} has {found}"
    if step == "forward":
        channels, rows, columns = tensor.shape[1:]
        if channels > MOST_CHANNELS or rows > MOST_ROWS or channels * rows * columns > MOST_NUMBERS:
            most = f"{MOST_ROWS} rows, {MOST_CHANNELS} channels and {MOST_NUMBERS} numbers"
            return f"no kernel for patches of more than {most}, got {rows} x {columns} of {channels} channels"
    return None


def _table(images, channels_last, device):
    """Where each image lies; None for the images of one tensor, of which the kernel is told directly."""
    if len(images) < 2:
        return None
    table = host_buffer(len(images), 6, dtype=torch.int64, device=device)
    _images(table, images, channels_last)
    return to_device([table], device)[0]


def _rows(weight):
    """(dim, width), the width padded with zeros so that every row starts on 16 bytes."""
    rows, lacking = weight.flatten(1), -weight.shape[1:].numel() % (16 // weight.element_size())
    rows = F.pad(rows, (0, lacking)) if lacking else rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


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
    scale, shift = affine(images, weight.shape[1], mean, std)
    table = _table(images, channels_last, weight.device)
    return _forward(
        images if table is None else images[:1],  # it says the dtype; hundreds of tensors take their time to hand over
        table,
        _rows(weight),
        None if bias is None else bias.contiguous(),
        cu_seqlens,
        placement.contiguous(),
        image,
        None if pos is None else pos.contiguous(),
        None if prefix is None else prefix.contiguous(),
        scale,
        shift,
        interpolation == "bicubic",
        channels_last,
        prefix_tokens,
        *weight.shape[2:],
        keep,
    )


def backward(grad, patches, cu_seqlens, placement, image, prefix_tokens, cells):
    grad = grad.contiguous()
    sums = _sums(grad, cu_seqlens, placement.contiguous(), prefix_tokens, cells)
    if len(patches):
        return grad.masked_fill((image < 0)[:, None], 0).T @ patches, sums
    return grad.new_zeros(grad.shape[1], patches.shape[1]), sums
