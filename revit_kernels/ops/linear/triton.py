"""Linear layers in Triton: one product with bias, activation and gate in its epilogue.

Tiles depend on the weight's shape, the dtype and the GPU, never on the number of rows: so a row's bits do not depend on
the rows beside it. From Hopper on the operands come by the hardware's tile loads (TMA) where rows start on 16 bytes.
"""

import os
from functools import cache

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from revit_kernels import measured
from revit_kernels.ops.e4m3 import E4M3, E4M3_SINCE, GROUP
from revit_kernels.ops.e4m3_triton import quantize_rows
from revit_kernels.ops.linear.products import derivative_products, keeps
from revit_kernels.ops.linear.tiles import NUMBERS, TILES, WORDS, power_of_two

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROWS_PER_PROGRAM = 64  # at least, in the backward pass
MOST_PROGRAMS = 256
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _capability(device) -> tuple[int, int]:
    """Where there is no GPU, the interpreter goes the way of the newest."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def refusal(step, args):
    for tensor in args:
        if not isinstance(tensor, torch.Tensor):
            continue
        if not tensor.is_cuda and not INTERPRETED:
            return "needs a CUDA tensor"
        if tensor.dtype == E4M3:
            if (found := _capability(tensor.device)) < E4M3_SINCE:
                return "e4m3 needs compute capability {}.{}, {} has {}.{}".format(*E4M3_SINCE, tensor.device, *found)
        elif tensor.is_floating_point() and tensor.dtype not in DTYPES:
            return f"no kernel for {tensor.dtype}"
    if step == "fp8":
        x, x_scale = args.x, args.x_scale
        if x.shape[1] % 16:
            return f"an e4m3 product needs a multiple of 16 inputs, got {x.shape[1]}"
        if x_scale.shape[1] > 1 and x.shape[1] != x_scale.shape[1] * GROUP:
            return f"takes one scale a row or one for {GROUP} inputs, got {x_scale.shape[1]} for {x.shape[1]}"
    return None


@triton.jit
def _short_gelu(h):
    """h Phi(h) for a result that is rounded to bf16, without branches: off by at most 7e-5.

    Phi - 1/2 is h times a polynomial in h^2, fitted on [-4.2, 4.2], 1/2 at its end. erf takes longer than the product
    of 384 inputs: on an H200 half of fc1's time.
    """
    inside = tl.minimum(tl.maximum(h, -4.2), 4.2)
    z = inside * inside
    p = tl.fma(z, 8.60899962429329e-11, -7.735308393819196e-09)
    p = tl.fma(p, z, 3.049644021757558e-07)
    p = tl.fma(p, z, -7.0407750172307715e-06)
    p = tl.fma(p, z, 0.00010810770618263632)
    p = tl.fma(p, z, -0.001198110170662403)
    p = tl.fma(p, z, 0.01012105867266655)
    p = tl.fma(p, z, -0.06685450673103333)
    p = tl.fma(p, z, 0.3992001712322235)
    return h * tl.fma(inside, p, 0.5)


@triton.jit
def _activate(h, ACTIVATION: tl.constexpr, SHORT: tl.constexpr = False):
    if ACTIVATION == "gelu":
        if SHORT:
            h = _short_gelu(h)
        else:
            h = h * 0.5 * (1 + tl.erf(h * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        h = h * tl.sigmoid(1.5957691216057308 * (h + 0.044715 * h * h * h))
    elif ACTIVATION == "silu":
        h = h * tl.sigmoid(h)
    return h


@triton.jit
def _slope(h, ACTIVATION: tl.constexpr):
    """The activation's derivative at h."""
    if ACTIVATION == "gelu":
        slope = 0.5 * (1 + tl.erf(h * 0.7071067811865476)) + h * tl.exp(-0.5 * h * h) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        inner = 1.5957691216057308 * (h + 0.044715 * h * h * h)
        s = tl.sigmoid(inner)
        slope = s + h * s * tl.sigmoid(-inner) * 1.5957691216057308 * (1 + 0.134145 * h * h)
    elif ACTIVATION == "silu":
        s = tl.sigmoid(h)
        slope = s * (1 + h * tl.sigmoid(-h))
    else:
        slope = h * 0 + 1
    return slope


