"""Images of any size to packed tokens: resize, normalise, cut, embed, add positions, place the prefix."""

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor

from revit_kernels.dispatch import PLAIN, contiguous, load, one_device, register
from revit_kernels.ops.derivatives import once_differentiable
from revit_kernels.ops.patch_embed.weight import resize_patch_weight
from revit_kernels.ops.pos_embed.interpolation import MODES
from revit_kernels.packing import Packing

_PLACES = "Tensor cu_seqlens, Tensor placement, Tensor image"

_forward = register(
    "patch_embed",
    "forward",
    f"(Tensor[] images, Tensor weight, Tensor? bias, {_PLACES}, Tensor? pos, Tensor? prefix, float[]? mean, "
    "float[]? std, str interpolation, bool channels_last, bool resize, SymInt prefix_tokens, bool keep, "
    "str? backend) -> (Tensor, Tensor)",
    lambda images, weight, bias, cu_seqlens, placement, image, *rest: (
        weight.new_empty(image.shape[0], weight.shape[0]),
        weight.new_empty(image.shape[0] if rest[-2] else 0, weight.shape[1] * weight.shape[2] * weight.shape[3]),
    ),
    check=lambda args: _check_as_laid_out(args),
)
_backward = register(
    "patch_embed",
    "backward",
    f"(Tensor grad, Tensor patches, {_PLACES}, SymInt prefix_tokens, SymInt cells, str? backend) -> (Tensor, Tensor)",
    lambda grad, patches, cu_seqlens, placement, image, prefix_tokens, cells, backend: (
        grad.new_empty(grad.shape[1], patches.shape[1]),
        grad.new_empty(prefix_tokens + cells, grad.shape[1], dtype=torch.promote_types(grad.dtype, torch.float32)),
    ),
    check=lambda args: _check_backward(args),
)


class _PatchEmbed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, bias, pos, prefix, cu_seqlens, placement, image, mean, std, *rest):
        interpolation, channels_last, resize, prefix_tokens, cells, keep, backend, *images = rest
        how = (interpolation, channels_last, resize, prefix_tokens, keep, backend)
        y, patches = _forward(images, weight, bias, cu_seqlens, placement, image, pos, prefix, mean, std, *how)
        ctx.save_for_backward(patches, cu_seqlens, placement, image)
        ctx.how = (prefix_tokens, cells, backend)
        ctx.shape, ctx.nothing = weight.shape, (None,) * (len(rest) + 5)
        return y

    @staticmethod
    @once_differentiable("patch_embed")
    def backward(ctx, grad):
        dweight, sums = _backward(grad, *ctx.saved_tensors, *ctx.how)
        before, cells = sums[: ctx.how[0]], sums[ctx.how[0] :]
        needs = ctx.needs_input_grad
        return (
            dweight.view(ctx.shape) if needs[0] else None,
            cells.sum(0).to(grad.dtype) if needs[1] else None,
            cells.to(grad.dtype) if needs[2] else None,
            before.to(grad.dtype) if needs[3] else None,
            *ctx.nothing,
        )


_SHAPE, _DTYPE, _DEVICE = map(attrgetter, ("shape", "dtype", "device"))


def _sizes_of_kinds(images, accepted, weight, channels_last):
    """(height, width) of each image of a list, each kind of them looked at once; None where some need a closer look."""
    if torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, images)):
        return None
    if torch.is_grad_enabled() and any([x.requires_grad for x in images]):
        return None
    dtypes, devices = set(map(_DTYPE, images)), set(map(_DEVICE, images))
    if len(dtypes) != 1 or not dtypes.issubset(accepted) or devices != {weight.device}:
        return None
    shapes = list(map(_SHAPE, images))
    sizes = {}
    for shape in set(shapes):
        if len(shape) != 3 or 0 in shape or shape[2 if channels_last else 0] != weight.shape[1]:
            return None
        sizes[shape] = tuple(shape[:2] if channels_last else shape[1:])
    return [sizes[shape] for shape in shapes]


