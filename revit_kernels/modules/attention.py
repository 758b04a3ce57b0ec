"""Self-attention inside each image of a packing."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_kernels import ops
from revit_kernels.modules.layer_norm import RmsNorm, apply_norm
from revit_kernels.modules.linear import linear
from revit_kernels.ops.attention.rotary import Rotary, rotate
from revit_kernels.packing import Packing


def dense_packing(x: Tensor) -> Packing:
    """The packing of a dense batch (images, length, dim): every image owns as many rows."""
    if x.ndim != 3:
        raise ValueError(f"without a packing, tokens must be (images, length, dim), got {tuple(x.shape)}")
    return Packing.uniform(x.shape[0], (1, x.shape[1]), 0, device=x.device)


def by_length(module: nn.Module, x: Tensor, packing: Packing, mask: dict) -> Tensor:
    """A module that knows no packing, called with a dense batch (images, length, dim) for each length there is."""
    if x.ndim == 3:
        return module(x, **mask)
    if packing.grids is None or mask:
        raise ValueError(f"{type(module).__name__} runs only where the host knows the grids, and without a mask")
    images: dict[int, list[int]] = {}
    parts = list(packing.split(x))
    for i, part in enumerate(parts):
        images.setdefault(len(part), []).append(i)
    for members in images.values():
        for i, y in zip(members, module(torch.stack([parts[i] for i in members]))):
            parts[i] = y
    used = torch.cat(parts) if parts else x[:0]
    return F.pad(used, (0, 0, 0, x.shape[0] - len(used)))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing,
    scale: float | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
    rope: Rotary | None = None,
) -> Tensor:
    """Attention inside each image. q, k, v: (capacity, heads, head_dim). Returns (capacity, heads, head_dim).

    rope: angles by which q and k are turned, or None
    A mask (as F.scaled_dot_product_attention takes it), causality and dropout are no matter of the packed kernels:
    they run on torch's, and a mask and causality only for a dense batch. ValueError otherwise.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a norm of queries and keys leaves them wider
    if attn_mask is None and not is_causal and not dropout:
        return ops.attention(q, k, v, packing.cu_seqlens, packing.max_seqlen, scale=scale, rotary=rope)
    if rope is not None:
        q, k = (rotate(t, *rope).to(t.dtype) for t in (q, k))

    def dense(q, k, v):  # (images, length, heads, head_dim)
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        options = {"attn_mask": attn_mask, "dropout_p": dropout, "is_causal": is_causal, "scale": scale}
        return F.scaled_dot_product_attention(*heads_first, **options).transpose(1, 2)

    if len(packing.menu) == 1 and packing.full:
        split = (packing.images, packing.max_seqlen, *q.shape[1:])
        return dense(q.view(split), k.view(split), v.view(split)).reshape(q.shape)
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask and is_causal need a dense batch: images of one length, as a tensor")
    parts = [dense(*(t[None] for t in parts))[0] for parts in zip(*(packing.split(t) for t in (q, k, v)))]
    return F.pad(torch.cat(parts), (0, 0, 0, 0, 0, q.shape[0] - sum(map(len, parts))))


