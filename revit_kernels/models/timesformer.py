"""VarLenTimeSformer: TimeSformer on clips of any sizes and frame counts, in one packed batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from revit_kernels import modules, ops
from revit_kernels.clips import ClipPacking
from revit_kernels.models.layers import ACTIVATIONS, NORMS, Layer, layer
from revit_kernels.models.video import ClipModel, resized_times
from revit_kernels.modules.divided import DividedBlock
from revit_kernels.modules.layer_norm import normalise
from revit_kernels.modules.patch_embed import pair
from revit_kernels.packing import PackedTokens, Packing

ATTENTION_TYPES = ("divided_space_time", "space_only", "joint_space_time")


class VarLenTimeSformer(ClipModel):
    """TimeSformer (Bertasius et al., arXiv:2102.05095) that takes clips of different grids and frame counts.

    Constructor, module tree, state_dict keys and outputs are those of its own `VisionTransformer`; patch_embed, blocks
    and head are named as timm names them, so image weights fit (see `from_image_model`).

    Calling the model:
        model(x)                           x: (clips, channels, frames, height, width) float -> (clips, classes)
        model([clip, ...])                 clips (channels, frames, height, width) of any sizes and frame counts: each
                                           keeps its aspect and its frames, with at most as many patches a frame as the
                                           model was made for
        model(clips, grids=[(7, 7), ...])  the frames of each clip resized to its own grid (rows, columns) of patches
        model(clips, grids=[(4, 7, 7), ...])  and 4 of its frames taken, the middles of 4 equal parts of the clip
        model(clips, packing=...)          where a ClipPacking, of `model.packing(grids)`, says the grids
    Float clips come normalised; uint8 clips are normalised with pretrained_cfg's mean and std, and may be
    (frames, height, width, channels) with channels_last=True, as decoders give them.

    attention_type: "divided_space_time", "space_only" (frames apart, their tokens averaged at the end) or
                    "joint_space_time" (all tokens of a clip together)
    num_frames:     frames of the clips that the model is made for; times of other frame counts are interpolated
                    linearly and positions of other grids bicubically, or both "nearest" (model.pos_interpolation)

    In training, stochastic depth leaves out the temporal branch of a whole clip, the spatial branch of a frame, and the
    MLP of a clip. Raises ValueError for clips whose channels, dtype, size or number do not fit the model or the grids,
    and for a grid that is not one for all frames of a clip.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        num_frames: int = 8,
        attention_type: str = "divided_space_time",
        norm_layer: Layer = None,
        act_layer: Layer = None,
        weight_init: str = "",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if attention_type not in ATTENTION_TYPES:
            raise ValueError(f"attention_type must be one of {ATTENTION_TYPES}, got {attention_type!r}")
        kwargs = {"device": device, "dtype": dtype}
        norm_layer = layer("norm_layer", norm_layer, NORMS, modules.LayerNorm)
        act_layer = layer("act_layer", act_layer, ACTIVATIONS, nn.GELU)
        self.attention_type, self.num_frames = attention_type, num_frames
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, "token"
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens, self.has_class_token = 1, True
        self.per_frame = attention_type != "joint_space_time"
        self.patch_embed = modules.PatchEmbed(img_size, patch_size, in_chans, embed_dim, **kwargs)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim, **kwargs))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim, **kwargs))
        self.time_embed = None
        if attention_type != "space_only":
            self.time_embed = nn.Parameter(torch.zeros(1, num_frames, embed_dim, **kwargs))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        block = DividedBlock if attention_type == "divided_space_time" else modules.Block
        options = {"mlp_ratio": mlp_ratio, "qkv_bias": qkv_bias, "proj_drop": proj_drop_rate}
        options |= {"norm_layer": norm_layer, "act_layer": act_layer, **kwargs}
        self.blocks = nn.ModuleList(
            block(embed_dim, num_heads, drop_path=drop_path_rate * i / max(depth - 1, 1), **options)
            for i in range(depth)
        )
        self.norm = norm_layer(embed_dim, **kwargs)
        self.fc_norm = nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **kwargs) if num_classes > 0 else nn.Identity()
        self._set_preprocessing()
        if weight_init != "skip":
            self._draw()
            if attention_type == "divided_space_time":
                for block in self.blocks[1:]:  # as its authors: attention over time starts at zero, except in the first
                    nn.init.zeros_(block.temporal_fc.weight)

    @classmethod
    def from_image_model(
        cls, model: nn.Module, num_frames: int = 8, attention_type: str = "divided_space_time", **kwargs: Any
    ) -> VarLenTimeSformer:
        """A TimeSformer that begins with the weights of a Vision Transformer of images, copied.

        model:  a VarLenViT or timm VisionTransformer of plain blocks with a class token and no other prefix tokens
        kwargs: of the constructor, such as drop_path_rate; what the image model says itself cannot be given

        Temporal attention and its norm start as copies of the spatial ones, behind a projection of zeros, and times
        start as zeros: for any number of equal frames the new model gives what the image model gives.
        Raises NotImplementedError for an image model that has parameters with no place here, by name.
        """
        patch, block = model.patch_embed, model.blocks[0]
        if model.cls_token is None or model.pos_embed is None:
            raise NotImplementedError("from_image_model takes a model with a class token and a table of positions")
        known = {
            "img_size": tuple(patch.img_size),
            "patch_size": tuple(patch.patch_size),
            "in_chans": patch.proj.in_channels,
            "num_classes": model.num_classes,
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": block.attn.num_heads,
            "mlp_ratio": (block.mlp.fc1.out_features + 0.5) / model.embed_dim,
            "qkv_bias": block.attn.qkv.bias is not None,
            "norm_layer": {"name": "layernorm", "eps": block.norm1.eps},
        }
        new = cls(**kwargs, **known, num_frames=num_frames, attention_type=attention_type, weight_init="skip")
        state, wanted = model.state_dict(), new.state_dict()
        unknown = sorted(state.keys() - wanted.keys())
        added = {k for k in wanted if "temporal_" in k or k == "time_embed"}
        missing = sorted(wanted.keys() - state.keys() - added)
        if unknown or missing:
            raise NotImplementedError(f"from_image_model finds no place for {unknown[:3]}, and no {missing[:3]}")
        state |= {k: v for k, v in wanted.items() if k in added}
        new.load_state_dict(state)
        if attention_type == "divided_space_time":
            for block in new.blocks:
                block.reset_temporal()
        act = model.blocks[0].mlp.act
        if type(act) is not nn.GELU or act.approximate != "none":
            raise NotImplementedError(f"from_image_model takes GELU, got {act}")
        mean, std = (model.pretrained_cfg.get(name) for name in ("mean", "std"))
        new.pretrained_cfg = new.default_cfg = {"mean": tuple(mean), "std": tuple(std)}
        weight = patch.proj.weight
        return new.to(weight.device, weight.dtype).train(model.training)

    # ------------------------------------------------------------------ what ClipModel asks

    def _positions(self, menu) -> tuple[Tensor, Tensor]:
        """Position rows for every cell of every frame of every grid of the menu, and the class token with its own."""
        table = self.pos_embed[0, 1:].view(*self.patch_embed.grid_size, -1)
        spatial = {grid: self._spatial(table, grid) for grid in {g[1:] for g in menu}}
        parts = []
        for frames, *grid in menu:
            cells = spatial[tuple(grid)].expand(frames, -1, -1)
            if self.time_embed is not None:
                cells = cells + resized_times(self.time_embed[0], frames, self.pos_interpolation == "nearest")[:, None]
            parts.append(cells.reshape(-1, self.embed_dim))
        cells = torch.cat(parts) if parts else self.pos_embed.new_empty(0, self.embed_dim)
        return cells, self.cls_token[0] + self.pos_embed[0, :1]

    def _of_blocks(self, packing: ClipPacking) -> Packing:
        return packing.space() if self.attention_type == "space_only" else packing

    def _class(self, x: Tensor, packing: ClipPacking) -> Tensor:
        if self.attention_type != "space_only":
            return super()._class(x, packing)
        return ops.pool(x[packing.prefix_rows], packing.cu_frames, "avg", include_prefix=True)

    def _features(self, x: Tensor, packing: ClipPacking) -> PackedTokens:
        if self.attention_type != "space_only":
            return super()._features(x, packing)
        parts = [part.unflatten(0, (grid[0], -1)) for part, grid in zip(packing.split(x), packing.grids)]
        wide = torch.promote_types(x.dtype, torch.float32)
        x = torch.cat([part.to(wide).mean(0).to(x.dtype) for part in parts]) if parts else x[:0]
        found = ClipPacking.from_grids([(1, *grid[1:]) for grid in packing.grids], 1, device=packing.device)
        row = packing.length_index[found.image.long()]  # the affine is that of the whole clip's length
        told = (packing.menu, 1, found.capacity, None, True)
        lengths = Packing(found.cu_seqlens, packing.length_index, found.image, row, None, *told)
        return PackedTokens(normalise(self.norm, x, lengths)[0], found)

    def _dense(self, x: PackedTokens) -> Tensor:
        """(clips, 1 + patches * frames, dim): the class token, then the patches, the frame running fastest."""
        clips, dim = x.packing.clips, x.tokens.shape[1]
        frames = x.packing.grids[0][0] if clips else 1
        if x.packing.per_frame:
            tokens = x.tokens.view(clips, frames, -1, dim)
            first, patches = tokens[:, 0, :1], tokens[:, :, 1:]
        else:
            tokens = x.tokens.view(clips, -1, dim)
            first, patches = tokens[:, :1], tokens[:, 1:].unflatten(1, (frames, -1))
        return torch.cat([first, patches.transpose(1, 2).flatten(1, 2)], 1)

    def set_input_size(self, img_size: int | tuple[int, int] | None = None, num_frames: int | None = None) -> None:
        """Resample positions and times to another size of frames, another number of frames, or both, for good."""
        img_size = None if img_size is None else pair(img_size)
        old = tuple(self.patch_embed.grid_size)
        table = self.pos_embed.detach()[0]
        self.patch_embed.set_input_size(img_size)
        grid = tuple(self.patch_embed.grid_size)
        if grid != old:
            cells = self._spatial(table[1:].view(*old, -1), grid)
            self.pos_embed = nn.Parameter(torch.cat([table[:1], cells])[None], self.pos_embed.requires_grad)
        if num_frames is not None and num_frames != self.num_frames:
            self.num_frames = num_frames
            if self.time_embed is not None:
                times = resized_times(self.time_embed.detach()[0], num_frames, self.pos_interpolation == "nearest")
                self.time_embed = nn.Parameter(times[None].clone(), self.time_embed.requires_grad)