def _check_images(images, weight, wanted, channels_last):
    """The images as a list (a batch stays one tensor), and (height, width) of each tensor in it."""
    if isinstance(images, Tensor) and images.ndim != 4:
        layout = "(images, height, width, channels)" if channels_last else "(images, channels, height, width)"
        raise ValueError(f"images must be {layout} or a list of images, got {tuple(images.shape)}")
    batch = isinstance(images, Tensor)
    count = images.shape[0] if batch else len(images)
    if count != wanted:
        raise ValueError(f"images must be as many as the packing's {wanted}, got {count}")
    images = [images] if batch else list(images)
    accepted = tuple(dict.fromkeys((torch.uint8, torch.float32, weight.dtype)))
    if len(images) > 1 and (sizes := _sizes_of_kinds(images, accepted, weight, channels_last)) is not None:
        return images, sizes
    for i, x in enumerate(images):
        name = "images" if batch else f"images[{i}]"
        if not batch and x.ndim != 3:
            layout = "(height, width, channels)" if channels_last else "(channels, height, width)"
            raise ValueError(f"{name} must be {layout}, got {tuple(x.shape)}")
        channels = x.shape[-1 if channels_last else -3]
        if channels != weight.shape[1]:
            raise ValueError(f"expected images of {weight.shape[1]} channels, got {channels} ({name})")
        if count and 0 in x.shape:
            raise ValueError(f"{name} is empty: {tuple(x.shape)}")
        if x.dtype not in accepted:
            raise ValueError(f"{name} must be of one of {accepted} for a weight of {weight.dtype}, got {x.dtype}")
        if x.dtype != images[0].dtype:
            raise ValueError(f"images must all be of one dtype, got {images[0].dtype} and {x.dtype} ({name})")
        if x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} requires grad, and patch_embed has no gradient for images")
        one_device(**{name: x, "weight": weight})
    return images, [tuple(x.shape[-3:-1] if channels_last else x.shape[-2:]) for x in images]


def _check_parameters(weight, bias, cu_seqlens, cells, prefix_tokens, pos, prefix, mean, std, interpolation):
    if weight.ndim != 4 or 0 in weight.shape or not weight.is_floating_point():
        raise ValueError(
            f"weight must be (dim, channels, patch_h, patch_w) and floating-point, got {tuple(weight.shape)} "
            f"{weight.dtype}"
        )
    dim, channels = weight.shape[:2]
    expected = {"bias": (bias, (dim,)), "pos": (pos, (cells, dim)), "prefix": (prefix, (prefix_tokens, dim))}
    for name, (x, shape) in expected.items():
        if x is not None and tuple(x.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(x.shape)}")
        if x is not None and x.dtype != weight.dtype:
            raise ValueError(f"{name} must be of the weight's dtype {weight.dtype}, got {x.dtype}")
    for name, x in {"mean": mean, "std": std}.items():
        if x is not None and len(x) != channels:
            raise ValueError(f"{name} must be {channels} numbers, one per channel, got {len(x)}")
    if std is not None and 0 in std:
        raise ValueError(f"std must not be 0, got {tuple(std)}")
    if interpolation not in MODES:
        raise ValueError(f"interpolation must be one of {MODES}, got {interpolation!r}")
    one_device(weight=weight, bias=bias, packing=cu_seqlens, pos=pos, prefix=prefix)


def _check_places(cu_seqlens, placement, image, prefix_tokens):
    entries = placement.shape[0] if placement.ndim else -1
    for name, tensor, shape in (
        ("cu_seqlens", cu_seqlens, (entries + 1,)),
        ("placement", placement, (entries, 3)),
        ("image", image, (image.shape[0] if image.ndim else -1,)),
    ):
        if tensor.shape != shape or tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be {shape} of int32, got {tuple(tensor.shape)} {tensor.dtype}")
    if prefix_tokens < 0:
        raise ValueError(f"prefix_tokens must be at least 0, got {prefix_tokens}")
    contiguous(cu_seqlens=cu_seqlens, placement=placement, image=image)