class Attention(nn.Module):
    """Multi-head self-attention, optionally with norms of queries and keys, of the output, and a sigmoid gate.

    x: (capacity, dim) with its packing, or (images, length, dim) without.
    """

    def __init__(
        self,
        dim,
        num_heads=8,
        attn_head_dim=None,
        dim_out=None,
        qkv_bias=False,
        qk_norm=False,
        scale_norm=False,
        proj_bias=True,
        gated=False,
        attn_drop=0.0,
        proj_drop=0.0,
        norm_layer=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = self.head_dim * num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, self.attn_dim * 3, bias=qkv_bias, **kwargs)
        self.q_norm = norm_layer(self.head_dim, **kwargs) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **kwargs) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(self.attn_dim, **kwargs) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **kwargs) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **kwargs)
        self.proj_drop = nn.Dropout(proj_drop)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x, (capacity, heads, head_dim) each."""
        return linear(self.qkv, x).view(-1, 3, self.num_heads, self.head_dim).unbind(1)

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        packing: Packing | None = None,
        rope: Rotary | None = None,
    ) -> Tensor:
        packing = packing or dense_packing(x)
        q, k, v = self.project(x)
        y = attend(
            apply_norm(self.q_norm, q, packing),
            apply_norm(self.k_norm, k, packing),
            v,
            packing,
            self.scale,
            attn_mask=attn_mask,
            is_causal=is_causal,
            dropout=self.attn_drop.p if self.training else 0.0,
            rope=rope,
        )
        y = apply_norm(self.norm, y.reshape(*x.shape[:-1], self.num_heads * self.head_dim), packing)
        if self.gate is not None:
            y = y * linear(self.gate, x).sigmoid()
        return self.proj_drop(linear(self.proj, y))


class _Lambda(nn.Module):
    """The learned weight of the second attention map in differential attention (arXiv:2410.05258)."""

    def _init_lambda(self, dual: bool, depth: int, device) -> None:
        self.dual_lambda = dual

        def parameter(name, wanted, *shape):
            made = nn.Parameter(torch.zeros(shape, dtype=torch.float32, device=device)) if wanted else None
            self.register_parameter(name, made)

        for name in ("lambda_a", "lambda_b"):
            parameter(name, dual)
        for name in ("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"):
            parameter(name, not dual, self.head_dim)
        self.set_lambda_init(depth)
        self.reset_parameters()

    def set_lambda_init(self, depth: int) -> None:
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * depth)

    def reset_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            if name in ("lambda_a", "lambda_b"):
                nn.init.zeros_(parameter)
            elif name.startswith("lambda_"):
                nn.init.normal_(parameter, std=0.1)

    def _compute_lambda(self) -> Tensor:
        if self.lambda_a is not None:
            first, second = self.lambda_a, self.lambda_b
        else:
            first, second = (self.lambda_q1 * self.lambda_k1).sum(), (self.lambda_q2 * self.lambda_k2).sum()
        return first.float().exp() - second.float().exp() + self.lambda_init

    def _differ(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, **options) -> Tensor:
        """q, k, v: (capacity, dim). The difference of two attention maps, normalised. Returns (capacity, dim).

        The value heads are twice as wide as those of queries and keys, so each map is applied to both their halves.
        """
        q = self.q_norm(q.reshape(-1, self.num_heads, 2, self.head_dim)).transpose(1, 2)
        k = self.k_norm(k.reshape(-1, self.num_heads, 2, self.head_dim)).transpose(1, 2)
        v = v.reshape(-1, 1, self.num_heads, 2, self.head_dim).expand(-1, 2, -1, -1, -1)
        shape = (q.shape[0], 2, self.num_heads, 2, self.head_dim)
        wide = (t.unsqueeze(3).expand(shape).reshape(q.shape[0], -1, self.head_dim) for t in (q, k))
        y = attend(*wide, v.reshape(q.shape[0], -1, self.head_dim), packing, self.scale, **options)
        first, second = y.view(shape[0], 2, self.num_heads, 2 * self.head_dim).unbind(1)
        y = self.sub_norm(first - self._compute_lambda().type_as(q) * second) * (1 - self.lambda_init)
        return y.reshape(shape[0], -1)


class DiffAttention(_Lambda):
    """Differential attention: the difference of two softmax maps (arXiv:2410.05258). x as in Attention."""

    def __init__(
        self,
        dim,
        num_heads=8,
        qkv_bias=False,
        qk_norm=False,
        scale_norm=False,
        proj_bias=True,
        attn_drop=0.0,
        proj_drop=0.0,
        norm_layer=None,
        depth=0,
        dual_lambda=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        norm_layer = norm_layer or RmsNorm
        self.num_heads = num_heads
        self.head_dim = dim // num_heads // 2
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **kwargs)
        self.q_norm = norm_layer(self.head_dim, **kwargs) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim, **kwargs) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.attn_drop_p = attn_drop
        self.norm = norm_layer(dim, **kwargs) if scale_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim, bias=proj_bias, **kwargs)
        self.proj_drop = nn.Dropout(proj_drop)
        self.sub_norm = RmsNorm(2 * self.head_dim, eps=1e-5, **kwargs)
        self._init_lambda(dual_lambda, depth, device)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, *, packing: Packing | None = None
    ) -> Tensor:
        packing = packing or dense_packing(x)
        q, k, v = linear(self.qkv, x).view(-1, 3, x.shape[-1]).unbind(1)
        dropout = self.attn_drop_p if self.training else 0.0
        y = self._differ(q, k, v, packing, attn_mask=attn_mask, is_causal=is_causal, dropout=dropout)
        return self.proj_drop(linear(self.proj, self.norm(y.view(x.shape))))
