"""Attention across frames in Triton: a program has some rows and a head, and goes through the frames of their clips."""

import os

import torch
import triton
import triton.language as tl

from revit_kernels import measured

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LOG2E = tl.constexpr(1.44269504088896341)


def refusal(step, args):
    if not args.q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a CUDA tensor"
    if args.q.dtype not in DTYPES:
        return f"no kernel for {args.q.dtype}"
    return None if args.q.shape[2] <= 256 else f"head_dim must be at most 256, got {args.q.shape[2]}"


@triton.jit
def _sequences(cu_seqlens_ptr, frames_ptr, row, tokens, clips, prefix):
    """Of each row: the row of its position in frame 0, rows from frame to frame, frames; none for what takes no part.

    row: [BLOCK_TOKENS]
    """
    low = tl.zeros_like(row)
    high = low + clips
    step = clips
    while step > 0:  # the last clip that begins at or before the row
        middle = (low + high) // 2
        before = (middle > low) & (tl.load(cu_seqlens_ptr + middle) <= row)
        low = tl.where(before, middle, low)
        high = tl.where(before | (middle == low), high, middle)
        step = step // 2
    known = (clips > 0) & (row < tokens)
    begin = tl.load(cu_seqlens_ptr + low, mask=known, other=0)
    end = tl.load(cu_seqlens_ptr + low + 1, mask=known, other=0)
    frames = tl.maximum(tl.load(frames_ptr + low, mask=known, other=0), 0)
    stride = (end - begin) // tl.maximum(frames, 1)
    at = row - begin
    position = at % tl.maximum(stride, 1)
    inside = known & (at >= 0) & (row < end) & (at < stride * frames) & (position >= prefix)
    return begin + position, stride, tl.where(inside, frames, 0)


@triton.jit
def _rows(x_ptr, token, head, row, offset, inside, cols, dim):
    """Some rows of one head, as fp32: [BLOCK_TOKENS, BLOCK_DIM]."""
    at = row.to(tl.int64)[:, None] * token + offset * head + cols[None, :]
    return tl.load(x_ptr + at, mask=inside[:, None] & (cols < dim)[None, :], other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=("cu_seqlens_ptr", "frames_ptr", "tokens", "clips"))
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, cu_seqlens_ptr, frames_ptr, tokens, clips, heads, dim,
    q_token, q_head, k_token, k_head, v_token, v_head, prefix, scale,
    BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    cols = tl.arange(0, BLOCK_DIM)
    first, stride, frames = _sequences(cu_seqlens_ptr, frames_ptr, row, tokens, clips, prefix)
    q = _rows(q_ptr, q_token, q_head, row, head, frames > 0, cols, dim)
    top = tl.full([BLOCK_TOKENS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_TOKENS], tl.float32)
    sums = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
    most = tl.max(frames, 0)
    frame = 0
    while frame < most:
        inside = frame < frames
        k = _rows(k_ptr, k_token, k_head, first + frame * stride, head, inside, cols, dim)
        v = _rows(v_ptr, v_token, v_head, first + frame * stride, head, inside, cols, dim)
        score = tl.where(inside, tl.sum(q * k, 1) * scale, float("-inf"))
        largest = tl.maximum(top, score)
        shift = tl.where(largest == float("-inf"), 0.0, largest)
        shrink = tl.exp2((top - shift) * LOG2E)
        weight = tl.exp2((score - shift) * LOG2E)
        total = total * shrink + weight
        sums = sums * shrink[:, None] + weight[:, None] * v
        top = largest
        frame += 1
    used = frames > 0
    total = tl.where(used, total, 1.0)
    y = tl.where(used[:, None], sums / total[:, None], 0.0)
    lse = tl.where(used, top + tl.log2(total) / LOG2E, 0.0)
    to = row.to(tl.int64) * heads + head
    tl.store(lse_ptr + to, lse, mask=row < tokens)
    mask = (row < tokens)[:, None] & (cols < dim)[None, :]
    tl.store(y_ptr + to[:, None] * dim + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("cu_seqlens_ptr", "frames_ptr", "tokens", "clips"))
