"""Transformer blocks of the zoo, on packed tokens.

A block that `streams` takes and gives its residual stream as [x, branch, gamma], standing for x + gamma * branch, so
that the add runs inside the norm that comes next, even if that norm is the next block's.
"""

import torch
from torch import Tensor, nn

from revit_kernels.modules import whole_block
from revit_kernels.modules.attention import (
    Attention,
    DiffAttention,
    Maps,
    _Lambda,
    attend,
    by_length,
    fitting,
    image_by_image,
    mask_of,
)
from revit_kernels.modules.layer_norm import LayerNorm, RmsNorm, add, apply_norm, normalise
from revit_kernels.modules.linear import is_plain, linear, takes_packing, traced
from revit_kernels.modules.mlp import Mlp
from revit_kernels.ops.attention.rotary import Rotary
from revit_kernels.packing import Packing

ATTENTION = {"": Attention, "attn": Attention, "diff": DiffAttention}

Stream = list[Tensor | None]  # [x, branch, gamma]


def take(stream: Stream) -> Stream:
    """What is in the stream, which lets go of it unless a backward may want it: it is the largest thing there is."""
    taken = list(stream)
    if not torch.is_grad_enabled():
        stream.clear()
    return taken


def make_attention(layer, dim: int, depth: int, **kwargs) -> nn.Module:
    """The attention layer by class, or by timm's name for it. Only DiffAttention depends on the depth."""
    if isinstance(layer, str):
        if layer not in ATTENTION:
            raise ValueError(f"attn_layer must be one of {sorted(ATTENTION)}, got {layer!r}")
        layer = ATTENTION[layer]
    if isinstance(layer, type) and issubclass(layer, DiffAttention):
        kwargs["depth"] = depth
    return layer(dim, **kwargs)


def run_attention(module: nn.Module, x: Tensor, packing: Packing, mask: dict, rope: Rotary | None = None) -> Tensor:
    """module(x), where somebody may have put an attention of another library, or of his own, into the block."""
    positions = {} if rope is None else {"rope": rope}
    if takes_packing(module):
        return module(x, packing=packing, **mask, **positions)
    if positions:
        raise ValueError(f"rotary positions need the block's own attention, got {type(module).__name__}")
    return by_length(module, x, packing, mask)


class LayerScale(nn.Module):
    """A learned scale per channel (Touvron et al., arXiv:2103.17239)."""

    def __init__(self, dim: int, init_values: float = 1e-5, inplace: bool = False, device=None, dtype=None):
        super().__init__()
        self.init_values = init_values
        self.inplace = inplace
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class FixedScale(nn.Module):
    """A scale per channel that is not learned, and not in the state_dict."""

    gamma: Tensor

    def __init__(self, dim: int, value: float, device=None, dtype=None):
        super().__init__()
        self.value = value
        self.register_buffer("gamma", torch.full((dim,), value, device=device, dtype=dtype), persistent=False)

    def reset_parameters(self) -> None:
        self.gamma.fill_(self.value)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: in training, leaves out the branch of an image with probability `drop_prob`.

    x: (images, length, dim); `scale` serves packed tokens.
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.drop_prob:
            return x
        keep = x.new_empty(x.shape[0], *(1,) * (x.ndim - 1)).bernoulli_(1 - self.drop_prob)
        return x * (keep / (1 - self.drop_prob) if self.scale_by_keep and self.drop_prob < 1 else keep)


def drop_path(module: nn.Module, x: Tensor, packing: Packing) -> Tensor:
    """module(x) for a DropPath: a whole image's branch, however many tokens it has, is kept or left out."""
    if traced(x) or x.ndim == 3 or isinstance(module, nn.Identity):
        return module(x)
    if not is_plain(module, "DropPath"):
        return by_length(module, x, packing, {})
    if not module.training or not module.drop_prob:
        return x
    scale = module(x.new_ones(packing.images, 1))  # (images, 1), drawn by the module's own rule
    return x * scale[packing.image.clamp(min=0).long()] if packing.images else x


def scaled(scale: nn.Module, path: nn.Module, x: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None]:
    """path(scale(x)) as (branch, gamma): a plain scale is left to be applied where the branch is added."""
    if is_plain(scale, "LayerScale", "FixedScale") and is_plain(path, "DropPath", "Identity") and not traced(x):
        return drop_path(path, x, packing), scale.gamma
    return drop_path(path, scale(x), packing), None


