import pytest
import torch
import torch.nn.functional as F

from revit_kernels.ops import patch_embed
from revit_kernels.packing import Packing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
MENU = [(14, 14), (10, 10), (7, 7), (4, 4)]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def parameters(dtype, patch, packing, requires_grad=False):
    shapes = dict(weight=(768, 3, patch, patch), bias=(768,), pos=(sum(h * w for h, w in packing.menu), 768))
    shapes |= dict(prefix=(1, 768))
    return {
        name: torch.nn.Parameter(torch.randn(shape, device=DEVICE, dtype=dtype) / 8, requires_grad)
        for name, shape in shapes.items()
    }


def convolve(x, p, patch, rows):
    """timm's PatchEmbed, then its positions and its class token."""
    tokens = F.conv2d(x, p["weight"], p["bias"], stride=patch).flatten(2).mT + p["pos"][rows]
    return torch.cat([p["prefix"].expand(len(x), 1, -1), tokens], 1)


def unfold(x, p, patch, rows):
    """The patches as a matrix, then F.linear."""
    patches = F.unfold(x, patch, stride=patch).mT
    tokens = F.linear(patches, p["weight"].flatten(1), p["bias"]) + p["pos"][rows]
    return torch.cat([p["prefix"].expand(len(x), 1, -1), tokens], 1)


@every_dtype
@pytest.mark.parametrize("patch", [16, 14])
@pytest.mark.parametrize("rival", [convolve, unfold], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def bench_patch_embed(duel, backward, rival, patch, dtype):
    """32 normalised images of 224 x 224: nothing to resize."""
    h = 224 // patch
    packing = Packing.from_grids([(h, h)] * 32, 1, device=DEVICE)
    p = parameters(dtype, patch, packing, backward)
    x = torch.randn(32, 3, 224, 224, device=DEVICE, dtype=dtype)
    grad = torch.randn(packing.capacity, 768, device=DEVICE, dtype=dtype)

    def step(y):
        return torch.autograd.grad(y.view(-1, 768), list(p.values()), grad) if backward else y

    duel(
        lambda: step(patch_embed(x, packing=packing, **p)),
        lambda: step(rival(x, p, patch, slice(None))),
        rounds=20,
        flops=2 * 32 * h * h * 768 * 3 * patch * patch * (2 if backward else 1),
        rival=rival.__name__,
    )


@every_dtype
@pytest.mark.parametrize("channels_last", [False, True], ids=["planes", "channels_last"])
def bench_patch_embed_photographs(duel, channels_last, dtype):
    """32 uint8 photographs of 400 x 500 to four grids, against a resize and a convolution for each."""
    grids = MENU * 8
    packing = Packing.from_grids(grids, 1, menu=MENU, device=DEVICE)
    p = parameters(dtype, 16, packing)
    images = [torch.randint(0, 256, (3, 400, 500), dtype=torch.uint8, device=DEVICE) for _ in grids]
    if channels_last:
        images = [image.permute(1, 2, 0).contiguous() for image in images]
    mean, std = (torch.tensor(x, device=DEVICE).view(-1, 1, 1) for x in (MEAN, STD))
    rows = [slice(start, start + h * w) for h, w, start in packing.placement.tolist()]

    def theirs():
        tokens = []
        for image, (h, w), row in zip(images, grids, rows):
            x = (image.permute(2, 0, 1) if channels_last else image)[None].float()
            x = F.interpolate(x, (h * 16, w * 16), mode="bicubic", antialias=True).div_(255)
            tokens.append(convolve(x.sub_(mean).div_(std).to(dtype), p, 16, row)[0])
        return torch.cat(tokens)

    with torch.no_grad():
        duel(
            lambda: patch_embed(images, packing=packing, mean=MEAN, std=STD, channels_last=channels_last, **p),
            theirs,
            rounds=20,
            flops=2 * sum(h * w for h, w in grids) * 768 * 768,
            rival="F.interpolate, conv2d",
        )
