"""The op in Triton: one fused kernel where images fit their grids, a resizing kernel ahead of it where they do not."""

import os

import torch
import triton
import triton.language as tl

from revit_kernels import measured
from revit_kernels.device_cache import DeviceCache, constant, to_device
from revit_kernels.ops.patch_embed.normalisation import affine

PIXELS = {torch.uint8: tl.uint8, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # it multiplies the bits of bfloat16, not the values


def refusal(step, args):
    tensor = args.weight if step == "forward" else args.patches
    if not (tensor.is_cuda or INTERPRETED):
        return "needs a CUDA tensor"
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {tensor.dtype}"
    if step == "forward" and any(max(image.shape[-3:]) >= 2**15 for image in args.images):
        return f"an image has {2**15} pixels or more a side: positions are 32-bit fractions"
    return None


@triton.jit
def _filter(numerator, denominator, CUBIC: tl.constexpr):
    """The antialiasing filter at numerator / denominator, whole numbers: the distance of a pixel is exact."""
    x = tl.abs(numerator.to(tl.float32) / denominator.to(tl.float32))
    if CUBIC:
        near = (1.5 * x - 2.5) * x * x + 1
        far = ((-0.5 * x + 2.5) * x - 4) * x + 2
        y = tl.where(x < 1, near, tl.where(x < 2, far, 0.0))
    else:
        y = tl.maximum(1 - x, 0.0)
    return y


@triton.jit(do_not_specialize=("origin", "cu_seqlens_ptr", "placement_ptr", "image_ptr"))
def _patchify_kernel(
    table_ptr,  # (images, 6) int64: address less `origin`, height, width, and strides of channel, row and pixel
    origin: tl.int64,
    cu_seqlens_ptr,
    placement_ptr,  # (images, 3): grid, first row of `pos`
    image_ptr,  # (capacity,)
    affine_ptr,  # (2, channels) fp32: what to multiply a pixel with and what to add
    patches_ptr,  # (capacity, channels * PATCH_H * PATCH_W)
    prefix,
    channels,
    PIXEL: tl.constexpr,
    CUBIC: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    BLOCK_H: tl.constexpr,  # at least PATCH_H
    BLOCK_W: tl.constexpr,
    BLOCK: tl.constexpr,  # source pixels at a time, each way
):
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1)
    image = tl.load(image_ptr + row)
    known = image >= 0
    image = tl.maximum(image, 0).to(tl.int64)
    patch = tl.program_id(0) - tl.load(cu_seqlens_ptr + image, mask=known, other=0) - prefix
    known = known & (patch >= 0)
    py, px = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_W)
    inside = (py < PATCH_H)[:, None] & (px < PATCH_W)[None, :]
    out = patches_ptr + (row * channels + channel) * (PATCH_H * PATCH_W) + py[:, None] * PATCH_W + px[None, :]
    value = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    if known:
        table = table_ptr + image * 6
        height, width = tl.load(table + 1).to(tl.int32), tl.load(table + 2).to(tl.int32)
        pitch, step = tl.load(table + 4), tl.load(table + 5)
        base = (tl.load(table) + origin).to(tl.pointer_type(PIXEL)) + channel * tl.load(table + 3)
        rows = tl.load(placement_ptr + image * 3)
        columns = tl.load(placement_ptr + image * 3 + 1)
        high, wide = rows * PATCH_H, columns * PATCH_W
        y, x = patch // columns * PATCH_H + py, patch % columns * PATCH_W + px  # the pixels of the resized image
        if (high == height) & (wide == width):
            value = tl.load(base + y[:, None] * pitch + x[None, :] * step, mask=inside, other=0).to(tl.float32)
        else:
            reach: tl.constexpr = 4 if CUBIC else 2
            tall, broad = tl.maximum(height, high), tl.maximum(width, wide)
            y0, x0 = patch // columns * PATCH_H, patch % columns * PATCH_W
            top = tl.maximum(height * (2 * y0 + 1) - reach * tall + high, 0) // (2 * high)
            left = tl.maximum(width * (2 * x0 + 1) - reach * broad + wide, 0) // (2 * wide)
            bottom = tl.minimum((height * (2 * (y0 + PATCH_H) - 1) + reach * tall + high) // (2 * high), height)
            right = tl.minimum((width * (2 * (x0 + PATCH_W) - 1) + reach * broad + wide) // (2 * wide), width)
            down_sum = tl.zeros([BLOCK_H], tl.float32)
            across_sum = tl.zeros([BLOCK_W], tl.float32)
            while top < bottom:  # not `for`: NumPy 2.4 broke the interpreter's bounds that are not constants
                sy = top + tl.arange(0, BLOCK)
                across_sum = tl.zeros([BLOCK_W], tl.float32)
                middle = tl.zeros([BLOCK, BLOCK_W], tl.float32)
                at = left
                while at < right:
                    sx = at + tl.arange(0, BLOCK)
                    here = (sy < bottom)[:, None] & (sx < right)[None, :]
                    pixel = tl.load(
                        base + sy[:, None] * pitch + sx[None, :] * step, mask=here, other=0
                    )  # [BLOCK, BLOCK]
                    across = _filter((2 * sx + 1)[:, None] * wide - width * (2 * x + 1)[None, :], 2 * broad, CUBIC)
                    across = tl.where((sx < right)[:, None], across, 0.0)  # [BLOCK, BLOCK_W]
                    middle += tl.dot(pixel.to(tl.float32), across, input_precision="ieee")
                    across_sum += tl.sum(across, 0)
                    at += BLOCK
                down = _filter((2 * sy + 1)[None, :] * high - height * (2 * y + 1)[:, None], 2 * tall, CUBIC)
                down = tl.where((sy < bottom)[None, :], down, 0.0)  # [BLOCK_H, BLOCK]
                value += tl.dot(down, middle, input_precision="ieee")
                down_sum += tl.sum(down, 1)
                top += BLOCK
            value = value / down_sum[:, None] / across_sum[None, :]
        value = value * tl.load(affine_ptr + channel) + tl.load(affine_ptr + channels + channel)
    tl.store(out, value, mask=inside)


@triton.jit(do_not_specialize=("origin", "placement_ptr", "cu_seqlens_ptr", "image_ptr", "capacity"))
def _forward_kernel(
    patches_ptr,  # (capacity, WIDTH), unless FUSED
    table_ptr,  # these four as in _patchify_kernel, if FUSED
    origin: tl.int64,
    placement_ptr,
    affine_ptr,
    weight_ptr,  # (dim, WIDTH)
    bias_ptr,
    pos_ptr,
    prefix_ptr,
    cu_seqlens_ptr,
    image_ptr,
    y_ptr,  # (capacity, dim)
    capacity,
    dim,
    prefix,
    FUSED: tl.constexpr,
    PIXEL: tl.constexpr,
    OPERAND: tl.constexpr,  # what is multiplied: the weight's dtype
    HAS_BIAS: tl.constexpr,
    HAS_POS: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    WIDTH: tl.constexpr,
    PATCH_H: tl.constexpr,
    PATCH_W: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    col = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    image = tl.load(image_ptr + row, mask=row < capacity, other=-1)
    owned = image >= 0
    image = tl.maximum(image, 0)
    place = row - tl.load(cu_seqlens_ptr + image, mask=owned, other=0)  # within its image, prefix tokens counted
    known = owned & (place >= prefix)
    patch = tl.where(known, place - prefix, 0)
    if FUSED:
        table = table_ptr + image.to(tl.int64) * 6
        columns = tl.load(placement_ptr + image * 3 + 1, mask=known, other=1)
        base = (tl.load(table, mask=known, other=0) + origin).to(tl.pointer_type(PIXEL))
        plane = tl.load(table + 3, mask=known, other=0).to(tl.int32)  # the host made sure that an image fits in int32
        pitch = tl.load(table + 4, mask=known, other=0).to(tl.int32)
        step = tl.load(table + 5, mask=known, other=0).to(tl.int32)
        corner = base + (patch // columns * PATCH_H * pitch + patch % columns * PATCH_W * step)
    total = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
    for start in range(0, WIDTH, BLOCK_WIDTH):
        k = start + tl.arange(0, BLOCK_WIDTH)
        mask = known[:, None] & (k < WIDTH)[None, :]
        if FUSED:
            channel, py, px = k // (PATCH_H * PATCH_W), k // PATCH_W % PATCH_H, k % PATCH_W
            offset = channel[None, :] * plane[:, None] + py[None, :] * pitch[:, None] + px[None, :] * step[:, None]
            x = tl.load(corner[:, None] + offset, mask=mask, other=0).to(tl.float32)
            scale = tl.load(affine_ptr + channel, mask=k < WIDTH, other=0.0)
            shift = tl.load(affine_ptr + WIDTH // (PATCH_H * PATCH_W) + channel, mask=k < WIDTH, other=0.0)
            x = tl.where(mask, x * scale[None, :] + shift[None, :], 0.0).to(weight_ptr.dtype.element_ty)
        else:
            x = tl.load(patches_ptr + row.to(tl.int64)[:, None] * WIDTH + k[None, :], mask=mask, other=0.0)
        weight = tl.load(
            weight_ptr + col[None, :] * WIDTH + k[:, None],
            mask=(col < dim)[None, :] & (k < WIDTH)[:, None],
            other=0.0,
        )  # [BLOCK_WIDTH, BLOCK_DIM]
        total = tl.dot(x.to(OPERAND), weight.to(OPERAND), total, input_precision="ieee")
    if HAS_BIAS:
        total += tl.load(bias_ptr + col, mask=col < dim, other=0.0).to(tl.float32)[None, :]
    inside = (col < dim)[None, :]
    total = tl.where(known[:, None], total, 0.0)
    if HAS_POS or HAS_PREFIX:  # one load serves both: a second one would not fit in the registers
        cell = tl.load(placement_ptr + image * 3 + 2, mask=known, other=0) + patch
        extra, wanted = pos_ptr + cell.to(tl.int64) * dim, known & HAS_POS
        if HAS_PREFIX:
            ahead = owned & (place < prefix)
            extra, wanted = tl.where(ahead, prefix_ptr + place.to(tl.int64) * dim, extra), wanted | ahead
        total += tl.load(extra[:, None] + col[None, :], mask=wanted[:, None] & inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row.to(tl.int64)[:, None] * dim + col[None, :], total, mask=(row < capacity)[:, None] & inside)


@triton.jit(do_not_specialize=("cu_seqlens_ptr", "placement_ptr", "images"))
def _sums_kernel(
    grad_ptr,  # (capacity, dim)
    cu_seqlens_ptr,
    placement_ptr,
    sums_ptr,  # (prefix + cells, dim) fp32
    images,
    dim,
    prefix,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    slot = tl.program_id(0)  # a prefix token, or a cell
    col = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    total = tl.zeros([BLOCK_DIM], tl.float32)
    first = 0
    while first < images:
        image = first + tl.arange(0, BLOCK_IMAGES)
        known = image < images
        begin = tl.load(cu_seqlens_ptr + image, mask=known, other=0)
        end = tl.load(cu_seqlens_ptr + image + 1, mask=known, other=0)
        cell = tl.load(placement_ptr + image * 3 + 2, mask=known, other=0)
        place = tl.where(slot < prefix, slot, slot - cell)  # the token of the image that is at this slot
        known = known & ((slot < prefix) | (place >= prefix)) & (place < end - begin)
        at = grad_ptr + (begin + place).to(tl.int64)[:, None] * dim + col[None, :]
        total += tl.sum(tl.load(at, mask=known[:, None] & (col < dim)[None, :], other=0.0).to(tl.float32), 0)
        first += BLOCK_IMAGES
    tl.store(sums_ptr + slot.to(tl.int64) * dim + col, total, mask=col < dim)


_CACHE = DeviceCache()


def _table(images, channels_last, device):
    """One row per image for the kernels, the origin of its addresses, and whether offsets in an image fit in 32 bits.

    The images of one tensor lie evenly behind its address, so that the same table serves the next tensor.
    """
    origin = images[0].data_ptr() if len(images) == 1 else 0
    rows, small = [], True
    for x in images:
        c, h, w = (x.ndim + i for i in ((-1, -3, -2) if channels_last else (-3, -2, -1)))
        shape = (x.shape[h], x.shape[w], x.stride(c), x.stride(h), x.stride(w))
        small &= sum((n - 1) * abs(s) for n, s in zip(x.shape[-3:], x.stride()[-3:])) < 2**31
        many, pitch = (x.shape[0], x.stride(0)) if x.ndim == 4 else (1, 0)
        rows += [(x.data_ptr() - origin + i * pitch * x.element_size(), *shape) for i in range(many)]
    rows = tuple(rows) or ((0,) * 6,)
    if len(images) > 1:  # addresses of this batch alone
        (table,) = to_device([torch.tensor(rows)], device)
    else:
        (table,) = _CACHE.get(("table", rows), device, lambda: [torch.tensor(rows)])
    return table, origin, small


def _affine(images, channels, mean, std, device):
    """(2, channels) fp32"""
    rows = affine(images, channels, mean, std)
    return constant(("affine", *map(tuple, rows)), device, lambda: torch.tensor(rows, dtype=torch.float32))


def forward(
    images, weight, bias, cu_seqlens, placement, image, pos, prefix, mean, std, interpolation, channels_last, resize,
    prefix_tokens, keep,
):  # fmt: skip
    (dim, channels, ph, pw), capacity = weight.shape, image.shape[0]
    y = weight.new_empty(capacity, dim)
    patches = weight.new_empty(0, weight[0].numel())
    if capacity == 0:
        return y, patches
    weight = weight.contiguous()
    table, origin, small = _table(images, channels_last, weight.device)
    affine = _affine(images, channels, mean, std, weight.device)
    pixel = PIXELS[images[0].dtype] if images else tl.uint8
    fused = not (resize or keep) and small
    bits = 8 * weight.element_size()
    if not fused:
        patches = weight.new_empty(capacity, patches.shape[1])
        _patchify_kernel[(capacity, channels)](
            table,
            origin,
            cu_seqlens,
            placement,
            image,
            affine,
            patches,
            prefix_tokens,
            channels,
            PIXEL=pixel,
            CUBIC=interpolation == "bicubic",
            PATCH_H=ph,
            PATCH_W=pw,
            BLOCK_H=max(16, triton.next_power_of_2(ph)),
            BLOCK_W=max(16, triton.next_power_of_2(pw)),
            **measured.tiles("patch_embed", "patchify", weight.device, bits=bits, patch=max(ph, pw)),
        )
    tiles = measured.tiles("patch_embed", "forward", weight.device, bits=bits, dim=dim)
    _forward_kernel[(triton.cdiv(capacity, tiles["BLOCK_TOKENS"]), triton.cdiv(dim, tiles["BLOCK_DIM"]))](
        patches,
        table,
        origin,
        placement,
        affine,
        weight,
        weight if bias is None else bias.contiguous(),
        weight if pos is None else pos.contiguous(),
        weight if prefix is None else prefix.contiguous(),
        cu_seqlens,
        image,
        y,
        capacity,
        dim,
        prefix_tokens,
        FUSED=fused,
        PIXEL=pixel,
        OPERAND=tl.float32 if INTERPRETED else PIXELS[weight.dtype],
        HAS_BIAS=bias is not None,
        HAS_POS=pos is not None,
        HAS_PREFIX=prefix is not None,
        WIDTH=patches.shape[1],
        PATCH_H=ph,
        PATCH_W=pw,
        **tiles,
    )
    return y, patches if keep else patches[:0].clone()


def backward(grad, patches, cu_seqlens, placement, image, prefix_tokens, cells):
    grad = grad.contiguous()
    dim, images = grad.shape[1], placement.shape[0]
    sums = grad.new_empty(prefix_tokens + cells, dim, dtype=torch.float32)
    if sums.numel():
        tiles = measured.tiles("patch_embed", "sums", grad.device, bits=8 * grad.element_size(), dim=dim)
        _sums_kernel[(sums.shape[0], triton.cdiv(dim, tiles["BLOCK_DIM"]))](
            grad, cu_seqlens, placement, sums, images, dim, prefix_tokens, **tiles
        )
    if len(patches):
        return grad.masked_fill((image < 0)[:, None], 0).T @ patches, sums
    return grad.new_zeros(dim, patches.shape[1]), sums


def specification(
    kernel, tiles, bits=16, dim=768, patch=16, dtype=None, pixel=tl.uint8, cubic=True, fused=True,
    has=(True, True, True), ones=("prefix",), is_aligned=True,
):  # fmt: skip
    """A kernel as a model calls it, for the compiler alone: see tests/machine_code.py.

    has: whether there are a bias, positions, prefix tokens; ones: the arguments that are 1
    """
    function = {"forward": _forward_kernel, "patchify": _patchify_kernel, "sums": _sums_kernel}[kernel]
    dtype = dtype or ("fp32" if bits == 32 else "bf16")
    fixed = dict.fromkeys(("cu_seqlens_ptr", "placement_ptr", "image_ptr"), "*i32")
    fixed |= {"table_ptr": "*i64", "affine_ptr": "*fp32", "sums_ptr": "*fp32", "origin": "i64"}
    fixed |= dict.fromkeys(("capacity", "dim", "prefix", "channels", "images"), "i32")
    sides, block = {"PATCH_H": patch, "PATCH_W": patch}, max(16, triton.next_power_of_2(patch))
    operand = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}[dtype]
    constexprs = {
        "patchify": {"PIXEL": pixel, "CUBIC": cubic, "BLOCK_H": block, "BLOCK_W": block} | sides,
        "forward": {"FUSED": fused, "PIXEL": pixel, "OPERAND": operand, "WIDTH": 3 * patch * patch}
        | dict(zip(("HAS_BIAS", "HAS_POS", "HAS_PREFIX"), has))
        | sides,
        "sums": {},
    }[kernel] | {name: value for name, value in tiles.items() if name.startswith("BLOCK")}
    constexprs |= {name: 1 for name in ones if name in function.arg_names}  # Triton makes a constant of a 1
    signature = {name: fixed.get(name, f"*{dtype}") for name in function.arg_names if name not in constexprs}
    options = {name: tiles[name] for name in ("num_warps", "num_stages") if name in tiles}
    options |= {"aligned": is_aligned, "multiples": ("dim",) if is_aligned and dim % 16 == 0 else ()}
    return {"kernel": function, "signature": signature, "constexprs": constexprs} | options
