"""Whole blocks on a CPU, packed as an engine packs them, against the same ops one by one."""

import pytest
import torch

from revit_kernels import Packing, VarLenViT
from revit_kernels.engines.packed import PackedBlocks
from revit_kernels.modules import whole_block

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the whole block is for CPUs")
GRIDS = [(4, 4), (7, 7), (10, 10), (14, 14)]
ROUNDS = 15


@pytest.mark.parametrize("images", [1, 32])
@pytest.mark.parametrize("dim", [384, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def bench_block(duel, monkeypatch, dtype, dim, images):
    torch.manual_seed(0)
    model = VarLenViT(embed_dim=dim, num_heads=dim // 64, depth=4).to(dtype).eval().requires_grad_(False)
    packed = PackedBlocks(model, None)
    grids = [GRIDS[i * len(GRIDS) // images] for i in range(images)] if images > 1 else [(14, 14)]
    packing = Packing.from_grids(grids, 1)
    x = torch.randn(packing.capacity, dim).to(dtype)

    def whole():
        return packed.run(x, packing, 0, None)

    def one_by_one():
        stream = [x, None, None]
        for block in model.blocks:
            stream = block.stream(stream, packing)
        return stream[0] + stream[1]

    monkeypatch.setattr(whole_block, "refusal", lambda *_: "for the duel")
    error = (whole().float() - one_by_one().float()).norm() / one_by_one().float().norm()
    assert error <= 4 * torch.finfo(dtype).eps, "it computes something else"
    lengths = [h * w + 1 for h, w in grids]
    work = len(model.blocks) * (24 * dim * dim * sum(lengths) + 4 * dim * sum(n * n for n in lengths))
    duel(whole, one_by_one, rounds=ROUNDS, flops=work, rival="ops one by one")
