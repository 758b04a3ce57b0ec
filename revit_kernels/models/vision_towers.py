"""The vision towers of language models, as classifiers: Qwen3-VL's, DeepSeek's and Gemma 4's."""

from __future__ import annotations

import torch
from torch import nn

from revit_kernels import modules
from revit_kernels.models.axis_positions import AxisPositions
from revit_kernels.models.eva import VarLenEva
from revit_kernels.models.layers import ACTIVATIONS, layer
from revit_kernels.modules.gemma4 import CentredPatchEmbed, SandwichBlock


class _Tower(VarLenEva):
    """A tower with rotary positions, whose answer is a norm without weights and a head on the mean of its tokens."""

    def __init__(self, *args, **kwargs):
        fixed = {"class_token": False, "use_rot_pos_emb": True, "use_fc_norm": True, "weight_init": "skip"}
        super().__init__(*args, **fixed | kwargs)
        norm = self.fc_norm
        self.fc_norm = type(norm)(self.embed_dim, eps=norm.eps, affine=False)

    def fix_init_weight(self) -> None:
        """Nothing: a tower's output projections are not scaled down by depth."""


class VarLenTower(_Tower):
    """Qwen3-VL's tower (arXiv:2511.21631) or DeepSeek's, as timm's `Qwen3VitClassifier` and `DeepseekVitClassifier`.

    Keys are those of VarLenEva; `load_checkpoint` takes timm's files, whose keys begin with `encoder.`.
    args, kwargs: of VarLenEva
    act_layer:    activation of an MLP that is not gated
    mlp_bias:     whether MLPs have biases
    """

    def __init__(self, *args, act_layer=None, mlp_bias: bool = True, **kwargs):
        mode = kwargs.pop("weight_init", "")
        super().__init__(*args, **kwargs)
        act_layer = layer("act_layer", act_layer, ACTIVATIONS)
        for block in self.blocks:
            if act_layer is not None:
                block.mlp.act = act_layer()
            if not mlp_bias:
                for child in block.mlp.children():
                    if isinstance(child, nn.Linear):
                        child.register_parameter("bias", None)
        self.pos_interpolation, self.pos_antialias, self.pos_align_corners = "bilinear", False, True
        if mode != "skip":
            self.init_weights(mode, needs_reset=False)


class VarLenGemma4(_Tower):
    """Gemma 4's tower, as timm's `Gemma4VitClassifier`: images with values from 0 to 1 in.

    Keys are those of our modules; `load_checkpoint` takes timm's files.
    args, kwargs:            of VarLenEva
    intermediate_size:       width of the gated MLPs
    num_positions:           rows and columns that have positions
    use_clipped_linears:     whether linear layers clamp their inputs and outputs
    standardize:             whether there are `std_bias` and `std_scale` of a language model's projector; no answer
                             uses them, but checkpoints hold them
    """

    def __init__(
        self,
        *args,
        intermediate_size: int = 3072,
        num_positions: int = 10240,
        use_clipped_linears: bool = False,
        standardize: bool = False,
        **kwargs,
    ):
        mode, depth, heads = kwargs.pop("weight_init", ""), kwargs.pop("depth", 16), kwargs.get("num_heads", 12)
        kv_heads = kwargs.pop("num_kv_heads", None)
        attn_drop, proj_drop, rate = (kwargs.pop(f"{n}_rate", 0.0) for n in ("attn_drop", "proj_drop", "drop_path"))
        super().__init__(*args, **kwargs, depth=0, use_abs_pos_emb=False, norm_layer=modules.RmsNorm)
        new = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        embed = self.patch_embed
        self.patch_embed = CentredPatchEmbed(
            embed.img_size, embed.patch_size, self.in_chans, self.embed_dim, bias=False, output_fmt="NHWC", **new
        )
        self.pos_axes = AxisPositions((num_positions,) * 2, self.embed_dim, interpolate=False, **new)
        self.blocks = nn.ModuleList(
            SandwichBlock(
                self.embed_dim,
                heads,
                intermediate_size,
                num_kv_heads=kv_heads,
                clipped=use_clipped_linears,
                act_layer=ACTIVATIONS["gelu_tanh"],
                attn_drop=attn_drop,
                proj_drop=proj_drop,
                drop_path=rate * i / max(depth - 1, 1),
                **new,
            )
            for i in range(depth)
        )
        if standardize:
            self.register_buffer("std_bias", torch.zeros(self.embed_dim, **new))
            self.register_buffer("std_scale", torch.ones(self.embed_dim, **new))
        reduction = self.patch_embed.feat_ratio()
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": self.embed_dim, "reduction": reduction} for i in range(depth)
        ]
        if mode != "skip":
            self.init_weights(mode, needs_reset=False)