def _check_as_laid_out(args):
    """Raise ValueError for what the public function refuses or copies first: GPU kernels do not check tensors."""
    images, pos, cu_seqlens = args.images, args.pos, args.cu_seqlens
    _check_places(cu_seqlens, args.placement, args.image, args.prefix_tokens)
    cells = pos.shape[0] if pos is not None and pos.ndim else 0  # of how many the menu is, the device alone knows
    how = (cells, args.prefix_tokens, pos, args.prefix, args.mean, args.std, args.interpolation)
    _check_parameters(args.weight, args.bias, cu_seqlens, *how)
    batch = images[0] if len(images) == 1 and images[0].ndim == 4 else images
    _check_images(batch, args.weight, args.placement.shape[0], args.channels_last)
    one_device(weight=args.weight, cu_seqlens=cu_seqlens, placement=args.placement, image=args.image)


def _check_backward(args):
    grad, patches, image = args.grad, args.patches, args.image
    _check_places(args.cu_seqlens, args.placement, image, args.prefix_tokens)
    tokens = image.shape[0]
    if grad.ndim != 2 or grad.shape[0] != tokens or not grad.is_floating_point():
        raise ValueError(f"grad must be ({tokens}, dim) and floating-point, got {tuple(grad.shape)} {grad.dtype}")
    if patches.ndim != 2 or patches.shape[0] not in (0, tokens) or patches.dtype != grad.dtype:
        wanted = f"({tokens} or 0, numbers of a patch) of {grad.dtype}"
        raise ValueError(f"patches must be {wanted}, got {tuple(patches.shape)} {patches.dtype}")
    if args.cells < 0:
        raise ValueError(f"cells must be at least 0, got {args.cells}")
    one_device(grad=grad, patches=patches, cu_seqlens=args.cu_seqlens, placement=args.placement, image=image)