def _backward_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr, cu_seqlens_ptr, frames_ptr,
    tokens, clips, heads, dim,
    grad_token, grad_head, q_token, q_head, k_token, k_head, v_token, v_head, prefix, scale,
    BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """Each row as a query, whose keys are in the other frames, and as a key, whose queries are."""
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    cols = tl.arange(0, BLOCK_DIM)
    first, stride, frames = _sequences(cu_seqlens_ptr, frames_ptr, row, tokens, clips, prefix)
    used = frames > 0
    q = _rows(q_ptr, q_token, q_head, row, head, used, cols, dim)
    k = _rows(k_ptr, k_token, k_head, row, head, used, cols, dim)
    v = _rows(v_ptr, v_token, v_head, row, head, used, cols, dim)
    grad = _rows(grad_ptr, grad_token, grad_head, row, head, used, cols, dim)
    out = _rows(out_ptr, heads * dim, dim, row, head, used, cols, dim)
    delta = tl.sum(grad * out, 1)
    lse = tl.load(lse_ptr + row.to(tl.int64) * heads + head, mask=used, other=0.0)
    dq = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
    dk = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
    dv = tl.zeros([BLOCK_TOKENS, BLOCK_DIM], tl.float32)
    most = tl.max(frames, 0)
    frame = 0
    while frame < most:
        inside = frame < frames
        other = first + frame * stride
        other_k = _rows(k_ptr, k_token, k_head, other, head, inside, cols, dim)
        other_v = _rows(v_ptr, v_token, v_head, other, head, inside, cols, dim)
        weight = tl.where(inside, tl.exp2((tl.sum(q * other_k, 1) * scale - lse) * LOG2E), 0.0)
        dq += (weight * (tl.sum(grad * other_v, 1) - delta))[:, None] * other_k
        other_q = _rows(q_ptr, q_token, q_head, other, head, inside, cols, dim)
        other_grad = _rows(grad_ptr, grad_token, grad_head, other, head, inside, cols, dim)
        other_out = _rows(out_ptr, heads * dim, dim, other, head, inside, cols, dim)
        other_lse = tl.load(lse_ptr + other.to(tl.int64) * heads + head, mask=inside, other=0.0)
        weight = tl.where(inside, tl.exp2((tl.sum(other_q * k, 1) * scale - other_lse) * LOG2E), 0.0)
        slope = weight * (tl.sum(other_grad * v, 1) - tl.sum(other_grad * other_out, 1))
        dk += slope[:, None] * other_q
        dv += weight[:, None] * other_grad
        frame += 1
    to = (row.to(tl.int64) * heads + head)[:, None] * dim + cols[None, :]
    mask = (row < tokens)[:, None] & (cols < dim)[None, :]
    tl.store(dq_ptr + to, (dq * scale).to(dq_ptr.dtype.element_ty), mask=mask)
    tl.store(dk_ptr + to, (dk * scale).to(dk_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + to, dv.to(dv_ptr.dtype.element_ty), mask=mask)


def _strides(*tensors):
    return [stride for x in tensors for stride in x.stride()[:2]]


def _launch(kernel, function, q, *args):
    if q.numel():
        tiles = measured.tiles("temporal_attention", kernel, q.device, bits=8 * q.element_size(), head_dim=q.shape[2])
        function[(triton.cdiv(q.shape[0], tiles["BLOCK_TOKENS"]), q.shape[1])](*args, **tiles)


def forward(q, k, v, cu_seqlens, frames, max_frames, prefix, scale):
    y, lse = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
    sizes = (q.shape[0], frames.shape[0], *q.shape[1:])
    args = (q, k, v, y, lse, cu_seqlens, frames, *sizes, *_strides(q, k, v), prefix, scale)
    _launch("forward", _forward_kernel, q, *args)
    return y, lse


def backward(grad, q, k, v, out, lse, cu_seqlens, frames, max_frames, prefix, scale):
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    sizes = (q.shape[0], frames.shape[0], *q.shape[1:])
    tensors = (grad, q, k, v, out, lse, dq, dk, dv, cu_seqlens, frames)
    _launch("backward", _backward_kernel, q, *tensors, *sizes, *_strides(grad, q, k, v), prefix, scale)
    return dq, dk, dv


def specification(kernel, tiles, bits=16, head_dim=64, dtype=None, ones=(), is_aligned=True):
    """A kernel as a model calls it, for the compiler alone: see tests/machine_code.py."""
    function = {"forward": _forward_kernel, "backward": _backward_kernel}[kernel]
    dtype = dtype or ("fp32" if bits == 32 else "bf16")
    types = {name: f"*{dtype}" if name.endswith("_ptr") else "i32" for name in function.arg_names}
    types |= {"lse_ptr": "*fp32", "cu_seqlens_ptr": "*i32", "frames_ptr": "*i32", "scale": "fp32"}
    constexprs = {name: tiles[name] for name in ("BLOCK_TOKENS", "BLOCK_DIM")}
    constexprs |= {name: 1 for name in ones}  # Triton makes a constant of a 1
    signature = {name: types[name] for name in function.arg_names if name not in constexprs}
    aligned = is_aligned and head_dim % 16 == 0
    strides = [name for name in signature if name.endswith(("_token", "_head"))]
    options = {"num_warps": tiles["num_warps"], "aligned": aligned, "multiples": ("dim", *strides) if aligned else ()}
    return {"kernel": function, "signature": signature, "constexprs": constexprs} | options
