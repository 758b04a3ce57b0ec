"""Self-attention inside each image of a packing."""

import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_kernels import ops
from revit_kernels.modules.layer_norm import PLAIN, RmsNorm, _PerLength, apply_norm
from revit_kernels.modules.linear import is_plain, linear, traced
from revit_kernels.modules.script import refuse_script
from revit_kernels.ops.attention.rotary import Rotary, rotate
from revit_kernels.packing import Packing


def dense_packing(x: Tensor) -> Packing:
    """The packing of a dense batch (images, length, dim): every image owns as many rows."""
    if x.ndim != 3:
        raise ValueError(f"without a packing, tokens must be (images, length, dim), got {tuple(x.shape)}")
    return Packing.uniform(x.shape[0], (1, x.shape[1]), 0, device=x.device)


def fitting(packing: Packing | None, x: Tensor) -> Packing | None:
    """The packing of x: the one given, or another where somebody's code changed the number of a dense batch's tokens.

    A tracer is followed with what is given, and with none. Raises ValueError where the number changed in a mixed batch.
    """
    if traced(x):
        return packing
    if packing is None:
        return dense_packing(x)
    if len(x.shape) == 3 and (x.shape[0] != packing.images or x.shape[1] != packing.max_seqlen):
        prefix = packing.prefix if x.shape[1] > packing.prefix else 0
        return Packing.uniform(x.shape[0], (1, x.shape[1] - prefix), prefix, device=x.device)
    if len(x.shape) == 2 and not torch.compiler.is_compiling() and x.shape[0] != packing.capacity:
        raise ValueError(
            f"a hook or module made {x.shape[0]} tokens of {packing.capacity}: to change their number needs a dense "
            "batch, images of one size as a tensor"
        )
    return packing


def per_length(function, parts) -> list[Tensor]:
    """What `function` gives for each part (length, dim), called with a dense batch for each length there is."""
    images: dict[int, list[int]] = {}
    for i, part in enumerate(parts):
        images.setdefault(len(part), []).append(i)
    results = [None] * len(parts)
    for members in images.values():
        for i, y in zip(members, function(torch.stack([parts[i] for i in members]))):
            results[i] = y
    return results


def by_length(module: nn.Module, x: Tensor, packing: Packing | None, mask: dict) -> Tensor:
    """A module that knows no packing, called with a dense batch (images, length, dim) for each length there is."""
    if traced(x):
        return module(x, **mask)
    if any(isinstance(part, _PerLength) and packing.menu != part.menu[:1] for part in module.modules()):
        raise ValueError(
            f"{type(module).__name__}, or a hook on it, hides the packing from norms with an affine for each length: "
            "the model answers images of its longest length alone"
        )
    if x.ndim == 3:
        return module(x, **mask)
    if packing.grids is None or mask:
        raise ValueError(f"{type(module).__name__} runs only where the host knows the grids, and without a mask")
    parts = packing.split(x)
    results = per_length(module, parts)
    if any(len(result) != len(part) for result, part in zip(results, parts)):
        raise ValueError(
            f"{type(module).__name__} changed the number of tokens: that needs a dense batch, images of one size as a "
            "tensor"
        )
    used = torch.cat(results) if results else x[:0]
    return F.pad(used, (0, 0, 0, x.shape[0] - len(used)))


def mask_of(attn_mask: Tensor | None, is_causal: bool) -> dict:
    """The arguments that tell an attention of a mask; none where there is no mask."""
    return {"attn_mask": attn_mask, "is_causal": is_causal} if attn_mask is not None or is_causal else {}


def weigh(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attn_mask=None, is_causal: bool = False) -> Tensor:
    """timm's attention, by torch's ops: through `module.attn_drop` where its maps are wanted.

    q, k, v: (images, heads, length, head_dim). Returns (images, heads, length, head_dim).
    """
    if module.fuses():
        dropout = module.attn_drop.p if module.training else 0.0
        options = {"attn_mask": attn_mask, "dropout_p": dropout, "is_causal": is_causal}
        return F.scaled_dot_product_attention(q, k, v, **options, scale=module.kernel_scale())
    return attention_map(module, q, k, attn_mask, is_causal) @ v


def attention_map(module: nn.Module, q: Tensor, k: Tensor, attn_mask=None, is_causal: bool = False) -> Tensor:
    """(images, heads, length, length): what `module.attn_drop` makes of the softmax. q, k: as in `weigh`"""
    scores = _masked((q * module.scale) @ k.transpose(-2, -1), attn_mask, is_causal)
    maps = module.attn_drop(scores.softmax(dim=-1))
    if module.is_recorded():
        _recording.maps[module].extend(maps)
    return maps


