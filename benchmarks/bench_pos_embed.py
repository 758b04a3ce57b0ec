import pytest
import torch
import torch.nn.functional as F

from revit_kernels.ops import pos_embed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MENU = [(14, 14), (10, 10), (7, 7), (4, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("table, menu", [(14, MENU), (37, [(37, 37), (24, 31), (16, 16), (9, 12)])], ids=["14", "37"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def bench_pos_embed(duel, backward, table, menu, dtype):
    """Against what timm does: one F.interpolate per grid, in fp32."""
    x = torch.randn(table, table, 768, device=DEVICE, dtype=dtype, requires_grad=backward)

    def theirs():
        nchw = x.float().permute(2, 0, 1)[None]
        sizes = [grid for grid in menu if grid != (table, table)]
        parts = [F.interpolate(nchw, grid, mode="bicubic", antialias=True)[0].flatten(1).T for grid in sizes]
        return torch.cat([x.flatten(0, 1), *(part.to(dtype) for part in parts)])

    def step(run):
        y = run()
        return torch.autograd.grad(y, x, grad) if backward else y

    cells = sum(h * w for h, w in menu)
    grad = torch.randn(cells, 768, device=DEVICE, dtype=dtype)
    moved = (table * table + cells) * 768 * x.element_size() * (2 if backward else 1)
    duel(lambda: step(lambda: pos_embed(x, menu)), lambda: step(theirs), bytes=moved, rival="F.interpolate")
