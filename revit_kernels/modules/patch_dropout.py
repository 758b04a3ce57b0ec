"""Patch dropout: training on a random part of each image's patches."""

import torch
from torch import Tensor, nn

from revit_kernels.packing import Packing


class PatchDropout(nn.Module):
    """Leaves out patches in training (Liu et al., arXiv:2208.07220); of a mixed batch, VarLenViT leaves them out."""

    def __init__(self, prob: float = 0.5, num_prefix_tokens: int = 1):
        super().__init__()
        if not 0 <= prob < 1:
            raise ValueError(f"patch_drop_rate must be at least 0 and below 1, got {prob}")
        self.prob = prob
        self.num_prefix_tokens = num_prefix_tokens

    def forward(self, x: Tensor) -> Tensor:
        """(images, kept, dim), in no order, of a dense batch (images, length, dim); x itself outside of training."""
        if not self.training or not self.prob:
            return x
        prefix, patches = x[:, : self.num_prefix_tokens], x[:, self.num_prefix_tokens :]
        count = patches.shape[1]
        order = torch.randn(x.shape[0], count, device=x.device).argsort(-1)[:, : max(1, int(count * (1 - self.prob)))]
        return torch.cat([prefix, patches.gather(1, order[..., None].expand(-1, -1, x.shape[2]))], 1)


def drop_patches(x: Tensor, packing: Packing, prob: float) -> tuple[Tensor, Packing]:
    """A random (1 - prob) of each image's patches, at least one, with all prefix tokens; and their packing."""
    if packing.grids is None:
        raise ValueError("patch dropout needs grids that the host knows")
    kept = [max(1, int(h * w * (1 - prob))) for h, w in packing.grids]
    order = torch.rand(x.shape[0], device=x.device)
    is_prefix = torch.arange(x.shape[0], device=x.device) - packing.cu_seqlens[packing.image.long()] < packing.prefix
    order = torch.where(is_prefix, -1.0, order) + 2 * packing.image  # images stay in order, prefix tokens first
    order = torch.where(packing.image < 0, torch.inf, order)
    order = order.argsort(stable=True)
    shorter = Packing.from_grids([(1, n) for n in kept], packing.prefix, device=x.device)
    starts = packing.cu_seqlens[shorter.image.long()] - shorter.cu_seqlens[shorter.image.long()]
    rows = torch.arange(shorter.capacity, device=x.device) + starts
    return x[order[rows]], shorter