def patch_embed(
    images: Tensor | Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    packing: Packing,
    *,
    pos: Tensor | None = None,
    prefix: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    method: str = "resize",
    interpolation: str = "bicubic",
    channels_last: bool = False,
    packed: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Embed images of any size as packed tokens, each on the grid that the packing gives it.

    images:  (images, channels, height, width), or a list of (channels, height, width), each of its own size; uint8 (in
             units of 1/255), fp32 or the weight's dtype, the same for all
    weight:  (dim, channels, patch_h, patch_w)
    bias:    (dim,) or None
    packing: one entry per image
    pos:     (cells, dim), a row per cell of every grid of `packing.menu` (see `pos_embed`), or None
    prefix:  (packing.prefix, dim), the rows ahead of each image's patches; None for zeros
    mean, std: numbers per channel, in units of an image from 0 to 1, to subtract and divide by
    method:  "resize": an image that is not grid x patch is resized to it as by F.interpolate(antialias=True).
             "patch": the weight is resized to height / rows, width / columns instead (FlexiViT, arXiv:2212.08013, 3.4)
    channels_last: images are (..., height, width, channels)
    packed:  weight and bias as the CPU's kernel reads them (`ops.patch_embed.cpu.pack`), from an engine; at inference
             on a CPU only, and not with method="patch"

    Returns (capacity, dim) in the dtype of the weight; rows of no image are zeros. Pixels are resized and normalised in
    fp32, then rounded to the weight's dtype. Gradients to weight, bias, pos and prefix.

    Raises ValueError for images, parameters or a packing that do not go together, for images that require grad, and for
    method="patch" where sizes are no multiple of the grid or the host does not know the grids.
    """
    cells = sum(h * w for h, w in packing.menu)
    _check_parameters(weight, bias, packing.cu_seqlens, cells, packing.prefix, pos, prefix, mean, std, interpolation)
    images, sizes = _check_images(images, weight, packing.images, channels_last)
    if method not in ("resize", "patch"):
        raise ValueError(f"method must be 'resize' or 'patch', got {method!r}")
    options = dict(pos=pos, prefix=prefix, mean=mean, std=std, interpolation=interpolation)
    options |= dict(channels_last=channels_last, backend=backend)
    if packed is not None and method == "resize":
        statistics = (None if x is None else [float(number) for number in x] for x in (mean, std))
        places = (packing.cu_seqlens, packing.placement, packing.image)
        how = (pos, prefix, *statistics, interpolation, channels_last, packing.prefix)
        return load("patch_embed", "cpu").forward_packed(images, weight, packed, *places, *how)
    if method == "patch":
        return _resized_patches(images, sizes, weight, bias, packing, options)
    return _embed(images, sizes, weight, bias, packing, **options)


def _embed(images, sizes, weight, bias, packing, pos, prefix, mean, std, interpolation, channels_last, backend):
    ph, pw = weight.shape[2:]
    whole = {(h, w): (h * ph, w * pw) for h, w in packing.menu}  # the size that needs no resizing
    if len(sizes) == packing.images and packing.grids is not None:
        resize = any(whole[grid] != size for grid, size in zip(packing.grids, sizes))
    else:  # one tensor for all images, however many: their number may be symbolic
        resize = any(own != size for own in whole.values() for size in sizes)
    places = (packing.cu_seqlens, packing.placement, packing.image)
    statistics = (None if x is None else [float(number) for number in x] for x in (mean, std))
    how = (interpolation, channels_last, resize, packing.prefix)
    if not torch.is_grad_enabled():
        return _forward(images, weight, bias, *places, pos, prefix, *statistics, *how, False, backend)[0]
    cells = sum(h * w for h, w in packing.menu)
    rest = (*statistics, *how, cells, weight.requires_grad, backend, *images)
    return _PatchEmbed.apply(weight, bias, pos, prefix, *places, *rest)


def _resized_patches(images, sizes, weight, bias, packing, options):
    """One call per patch size, each with its own weight, then the images in the packing's order."""
    if packing.grids is None:
        raise ValueError("method='patch' needs a packing whose grids the host knows")
    sizes = sizes if len(sizes) == packing.images else sizes * packing.images
    groups = {}
    for i, ((height, width), (h, w)) in enumerate(zip(sizes, packing.grids)):
        if height % h or width % w:
            raise ValueError(f"images[{i}] of {(height, width)} cannot be cut into {(h, w)} patches of one size")
        groups.setdefault((height // h, width // w), []).append(i)
    interpolation = options["interpolation"]
    if len(groups) < 2:
        size = next(iter(groups), weight.shape[2:])
        return _embed(
            images, sizes, resize_patch_weight(weight, size, interpolation=interpolation), bias, packing, **options
        )
    images = [image for x in images for image in (x if x.ndim == 4 else [x])]
    parts = [None] * packing.images
    for size, members in groups.items():
        part = Packing.from_grids(
            [packing.grids[i] for i in members], packing.prefix, menu=packing.menu, device=packing.device
        )
        resized = resize_patch_weight(weight, size, interpolation=interpolation)
        tokens = _embed([images[i] for i in members], [sizes[i] for i in members], resized, bias, part, **options)
        for i, rows in zip(members, part.split(tokens)):
            parts[i] = rows
    tail = packing.capacity - sum(len(rows) for rows in parts)
    return torch.cat([*parts, weight.new_zeros(tail, weight.shape[0])])


def sample(device="cpu", dtype=torch.float32):
    packing = Packing.from_grids([(2, 2)], 1, device=device)
    weight = torch.ones(8, 3, 4, 4, device=device, dtype=dtype)
    images = [torch.zeros(3, 9, 8, dtype=torch.uint8, device=device)]
    places = (packing.cu_seqlens, packing.placement, packing.image)
    return images, weight, None, *places, None, None, None, None, "bicubic", False, True, 1, False
