"""linear against PyTorch's: F.linear and what follows it, step by step and compiled, and its own two backends.

The duels of Triton with the vendor, and the fp8 ones, are what choose_linear.py writes into revit_kernels/measured.
"""

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F

from revit_kernels.dispatch import refusal
from revit_kernels.ops import linear, linear_fp8
from revit_kernels.ops.linear import choice
from revit_kernels.ops.linear.fp8 import quantize

torch._functorch.config.donated_buffer = False  # a compiled backward is timed more than once

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROWS = (1576, 12608, 50432) if CUDA else (1576,)  # 8, 64 and 256 images of 197 tokens
EPILOGUES = {  # (activation, gate), of layers (in, out) in units of dim
    "plain": ((None, None), ((1, 3), (1, 1), (4, 1))),
    "gelu": (("gelu", None), ((1, 4),)),
    "swiglu": (("silu", "first"), ((1, 5),)),
}
LAYERS = [
    (name, form, dim * inputs, dim * out)
    for dim in ((384, 768, 1024) if CUDA else (384,))
    for name, (form, layers) in EPILOGUES.items()
    for inputs, out in layers
]

rows = pytest.mark.parametrize("rows", ROWS)
layers = pytest.mark.parametrize("layer", LAYERS, ids=[f"{name}-{inputs}x{out}" for name, _, inputs, out in LAYERS])
dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16] + ([] if CUDA else [torch.float32]), ids=str)


def make_inputs(rows, layer, dtype):
    _, (activation, gate), inputs, out = layer
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    found = {"x": random(rows, inputs), "weight": random(out, inputs) / inputs**0.5, "bias": random(out)}
    form = {"activation": activation, "gate": gate}
    flops = 2 * rows * inputs * out
    key = choice.shape_key("forward", dtype, (out, inputs), activation, gate)
    return found, form, flops, key


def unfused(x, weight, bias, activation=None, gate=None):
    y = F.linear(x, weight, bias)
    if gate:
        first, second = y.chunk(2, -1)
        y = F.silu(first) * second
    elif activation:
        y = F.gelu(y)
    return y


def gradients(function, tensors, form):
    """The backward pass of the function, as a call without arguments."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    y = function(**leaves, **form)
    seed = torch.ones_like(y)
    return lambda: torch.autograd.grad(y, list(leaves.values()), seed, retain_graph=True)


def need(backend, tensors, form):
    if why := refusal("linear", backend, *tensors.values(), *form.values(), False):
        pytest.skip(f"{backend}: {why}")


@pytest.mark.parametrize("rival", ["F.linear and the rest", "F.linear and the rest, compiled"])
@rows
@layers
@dtypes
def bench_forward(duel, rows, layer, dtype, rival):
    tensors, form, flops, _ = make_inputs(rows, layer, dtype)
    theirs = torch.compile(unfused) if rival.endswith("compiled") else unfused
    with torch.no_grad():
        duel(lambda: linear(**tensors, **form), lambda: theirs(**tensors, **form), flops=flops, rival=rival)


@pytest.mark.parametrize("rival", ["F.linear and the rest", "F.linear and the rest, compiled"])
@rows
@layers
@dtypes
def bench_backward(duel, rows, layer, dtype, rival):
    tensors, form, flops, _ = make_inputs(rows, layer, dtype)
    theirs = torch.compile(unfused) if rival.endswith("compiled") else unfused
    duel(gradients(linear, tensors, form), gradients(theirs, tensors, form), flops=2 * flops, rival=rival)


@rows
@layers
@dtypes
def bench_triton(duel, benchmark, rows, layer, dtype):
    """Which of the two backends wins."""
    tensors, form, flops, key = make_inputs(rows, layer, dtype)
    for backend in ("triton", "vendor"):
        need(backend, tensors, form)
    benchmark.extra_info |= {"shape_key": key, "rows": rows}
    with torch.no_grad():
        ways = [lambda backend=backend: linear(**tensors, **form, backend=backend) for backend in ("triton", "vendor")]
        duel(*ways, flops=flops, rival="vendor")


@pytest.mark.parametrize("rival", ["vendor", "bf16"])
@rows
@layers
def bench_fp8(duel, benchmark, rows, layer, rival):
    """Triton's product in e4m3 against the vendor's, and e4m3 as chosen, its rows quantized before, against bf16."""
    tensors, form, flops, key = make_inputs(rows, layer, torch.bfloat16)
    eighth = tensors | {name: quantize(tensors[name]) for name in ("x", "weight")}
    x, weight = eighth["x"], eighth["weight"]
    sample = (x.values, x.scale, weight.values, weight.scale[:, 0], tensors["bias"], *form.values())
    for backend in ("triton", "vendor"):
        if why := refusal("linear", backend, *sample, torch.bfloat16, False, step="fp8"):
            pytest.skip(f"{backend}: {why}")
    benchmark.extra_info |= {"shape_key": key.replace("forward", "fp8", 1), "rows": rows}
    with torch.no_grad():
        if rival == "vendor":
            ways = [lambda b=b: linear_fp8(**eighth, **form, backend=b) for b in ("triton", "vendor")]
        else:
            ways = [lambda: linear_fp8(**eighth, **form), lambda: linear(**tensors, **form)]
        duel(*ways, flops=flops, rival=rival, dtype=torch.bfloat16)
