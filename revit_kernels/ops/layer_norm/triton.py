"""LayerNorm in Triton. A parameter's gradient is summed in two stages whose order the shapes alone decide."""

import os

import torch
import triton
import triton.language as tl

from revit_kernels import measured
from revit_kernels.ops.e4m3 import E4M3
from revit_kernels.ops.e4m3_triton import quantize_rows
from revit_kernels.ops.layer_norm.tiles import columns

TOKENS_PER_PROGRAM = 16  # at least, in the backward pass
MOST_PROGRAMS = 1024
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


@triton.jit(do_not_specialize=("tokens", "row_ptr"))
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, row_ptr, branch_ptr, gamma_ptr, y_ptr, sum_ptr, mean_ptr, rstd_ptr, scale_ptr,
    tokens, lengths, dim, eps, RMS: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    cols = tl.arange(0, BLOCK_DIM)
    exists = token < tokens
    if row_ptr is None:
        used = exists
        affine = token * 0
    else:
        row = tl.load(row_ptr + token, mask=exists, other=-1).to(tl.int64)
        used = row >= 0
        affine = tl.minimum(row, lengths - 1) * dim
    whole = exists[:, None] & (cols < dim)[None, :]
    inside = used[:, None] & (cols < dim)[None, :]
    at = token[:, None] * dim + cols[None, :]

    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK_TOKENS, BLOCK_DIM]
    if branch_ptr is not None:
        branch = tl.load(branch_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if gamma_ptr is not None:
            branch *= tl.load(gamma_ptr + cols, mask=cols < dim, other=0.0).to(tl.float32)[None, :]
        total = (x + branch).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, total, mask=whole)
        x = total.to(tl.float32)
    mean = tl.zeros([BLOCK_TOKENS], tl.float32)
    if not RMS:
        mean = tl.sum(x, 1) / dim
    centred = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / dim + eps)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        y *= tl.load(weight_ptr + affine[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + affine[:, None] + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if scale_ptr is not None:
        y, scale = quantize_rows(tl.where(inside, y, 0.0))
        tl.store(scale_ptr + token, scale, mask=exists)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=whole)
    if mean_ptr is not None:
        tl.store(mean_ptr + token, mean, mask=exists)
        tl.store(rstd_ptr + token, tl.where(used, rstd, 0.0), mask=exists)


@triton.jit
def _add_to(ptr, value, inside, seen):
    """Adds to what this program stored there before; there is nothing yet unless `seen`."""
    tl.store(ptr, value + tl.load(ptr, mask=inside & seen, other=0.0), mask=inside)


@triton.jit(do_not_specialize=("tokens", "tokens_per_program", "row_ptr"))
def _backward_kernel(
    dy_ptr, dsum_ptr, sum_ptr, weight_ptr, row_ptr, branch_ptr, gamma_ptr, mean_ptr, rstd_ptr, dx_ptr, dbranch_ptr,
    partial_ptr, touched_ptr, tokens, lengths, dim, tokens_per_program, slots,
    RMS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_LENGTHS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_DIM)
    inside = cols < dim
    length = tl.arange(0, BLOCK_LENGTHS)
    touched = tl.zeros([BLOCK_LENGTHS], tl.int32)  # the affines that have a partial sum in memory
    partial_ptr += program * slots * dim + cols
    dweight = tl.zeros([BLOCK_DIM], tl.float32)  # of the affine `current`, not yet added to memory
    dbias = tl.zeros([BLOCK_DIM], tl.float32)
    dgamma = tl.zeros([BLOCK_DIM], tl.float32)
    current = tl.full([], -1, tl.int32)
    token = program * tokens_per_program
    end = tl.minimum(token + tokens_per_program, tokens)
    while token < end:  # not `range`: the interpreter's needs a NumPy before 2.4
        row = tl.full([], 0, tl.int32)
        if row_ptr is not None:
            row = tl.minimum(tl.load(row_ptr + token), lengths - 1)
        used = row >= 0
        if used & (row != current):
            if current >= 0:
                seen = tl.sum(tl.where(length == current, touched, 0), 0) > 0
                tl.debug_barrier()
                if weight_ptr is not None:
                    _add_to(partial_ptr + current.to(tl.int64) * dim, dweight, inside, seen)
                if HAS_BIAS:
                    slot = current.to(tl.int64) + (lengths if weight_ptr is not None else 0)
                    _add_to(partial_ptr + slot * dim, dbias, inside, seen)
                touched = tl.where(length == current, 1, touched)
                dweight = tl.zeros([BLOCK_DIM], tl.float32)
                dbias = tl.zeros([BLOCK_DIM], tl.float32)
            current = row
        read = inside & used
        at = token * dim + cols
        mean = tl.load(mean_ptr + token)
        rstd = tl.load(rstd_ptr + token)
        dy = tl.load(dy_ptr + at, mask=read, other=0.0).to(tl.float32)  # [BLOCK_DIM]
        total = tl.load(sum_ptr + at, mask=read, other=0.0).to(tl.float32)
        normed = tl.where(read, (total - mean) * rstd, 0.0)
        scaled = dy
        if weight_ptr is not None:
            scaled *= tl.load(weight_ptr + row.to(tl.int64) * dim + cols, mask=read, other=0.0).to(tl.float32)
        ds = scaled - normed * (tl.sum(scaled * normed, 0) / dim)
        if not RMS:
            ds -= tl.sum(scaled, 0) / dim
        ds *= rstd
        if dsum_ptr is not None:
            ds += tl.load(dsum_ptr + at, mask=read, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, ds.to(dx_ptr.dtype.element_ty), mask=inside)
        if branch_ptr is not None:
            branch = tl.load(branch_ptr + at, mask=read, other=0.0).to(tl.float32)
            gamma = tl.load(gamma_ptr + cols, mask=inside, other=0.0).to(tl.float32)
            tl.store(dbranch_ptr + at, (ds * gamma).to(dbranch_ptr.dtype.element_ty), mask=inside)
            dgamma += ds * branch
        dweight += dy * normed
        dbias += dy
        token += 1
    if current >= 0:
        seen = tl.sum(tl.where(length == current, touched, 0), 0) > 0
        tl.debug_barrier()
        if weight_ptr is not None:
            _add_to(partial_ptr + current.to(tl.int64) * dim, dweight, inside, seen)
        if HAS_BIAS:
            slot = current.to(tl.int64) + (lengths if weight_ptr is not None else 0)
            _add_to(partial_ptr + slot * dim, dbias, inside, seen)
        touched = tl.where(length == current, 1, touched)
    if branch_ptr is not None:
        tl.store(partial_ptr + (slots - 1) * dim, dgamma, mask=inside)
    tl.store(touched_ptr + program * lengths + length, touched, mask=length < lengths)


@triton.jit(do_not_specialize=("programs",))
def _reduce_kernel(
    partial_ptr, touched_ptr, out_ptr, programs, lengths, dim, slots,
    HAS_GAMMA: tl.constexpr, BLOCK_PROGRAMS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    total = tl.zeros([BLOCK_PROGRAMS, BLOCK_DIM], tl.float32)
    first = slot * 0
    while first < programs:
        program = (first + tl.arange(0, BLOCK_PROGRAMS)).to(tl.int64)
        touched = tl.load(touched_ptr + program * lengths + slot % lengths, mask=program < programs, other=0) > 0
        if HAS_GAMMA:
            touched = touched | ((slot == slots - 1) & (program < programs))
        at = (program * slots + slot)[:, None] * dim + cols[None, :]
        total += tl.load(partial_ptr + at, mask=touched[:, None] & (cols < dim)[None, :], other=0.0)
        first += BLOCK_PROGRAMS
    tl.store(out_ptr + slot.to(tl.int64) * dim + cols, tl.sum(total, 0), mask=cols < dim)


def _tiles(kernel, x):
    """Tiles for rows like those of x, with BLOCK_DIM where it is a whole row."""
    dim = x.shape[1]
    tiles = measured.tiles("layer_norm", kernel, x.device, bits=8 * x.element_size(), dim=dim)
    return tiles if kernel == "reduce" else tiles | {"BLOCK_DIM": columns(dim)}


def forward(x, weight, bias, row, branch, gamma, eps, rms):
    tokens, dim = x.shape
    weight, bias, gamma = (p if p is None else p.contiguous() for p in (weight, bias, gamma))
    lengths = next((p.shape[0] for p in (weight, bias) if p is not None), 1)
    y = torch.empty_like(x)
    total = x.new_empty(0) if branch is None else torch.empty_like(x)
    mean, rstd = (x.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    tiles = _tiles("forward", x)
    if tokens:
        _forward_kernel[(triton.cdiv(tokens, tiles["BLOCK_TOKENS"]),)](
            x, weight, bias, row, branch, gamma, y, total, mean, rstd, None, tokens, lengths, dim, eps, RMS=rms, **tiles
        )
    return y, total, mean, rstd


def fp8(x, weight, bias, row, branch, gamma, eps, rms):
    tokens, dim = x.shape
    weight, bias, gamma = (p if p is None else p.contiguous() for p in (weight, bias, gamma))
    lengths = next((p.shape[0] for p in (weight, bias) if p is not None), 1)
    y = torch.empty_like(x, dtype=E4M3)
    total = x.new_empty(0) if branch is None else torch.empty_like(x)
    scale = x.new_empty(tokens, 1, dtype=torch.float32)
    tiles = _tiles("forward", x)
    if tokens:
        _forward_kernel[(triton.cdiv(tokens, tiles["BLOCK_TOKENS"]),)](
            x, weight, bias, row, branch, gamma, y, total, None, None, scale, tokens, lengths, dim, eps,
            RMS=rms, **tiles,
        )  # fmt: skip
    return y, scale, total


def backward(dy, dsum, sum, weight, bias, row, branch, gamma, mean, rstd, rms):
    tokens, dim = sum.shape
    parameters = (weight, bias, gamma)
    weight, bias, gamma = (p if p is None else p.contiguous() for p in parameters)
    lengths = next((p.shape[0] for p in (weight, bias) if p is not None), 1)
    rows = [0 if weight is None else lengths, 0 if bias is None else lengths, 0 if gamma is None else 1]
    slots = max(1, rows[0] + rows[1] + rows[2])
    per_program = max(TOKENS_PER_PROGRAM, triton.cdiv(tokens, MOST_PROGRAMS))
    programs = triton.cdiv(tokens, per_program)
    dx = torch.empty_like(sum)
    dbranch = mean.new_empty(0) if branch is None else torch.empty_like(branch)
    partial = mean.new_empty(programs, slots, dim)
    touched = torch.empty(programs, lengths, dtype=torch.int32, device=sum.device)
    grads = mean.new_zeros(slots, dim)
    if tokens:
        _backward_kernel[(programs,)](
            dy, dsum, sum, weight, row, branch, gamma, mean, rstd, dx, dbranch, partial, touched,
            tokens, lengths, dim, per_program, slots,
            RMS=rms, HAS_BIAS=bias is not None, BLOCK_LENGTHS=triton.next_power_of_2(lengths),
            **_tiles("backward", sum),
        )  # fmt: skip
        tiles = _tiles("reduce", sum)
        _reduce_kernel[(slots, triton.cdiv(dim, tiles["BLOCK_DIM"]))](
            partial, touched, grads, programs, lengths, dim, slots, HAS_GAMMA=gamma is not None, **tiles
        )
    split = grads[: rows[0] + rows[1] + rows[2]].split(rows)
    of_parameters = (
        mean.new_empty(0) if p is None else grad.reshape(p.shape).to(p.dtype, copy=True)
        for p, grad in zip(parameters, split)
    )
    return dx, dbranch, *of_parameters


def specification(
    kernel, tiles, bits=16, dim=768, dtype=None, branch=None, affine=None, missing=("row",), rms=False,
    ones=("lengths",), is_aligned=True, quantized=False,
):  # fmt: skip
    """A kernel as a model calls it, for the compiler alone: see tests/machine_code.py.

    branch, affine: dtypes, by default dtype's; missing: arguments that are None; ones: those that are 1
    quantized: y is e4m3
    """
    dtype = dtype or ("fp32" if bits == 32 else "bf16")
    branch, affine = branch or dtype, affine or dtype
    pointers = "x weight bias row branch gamma y sum mean rstd dy dsum dx dbranch partial touched out".split()
    ints = ("tokens", "lengths", "dim", "tokens_per_program", "slots", "programs")
    types = {f"{name}_ptr": f"*{affine if name in ('weight', 'bias', 'gamma') else dtype}" for name in pointers}
    types |= {"row_ptr": "*i32", "touched_ptr": "*i32", "branch_ptr": f"*{branch}", "dbranch_ptr": f"*{branch}"}
    types |= {f"{name}_ptr": "*fp32" for name in ("mean", "rstd", "partial", "out")}
    types |= dict.fromkeys(ints, "i32") | {"eps": "fp32"}
    types |= {"scale_ptr": "*fp32"} | ({"y_ptr": "*fp8e4nv"} if quantized else {})
    missing = (*missing, *(("mean", "rstd") if quantized and kernel == "forward" else ("scale",)))
    absent = {f"{name}_ptr": None for name in missing} | dict.fromkeys(ones, 1)  # Triton makes a constant of a 1
    function = {"forward": _forward_kernel, "backward": _backward_kernel, "reduce": _reduce_kernel}[kernel]
    constexprs = {name: value for name, value in absent.items() if name in function.arg_names}
    constexprs |= {
        "forward": {"RMS": rms, "BLOCK_DIM": columns(dim)},
        "backward": {
            "RMS": rms, "HAS_BIAS": "bias" not in missing, "BLOCK_LENGTHS": 1 if "lengths" in ones else 4,
            "BLOCK_DIM": columns(dim),
        },
        "reduce": {"HAS_GAMMA": "gamma" not in missing},
    }[kernel] | {name: value for name, value in tiles.items() if name != "num_warps"}  # fmt: skip
    signature = {name: types[name] for name in function.arg_names if name not in constexprs}
    multiples = ("dim",) if is_aligned and dim % 16 == 0 else ()
    options = {"num_warps": tiles["num_warps"], "aligned": is_aligned, "multiples": multiples}
    return {"kernel": function, "signature": signature, "constexprs": constexprs} | options
