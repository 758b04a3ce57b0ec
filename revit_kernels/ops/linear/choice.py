"""Which backend runs a linear layer on a GPU: what was measured faster on this GPU, else what arithmetic says.

Measured is what `revit_kernels/measured` holds in its table "linear": {shape_key: backend}, written by
benchmarks/choose_linear.py. It is of no number of rows: a row's bits do not depend on the rows beside it.

The arithmetic: behind the vendor's product every further step reads and writes the (rows, columns)
result once more; a product with an epilogue saves that, and loses SHORTFALL of the vendor's speed. Per number of the
result the one costs bytes / BANDWIDTH and the other SHORTFALL * 2 * in / RATE, so few inputs speak for the epilogue.
With an H200's figures the two are equal at 690 inputs for a GELU in bf16: Triton takes fc1 of ViT-S, and cuBLAS that
of ViT-B, where Triton was measured slower. SHORTFALL was measured with an erf of 32 instructions a number in the
epilogue, which has 13 since: to be measured again.
"""

import torch

from revit_kernels import measured

VENDOR_FIRST = ("vendor", "triton", "reference")
ON_CPU = ("cpu", *VENDOR_FIRST)
TRITON_FIRST = ("triton", "vendor", "reference")
RATE, BANDWIDTH = 790e12, 4.3e12  # FLOP/s in bf16 and bytes/s, measured on an H200
SHORTFALL = 0.53  # how much slower Triton's fc1 of ViT-B, with its GELU, is than cuBLASLt's fc2: 416 and 886 TFLOP/s


def shape_key(step: str, dtype: torch.dtype, weight_shape, activation, gate) -> str:
    """What the measured table calls a shape: "forward bfloat16 768x3072 gelu", from in and out."""
    out, inputs = weight_shape
    words = [step, str(dtype).removeprefix("torch."), f"{inputs}x{out}", activation, gate and f"gate-{gate}"]
    return " ".join(word for word in words if word)


def _lookup(device: torch.device, *shape) -> tuple | None:
    """The order that was measured for a shape, as `shape_key` takes it; None where none was."""
    table = measured.of(device).get("linear")
    fastest = table and table.get(shape_key(*shape))
    return {"triton": TRITON_FIRST, "vendor": VENDOR_FIRST}.get(fastest)


def saved_bytes(itemsize: int, activation, gate) -> int:
    """Bytes per number of the result that an epilogue keeps from memory."""
    return (3 if gate else 2 if activation else 0) * itemsize


def favours_epilogue(inputs: int, itemsize: int, activation, gate) -> bool:
    saved = saved_bytes(itemsize, activation, gate)
    products = 2 if gate else 1
    return saved / BANDWIDTH > SHORTFALL * products * 2 * inputs / RATE


def forward_order(x, weight, bias, activation, gate, recorded) -> tuple:
    if not x.is_cuda:
        return ON_CPU
    order = _lookup(x.device, "forward", x.dtype, weight.shape, activation, gate)
    if order is not None:
        return order
    if x.dtype == torch.float32:  # off the tensor cores a product is long whatever comes behind it
        return VENDOR_FIRST
    return TRITON_FIRST if favours_epilogue(x.shape[1], x.element_size(), activation, gate) else VENDOR_FIRST


def backward_order(dy, x, weight, bias, kept, activation, gate, need_x, need_weight) -> tuple:
    """Both backends leave the products to the vendor; Triton's pass before them reads and writes everything once."""
    one_pass = x.is_cuda and (activation is not None or gate is not None)
    return TRITON_FIRST if one_pass else VENDOR_FIRST


def fp8_order(x, x_scale, weight, weight_scale, bias, activation, gate, dtype, quantized) -> tuple:
    if not x.is_cuda:
        return ("reference", "triton", "vendor")
    order = _lookup(x.device, "fp8", dtype, weight.shape, activation, gate)
    plain = activation is None and gate is None
    return order or (VENDOR_FIRST if plain else TRITON_FIRST)
