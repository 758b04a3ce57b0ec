"""VarLenEva: timm's Eva on images of any token lengths: EVA-02, DINOv3, Perception Encoder, RoPE-ViT and others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revit_kernels import modules
from revit_kernels.models.initialise import truncated_normal
from revit_kernels.models.layers import NORMS, layer
from revit_kernels.models.rotary import RotaryPositions
from revit_kernels.models.vit import VarLenViT
from revit_kernels.modules.eva import EvaBlock, EvaBlockPostNorm
from revit_kernels.modules.patch_dropout import PatchDropout
from revit_kernels.packing import Packing

POOLS = ("", "avg", "avgmax", "max", "token", "map")


class VarLenEva(VarLenViT):
    """A Vision Transformer with rotary positions (Fang et al., arXiv:2303.11331), on images at different token lengths.

    Constructor, module tree, state_dict keys and attributes are those of timm 1.0.31's `Eva`, and it is called as
    VarLenViT is. Each image's positions are those of its own grid.

    Raises NotImplementedError for patch dropout beside rotary positions.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        num_kv_heads: int | tuple[int, ...] | None = None,
        qkv_bias: bool = True,
        qkv_fused: bool = True,
        qk_norm: bool = False,
        mlp_ratio: float = 4.0,
        swiglu_mlp: bool = False,
        swiglu_align_to: int = 0,
        scale_mlp: bool = False,
        scale_attn_inner: bool = False,
        attn_type: str = "eva",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        norm_layer=None,
        init_values: float | None = None,
        attn_only_layer_scale: bool = False,
        class_token: bool = True,
        num_reg_tokens: int = 0,
        no_embed_class: bool = False,
        use_abs_pos_emb: bool = True,
        use_rot_pos_emb: bool = False,
        rope_type: str | None = "cat",
        rope_grid_offset: float = 0.0,
        rope_grid_indexing: str = "ij",
        rope_temperature: float = 10000.0,
        rope_rotate_half: bool = False,
        rope_shift_coords: float | None = None,
        rope_jitter_coords: float | None = None,
        rope_rescale_coords: float | None = None,
        rope_mrope_section: tuple[int, int, int] | None = None,
        use_post_norm: bool = False,
        use_pre_transformer_norm: bool = False,
        use_post_transformer_norm: bool | None = None,
        use_fc_norm: bool | None = None,
        attn_pool_num_heads: int | None = None,
        attn_pool_mlp_ratio: float | None = None,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        ref_feat_shape: int | tuple[int, int] | None = None,
        head_init_scale: float = 0.001,
        weight_init: str = "",
        device=None,
        dtype=None,
    ):
        nn.Module.__init__(self)
        kwargs = {"device": device, "dtype": dtype}
        self._check_pool(global_pool, class_token)
        norm_layer = layer("norm_layer", norm_layer, NORMS, modules.LayerNorm)
        use_fc_norm = global_pool == "avg" if use_fc_norm is None else use_fc_norm
        final_norm = not use_fc_norm if use_post_transformer_norm is None else use_post_transformer_norm

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = int(class_token) + num_reg_tokens
        self.no_embed_class = no_embed_class
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False
        embed_args = {"strict_img_size": False, "output_fmt": "NHWC"} if dynamic_img_size else {}
        self.patch_embed = modules.PatchEmbed(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=not use_pre_transformer_norm,
            dynamic_img_pad=dynamic_img_pad,
            **embed_args,
            **kwargs,
        )

        def tokens(count):
            return nn.Parameter(torch.empty(1, count, embed_dim, **kwargs)) if count else None

        self.cls_token = tokens(int(class_token))
        self.reg_token = tokens(num_reg_tokens)
        embed_len = self.patch_embed.num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        self.pos_embed = tokens(embed_len if use_abs_pos_emb else 0)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop = PatchDropout(patch_drop_rate, self.num_prefix_tokens) if patch_drop_rate else nn.Identity()
        self.rope = None
        if use_rot_pos_emb:
            reference = (ref_feat_shape,) * 2 if isinstance(ref_feat_shape, int) else ref_feat_shape
            self.rope = RotaryPositions(
                rope_type,
                embed_dim // num_heads,
                temperature=rope_temperature,
                indexing=rope_grid_indexing,
                offset=rope_grid_offset,
                reference=reference if reference is None else tuple(reference),
                half=rope_rotate_half,
                section=rope_mrope_section or (8, 12, 12),
                augment=(rope_shift_coords, rope_jitter_coords, rope_rescale_coords),
                depth=depth,
                num_heads=num_heads,
                **kwargs,
            )
        self.norm_pre = norm_layer(embed_dim, **kwargs) if use_pre_transformer_norm else nn.Identity()
        kv_heads = (num_kv_heads,) * depth if num_kv_heads is None or isinstance(num_kv_heads, int) else num_kv_heads
        if len(kv_heads) != depth:
            raise ValueError(f"num_kv_heads must name one number for each of {depth} blocks, got {len(kv_heads)}")
        if use_post_norm and (qk_norm or attn_only_layer_scale or any(heads is not None for heads in kv_heads)):
            raise ValueError("use_post_norm goes with neither qk_norm, num_kv_heads nor attn_only_layer_scale")
        self.blocks = nn.ModuleList(
            (EvaBlockPostNorm if use_post_norm else EvaBlock)(
                dim=embed_dim,
                num_heads=num_heads,
                qkv_bias=qkv_bias,
                qkv_fused=qkv_fused,
                mlp_ratio=mlp_ratio,
                swiglu_mlp=swiglu_mlp,
                swiglu_align_to=swiglu_align_to,
                scale_mlp=scale_mlp,
                scale_attn_inner=scale_attn_inner,
                num_prefix_tokens=self.num_prefix_tokens,
                attn_type=attn_type,
                rotate_half=rope_rotate_half or rope_type == "mrope",
                qk_norm=qk_norm,
                num_kv_heads=kv_heads[i],
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate * i / max(depth - 1, 1),
                init_values=init_values,
                attn_only_layer_scale=attn_only_layer_scale,
                norm_layer=norm_layer,
                **kwargs,
            )
            for i in range(depth)
        )
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.norm = norm_layer(embed_dim, **kwargs) if final_norm else nn.Identity()
        self.attn_pool = None
        if global_pool == "map":
            self.attn_pool = modules.AttentionPoolLatent(
                embed_dim,
                num_heads=attn_pool_num_heads or num_heads,
                mlp_ratio=attn_pool_mlp_ratio or mlp_ratio,
                norm_layer=norm_layer,
                act_layer=nn.GELU,
                **kwargs,
            )
        self.fc_norm = norm_layer(embed_dim, **kwargs) if use_fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **kwargs) if num_classes > 0 else nn.Identity()
        self.head_init_scale = head_init_scale
        self._set_preprocessing()
        if weight_init != "skip":
            self.init_weights(weight_init, needs_reset=False)

    def _set_preprocessing(self) -> None:
        """Also what timm's Eva does not have of what its VisionTransformer has."""
        super()._set_preprocessing()
        self.has_class_token = self.cls_token is not None
        self.num_reg_tokens = self.num_prefix_tokens - int(self.has_class_token)
        if self.patch_drop is None:
            self.patch_drop = nn.Identity()
        if self.rope is not None and not isinstance(self.patch_drop, nn.Identity):
            raise NotImplementedError("patch_drop_rate beside rotary positions is not implemented")

    @property
    def pool_include_prefix(self) -> bool:
        """Whether pooling sees the prefix tokens: attention pooling does."""
        return self.attn_pool is not None

    @staticmethod
    def _check_pool(global_pool: str, class_token: bool) -> None:
        if global_pool not in POOLS:
            raise ValueError(f"global_pool must be one of {POOLS}, got {global_pool!r}")
        VarLenViT._check_pool(global_pool, class_token)

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Draw the weights anew, as timm's Eva does. ValueError for a mode other than ''."""
        if mode:
            raise ValueError(f"weight_init must be '' or 'skip', got {mode!r}")
        for name, module in self.named_modules():
            if module is not self:
                truncated_normal(module, name, needs_reset)
        for token in (self.pos_embed, self.cls_token, self.reg_token):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        self.fix_init_weight()
        if self.head_init_scale and isinstance(self.head, nn.Linear):
            with torch.no_grad():
                self.head.weight.mul_(self.head_init_scale)
                self.head.bias.mul_(self.head_init_scale)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | ({"rope.freqs"} if self.rope is not None else set())

    def _block_positions(self, packing: Packing | None) -> list[dict]:
        if self.rope is None:
            return []
        return [{"rope": rotary} for rotary in self.rope(packing)]

    def _embed(self, *args) -> Tensor:
        x = super()._embed(*args)
        return x if self.pos_embed is not None else self.pos_drop(x)
