"""Tubelets, patches of a few frames, with the weights in a Conv3d."""

import math

from torch import nn

from revit_kernels.modules.patch_embed import pair


class TubeletEmbed(nn.Module):
    """One linear projection per tubelet (ViViT, arXiv:2103.15691): `tubelet_size` frames of a patch.

    ClipModel cuts clips for it; `proj` holds the weight.
    """

    def __init__(self, img_size=224, patch_size=16, tubelet_size=2, in_chans=3, embed_dim=768, device=None, dtype=None):
        super().__init__()
        self.patch_size, self.tubelet_size = pair(patch_size), tubelet_size
        self.set_input_size(img_size)
        size = (tubelet_size, *self.patch_size)
        self.proj = nn.Conv3d(in_chans, embed_dim, size, size, device=device, dtype=dtype)

    def set_input_size(self, img_size) -> None:
        """Take another size (height, width) of frames."""
        self.img_size = pair(img_size)
        self.grid_size = tuple(s // p for s, p in zip(self.img_size, self.patch_size))
        self.num_patches = math.prod(self.grid_size)  # of one frame of tokens
