"""Temporal attention of clips of several grids against torch's SDPA: on tensors that were rearranged for it, and with
the rearranging that a model would do around it."""

import pytest
import torch
import torch.nn.functional as F

from revit_kernels.clips import ClipPacking
from revit_kernels.ops import temporal_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, HEAD_DIM = 6, 64
CLIPS = 64 if DEVICE == "cuda" else 8
GRIDS = {
    "8 frames, 14x14": [(8, 14, 14)] * CLIPS,
    "8 frames, 14x14, 10x10, 7x7": ([(8, 14, 14), (8, 10, 10), (8, 7, 7)] * CLIPS)[:CLIPS],
    "32 frames, 7x7": [(32, 7, 7)] * CLIPS,
    "96 frames, 4x4": [(96, 4, 4)] * CLIPS,
}


class Case:
    def __init__(self, grids, dtype, gradients):
        torch.manual_seed(0)
        self.grids = sorted(grids, reverse=True)  # clips of one grid together, as the rival needs them
        self.packing = ClipPacking.from_grids(self.grids, device=DEVICE)
        shape = (self.packing.capacity, 3, HEADS, HEAD_DIM)
        self.qkv = torch.randn(shape, device=DEVICE, dtype=dtype, requires_grad=gradients)
        self.sizes = {grid: self.grids.count(grid) for grid in dict.fromkeys(self.grids)}
        pairs = sum(count * frames * frames * h * w for (frames, h, w), count in self.sizes.items())
        self.flops = 4 * pairs * HEADS * HEAD_DIM

    def ours(self):
        p = self.packing
        return temporal_attention(*self.qkv.unbind(1), p.cu_seqlens, p.frames, p.max_frames)

    def apart(self):
        """(clips, frames, patches, 3, heads, head_dim) of each grid, without class tokens."""
        rows = [n * frames * (1 + h * w) for (frames, h, w), n in self.sizes.items()]
        for part, ((frames, _, _), n) in zip(self.qkv.split(rows), self.sizes.items()):
            yield part.view(n, frames, -1, 3, HEADS, HEAD_DIM)[:, :, 1:]

    def rearranged(self):
        """(3, sequences, heads, frames, head_dim) of each grid."""
        return [x.permute(3, 0, 2, 4, 1, 5).reshape(3, -1, HEADS, x.shape[1], HEAD_DIM) for x in self.apart()]


def sdpa(case):
    """Of tensors that lie as it wants them."""
    tensors = [x.detach().clone().requires_grad_(x.requires_grad) for x in case.rearranged()]
    return lambda: [F.scaled_dot_product_attention(*x) for x in tensors]


def sdpa_rearranging(case):
    """Of a frame-major projection, and back."""

    def run():
        found = []
        for x, y in zip(case.rearranged(), case.apart()):
            z = F.scaled_dot_product_attention(*x)
            found.append(z.view(y.shape[0], -1, HEADS, y.shape[1], HEAD_DIM).permute(0, 3, 1, 2, 4).contiguous())
        return found

    return run


def stepping(call):
    """The call and its backward."""

    def run():
        outputs = call()
        outputs = outputs if isinstance(outputs, list) else [outputs]
        torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])

    return run


@pytest.mark.parametrize("rival", [sdpa, sdpa_rearranging], ids=lambda rival: rival.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("step", ["forward", "backward"])
@pytest.mark.parametrize("grids", GRIDS)
def bench_temporal_attention(duel, grids, step, dtype, rival):
    case = Case(GRIDS[grids], dtype, step == "backward")
    theirs = rival(case)
    with torch.no_grad():
        expected = torch.cat([y.flatten(0, 2) for y in sdpa_rearranging(case)()])
        keep = torch.ones(case.packing.capacity, dtype=torch.bool, device=DEVICE)
        keep[case.packing.prefix_rows] = False
        limit = 8 * torch.finfo(dtype).eps  # of each, from exact arithmetic, half as much
        assert (case.ours()[keep] - expected).abs().max() <= limit * expected.abs().max(), "it computes something else"
    moved = 4 * case.qkv.numel() // 3 * case.qkv.element_size()
    if step == "backward":
        return duel(
            stepping(case.ours), stepping(theirs), flops=3.5 * case.flops, bytes=4 * moved, rival=rival.__name__
        )
    with torch.no_grad():
        duel(case.ours, theirs, flops=case.flops, bytes=moved, rival=rival.__name__)
