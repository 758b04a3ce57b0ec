"""Attention within each image in Triton: one program per head, image and tile of its rows; no atomics.

A head_dim that is no power of two is split into two powers of two (72 and 80 into 64 + 16) rather than padded to one.
"""

import os

import torch
import triton
import triton.language as tl

from revit_kernels import measured
from revit_kernels.ops.attention import tail
from revit_kernels.ops.attention.tiles import aligned, pieces

TAIL_PROGRAMS = 8  # programs that write zeros into the rows of no image
# What differs from batch to batch.
COUNTS = ("tokens", "tokens_k", "images", "positions", "cu_seqlens_ptr", "cu_seqlens_k_ptr", "row_ptr")


def refusal(step, args):
    x = args.q
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a CUDA tensor"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {x.dtype}"
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        return "Triton's interpreter multiplies the bits of bfloat16 as integers"
    if x.shape[2] > 256:
        return f"head_dim must be at most 256, got {x.shape[2]}"
    if args.cos is not None and args.cos.dtype != torch.float32:
        return f"a rotary table must be of float32, got {args.cos.dtype}"
    return None


@triton.jit
def _split(
    row_ptr, rows, inside, stride, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ALIGNED: tl.constexpr
):
    """Rows of a (tokens, dim) view in two pieces, zeros outside."""
    cols = tl.arange(0, MAIN)
    starts = row_ptr + rows.to(tl.int64)[:, None] * stride
    if ALIGNED:
        starts = tl.multiple_of(starts, [16, 16])
    main = tl.load(starts + cols[None, :], mask=inside[:, None] & (cols < DIM)[None, :], other=0.0)
    rest = main
    if REST > 0:
        more = MAIN + tl.arange(0, REST)
        rest = tl.load(starts + more[None, :], mask=inside[:, None] & (more < DIM)[None, :], other=0.0)
    return main, rest


