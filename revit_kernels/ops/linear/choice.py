"""Which backend runs a linear layer on a GPU: as measured.json says of this GPU, or else as arithmetic says.

measured.json is written by benchmarks/choose_linear.py. It holds, for each GPU by name and for each shape
(`shape_key`), [[most rows, backend], ...], ascending, with null for any number of rows.

The arithmetic, not measured: behind the vendor's product every further step reads and writes the (rows, columns)
result once more; a product with an epilogue saves that, and loses SHORTFALL of the vendor's speed. Per number of the
result the one costs bytes / BANDWIDTH and the other SHORTFALL * 2 * in / RATE, so few inputs speak for the epilogue.
With an H200's figures the two are equal at 2,450 inputs for a GELU in bf16: Triton takes fc1, and the residual behind
the attention's projection; the vendor keeps fc2, whose product is long. At an estimated 25 instructions a number, an
erf costs the epilogue as long as 400 inputs of the product, unless another block's product hides it: that is not
counted.
"""

import json
from functools import cache
from pathlib import Path

import torch

VENDOR_FIRST = ("vendor", "triton", "reference")
TRITON_FIRST = ("triton", "vendor", "reference")
RATE, BANDWIDTH = 790e12, 4.3e12  # FLOP/s in bf16 and bytes/s, measured on an H200
SHORTFALL = 0.15  # assumed: how much slower Triton's product is than cuBLASLt's


@cache
def _measured() -> dict:
    path = Path(__file__).with_name("measured.json")
    return json.loads(path.read_text()) if path.exists() else {}


@cache
def _table(device: torch.device) -> dict:
    return _measured().get(torch.cuda.get_device_name(device), {})


def shape_key(step: str, dtype: torch.dtype, weight_shape, activation, gate, residual: bool) -> str:
    """What measured.json calls a shape: "forward bfloat16 768x3072 gelu", from in and out."""
    out, inputs = weight_shape
    words = [step, str(dtype).removeprefix("torch."), f"{inputs}x{out}", activation, gate and f"gate-{gate}"]
    return " ".join(word for word in (*words, "residual" if residual else None) if word)


def _lookup(device, key: str, rows: int) -> tuple | None:
    for most, backend in _table(device).get(key, ()):
        if most is None or rows <= most:
            return TRITON_FIRST if backend == "triton" else VENDOR_FIRST
    return None


def saved_bytes(itemsize: int, activation, gate, residual: bool, gamma: bool) -> int:
    """Bytes per number of the result that an epilogue keeps from memory."""
    steps = (3 if gate else 2 if activation else 0) + (2 if residual else 2 if gamma else 0)
    return steps * itemsize


def favours_epilogue(inputs: int, itemsize: int, activation, gate, residual: bool, gamma: bool) -> bool:
    saved = saved_bytes(itemsize, activation, gate, residual, gamma)
    products = 2 if gate else 1
    return saved / BANDWIDTH > SHORTFALL * products * 2 * inputs / RATE


def forward_order(x, weight, bias, residual, gamma, activation, gate, keep) -> tuple:
    if not x.is_cuda:
        return VENDOR_FIRST
    key = shape_key("forward", x.dtype, weight.shape, activation, gate, residual is not None)
    if (order := _lookup(x.device, key, x.shape[0])) is not None:
        return order
    if x.dtype == torch.float32:  # off the tensor cores a product is long whatever comes behind it
        return VENDOR_FIRST
    form = activation, gate, residual is not None, gamma is not None
    return TRITON_FIRST if favours_epilogue(x.shape[1], x.element_size(), *form) else VENDOR_FIRST


def backward_order(dy, x, weight, bias, gamma, kept, activation, gate, need_x, need_weight) -> tuple:
    """Both backends leave the products to the vendor; Triton's pass before them reads and writes everything once."""
    one_pass = x.is_cuda and (activation is not None or gate is not None or gamma is not None)
    return TRITON_FIRST if one_pass else VENDOR_FIRST


def fp8_order(x, x_scale, weight, weight_scale, bias, residual, gamma, activation, gate, dtype, quantised) -> tuple:
    if not x.is_cuda:
        return ("reference", "triton", "vendor")
    key = shape_key("fp8", dtype, weight.shape, activation, gate, residual is not None)
    order = _lookup(x.device, key, x.shape[0])
    plain = activation is None and gate is None and residual is None
    return order or (VENDOR_FIRST if plain else TRITON_FIRST)
