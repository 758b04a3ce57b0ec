"""VarLenVideoViT: Vision Transformers of tubelets with attention over whole clips: VideoMAE, ViViT, V-JEPA 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revit_kernels import modules
from revit_kernels.clips import ClipPacking, KeptPacking
from revit_kernels.models.layers import ACTIVATIONS, NORMS, Layer, layer
from revit_kernels.models.video import ClipModel, resized_times
from revit_kernels.modules.patch_embed import pair
from revit_kernels.modules.tubelet_embed import TubeletEmbed
from revit_kernels.modules.vjepa_attention import Turn, TurnedAttention, angles

POSITIONS = ("sincos", "learn", "rope")


class VarLenVideoViT(ClipModel):
    """A Vision Transformer of tubelets that takes clips of different grids and frame counts, each as one sequence.

    Called as VarLenTimeSformer is. A grid (frames, rows, columns) counts tokens, each of `tubelet_size` frames: the
    frames of a clip must be a multiple of it.

    num_frames:   frames of the clips that the model is made for
    tubelet_size: frames of a clip that one token sees
    pos_embed:    "sincos": a fixed table over the flat index of a token (VideoMAE, arXiv:2203.12602); "learn": a
                  learned one (ViViT, arXiv:2103.15691); both interpolated in space, then in time, for other sizes;
                  "rope": queries and keys are turned by their token's frame, row and column (V-JEPA 2,
                  arXiv:2506.09985)
    class_token:  whether there is one
    global_pool:  "avg" (of the patches) or "token" (the first)
    final_norm:   whether tokens are normalised after the last block
    fc_norm:      whether the pooled tokens are normalised before the head

    Raises ValueError for clips whose channels, dtype, size or number do not fit the model or the grids.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 400,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        num_frames: int = 16,
        tubelet_size: int = 2,
        pos_embed: str = "sincos",
        class_token: bool = False,
        final_norm: bool = True,
        fc_norm: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer: Layer = None,
        act_layer: Layer = None,
        weight_init: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if pos_embed not in POSITIONS:
            raise ValueError(f"pos_embed must be one of {POSITIONS}, got {pos_embed!r}")
        if global_pool not in ("avg", "token"):
            raise ValueError(f"global_pool must be 'avg' or 'token', got {global_pool!r}")
        if num_frames % tubelet_size:
            raise ValueError(f"num_frames must be a multiple of tubelet_size, got {num_frames} and {tubelet_size}")
        if class_token and pos_embed != "learn":
            raise ValueError(f"a class token needs pos_embed 'learn', got {pos_embed!r}")
        kwargs = {"device": device, "dtype": dtype}
        norm_layer = layer("norm_layer", norm_layer, NORMS, modules.LayerNorm)
        act_layer = layer("act_layer", act_layer, ACTIVATIONS, nn.GELU)
        self.tubelet, self.num_frames, self.positions = tubelet_size, num_frames // tubelet_size, pos_embed
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens, self.has_class_token = int(class_token), class_token
        self.patch_embed = TubeletEmbed(img_size, patch_size, tubelet_size, in_chans, embed_dim, **kwargs)
        self.table_size = (self.num_frames, *self.patch_embed.grid_size)  # of the table of positions
        tokens = int(class_token) + self.num_frames * self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **kwargs)) if class_token else None
        learnt = pos_embed == "learn"
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim, **kwargs)) if learnt else None
        self.pos_drop = nn.Dropout(pos_drop_rate)
        options = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "proj_drop": proj_drop_rate}
        options |= {"norm_layer": norm_layer, "act_layer": act_layer, **kwargs}
        options |= {"attn_layer": TurnedAttention} if pos_embed == "rope" else {}
        self.blocks = nn.ModuleList(
            modules.Block(embed_dim, num_heads, drop_path=drop_path_rate * i / max(depth - 1, 1), **options)
            for i in range(depth)
        )
        self.norm = norm_layer(embed_dim, **kwargs) if final_norm else nn.Identity()
        self.fc_norm = norm_layer(embed_dim, **kwargs) if fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **kwargs) if num_classes > 0 else nn.Identity()
        self._set_preprocessing()
        if weight_init != "skip":
            self._draw()

    # ------------------------------------------------------------------ what ClipModel asks

    def _table(self) -> Tensor:
        """(frames, rows, columns, dim): the position of each token of a clip of the table's own size."""
        if self.pos_embed is not None:
            return self.pos_embed[0, self.num_prefix_tokens :].view(*self.table_size, -1)
        frames, rows, columns = self.table_size
        like, dim = self.patch_embed.proj.weight, self.embed_dim
        channel = torch.arange(dim, dtype=torch.float64, device=like.device)
        rates = 10000.0 ** (-2 * torch.div(channel, 2, rounding_mode="floor") / dim)
        index = torch.arange(frames * rows * columns, dtype=torch.float64, device=like.device)
        turns = index[:, None] * rates
        table = torch.where(channel % 2 == 0, turns.sin(), turns.cos())
        return table.to(like.dtype).view(frames, rows, columns, dim)

    def _positions(self, menu) -> tuple[Tensor | None, Tensor | None]:
        if self.positions == "rope":
            return None, None
        table, dim = self._table(), self.embed_dim
        flat = table.permute(1, 2, 0, 3).flatten(2)  # (rows, columns, frames * dim)
        parts = []
        for frames, *grid in menu:
            space = self._spatial(flat, tuple(grid)).unflatten(1, (-1, dim)).transpose(0, 1)  # (frames, cells, dim)
            parts.append(resized_times(space, frames, self.pos_interpolation == "nearest").flatten(0, 1))
        cells = torch.cat(parts) if parts else table.new_empty(0, dim)
        return cells, None if self.cls_token is None else self.cls_token[0] + self.pos_embed[0, :1]

    def _block_options(self, packing: ClipPacking | KeptPacking) -> dict:
        if self.positions != "rope":
            return {}
        if isinstance(packing, KeptPacking):
            whole = self._block_options(packing.whole)
            return {name: Turn(*(t[packing.rows] for t in turn)) for name, turn in whole.items()}
        table = angles(packing.menu, self.blocks[0].attn.head_dim, packing.device)
        frames = packing.by_frame
        row = torch.arange(packing.capacity, device=packing.device)
        if packing.clips:
            used = frames.image.long()
            row[: frames.capacity] += frames.placement[used, 2] - frames.cu_seqlens[used]
            row[frames.capacity :] = 0  # of no clip
        return {"turn": Turn(*(t[row] for t in table))} if packing.clips else {}

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, num_frames: int | None = None) -> None:
        """Take another size of frames, another number of frames of tokens, or both, for good: a learned table is
        resampled."""
        size = self.patch_embed.img_size if img_size is None else pair(img_size)
        frames = self.num_frames if num_frames is None else num_frames
        grid = tuple(s // p for s, p in zip(size, self.patch_embed.patch_size))
        if self.pos_embed is not None and (frames, *grid) != self.table_size:
            with torch.no_grad():
                cells = self._positions(((frames, *grid),))[0]
                table = torch.cat([self.pos_embed[0, : self.num_prefix_tokens], cells])
            self.pos_embed = nn.Parameter(table[None], self.pos_embed.requires_grad)
            self.table_size = (frames, *grid)
        self.patch_embed.set_input_size(size)
        self.num_frames = frames