class _Streaming(nn.Module):
    """A block whose work is `stream`. x: (capacity, dim) with its packing, or (images, length, dim) without."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        packing: Packing | None = None,
        **told,
    ) -> Tensor:
        """told: what else `stream` takes, such as the positions of tokens"""
        mask = mask_of(attn_mask, is_causal)
        return add(*self.stream([x, None, None], fitting(packing, x), **mask, **told))

    def _options(self, dim, device, dtype, init_values, drop_path):
        """A LayerScale and a DropPath, or identities in their place."""
        scale = LayerScale(dim, init_values, device=device, dtype=dtype) if init_values else nn.Identity()
        return scale, DropPath(drop_path) if drop_path > 0 else nn.Identity()


class Block(_Streaming):
    """Pre-norm block: attention, then MLP, each behind a norm and added to the stream."""

    def __init__(
        self,
        dim,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_norm=False,
        scale_attn_norm=False,
        scale_mlp_norm=False,
        proj_bias=True,
        proj_drop=0.0,
        attn_drop=0.0,
        init_values=None,
        drop_path=0.0,
        act_layer=nn.GELU,
        norm_layer=LayerNorm,
        mlp_layer=Mlp,
        attn_layer=Attention,
        depth=0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        self.norm1 = norm_layer(dim, **kwargs)
        self.attn = make_attention(
            attn_layer,
            dim,
            depth,
            num_heads=num_heads,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            scale_norm=scale_attn_norm,
            proj_bias=proj_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            norm_layer=norm_layer,
            **kwargs,
        )
        self.ls1, self.drop_path1 = self._options(dim, device, dtype, init_values, drop_path)
        self.norm2 = norm_layer(dim, **kwargs)
        self.mlp = mlp_layer(
            in_features=dim,
            hidden_features=int(dim * mlp_ratio),
            act_layer=act_layer,
            norm_layer=norm_layer if scale_mlp_norm else None,
            bias=proj_bias,
            drop=proj_drop,
            **kwargs,
        )
        self.ls2, self.drop_path2 = self._options(dim, device, dtype, init_values, drop_path)

    def stream(self, stream: Stream, packing: Packing, **mask) -> Stream:
        x, branch, gamma = take(stream)
        reason = "takes no mask" if mask or traced(x) else whole_block.refusal(self, x)
        if reason is None:
            return [whole_block.run(self, add(x, branch, gamma), packing), None, None]
        y, x = normalise(self.norm1, x, packing, branch, gamma)
        branch = None
        branch, gamma = scaled(self.ls1, self.drop_path1, run_attention(self.attn, y, packing, mask), packing)
        y, x = normalise(self.norm2, x, packing, branch, gamma)
        branch = None
        return [x, *scaled(self.ls2, self.drop_path2, self.mlp(y), packing)]


class ResPostBlock(_Streaming):
    """Post-norm block: the norms stand on the branches (Swin v2's residual post-norm)."""

    def __init__(self, dim, num_heads, *, init_values=None, **kwargs):
        """Arguments as of Block; init_values is what the norms' weights start with."""
        super().__init__()
        plain = Block(dim, num_heads, **kwargs)
        self.init_values = init_values
        for name in ("attn", "norm1", "drop_path1", "mlp", "norm2", "drop_path2"):
            self.add_module(name, getattr(plain, name))
        self.init_weights()

    def init_weights(self) -> None:
        if self.init_values is not None:
            nn.init.constant_(self.norm1.weight, self.init_values)
            nn.init.constant_(self.norm2.weight, self.init_values)

    def stream(self, stream: Stream, packing: Packing, **mask) -> Stream:
        x = add(*take(stream))
        branch, _ = normalise(self.norm1, run_attention(self.attn, x, packing, mask), packing)
        x = x + drop_path(self.drop_path1, branch, packing)
        branch, _ = normalise(self.norm2, self.mlp(x), packing)
        return [x, drop_path(self.drop_path2, branch, packing), None]


class ParallelScalingBlock(_Streaming, Maps):
    """Attention and MLP side by side from one input projection (ViT-22B, arXiv:2302.05442)."""

    def __init__(
        self,
        dim,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=False,
        qk_norm=False,
        scale_attn_norm=False,
        scale_mlp_norm=False,
        proj_bias=True,
        proj_drop=0.0,
        attn_drop=0.0,
        init_values=None,
        drop_path=0.0,
        act_layer=nn.GELU,
        norm_layer=LayerNorm,
        mlp_layer=None,
        attn_layer=None,
        depth=0,
        fuse_out_proj=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        if scale_attn_norm or scale_mlp_norm:
            raise ValueError("a parallel block has no place for scale_attn_norm and scale_mlp_norm")
        hidden = int(mlp_ratio * dim)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.in_norm = norm_layer(dim, **kwargs)
        self.in_proj = nn.Linear(dim, hidden + 3 * dim, bias=qkv_bias, **kwargs)
        self.in_split = [hidden] + [dim] * 3
        self.register_parameter("mlp_bias", None if qkv_bias else nn.Parameter(torch.zeros(hidden, **kwargs)))
        self._make_heads(norm_layer, qk_norm, attn_drop, kwargs)
        self.mlp_drop = nn.Dropout(proj_drop)
        self.mlp_act = act_layer()
        if fuse_out_proj:
            self.out_proj = nn.Linear(dim + hidden, dim, bias=proj_bias, **kwargs)
            self.attn_out_proj = self.mlp_out_proj = None
        else:
            self.out_proj = None
            self.attn_out_proj = nn.Linear(dim, dim, bias=proj_bias, **kwargs)
            self.mlp_out_proj = nn.Linear(hidden, dim, bias=proj_bias, **kwargs)
        self.ls = LayerScale(dim, init_values, **kwargs) if init_values is not None else nn.Identity()
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def _make_heads(self, norm_layer, qk_norm, attn_drop, kwargs) -> None:
        self.q_norm = norm_layer(self.head_dim, **kwargs) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **kwargs) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)

    def reset_parameters(self) -> None:
        if self.mlp_bias is not None:
            nn.init.zeros_(self.mlp_bias)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, mask: dict) -> Tensor:
        """q, k, v: (..., dim), as the packing has it. Returns their shape."""
        shape, dense = q.shape, self._in_steps(q, self.q_norm, self.k_norm)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)) for t in (q, k, v))
        q, k = apply_norm(self.q_norm, q, packing), apply_norm(self.k_norm, k, packing)
        if dense:
            return self._weigh(q, k, v, **mask).reshape(shape)
        if self._gives_maps():
            return image_by_image(self._weigh, packing, q, k, v).view(shape)
        dropout = self.attn_drop.p if self.training else 0.0
        q, k, v = (t.flatten(0, -3) for t in (q, k, v))
        return attend(q, k, v, packing, self.kernel_scale(), dropout=dropout, **mask).view(shape)

    def stream(self, stream: Stream, packing: Packing, **mask) -> Stream:
        x, branch, gamma = take(stream)
        y, x = normalise(self.in_norm, x, packing, branch, gamma)
        branch = None
        mlp, q, k, v = linear(self.in_proj, y).split(self.in_split, dim=-1)
        attn = self._attend(q, k, v, packing, mask)
        mlp = self.mlp_drop(self.mlp_act(mlp if self.mlp_bias is None else mlp + self.mlp_bias))
        if self.out_proj is not None:
            y = linear(self.out_proj, torch.cat((attn, mlp), -1))
        else:
            y = linear(self.attn_out_proj, attn) + linear(self.mlp_out_proj, mlp)
        return [x, *scaled(self.ls, self.drop_path, y, packing)]


