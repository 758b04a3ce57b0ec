"""A whole block on a CPU against the same ops one by one, whose products are oneDNN's on prepacked weights."""

import pytest
import torch

from revit_kernels import Packing, gemm
from revit_kernels.modules import Block, whole_block

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the whole block is for CPUs")
GRIDS = [(4, 4), (7, 7), (10, 10), (14, 14)]
ROUNDS = 15


@pytest.mark.parametrize("images", [1, 32])
@pytest.mark.parametrize("dim", [384, 768])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def bench_block(duel, monkeypatch, dtype, dim, images):
    torch.manual_seed(0)
    blocks = [Block(dim, dim // 64, qkv_bias=True).to(dtype).eval().requires_grad_(False) for _ in range(4)]
    grids = [GRIDS[i * len(GRIDS) // images] for i in range(images)] if images > 1 else [(14, 14)]
    packing = Packing.from_grids(grids, 1)
    x = torch.randn(packing.capacity, dim).to(dtype)
    for block in blocks:
        whole_block.prepack(block)
        for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
            gemm.prepack(linear.weight)

    def whole():
        return whole_block.run(blocks, x, packing)

    def one_by_one():
        stream = [x, None, None]
        for block in blocks:
            stream = block.stream(stream, packing)
        return stream[0] + stream[1]

    monkeypatch.setattr(whole_block, "refusal", lambda *_: "for the duel")
    error = (whole().float() - one_by_one().float()).norm() / one_by_one().float().norm()
    assert error <= 4 * torch.finfo(dtype).eps, "it computes something else"
    lengths = [h * w + 1 for h, w in grids]
    work = len(blocks) * (24 * dim * dim * sum(lengths) + 4 * dim * sum(n * n for n in lengths))
    duel(whole, one_by_one, rounds=ROUNDS, flops=work, rival="ops one by one")