@triton.jit
def _load(source, row, rows, k, inputs, stride, TMA: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """[BLOCK_ROWS, BLOCK] of a matrix (rows, inputs) from (row, k) on, zeros outside."""
    if TMA:
        tile = source.load([row, k])
    else:
        at = tl.arange(0, BLOCK_ROWS)[:, None]
        cols = tl.arange(0, BLOCK)[None, :]
        source += row.to(tl.int64) * stride + k
        tile = tl.load(source + at * stride + cols, mask=(at < rows - row) & (cols < inputs - k), other=0.0)
    return tile


@triton.jit
def _multiply(x, weight, total, WIDEN: tl.constexpr):
    """total + x weight^T in fp32."""
    if WIDEN:  # the interpreter multiplies the bits of bf16 as integers
        x = x.to(tl.float32)
        weight = weight.to(tl.float32)
    return tl.dot(x, tl.trans(weight), total, input_precision="ieee")


@triton.jit(do_not_specialize=("rows",))
def _forward_kernel(
    x, weight, bias_ptr, x_scale_ptr, weight_scale_ptr, y_ptr, y_scale_ptr, kept_ptr,
    rows, columns, inputs, x_row, weight_row,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, GROUPED: tl.constexpr, TMA: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_INPUTS: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    tl.static_assert(y_scale_ptr is None or BLOCK_COLUMNS == 128, "a scale is of the columns of one tile")
    tl.static_assert(not GROUPED or BLOCK_INPUTS == 128, "a scale is of the inputs of one step")
    down = tl.cdiv(rows, BLOCK_ROWS)
    across = tl.cdiv(columns, BLOCK_COLUMNS)
    out = columns if GATE is None else 2 * columns
    groups = tl.cdiv(inputs, BLOCK_INPUTS)
    tile = tl.program_id(0)
    # TALL tiles of rows are gone through together, so that their x and the weight stay in the cache.
    first = tile // (TALL * across) * TALL
    tall = tl.minimum(down - first, TALL)
    row = (first + tile % (TALL * across) % tall) * BLOCK_ROWS
    column = tile % (TALL * across) // tall * BLOCK_COLUMNS
    down_tile = tl.arange(0, BLOCK_ROWS)
    across_tile = tl.arange(0, BLOCK_COLUMNS)
    exists = row + down_tile < rows
    wanted = column + across_tile < columns
    wide_row = row.to(tl.int64)
    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    second = total
    for step in tl.range(0, groups):
        k = step * BLOCK_INPUTS
        a = _load(x, row, rows, k, inputs, x_row, TMA, BLOCK_ROWS, BLOCK_INPUTS)
        b = _load(weight, column, out, k, inputs, weight_row, TMA, BLOCK_COLUMNS, BLOCK_INPUTS)
        if GROUPED:
            of_row = x_scale_ptr + wide_row * groups + step
            of_row = tl.load(of_row + down_tile * groups, mask=exists, other=0.0)[:, None]
            part = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
            total += of_row * _multiply(a, b, part, WIDEN)
        else:
            total = _multiply(a, b, total, WIDEN)
        if GATE is not None:
            b = _load(weight, columns + column, out, k, inputs, weight_row, TMA, BLOCK_COLUMNS, BLOCK_INPUTS)
            if GROUPED:
                second += of_row * _multiply(a, b, part, WIDEN)
            else:
                second = _multiply(a, b, second, WIDEN)

    # 64-bit numbers say where a tile is, 32-bit ones where in it: otherwise addresses fill the registers.
    inside = exists[:, None] & wanted[None, :]
    SHORT: tl.constexpr = y_ptr.dtype.element_ty == tl.bfloat16
    if x_scale_ptr is not None:
        if not GROUPED:
            of_row = tl.load(x_scale_ptr + row + down_tile, mask=exists, other=0.0)[:, None]
            total *= of_row
            second *= of_row
        total *= _columns(weight_scale_ptr + column, across_tile, wanted)
    if bias_ptr is not None:
        total += _columns(bias_ptr + column, across_tile, wanted)
    if kept_ptr is not None:
        kept = kept_ptr + wide_row * out + column
        kept_at = down_tile[:, None] * out + across_tile[None, :]
        tl.store(kept + kept_at, total.to(kept_ptr.dtype.element_ty), mask=inside)
    if GATE is not None:
        if x_scale_ptr is not None:
            second *= _columns(weight_scale_ptr + columns + column, across_tile, wanted)
        if bias_ptr is not None:
            second += _columns(bias_ptr + columns + column, across_tile, wanted)
        if kept_ptr is not None:
            tl.store(kept + columns + kept_at, second.to(kept_ptr.dtype.element_ty), mask=inside)
        if GATE == "first":
            total = _activate(total, ACTIVATION, SHORT) * second
        else:
            total = total * _activate(second, ACTIVATION, SHORT)
    else:
        total = _activate(total, ACTIVATION, SHORT)
    if y_scale_ptr is not None:
        total, scale = quantize_rows(tl.where(inside, total, 0.0))
        of_row = y_scale_ptr + wide_row * across + column // BLOCK_COLUMNS
        tl.store(of_row + down_tile * across, scale, mask=exists)
    y = y_ptr + wide_row * columns + column
    at = down_tile[:, None] * columns + across_tile[None, :]
    tl.store(y + at, total.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _columns(ptr, cols, wanted):
    """[1, BLOCK_COLUMNS] of a vector, in fp32."""
    return tl.load(ptr + cols, mask=wanted, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=("rows",))
def _quantize_kernel(
    x_ptr, y_ptr, scale_ptr, rows, columns, group, x_row, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    cols = tl.arange(0, BLOCK_COLUMNS)
    inside = (at < rows)[:, None] & (cols < group)[None, :]
    cols += tl.program_id(1) * group
    x = tl.load(x_ptr + at[:, None] * x_row + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    x, scale = quantize_rows(x)  # [BLOCK_ROWS, BLOCK_COLUMNS]
    tl.store(y_ptr + at[:, None] * columns + cols[None, :], x.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + at * tl.num_programs(1) + tl.program_id(1), scale, mask=at < rows)


@triton.jit(do_not_specialize=("rows", "rows_per_program"))
def _backward_kernel(
    dy_ptr, kept_ptr, dh_ptr, partial_ptr, rows, columns, rows_per_program,
    ACTIVATION: tl.constexpr, GATE: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dh of some rows and columns, and the sums of dh over these rows."""
    program = tl.program_id(0)
    cols = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    wanted = cols < columns
    out = columns if GATE is None else 2 * columns
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    second_sums = sums
    end = tl.minimum((program + 1) * rows_per_program, rows)
    for row in tl.range(program * rows_per_program, end, BLOCK_ROWS):
        at = (row + tl.arange(0, BLOCK_ROWS))[:, None].to(tl.int64)
        inside = (at < end) & wanted[None, :]
        dy = tl.load(dy_ptr + at * columns + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        h = tl.load(kept_ptr + at * out + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if GATE is None:
            dh = dy * _slope(h, ACTIVATION)
        else:
            other = tl.load(kept_ptr + at * out + columns + cols[None, :], mask=inside, other=0.0).to(tl.float32)
            if GATE == "first":
                dh = dy * other * _slope(h, ACTIVATION)
                second = dy * _activate(h, ACTIVATION)
            else:
                dh = dy * _activate(other, ACTIVATION)
                second = dy * h * _slope(other, ACTIVATION)
            tl.store(dh_ptr + at * out + columns + cols[None, :], second.to(dh_ptr.dtype.element_ty), mask=inside)
            second_sums += second
        tl.store(dh_ptr + at * out + cols[None, :], dh.to(dh_ptr.dtype.element_ty), mask=inside)
        sums += dh
    partial_ptr += program.to(tl.int64) * out + cols
    tl.store(partial_ptr, tl.sum(sums, 0), mask=wanted)
    if GATE is not None:
        tl.store(partial_ptr + columns, tl.sum(second_sums, 0), mask=wanted)


def _loads(x, *others):
    """What a load can take: more than a number where every row of every matrix starts on 16 bytes."""
    for matrix in (x, *others):
        if matrix.data_ptr() % 16 or matrix.stride(0) * matrix.element_size() % 16:
            return NUMBERS
    return TILES if _capability(x.device) >= (9, 0) and x.dtype != torch.float32 else WORDS


def _rows_apart(x):
    """The matrix, copied unless its rows are contiguous."""
    return x if x.stride(1) == 1 or (x.shape[1] == 1 and x.stride(0)) else x.contiguous()


def _product(x, weight, bias, x_scale, weight_scale, y, y_scale, kept, activation, gate):
    rows, columns = y.shape
    if not rows:
        return
    x, weight = _rows_apart(x), _rows_apart(weight)
    bias = None if bias is None else bias.contiguous()
    inputs = x.shape[1]
    loads = _loads(x, weight, y)
    tiles = measured.tiles(
        "linear", "forward", x.device, bits=8 * x.element_size(), parts=2 if gate else 1, loads=loads,
        inputs=inputs, out=weight.shape[0],
    )  # fmt: skip
    block_rows, block_columns, block_inputs = (tiles[f"BLOCK_{name}"] for name in ("ROWS", "COLUMNS", "INPUTS"))
    matrices = x, weight
    if loads == TILES:
        matrices = (
            TensorDescriptor(t, list(t.shape), list(t.stride()), [block, block_inputs])
            for t, block in ((x, block_rows), (weight, block_columns))
        )
    _forward_kernel[(triton.cdiv(rows, block_rows) * triton.cdiv(columns, block_columns),)](
        *matrices, bias, x_scale, weight_scale, y, y_scale, kept, rows, columns, inputs, x.stride(0), weight.stride(0),
        ACTIVATION=activation, GATE=gate, GROUPED=x_scale is not None and x_scale.shape[1] > 1, TMA=loads == TILES,
        WIDEN=INTERPRETED and not x.is_cuda, **tiles,
    )  # fmt: skip


def forward(x, weight, bias, activation, gate, recorded):
    rows, out = x.shape[0], weight.shape[0]
    y = x.new_empty(rows, out // 2 if gate else out)
    kept = x.new_empty(rows, out) if keeps(recorded, activation, gate) else None
    _product(x, weight, bias, None, None, y, None, kept, activation, gate)
    return y, x.new_empty(0) if kept is None else kept


def fp8(x, x_scale, weight, weight_scale, bias, activation, gate, dtype, quantized):
    rows, out = x.shape[0], weight.shape[0]
    columns = out // 2 if gate else out
    y = x.new_empty(rows, columns, dtype=E4M3 if quantized else dtype)
    y_scale = x_scale.new_empty(rows, columns // GROUP) if quantized else None
    scales = x_scale.contiguous(), weight_scale.contiguous()
    _product(x, weight, bias, *scales, y, y_scale, None, activation, gate)
    return y, x_scale.new_empty(0) if y_scale is None else y_scale


def quantize(x, group):
    rows, columns = x.shape
    x = _rows_apart(x)
    y = x.new_empty(rows, columns, dtype=E4M3)
    scale = x.new_empty(rows, columns // group, dtype=torch.float32)
    tiles = measured.tiles("linear", "quantize", x.device, columns=group)
    if rows:
        grid = triton.cdiv(rows, tiles["BLOCK_ROWS"]), columns // group
        launch = tiles | {"BLOCK_COLUMNS": power_of_two(group)}
        _quantize_kernel[grid](x, y, scale, rows, columns, group, x.stride(0), **launch)
    return y, scale


def backward(dy, x, weight, bias, kept, activation, gate, need_x, need_weight):
    rows, columns = dy.shape
    out = weight.shape[0]
    if activation is None and gate is None:
        dh, sums = dy, dy.sum(0, dtype=torch.float32)
    else:
        per_program = max(ROWS_PER_PROGRAM, triton.cdiv(triton.cdiv(rows, MOST_PROGRAMS), 16) * 16)
        programs = triton.cdiv(rows, per_program)
        dh = x.new_empty(rows, out)
        partial = x.new_empty(programs, out, dtype=torch.float32)
        tiles = measured.tiles("linear", "backward", x.device, parts=2 if gate else 1)
        if rows:
            _backward_kernel[(programs, triton.cdiv(columns, tiles["BLOCK_COLUMNS"]))](
                dy, kept, dh, partial, rows, columns, per_program, ACTIVATION=activation, GATE=gate, **tiles
            )
        sums = partial.sum(0)
    dbias = x.new_empty(0) if bias is None else sums.to(bias.dtype)
    return *derivative_products(dh, x, weight, need_x, need_weight), dbias


def specification(
    kernel, tiles, bits=16, parts=1, loads=TILES, inputs=768, out=3072, columns=768, dtype=None, activation="gelu",
    missing=("kept",), quantized=False, grouped=False,
):  # fmt: skip
    """A kernel as a model calls it, for the compiler alone: see tests/machine_code.py.

    missing: arguments that are None; quantized: the result is e4m3; grouped: x has a scale for every 128 inputs
    """
    half = dtype or {8: "bf16", 16: "bf16", 32: "fp32"}[bits]
    operand = "fp8e4nv" if bits == 8 else half
    tiles, gate = dict(tiles), "first" if parts == 2 else None
    types = {f"{name}_ptr": f"*{half}" for name in "bias y kept dy dh".split()}
    types |= {f"{name}_ptr": "*fp32" for name in "x_scale weight_scale y_scale partial scale".split()}
    ints = "rows columns inputs x_row weight_row rows_per_program group"
    types |= dict.fromkeys(ints.split(), "i32")
    function = {"forward": _forward_kernel, "backward": _backward_kernel, "quantize": _quantize_kernel}[kernel]
    options = {name: tiles.pop(name) for name in ("num_warps", "num_stages") if name in tiles}
    if kernel == "forward":
        for name, block in (("x", "ROWS"), ("weight", "COLUMNS")):
            tile = f"[{tiles[f'BLOCK_{block}']}, {tiles['BLOCK_INPUTS']}]"
            types[name] = f"tensordesc<{operand}{tile}>" if loads == TILES else f"*{operand}"
        constexprs = {"ACTIVATION": activation, "GATE": gate, "GROUPED": grouped, "TMA": loads == TILES, "WIDEN": False}
        missing = (*missing, *(() if bits == 8 else ("x_scale", "weight_scale")), *(() if quantized else ("y_scale",)))
        if quantized:
            types["y_ptr"] = "*fp8e4nv"
    elif kernel == "backward":
        constexprs = {"ACTIVATION": activation, "GATE": gate}
        missing = tuple(name for name in missing if name != "kept")
    else:
        types |= {"x_ptr": f"*{half}", "y_ptr": "*fp8e4nv"}
        constexprs, missing = {"BLOCK_COLUMNS": power_of_two(columns)}, ()
    constexprs |= tiles | {f"{name}_ptr": None for name in missing if f"{name}_ptr" in function.arg_names}
    signature = {name: types[name] for name in function.arg_names if name not in constexprs}
    multiples = tuple(name for name in ints.split() if not name.startswith("rows")) if loads > NUMBERS else ()
    rest = {"aligned": loads > NUMBERS, "multiples": multiples}
    return {"kernel": function, "signature": signature, "constexprs": constexprs} | options | rest