@torch.fx.wrap
def _masked(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """The scores with the mask that F.scaled_dot_product_attention would apply; one node of a torch.fx graph."""
    if is_causal:
        return scores + torch.full(scores.shape[-2:], -math.inf, dtype=scores.dtype, device=scores.device).triu(1)
    if attn_mask is None:
        return scores
    if attn_mask.dtype == torch.bool:
        return scores.masked_fill(~attn_mask, -math.inf)
    return scores + attn_mask


def image_by_image(core, packing: Packing, *tensors: Tensor) -> Tensor:
    """core of each image's rows, as a dense batch of one, packed again."""
    if packing.grids is None:
        raise ValueError("attention with fused_attn=False needs grids that the host knows")
    parts = [core(*(part[None] for part in parts))[0] for parts in zip(*map(packing.split, tensors))]
    used = torch.cat(parts) if parts else tensors[0][:0]
    return F.pad(used, (0, 0) * (used.ndim - 1) + (0, packing.capacity - len(used)))


def turned(q: Tensor, k: Tensor, rope: Rotary | None) -> tuple[Tensor, Tensor]:
    """q and k (capacity, heads, head_dim), turned by torch's ops where there are angles, in their own dtypes."""
    return (q, k) if rope is None else tuple(rotate(t, *rope).to(t.dtype) for t in (q, k))


class _Recording(threading.local):
    """The maps of each attention, while `recording` keeps those that this thread computes."""

    maps: dict[nn.Module, list[Tensor]] | None = None


_recording = _Recording()


@contextmanager
def recording(attentions: Iterable["Maps"]) -> Iterator[dict["Maps", list[Tensor]]]:
    """For each attention a list, to which this thread adds a map (heads, length, length) for each image."""
    before, _recording.maps = _recording.maps, {attention: [] for attention in attentions}
    try:
        yield _recording.maps
    finally:
        _recording.maps = before


class Maps(nn.Module):
    """What computes attention, in one kernel; or as timm's `fused_attn = False`, with maps that `attn_drop` sees."""

    __prepare_scriptable__ = refuse_script
    fused_attn = True

    def kernel_scale(self) -> float:
        """What the scores are multiplied with in one kernel: as in timm, `scale` counts where `fused_attn` is False."""
        return self.head_dim**-0.5 if self.fused_attn else self.scale

    def is_recorded(self) -> bool:
        """Whether `recording` keeps the maps that this thread computes; never those of a compiled module."""
        return not torch.compiler.is_compiling() and _recording.maps is not None and self in _recording.maps

    def fuses(self) -> bool:
        """Whether no maps are wanted: neither timm's `fused_attn = False` nor `recording` asks for them."""
        return self.fused_attn and not self.is_recorded()

    def _gives_maps(self) -> bool:
        """Whether somebody wants to see the maps, or drops some of them."""
        if self.is_recorded():
            return True
        if self.fused_attn:
            return False
        return self.training or not is_plain(self.attn_drop, "Dropout", "Identity")

    def _in_steps(self, x: Tensor, *within: nn.Module) -> bool:
        """Whether to compute as timm does: `within`, or what sees the maps, is watched or foreign, and x is dense."""
        if traced(x):
            return True
        return len(x.shape) == 3 and (self._gives_maps() or not all(is_plain(m, "Identity", *PLAIN) for m in within))

    def _weigh(self, *qkv: Tensor, **mask) -> Tensor:
        """`weigh` with the tokens before the heads: (images, length, heads, head_dim) each."""
        return weigh(self, *(t.transpose(1, 2) for t in qkv), **mask).transpose(1, 2)


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
    The packed kernels have no mask (as F.scaled_dot_product_attention takes it), causality or dropout: torch's runs
    those, a mask and causality for a dense batch only. ValueError otherwise.
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast a norm of queries and keys leaves them wider
    if attn_mask is None and not is_causal and not dropout:
        return ops.attention(q, k, v, packing.cu_seqlens, packing.max_seqlen, scale=scale, rotary=rope)
    q, k = turned(q, k, rope)

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


class Attention(Maps):
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
        if self._in_steps(x, self.q_norm, self.k_norm):
            return self._steps(x, attn_mask, is_causal, packing, rope)
        packing = fitting(packing, x)
        gate = None if self.gate is None else linear(self.gate, x).sigmoid()
        q, k, v = self.project(x)
        q, k = apply_norm(self.q_norm, q, packing), apply_norm(self.k_norm, k, packing)
        mask = {"attn_mask": attn_mask, "is_causal": is_causal}
        if self._gives_maps():
            y = image_by_image(self._weigh, packing, *turned(q, k, rope), v)
        else:
            dropout = self.attn_drop.p if self.training else 0.0
            y = attend(q, k, v, packing, self.kernel_scale(), dropout=dropout, rope=rope, **mask)
        y = apply_norm(self.norm, y.reshape(*x.shape[:-1], self.num_heads * self.head_dim), packing)
        y = y if gate is None else y * gate
        return self.proj_drop(linear(self.proj, y))

    def _steps(self, x: Tensor, attn_mask, is_causal, packing: Packing | None, rope: Rotary | None = None) -> Tensor:
        """timm's steps with timm's shapes. x: (images, length, dim)"""
        images, length, _ = x.shape
        gate = None if self.gate is None else self.gate(x).sigmoid()
        shape = images, length, self.num_heads, self.head_dim
        q, k, v = self.project(x)  # torch.fx can unpack this, not iterate over it
        q, k, v = q.reshape(shape).transpose(1, 2), k.reshape(shape).transpose(1, 2), v.reshape(shape).transpose(1, 2)
        q, k = apply_norm(self.q_norm, q, packing), apply_norm(self.k_norm, k, packing)
        if rope is not None:
            q, k = turned(*(t.transpose(1, 2).reshape(-1, *shape[2:]) for t in (q, k)), rope)
            q, k = (t.to(v.dtype).reshape(shape).transpose(1, 2) for t in (q, k))
        y = (
            weigh(self, q, k, v, attn_mask, is_causal)
            .transpose(1, 2)
            .reshape(images, length, self.num_heads * self.head_dim)
        )
        y = apply_norm(self.norm, y, packing)
        y = y if gate is None else y * gate
        return self.proj_drop(self.proj(y))


class _Lambda(Maps):
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
        wide = (t.unsqueeze(3).expand(shape).flatten(1, 3) for t in (q, k))
        y = attend(*wide, v.flatten(1, 3), packing, self.kernel_scale(), **options)
        first, second = y.view(shape[0], 2, self.num_heads, 2 * self.head_dim).unbind(1)
        y = self.sub_norm(first - self._compute_lambda().type_as(q) * second) * (1 - self.lambda_init)
        return y.flatten(1)

    def _differ_in_steps(self, q: Tensor, k: Tensor, v: Tensor, attn_mask=None, is_causal: bool = False) -> Tensor:
        """`_differ` with timm's steps and shapes. q, k, v: (images, length, dim)"""
        images, length, dim = q.shape
        q, k = (t.reshape(images, length, 2 * self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k))
        v = v.reshape(images, length, self.num_heads, 2 * self.head_dim).transpose(1, 2)
        q, k = self.q_norm(q), self.k_norm(k)
        weight = self._compute_lambda().type_as(q)
        if self.fuses():
            first_q, second_q = q.reshape(images, self.num_heads, 2, length, self.head_dim).unbind(2)
            first_k, second_k = k.reshape(images, self.num_heads, 2, length, self.head_dim).unbind(2)
            first = weigh(self, first_q, first_k, v, attn_mask, is_causal)
            y = first - weight * weigh(self, second_q, second_k, v, attn_mask, is_causal)
        else:
            maps = attention_map(self, q, k, attn_mask, is_causal).view(images, self.num_heads, 2, length, length)
            y = (maps[:, :, 0] - weight * maps[:, :, 1]) @ v
        y = self.sub_norm(y) * (1 - self.lambda_init)
        return y.transpose(1, 2).reshape(images, length, dim)

    def _differ_wholly(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing, mask: dict) -> Tensor:
        """Through whichever of both suits. q, k, v: (..., dim), as the packing has it. Returns their shape."""
        dropout = self.attn_drop_p if self.training else 0.0
        if (dropout and q.ndim == 3) or self._in_steps(q, self.q_norm, self.k_norm, self.sub_norm):
            return self._differ_in_steps(q, k, v, **mask)
        if self._gives_maps():
            return image_by_image(self._differ_in_steps, packing, q, k, v)
        flat = (t.reshape(-1, t.shape[-1]) for t in (q, k, v))
        return self._differ(*flat, packing, dropout=dropout, **mask).view(q.shape)


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
        packing = fitting(packing, x)
        mask = {"attn_mask": attn_mask, "is_causal": is_causal}
        q, k, v = linear(self.qkv, x).chunk(3, dim=-1)
        y = self._differ_wholly(q, k, v, packing, mask)
        return self.proj_drop(linear(self.proj, apply_norm(self.norm, y, packing)))