@triton.jit
def _rotate(
    x, rows, inside, row_ptr, cos_ptr, sin_ptr, positions, head, angle_row, angle_head,
    COLS: tl.constexpr, PAIRS: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Rows x [rows, COLS], each turned by the angles of its token, or back by them; in fp32."""
    row = tl.load(row_ptr + rows, mask=inside, other=-1)
    stays = (row < 0) | (row >= positions)
    at = tl.where(stays, 0, row).to(tl.int64) * angle_row + head * angle_head
    cols = tl.arange(0, COLS)
    if HALF:
        second = cols >= PAIRS
        pair, partner = tl.where(second, cols - PAIRS, cols), tl.where(second, cols - PAIRS, cols + PAIRS)
    else:
        second = cols % 2 == 1
        pair, partner = cols // 2, tl.where(second, cols - 1, cols + 1)
    turns = cols < 2 * PAIRS
    partner = tl.broadcast_to(tl.where(turns, partner, cols)[None, :], [x.shape[0], COLS])
    mask = turns[None, :] & (stays == 0)[:, None]
    cos = tl.load(cos_ptr + at[:, None] + pair[None, :], mask=mask, other=1.0)
    sin = tl.load(sin_ptr + at[:, None] + pair[None, :], mask=mask, other=0.0)
    sin = tl.where((second != BACK)[None, :], -sin, sin)  # the first of a pair takes the second's away
    x = x.to(tl.float32)
    return x * cos - tl.gather(x, partner, 1) * sin


@triton.jit
def _split_turned(
    x_ptr, rows, inside, stride, row_ptr, cos_ptr, sin_ptr, positions, head, angle_row, angle_head,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ALIGNED: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """`_split`, with the rows turned by their angles and rounded, where there are any."""
    main, rest = _split(x_ptr, rows, inside, stride, DIM, MAIN, REST, ALIGNED)
    if PAIRS > 0:
        y = _rotate(
            main, rows, inside, row_ptr, cos_ptr, sin_ptr, positions, head, angle_row, angle_head,
            MAIN, PAIRS, HALF, False,
        )  # fmt: skip
        main = y.to(main.dtype)
    return main, rest


@triton.jit
def _store(
    row_ptr,
    rows,
    inside,
    stride,
    main,
    rest,
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    cols = tl.arange(0, MAIN)
    starts = row_ptr + rows.to(tl.int64)[:, None] * stride
    if ALIGNED:
        starts = tl.multiple_of(starts, [16, 16])
    kind = row_ptr.dtype.element_ty
    tl.store(starts + cols[None, :], main.to(kind), mask=inside[:, None] & (cols < DIM)[None, :])
    if REST > 0:
        more = MAIN + tl.arange(0, REST)
        tl.store(starts + more[None, :], rest.to(kind), mask=inside[:, None] & (more < DIM)[None, :])


@triton.jit
def _scores(a, a_rest, b, b_rest, REST: tl.constexpr):
    """a b^T over both pieces, in fp32."""
    s = tl.dot(a, tl.trans(b), input_precision="ieee")
    if REST > 0:
        s = tl.dot(a_rest, tl.trans(b_rest), s, input_precision="ieee")
    return s


@triton.jit
def _bounds(cu_seqlens_ptr, image, tokens):
    """First and last + 1 of the image's rows: within the buffer, whatever cu_seqlens says."""
    begin = tl.maximum(tl.load(cu_seqlens_ptr + image), 0)
    return begin, tl.minimum(tl.load(cu_seqlens_ptr + image + 1), tokens)


@triton.jit
def _zero_tail(y_ptr, tokens, first, program, width, PROGRAMS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros in the rows from `first` on of a contiguous (tokens, width) buffer."""
    start = tl.maximum(first, 0).to(tl.int64) * width + program * BLOCK
    end = tokens.to(tl.int64) * width
    cols = tl.arange(0, BLOCK)
    for at in range(start, end, PROGRAMS * BLOCK):
        tl.store(y_ptr + at + cols, tl.zeros([BLOCK], y_ptr.dtype.element_ty), mask=at + cols < end)


@triton.jit(do_not_specialize=COUNTS)
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr,
    tokens, tokens_k, images, heads, scale,
    q_token, q_head, k_token, k_head, v_token, v_head,
    row_ptr, cos_ptr, sin_ptr, positions, angle_row, angle_head,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ALIGNED: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    image = pair // heads
    head = pair % heads
    if image == images:  # no image: the rows behind the last one
        if head == 0:
            first = tl.load(cu_seqlens_ptr + images)
            _zero_tail(y_ptr, tokens, first, tl.program_id(1), heads * DIM, TAIL, 1024)
            _zero_tail(lse_ptr, tokens, first, tl.program_id(1), heads, TAIL, 1024)
        return
    begin, end = _bounds(cu_seqlens_ptr, image, tokens)
    first = begin + tl.program_id(1) * BLOCK_QUERIES
    if first >= end:
        return
    begin_k, end_k = _bounds(cu_seqlens_k_ptr, image, tokens_k)
    rows = first + tl.arange(0, BLOCK_QUERIES)
    inside = rows < end
    q, q_rest = _split_turned(  # [BLOCK_QUERIES, MAIN]
        q_ptr + head * q_head, rows, inside, q_token,
        row_ptr, cos_ptr, sin_ptr, positions, head, angle_row, angle_head, DIM, MAIN, REST, ALIGNED, PAIRS, HALF,
    )  # fmt: skip

    factor = scale * 1.4426950408889634
    top = tl.full([BLOCK_QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_QUERIES], tl.float32)
    sums = tl.zeros([BLOCK_QUERIES, MAIN], tl.float32)
    sums_rest = tl.zeros([BLOCK_QUERIES, REST if REST > 0 else 16], tl.float32)
    for start in range(begin_k, end_k, BLOCK_KEYS):
        keys = start + tl.arange(0, BLOCK_KEYS)
        k, k_rest = _split_turned(
            k_ptr + head * k_head, keys, keys < end_k, k_token,
            row_ptr, cos_ptr, sin_ptr, positions, head, angle_row, angle_head, DIM, MAIN, REST, ALIGNED, PAIRS, HALF,
        )  # fmt: skip
        s = _scores(q, q_rest, k, k_rest, REST) * factor  # [BLOCK_QUERIES, BLOCK_KEYS]
        s = tl.where((keys < end_k)[None, :], s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        p = tl.exp2(s - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        top = higher
        v, v_rest = _split(v_ptr + head * v_head, keys, keys < end_k, v_token, DIM, MAIN, REST, ALIGNED)
        weights = p.to(v.dtype)
        sums = tl.dot(weights, v, sums * shrink[:, None], input_precision="ieee")
        if REST > 0:
            sums_rest = tl.dot(weights, v_rest, sums_rest * shrink[:, None], input_precision="ieee")
    inverse = tl.where(total > 0, 1 / total, tl.where(total == 0, 0.0, total))[:, None]  # no keys: zeros; NaN stays
    y_row = heads * DIM
    _store(y_ptr + head * DIM, rows, inside, y_row, sums * inverse, sums_rest * inverse, DIM, MAIN, REST, ALIGNED)
    lse = (top + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + rows.to(tl.int64) * heads + head, lse, mask=inside)


@triton.jit(do_not_specialize=COUNTS)
def _backward_q_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, y_ptr, lse_ptr, delta_ptr, dq_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr,
    tokens, tokens_k, images, heads, scale,
    grad_token, grad_head, q_token, q_head, k_token, k_head, v_token, v_head,
    row_ptr, cos_ptr, sin_ptr, positions, angle_row, angle_head,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ALIGNED: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dq, and delta = sum(y * grad) of each query for the other kernel."""
    pair = tl.program_id(0)
    image = pair // heads
    head = pair % heads
    if image == images:
        if head == 0:
            first = tl.load(cu_seqlens_ptr + images)
            _zero_tail(dq_ptr, tokens, first, tl.program_id(1), heads * DIM, TAIL, 1024)
        return
    begin, end = _bounds(cu_seqlens_ptr, image, tokens)
    first = begin + tl.program_id(1) * BLOCK_QUERIES
    if first >= end:
        return
    begin_k, end_k = _bounds(cu_seqlens_k_ptr, image, tokens_k)
    rows = first + tl.arange(0, BLOCK_QUERIES)
    inside = rows < end
    y_row = heads * DIM
    q, q_rest = _split_turned(
        q_ptr + head * q_head, rows, inside, q_token,
        row_ptr, cos_ptr, sin_ptr, positions, head, angle_row, angle_head, DIM, MAIN, REST, ALIGNED, PAIRS, HALF,
    )  # fmt: skip
    g, g_rest = _split(grad_ptr + head * grad_head, rows, inside, grad_token, DIM, MAIN, REST, ALIGNED)
    y, y_rest = _split(y_ptr + head * DIM, rows, inside, y_row, DIM, MAIN, REST, ALIGNED)
    delta = tl.sum(y.to(tl.float32) * g.to(tl.float32), 1)
    if REST > 0:
        delta += tl.sum(y_rest.to(tl.float32) * g_rest.to(tl.float32), 1)
    at = rows.to(tl.int64) * heads + head
    tl.store(delta_ptr + at, delta, mask=inside)
    lse = tl.load(lse_ptr + at, mask=inside, other=float("inf")) * 1.4426950408889634

    factor = scale * 1.4426950408889634
    dq = tl.zeros([BLOCK_QUERIES, MAIN], tl.float32)
    dq_rest = tl.zeros([BLOCK_QUERIES, REST if REST > 0 else 16], tl.float32)
    for start in range(begin_k, end_k, BLOCK_KEYS):
        keys = start + tl.arange(0, BLOCK_KEYS)
        k, k_rest = _split_turned(
            k_ptr + head * k_head, keys, keys < end_k, k_token,
            row_ptr, cos_ptr, sin_ptr, positions, head, angle_row, angle_head, DIM, MAIN, REST, ALIGNED, PAIRS, HALF,
        )  # fmt: skip
        v, v_rest = _split(v_ptr + head * v_head, keys, keys < end_k, v_token, DIM, MAIN, REST, ALIGNED)
        p = tl.exp2(_scores(q, q_rest, k, k_rest, REST) * factor - lse[:, None])
        p = tl.where((keys < end_k)[None, :], p, 0.0)  # [BLOCK_QUERIES, BLOCK_KEYS]
        slopes = (p * (_scores(g, g_rest, v, v_rest, REST) - delta[:, None])).to(k.dtype)
        dq = tl.dot(slopes, k, dq, input_precision="ieee")
        if REST > 0:
            dq_rest = tl.dot(slopes, k_rest, dq_rest, input_precision="ieee")
    if PAIRS > 0:
        dq = _rotate(
            dq, rows, inside, row_ptr, cos_ptr, sin_ptr, positions, head, angle_row, angle_head,
            MAIN, PAIRS, HALF, True,
        )  # fmt: skip
    _store(dq_ptr + head * DIM, rows, inside, y_row, dq * scale, dq_rest * scale, DIM, MAIN, REST, ALIGNED)


@triton.jit(do_not_specialize=COUNTS)
def _backward_kv_kernel(
    grad_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_seqlens_ptr, cu_seqlens_k_ptr,
    tokens, tokens_k, images, heads, scale,
    grad_token, grad_head, q_token, q_head, k_token, k_head, v_token, v_head,
    row_ptr, cos_ptr, sin_ptr, positions, angle_row, angle_head,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, ALIGNED: tl.constexpr,
    PAIRS: tl.constexpr, HALF: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr, BLOCK_KEYS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys."""
    pair = tl.program_id(0)
    image = pair // heads
    head = pair % heads
    if image == images:
        if head == 0:
            first = tl.load(cu_seqlens_k_ptr + images)
            _zero_tail(dk_ptr, tokens_k, first, tl.program_id(1), heads * DIM, TAIL, 1024)
            _zero_tail(dv_ptr, tokens_k, first, tl.program_id(1), heads * DIM, TAIL, 1024)
        return
    begin_k, end_k = _bounds(cu_seqlens_k_ptr, image, tokens_k)
    first = begin_k + tl.program_id(1) * BLOCK_KEYS
    if first >= end_k:
        return
    begin, end = _bounds(cu_seqlens_ptr, image, tokens)
    keys = first + tl.arange(0, BLOCK_KEYS)
    inside = keys < end_k
    k, k_rest = _split_turned(
        k_ptr + head * k_head, keys, inside, k_token,
        row_ptr, cos_ptr, sin_ptr, positions, head, angle_row, angle_head, DIM, MAIN, REST, ALIGNED, PAIRS, HALF,
    )  # fmt: skip
    v, v_rest = _split(v_ptr + head * v_head, keys, inside, v_token, DIM, MAIN, REST, ALIGNED)

    factor = scale * 1.4426950408889634
    dk = tl.zeros([BLOCK_KEYS, MAIN], tl.float32)
    dv = tl.zeros([BLOCK_KEYS, MAIN], tl.float32)
    dk_rest = tl.zeros([BLOCK_KEYS, REST if REST > 0 else 16], tl.float32)
    dv_rest = tl.zeros([BLOCK_KEYS, REST if REST > 0 else 16], tl.float32)
    for start in range(begin, end, BLOCK_QUERIES):
        rows = start + tl.arange(0, BLOCK_QUERIES)
        q, q_rest = _split_turned(
            q_ptr + head * q_head, rows, rows < end, q_token,
            row_ptr, cos_ptr, sin_ptr, positions, head, angle_row, angle_head, DIM, MAIN, REST, ALIGNED, PAIRS, HALF,
        )  # fmt: skip
        g, g_rest = _split(grad_ptr + head * grad_head, rows, rows < end, grad_token, DIM, MAIN, REST, ALIGNED)
        at = rows.to(tl.int64) * heads + head
        lse = tl.load(lse_ptr + at, mask=rows < end, other=float("inf")) * 1.4426950408889634
        delta = tl.load(delta_ptr + at, mask=rows < end, other=0.0)
        p = tl.exp2(_scores(k, k_rest, q, q_rest, REST) * factor - lse[None, :])  # [BLOCK_KEYS, BLOCK_QUERIES]
        weights = p.to(g.dtype)
        dv = tl.dot(weights, g, dv, input_precision="ieee")
        slopes = (p * (_scores(v, v_rest, g, g_rest, REST) - delta[None, :])).to(q.dtype)
        dk = tl.dot(slopes, q, dk, input_precision="ieee")
        if REST > 0:
            dv_rest = tl.dot(weights, g_rest, dv_rest, input_precision="ieee")
            dk_rest = tl.dot(slopes, q_rest, dk_rest, input_precision="ieee")
    y_row = heads * DIM
    if PAIRS > 0:
        dk = _rotate(
            dk, keys, inside, row_ptr, cos_ptr, sin_ptr, positions, head, angle_row, angle_head,
            MAIN, PAIRS, HALF, True,
        )  # fmt: skip
    _store(dk_ptr + head * DIM, keys, inside, y_row, dk * scale, dk_rest * scale, DIM, MAIN, REST, ALIGNED)
    _store(dv_ptr + head * DIM, keys, inside, y_row, dv, dv_rest, DIM, MAIN, REST, ALIGNED)


def _align(*tensors):
    """The tensors, copied where their strides keep rows from starting on 16 bytes though head_dim would allow it."""
    return tail.aligned(*tensors) if aligned(tensors[0].shape[2], 8 * tensors[0].element_size()) else tensors


def _angles(cos, sin, row):
    """What a kernel is told of the rotary table; Triton leaves out what is None."""
    if cos is None:
        return (None,) * 6
    return row, cos, sin, cos.shape[0], cos.stride(0), cos.stride(1) if cos.ndim == 3 else 0


def _launch(step, x, cos, half):
    dim, bits = x.shape[2], 8 * x.element_size()
    main, rest = pieces(dim, cos is not None)
    launch = {"DIM": dim, "MAIN": main, "REST": rest, "ALIGNED": aligned(dim, bits), "TAIL": TAIL_PROGRAMS}
    launch |= {"PAIRS": 0 if cos is None else cos.shape[-1], "HALF": half}
    step = step if cos is None else f"{step}_turned"
    return launch | measured.tiles("attention", step, x.device, bits=bits, head_dim=dim)


def _grid(cu_seqlens, x, max_seqlen, block):
    """A program for each tile that the longest image can have, of every image, and of the tail."""
    tokens, heads = x.shape[:2]
    return cu_seqlens.shape[0] * heads, max(triton.cdiv(min(max_seqlen, tokens), block), TAIL_PROGRAMS)


def forward(
    q, k, v, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k, scale, cos=None, sin=None, row=None, half=False
):
    tokens, heads = q.shape[:2]
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
    q, k, v = _align(q, k, v)
    launch = _launch("forward", q, cos, half)
    if y.numel():
        _forward_kernel[_grid(cu_seqlens, q, max_seqlen, launch["BLOCK_QUERIES"])](
            q, k, v, y, lse, cu_seqlens, cu_seqlens_k, tokens, k.shape[0], cu_seqlens.shape[0] - 1, heads, scale,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *_angles(cos, sin, row), **launch,
        )  # fmt: skip
    return y, lse


def backward(
    grad,
    q,
    k,
    v,
    out,
    lse,
    cu_seqlens,
    max_seqlen,
    cu_seqlens_k,
    max_seqlen_k,
    scale,
    cos=None,
    sin=None,
    row=None,
    half=False,
):
    heads = q.shape[1]
    tokens, images = (q.shape[0], k.shape[0]), cu_seqlens.shape[0] - 1
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty_like(lse)
    grad, q, k, v = _align(grad, q, k, v)
    strides = (*grad.stride()[:2], *q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    if dq.numel():
        launch = _launch("backward_q", q, cos, half)
        _backward_q_kernel[_grid(cu_seqlens, q, max_seqlen, launch["BLOCK_QUERIES"])](
            grad, q, k, v, out, lse, delta, dq, cu_seqlens, cu_seqlens_k, *tokens, images, heads, scale,
            *strides, *_angles(cos, sin, row), **launch,
        )  # fmt: skip
    if dk.numel():
        launch = _launch("backward_kv", q, cos, half)
        _backward_kv_kernel[_grid(cu_seqlens, k, max_seqlen_k, launch["BLOCK_KEYS"])](
            grad, q, k, v, lse, delta, dk, dv, cu_seqlens, cu_seqlens_k, *tokens, images, heads, scale,
            *strides, *_angles(cos, sin, row), **launch,
        )  # fmt: skip
    return dq, dk, dv


def specification(step, tiles, bits=16, head_dim=64, dtype=None, ones=(), pairs=0, half=False, **_):
    """A kernel as it is launched, for the compiler alone: see tests/machine_code.py."""
    kernels = {"forward": _forward_kernel, "backward_q": _backward_q_kernel, "backward_kv": _backward_kv_kernel}
    kernel = kernels[step.removesuffix("_turned")]
    dtype, (main, rest) = dtype or ("fp32" if bits == 32 else "bf16"), pieces(head_dim, pairs > 0)
    constexprs = {"DIM": head_dim, "MAIN": main, "REST": rest, "ALIGNED": aligned(head_dim, bits)} | tiles
    options = {key: constexprs.pop(key) for key in ("num_warps", "num_stages")}
    constexprs |= {"TAIL": TAIL_PROGRAMS, "PAIRS": pairs, "HALF": half} | dict.fromkeys(ones, 1)
    if not pairs:
        constexprs |= dict.fromkeys(("row_ptr", "cos_ptr", "sin_ptr", "positions", "angle_row", "angle_head"))
    types = dict.fromkeys(("cu_seqlens_ptr", "cu_seqlens_k_ptr", "row_ptr"), "*i32")
    types |= dict.fromkeys(("lse_ptr", "delta_ptr", "cos_ptr", "sin_ptr"), "*fp32")
    signature = {}
    for name in kernel.arg_names:
        if name not in constexprs:
            number = f"*{dtype}" if name.endswith("_ptr") else "fp32" if name == "scale" else "i32"
            signature[name] = types.get(name, number)
    # Rows of the fused projection are multiples of 16 apart, heads where head_dim is one.
    multiples = ("grad_token", "q_token", "k_token", "v_token")
    multiples += ("grad_head", "q_head", "k_head", "v_head") if head_dim % 16 == 0 else ()
    spec = {"kernel": kernel, "signature": signature, "constexprs": constexprs, **options}
    return spec | ({"multiples": multiples} if aligned(head_dim, bits) else {"aligned": False})
