"""Attention pooling: one vector per image from a learned query, or from patches refined by attention."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_kernels import ops
from revit_kernels.modules.attention import Maps, attend, fitting
from revit_kernels.modules.layer_norm import PLAIN, LayerNorm, apply_norm, normalise
from revit_kernels.modules.linear import is_plain, linear, traced
from revit_kernels.modules.mlp import Mlp
from revit_kernels.packing import Packing


class AttentionPoolLatent(Maps):
    """Learned queries attend to each image's tokens (the `map` head of SigLIP and big_vision).

    x: (capacity, dim) with its packing, or (images, length, dim) without. Returns (images, dim).
    """

    def __init__(
        self,
        in_features,
        out_features=None,
        embed_dim=None,
        num_heads=8,
        feat_size=None,
        mlp_ratio=4.0,
        qkv_bias=True,
        q_proj=True,
        qk_norm=False,
        latent_len=1,
        latent_dim=None,
        pos_embed="",
        pool_type="token",
        norm_layer=None,
        act_layer=nn.GELU,
        drop=0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        if pos_embed:
            raise ValueError(f"pos_embed must be '', got {pos_embed!r}: a table of one size does not fit mixed lengths")
        dim = embed_dim or in_features
        out_features = in_features if out_features is None else out_features
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.feat_size = feat_size
        self.scale = self.head_dim**-0.5
        self.pool = pool_type
        self.pos_embed = None
        self.latent_dim = latent_dim or dim
        self.latent_len = latent_len
        self.latent = nn.Parameter(torch.zeros(1, latent_len, self.latent_dim, **kwargs))
        self.q = nn.Linear(self.latent_dim, dim, bias=qkv_bias, **kwargs) if q_proj else nn.Identity()
        self.kv = nn.Linear(dim, dim * 2, bias=qkv_bias, **kwargs)
        qk_norm_layer = (norm_layer or LayerNorm) if qk_norm else None
        self.q_norm = qk_norm_layer(self.head_dim, **kwargs) if qk_norm else nn.Identity()
        self.k_norm = qk_norm_layer(self.head_dim, **kwargs) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, out_features, **kwargs) if out_features else nn.Identity()
        self.proj_drop = nn.Dropout(drop)
        if out_features:
            self.norm = norm_layer(out_features, **kwargs) if norm_layer else nn.Identity()
            hidden = int(out_features * mlp_ratio)
            self.mlp = Mlp(out_features, hidden, act_layer=act_layer or nn.GELU, **kwargs)
        else:
            self.norm, self.mlp = nn.Identity(), None
        self.out_features = out_features or dim
        self.init_weights()

    def init_weights(self) -> None:
        nn.init.trunc_normal_(self.latent, std=self.latent_dim**-0.5)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, *, packing: Packing | None = None) -> Tensor:
        if attn_mask is not None:
            raise ValueError("attention pooling takes no attn_mask: leave tokens out by packing without them")
        if self.pos_embed is not None:
            raise ValueError("attention pooling with a position table of one size does not fit mixed lengths")
        if traced(x) or (x.ndim == 3 and not self._is_plain()):
            return self._answer(self._steps(x))
        packing = fitting(packing, x)
        images = packing.images
        latent = linear(self.q, self.latent[0]) if isinstance(self.q, nn.Linear) else self.q(self.latent[0])
        q = self.q_norm(latent.view(self.latent_len, self.num_heads, self.head_dim))
        q = q.expand(images, *q.shape).reshape(-1, self.num_heads, self.head_dim)
        k, v = linear(self.kv, x).view(-1, 2, self.num_heads, self.head_dim).unbind(1)
        one_each = torch.arange(images + 1, dtype=torch.int32, device=x.device) * self.latent_len
        y = ops.attention(
            q.to(v.dtype),
            self.k_norm(k).to(v.dtype),
            v,
            one_each,
            self.latent_len,
            cu_seqlens_k=packing.cu_seqlens,
            max_seqlen_k=packing.max_seqlen,
            scale=self.kernel_scale(),
        )
        return self._answer(y.reshape(images, self.latent_len, self.num_heads * self.head_dim))

    def _is_plain(self) -> bool:
        norms = is_plain(self.q_norm, "Identity", *PLAIN) and is_plain(self.k_norm, "Identity", *PLAIN)
        return norms and is_plain(self.q, "Linear", "Identity")

    def _steps(self, x: Tensor) -> Tensor:
        """timm's attention with timm's shapes, by torch's ops. x: (images, length, dim)"""
        images, length, _ = x.shape
        q = self.q(self.latent.expand(images, -1, -1))
        q = q.reshape(images, self.latent_len, self.num_heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).reshape(images, length, 2, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, scale=self.kernel_scale())
        return y.transpose(1, 2).reshape(images, self.latent_len, self.num_heads * self.head_dim)

    def _answer(self, y: Tensor) -> Tensor:
        y = self.proj_drop(linear(self.proj, y))
        if self.mlp is not None:
            y = y + self.mlp(self.norm(y))
        return y[:, 0] if self.pool == "token" else y.mean(1) if self.pool == "avg" else y


class AttentionPoolPrr(Maps):
    """Patch representation refinement: the tokens attend to each other without weights, then are pooled.

    x: (capacity, dim) with its packing, or (images, length, dim) without. Returns (images, dim).
    """

    def __init__(
        self,
        dim,
        num_heads=8,
        pool_type="token",
        pre_norm=False,
        post_norm=False,
        norm_layer=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        norm_layer = norm_layer or LayerNorm
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.pool = pool_type
        self.out_features = dim
        self.pre_norm = norm_layer(dim, **kwargs) if pre_norm else nn.Identity()
        self.post_norm = norm_layer(dim, **kwargs) if post_norm else nn.Identity()

    def forward(self, x: Tensor, *, packing: Packing | None = None) -> Tensor:
        if traced(x):
            return self._steps(x, packing)
        packing = fitting(packing, x)
        x, _ = normalise(self.pre_norm, x, packing)
        heads = x.reshape(-1, self.num_heads, self.head_dim)
        x = attend(heads, heads.view_as(heads), heads.view_as(heads), packing, self.kernel_scale()).view(x.shape)
        x, _ = normalise(self.post_norm, x, packing)
        return ops.pool(x.flatten(0, -2), packing.cu_seqlens, self.pool, prefix=0, include_prefix=True)

    def _steps(self, x: Tensor, packing: Packing | None) -> Tensor:
        """timm's steps, by torch's ops. x: (images, length, dim)"""
        images, length, dim = x.shape
        x = apply_norm(self.pre_norm, x, packing)
        heads = x.reshape(images, length, self.num_heads, self.head_dim).transpose(1, 2)
        x = F.scaled_dot_product_attention(heads, heads, heads, scale=self.kernel_scale())
        x = apply_norm(self.post_norm, x.transpose(1, 2).reshape(images, length, dim), packing)
        return x[:, 0] if self.pool == "token" else x.mean(1)
