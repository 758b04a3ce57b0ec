"""Pooling in Triton: one program per image and block of columns."""

import os

import torch
import triton
import triton.language as tl

from revit_kernels import measured

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def refusal(step, args):
    for tensor in args:
        if not isinstance(tensor, torch.Tensor):
            continue
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            return "needs a CUDA tensor"
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"no kernel for {tensor.dtype}"
    return None


@triton.jit
def _pooled_rows(cu_seqlens_ptr, image, tokens, prefix, FIRST_ONLY: tl.constexpr):
    """First and last + 1 of the rows that the image pools."""
    end = tl.minimum(tl.load(cu_seqlens_ptr + image + 1), tokens).to(tl.int64)
    begin = tl.minimum(tl.load(cu_seqlens_ptr + image).to(tl.int64), end)
    if FIRST_ONLY:
        end = tl.minimum(end, begin + 1)
    else:
        begin = tl.minimum(end, begin + prefix)
    return begin, end


@triton.jit
def _largest(x_ptr, stride, begin, end, cols, inside, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """The largest of each column, NaN if there is one: [BLOCK_DIM]."""
    most = tl.full([BLOCK_TOKENS, BLOCK_DIM], float("-inf"), tl.float32)
    spoiled = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.int32)
    start = begin
    while start < end:
        row = start + tl.arange(0, BLOCK_TOKENS)
        mask = (row < end)[:, None] & inside[None, :]
        x = tl.load(x_ptr + row[:, None] * stride + cols[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        spoiled = tl.where(x != x, 1, spoiled)
        most = tl.where(x > most, x, most)
        start += BLOCK_TOKENS
    return tl.where(tl.max(spoiled, 0) > 0, float("nan"), tl.max(most, 0))


@triton.jit(do_not_specialize=("cu_seqlens_ptr", "tokens"))
def _forward_kernel(
    x_ptr, cu_seqlens_ptr, y_ptr, tokens, dim, stride, prefix,
    FIRST_ONLY: tl.constexpr, AVERAGE: tl.constexpr, MAXIMUM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = cols < dim
    begin, end = _pooled_rows(cu_seqlens_ptr, image, tokens, prefix, FIRST_ONLY)
    y = tl.zeros([BLOCK_DIM], tl.float32)
    if AVERAGE:
        total = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
        start = begin
        while start < end:
            row = start + tl.arange(0, BLOCK_TOKENS)
            mask = (row < end)[:, None] & inside[None, :]
            total += tl.load(x_ptr + row[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
            start += BLOCK_TOKENS
        y = tl.sum(total, 0) / tl.maximum(end - begin, 1).to(tl.float32)
    if MAXIMUM:
        most = _largest(x_ptr, stride, begin, end, cols, inside, BLOCK_TOKENS, BLOCK_DIM)
        y = 0.5 * (most + y) if AVERAGE else most
    y = tl.where(begin < end, y, 0.0)
    tl.store(y_ptr + image * dim + cols, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("cu_seqlens_ptr", "images", "tokens"))
def _backward_kernel(
    grad_ptr, x_ptr, cu_seqlens_ptr, dx_ptr, images, tokens, dim, stride, prefix,
    FIRST_ONLY: tl.constexpr, AVERAGE: tl.constexpr, MAXIMUM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Writes every row of the image; one program more, the tail."""
    image = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = cols < dim
    start = tl.load(cu_seqlens_ptr + image).to(tl.int64)
    last = tokens.to(tl.int64)
    begin = last
    end = last
    even = tl.zeros([BLOCK_DIM], tl.float32)
    share = tl.zeros([BLOCK_DIM], tl.float32)
    most = tl.zeros([BLOCK_DIM], tl.float32)
    if image < images:
        begin, end = _pooled_rows(cu_seqlens_ptr, image, tokens, prefix, FIRST_ONLY)
        last = tl.minimum(tl.load(cu_seqlens_ptr + image + 1), tokens).to(tl.int64)
        grad = tl.load(grad_ptr + image * dim + cols, mask=inside, other=0.0).to(tl.float32)
        if AVERAGE:
            if MAXIMUM:
                grad *= 0.5
            even = grad / tl.maximum(end - begin, 1).to(tl.float32)
        if MAXIMUM:
            most = _largest(x_ptr, stride, begin, end, cols, inside, BLOCK_TOKENS, BLOCK_DIM)
            ties = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
            row_start = begin
            while row_start < end:
                row = row_start + tl.arange(0, BLOCK_TOKENS)
                mask = (row < end)[:, None] & inside[None, :]
                x = tl.load(x_ptr + row[:, None] * stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
                ties += tl.where(mask & (x == most[None, :]), 1.0, 0.0)
                row_start += BLOCK_TOKENS
            share = grad / tl.maximum(tl.sum(ties, 0), 1.0)
    while start < last:
        row = start + tl.arange(0, BLOCK_TOKENS)
        pooled = ((row >= begin) & (row < end))[:, None] & inside[None, :]
        dx = tl.where(pooled, even[None, :], 0.0)
        if MAXIMUM:
            x = tl.load(x_ptr + row[:, None] * stride + cols[None, :], mask=pooled, other=0.0).to(tl.float32)
            dx += tl.where(pooled & (x == most[None, :]), share[None, :], 0.0)
        mask = (row < last)[:, None] & inside[None, :]
        tl.store(dx_ptr + row[:, None] * dim + cols[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)
        start += BLOCK_TOKENS


def _constants(kind):
    # The mean of one token is that token.
    return {"FIRST_ONLY": kind == "token", "AVERAGE": kind != "max", "MAXIMUM": kind in ("max", "avgmax")}


def forward(x, cu_seqlens, kind, prefix, include_prefix):
    (tokens, dim), images = x.shape, cu_seqlens.shape[0] - 1
    y = x.new_empty(images, dim)
    if y.numel():
        tiles = measured.tiles("pool", "forward", x.device, bits=8 * x.element_size(), dim=dim)
        grid = (images, triton.cdiv(dim, tiles["BLOCK_DIM"]))
        prefix = 0 if include_prefix else min(prefix, tokens)  # a larger one would overflow beside a row
        _forward_kernel[grid](
            x, cu_seqlens.contiguous(), y, tokens, dim, x.stride(0), prefix, **_constants(kind), **tiles
        )
    return y


def backward(grad, x, cu_seqlens, tokens, kind, prefix, include_prefix):
    images, dim = grad.shape
    dx = grad.new_empty(tokens, dim)
    if dx.numel():
        tiles = measured.tiles("pool", "backward", grad.device, bits=8 * grad.element_size(), dim=dim)
        grid = (images + 1, triton.cdiv(dim, tiles["BLOCK_DIM"]))
        prefix = 0 if include_prefix else min(prefix, tokens)
        stride = dim if x is None else x.stride(0)
        _backward_kernel[grid](
            grad, x, cu_seqlens.contiguous(), dx, images, tokens, dim, stride, prefix, **_constants(kind), **tiles
        )
    return dx


def specification(kernel, tiles, bits=16, dim=768, dtype=None, kind="avgmax", ones=(), is_aligned=True):
    """A kernel as a model calls it, for the compiler alone: see tests/machine_code.py."""
    ints = ("images", "tokens", "dim", "stride", "prefix")
    dtype = dtype or ("fp32" if bits == 32 else "bf16")
    types = {f"{name}_ptr": f"*{dtype}" for name in ("x", "y", "grad", "dx")} | dict.fromkeys(ints, "i32")
    types["cu_seqlens_ptr"] = "*i32"
    function = {"forward": _forward_kernel, "backward": _backward_kernel}[kernel]
    without_x = kernel == "backward" and kind in ("token", "avg")
    constexprs = _constants(kind) | {name: tiles[name] for name in ("BLOCK_TOKENS", "BLOCK_DIM")}
    constexprs |= {"x_ptr": None} if without_x else {}
    constexprs |= {name: 1 for name in ones if name in function.arg_names}  # Triton makes a constant of a 1
    signature = {name: types[name] for name in function.arg_names if name not in constexprs}
    aligned = is_aligned and dim % 16 == 0
    options = {"num_warps": tiles["num_warps"], "aligned": aligned, "multiples": ("dim", "stride") if aligned else ()}
    return {"kernel": function, "signature": signature, "constexprs": constexprs} | options
