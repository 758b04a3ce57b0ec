"""pool against one call per image, and against a padded batch with a mask."""

from itertools import accumulate

import pytest
import torch

from revit_kernels.ops import pool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# 224 pixels at patch size 16, and three shorter lengths: 2,920 tokens; on a GPU 50,370, more than its cache holds
LENGTHS = [197, 101, 50, 17] * (138 if DEVICE == "cuda" else 8)

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
dims = pytest.mark.parametrize("dim", [384, 768, 1280])
kinds = pytest.mark.parametrize("kind", ["avg", "max"])


def make_inputs(dim, dtype):
    x = torch.randn(sum(LENGTHS), dim, generator=torch.Generator().manual_seed(0)).to(DEVICE, dtype)
    return x, torch.tensor([0, *LENGTHS]).cumsum(0).to(DEVICE, torch.int32)


def per_image(x, kind):
    return torch.stack([t[1:].mean(0) if kind == "avg" else t[1:].amax(0) for t in x.split(LENGTHS)])


LONGEST = max(LENGTHS) - 1
INDEX = torch.cat([i * LONGEST + torch.arange(length - 1) for i, length in enumerate(LENGTHS)]).to(DEVICE)
PATCHES = torch.cat([end - length + torch.arange(1, length) for length, end in zip(LENGTHS, accumulate(LENGTHS))]).to(
    DEVICE
)


def padded(x, kind):
    """The patches copied into a padded batch, at places known beforehand."""
    batch = x.new_full((len(LENGTHS) * LONGEST, x.shape[1]), 0 if kind == "avg" else -1e4)
    batch = batch.index_copy(0, INDEX, x[PATCHES]).view(len(LENGTHS), LONGEST, -1)
    if kind == "max":
        return batch.amax(1)
    return batch.sum(1) / (torch.tensor(LENGTHS, device=x.device, dtype=x.dtype) - 1)[:, None]


rivals = pytest.mark.parametrize("rival", [per_image, padded], ids=["per image", "padded"])


@kinds
@rivals
@dims
@dtypes
def bench_forward(duel, dim, dtype, rival, kind):
    x, cu_seqlens = make_inputs(dim, dtype)
    with torch.no_grad():
        duel(lambda: pool(x, cu_seqlens, kind), lambda: rival(x, kind), bytes=x.nbytes, rival=rival.__name__)


@kinds
@rivals
@dims
@dtypes
def bench_backward(duel, dim, dtype, rival, kind):
    x, cu_seqlens = make_inputs(dim, dtype)
    leaf = x.requires_grad_()
    ours, theirs = pool(leaf, cu_seqlens, kind), rival(leaf, kind)
    seed = torch.ones_like(ours)
    duel(
        lambda: torch.autograd.grad(ours, leaf, seed, retain_graph=True),
        lambda: torch.autograd.grad(theirs, leaf, seed, retain_graph=True),
        bytes=x.nbytes * (1 if kind == "avg" else 2),
        rival=rival.__name__,
    )