class DiffParallelScalingBlock(ParallelScalingBlock, _Lambda):
    """ParallelScalingBlock with differential attention (arXiv:2302.05442, arXiv:2410.05258)."""

    def __init__(self, dim, num_heads, *args, depth=0, dual_lambda=False, device=None, dtype=None, **kwargs):
        kwargs["fuse_out_proj"] = True
        super().__init__(dim, num_heads, *args, depth=depth, device=device, dtype=dtype, **kwargs)
        self._init_lambda(dual_lambda, depth, device)

    def _make_heads(self, norm_layer, qk_norm, attn_drop, kwargs) -> None:
        self.head_dim //= 2
        self.scale = self.head_dim**-0.5
        self.attn_drop_p = attn_drop
        super()._make_heads(norm_layer, qk_norm, attn_drop, kwargs)
        self.sub_norm = RmsNorm(2 * self.head_dim, eps=1e-5, **kwargs)  # before out_proj, as timm orders parameters

    def reset_parameters(self) -> None:
        ParallelScalingBlock.reset_parameters(self)
        _Lambda.reset_parameters(self)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, mask: dict) -> Tensor:
        return self._differ_wholly(q, k, v, packing, mask)


class ParallelThingsBlock(nn.Module):
    """Several attentions side by side, then several MLPs (Touvron et al., arXiv:2203.09795)."""

    def __init__(self, dim, num_heads, num_parallel=2, **kwargs):
        """Arguments as of Block; num_parallel is how many stand side by side."""
        super().__init__()
        self.num_parallel = num_parallel
        self.attns = nn.ModuleList()
        self.ffns = nn.ModuleList()
        for _ in range(num_parallel):
            plain = Block(dim, num_heads, **kwargs)
            attn = {"norm": plain.norm1, "attn": plain.attn, "ls": plain.ls1, "drop_path": plain.drop_path1}
            ffn = {"norm": plain.norm2, "mlp": plain.mlp, "ls": plain.ls2, "drop_path": plain.drop_path2}
            for branches, parts in ((self.attns, attn), (self.ffns, ffn)):
                branches.append(nn.Sequential())
                for name, part in parts.items():
                    branches[-1].add_module(name, part)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, packing: Packing | None = None
    ) -> Tensor:
        packing = fitting(packing, x)
        mask = mask_of(attn_mask, is_causal)
        x = x + sum(
            self._branch(b, lambda y, b=b: run_attention(b.attn, y, packing, mask), x, packing, mask)
            for b in self.attns
        )
        return x + sum(self._branch(b, lambda y, b=b: b.mlp(y), x, packing, {}) for b in self.ffns)

    @staticmethod
    def _branch(parts: nn.Sequential, core, x: Tensor, packing: Packing, mask: dict) -> Tensor:
        if not mask and (traced(x) or not is_plain(parts, "Sequential")):
            return by_length(parts, x, packing, {})
        y, _ = normalise(parts.norm, x, packing)
        return drop_path(parts.drop_path, parts.ls(core(y)), packing)
