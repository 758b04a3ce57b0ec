"""The blocks of timm's Eva: rotary positions, gated MLPs, biases of q and v alone, grouped keys and values."""

import torch
from torch import Tensor, nn

from revit_kernels import ops
from revit_kernels.modules import whole_block
from revit_kernels.modules.attention import Attention, fitting, mask_of
from revit_kernels.modules.block import DropPath, Stream, drop_path, run_attention, take
from revit_kernels.modules.layer_norm import LayerNorm, add, normalise
from revit_kernels.modules.linear import is_plain, linear, traced
from revit_kernels.modules.mlp import GluMlp, Mlp, SwiGLU
from revit_kernels.ops.attention.rotary import Rotary
from revit_kernels.packing import Packing


class _Projected(Attention):
    """Attention whose queries, keys and values come of one projection or of three."""

    def __init__(
        self,
        dim,
        num_heads=8,
        qkv_bias=True,
        qkv_fused=True,
        num_prefix_tokens=1,
        attn_drop=0.0,
        proj_drop=0.0,
        attn_head_dim=None,
        norm_layer=None,
        qk_norm=False,
        scale_norm=False,
        rotate_half=False,
        gated=False,
        num_kv_heads=None,
        device=None,
        dtype=None,
    ):
        nn.Module.__init__(self)
        kwargs = {"device": device, "dtype": dtype}
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        if num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads must divide the {num_heads} heads, got {num_kv_heads}")
        if qkv_fused and self.num_kv_heads != num_heads:
            raise ValueError("num_kv_heads below num_heads needs qkv_fused=False")
        self.num_kv_groups = num_heads // self.num_kv_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.scale = self.head_dim**-0.5
        self.num_prefix_tokens = num_prefix_tokens
        self.rotate_half = rotate_half
        attn_dim = self.head_dim * num_heads
        self._make_projections(dim, attn_dim, qkv_bias, qkv_fused, kwargs)
        self.q_norm = norm_layer(self.head_dim, **kwargs) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **kwargs) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(attn_dim, **kwargs) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, attn_dim, bias=qkv_bias, **kwargs) if gated else None
        self.proj = nn.Linear(attn_dim, dim, **kwargs)
        self.proj_drop = nn.Dropout(proj_drop)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x, (capacity, heads, head_dim) each."""
        if self.qkv is not None:
            return self._joined(x).view(-1, 3, self.num_heads, self.head_dim).unbind(1)
        q, k, v = (
            linear(layer, x).view(-1, layer.out_features // self.head_dim, self.head_dim) for layer in self._apart()
        )
        if (groups := self.num_heads // k.shape[1]) > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        return q, k, v

    def _apart(self) -> tuple[nn.Module, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def _joined(self, x: Tensor) -> Tensor:
        return linear(self.qkv, x)


class AttentionRope(_Projected):
    """Self-attention with rotary positions. x as in Attention."""

    def _make_projections(self, dim, attn_dim, qkv_bias, qkv_fused, kwargs) -> None:
        kv_dim = self.num_kv_heads * self.head_dim
        self.qkv = nn.Linear(dim, 3 * attn_dim, bias=qkv_bias, **kwargs) if qkv_fused else None
        for name, width in (("q_proj", attn_dim), ("k_proj", kv_dim), ("v_proj", kv_dim)):
            setattr(self, name, None if qkv_fused else nn.Linear(dim, width, bias=qkv_bias, **kwargs))


class EvaAttention(_Projected):
    """Self-attention with rotary positions, and biases of queries and values but none of keys. x as in Attention."""

    def _make_projections(self, dim, attn_dim, qkv_bias, qkv_fused, kwargs) -> None:
        if self.num_kv_groups > 1:
            raise ValueError("num_kv_heads below num_heads needs attn_type 'rope'")
        has_bias = qkv_bias and qkv_fused
        self.qkv = nn.Linear(dim, 3 * attn_dim, bias=False, **kwargs) if qkv_fused else None
        self.q_bias = nn.Parameter(torch.zeros(attn_dim, **kwargs)) if has_bias else None
        self.v_bias = nn.Parameter(torch.zeros(attn_dim, **kwargs)) if has_bias else None
        for name, bias in (("q_proj", qkv_bias), ("k_proj", False), ("v_proj", qkv_bias)):
            setattr(self, name, None if qkv_fused else nn.Linear(dim, attn_dim, bias=bias, **kwargs))

    def reset_parameters(self) -> None:
        if self.q_bias is not None:
            nn.init.zeros_(self.q_bias)
            nn.init.zeros_(self.v_bias)

    def _joined(self, x: Tensor) -> Tensor:
        if self.q_bias is None:
            return linear(self.qkv, x)
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if is_plain(self.qkv, "Linear") and not traced(x):
            return ops.linear(x.reshape(-1, x.shape[-1]), self.qkv.weight, bias)
        return self.qkv(x) + bias


ATTENTION = {"eva": EvaAttention, "rope": AttentionRope}


def _make_mlp(dim, mlp_ratio, swiglu_mlp, apart, scale_mlp, align_to, drop, act_layer, norm_layer, kwargs) -> nn.Module:
    """apart: whether a gated MLP has a projection of its own for the gate"""
    norm, hidden = norm_layer if scale_mlp else None, int(dim * mlp_ratio)
    if not swiglu_mlp:
        return Mlp(dim, hidden, act_layer=act_layer, norm_layer=norm, drop=drop, **kwargs)
    if apart:
        return SwiGLU(dim, hidden, norm_layer=norm, drop=drop, align_to=align_to, **kwargs)
    return GluMlp(dim, 2 * hidden, act_layer=nn.SiLU, norm_layer=norm, gate_last=False, drop=drop, **kwargs)


class StreamingBlock(nn.Module):
    """A block whose work is `stream`. x: (capacity, dim) with its packing, or (images, length, dim) without."""

    def forward(
        self,
        x: Tensor,
        rope: Rotary | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        packing: Packing | None = None,
    ) -> Tensor:
        mask = mask_of(attn_mask, is_causal)
        return add(*self.stream([x, None, None], fitting(packing, x), rope=rope, **mask))


class _EvaBlock(StreamingBlock):
    """What both blocks of Eva are made of."""

    def __init__(
        self,
        dim,
        num_heads,
        qkv_bias=True,
        qkv_fused=True,
        mlp_ratio=4.0,
        swiglu_mlp=False,
        swiglu_align_to=0,
        scale_mlp=False,
        scale_attn_inner=False,
        num_prefix_tokens=1,
        attn_type="eva",
        rotate_half=False,
        gated_attn=False,
        qk_norm=False,
        num_kv_heads=None,
        proj_drop=0.0,
        attn_drop=0.0,
        drop_path=0.0,
        init_values=None,
        attn_only_layer_scale=False,
        act_layer=nn.GELU,
        norm_layer=LayerNorm,
        attn_head_dim=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        if attn_type not in ATTENTION:
            raise ValueError(f"attn_type must be one of {sorted(ATTENTION)}, got {attn_type!r}")
        norm1, norm2 = norm_layer(dim, **kwargs), norm_layer(dim, **kwargs)
        attn = ATTENTION[attn_type](
            dim,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qkv_fused=qkv_fused,
            num_prefix_tokens=num_prefix_tokens,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            attn_head_dim=attn_head_dim,
            norm_layer=norm_layer,
            qk_norm=qk_norm,
            scale_norm=scale_attn_inner,
            rotate_half=rotate_half,
            gated=gated_attn,
            num_kv_heads=num_kv_heads,
            **kwargs,
        )
        apart = scale_mlp or (self.aligned_apart and swiglu_align_to > 0)
        mlp = _make_mlp(
            dim, mlp_ratio, swiglu_mlp, apart, scale_mlp, swiglu_align_to, proj_drop, act_layer, norm_layer, kwargs
        )
        self._arrange(norm1, attn, norm2, mlp, drop_path)
        self.init_values = init_values
        scales = (init_values is not None, init_values is not None and not attn_only_layer_scale)
        self._make_scales(dim, scales, kwargs)


class EvaBlock(_EvaBlock):
    """Pre-norm block of Eva: attention with rotary positions, then an MLP, each behind a norm."""

    aligned_apart = True

    def _arrange(self, norm1, attn, norm2, mlp, rate) -> None:
        self.norm1, self.attn = norm1, attn
        self.drop_path1 = DropPath(rate) if rate > 0 else nn.Identity()
        self.norm2, self.mlp = norm2, mlp
        self.drop_path2 = DropPath(rate) if rate > 0 else nn.Identity()

    def _make_scales(self, dim, scales, kwargs) -> None:
        for name, wanted in zip(("gamma_1", "gamma_2"), scales):
            setattr(self, name, nn.Parameter(torch.full((dim,), float(self.init_values), **kwargs)) if wanted else None)

    def reset_parameters(self) -> None:
        for gamma in (self.gamma_1, self.gamma_2):
            if gamma is not None:
                nn.init.constant_(gamma, self.init_values)

    def stream(self, stream: Stream, packing: Packing, *, rope: Rotary | None = None, **mask) -> Stream:
        x, branch, gamma = take(stream)
        reason = "takes no mask" if mask or traced(x) else whole_block.refusal(self, x)
        if reason is None:
            return [whole_block.run(self, add(x, branch, gamma), packing, rope), None, None]
        y, x = normalise(self.norm1, x, packing, branch, gamma)
        branch = drop_path(self.drop_path1, run_attention(self.attn, y, packing, mask, rope), packing)
        y, x = normalise(self.norm2, x, packing, branch, self.gamma_1)
        branch = None
        return [x, drop_path(self.drop_path2, self.mlp(y), packing), self.gamma_2]


class EvaBlockPostNorm(_EvaBlock):
    """Post-norm block of Eva: the norms stand on the branches."""

    aligned_apart = False

    def _arrange(self, norm1, attn, norm2, mlp, rate) -> None:
        self.attn, self.norm1 = attn, norm1
        self.drop_path1 = DropPath(rate) if rate > 0 else nn.Identity()
        self.mlp, self.norm2 = mlp, norm2
        self.drop_path2 = DropPath(rate) if rate > 0 else nn.Identity()

    def _make_scales(self, dim, scales, kwargs) -> None:
        """It has none: init_values is ignored, as timm's does."""

    def stream(self, stream: Stream, packing: Packing, *, rope: Rotary | None = None, **mask) -> Stream:
        x = add(*take(stream))
        branch, _ = normalise(self.norm1, run_attention(self.attn, x, packing, mask, rope), packing)
        x = x + drop_path(self.drop_path1, branch, packing)
        branch, _ = normalise(self.norm2, self.mlp(x), packing)
        return [x, drop_path(self.drop_path2, branch, packing), None]
