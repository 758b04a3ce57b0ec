"""layer_norm against PyTorch's: the norm alone, and with the residual add and LayerScale before it."""

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F

from revit_kernels.ops import layer_norm

torch._functorch.config.donated_buffer = False  # a compiled backward is timed more than once


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# On a GPU the larger is 256 images of 197 tokens: more than its cache holds.
TOKENS = (2920, 50432) if DEVICE == "cuda" else (2920, 8192)

shapes = pytest.mark.parametrize("tokens, dim", [(t, d) for t in TOKENS for d in (384, 768, 1280)])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def make_inputs(tokens, dim, dtype):
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    row = torch.arange(tokens, device=DEVICE) * 3 // tokens  # three lengths, each a third of the tokens
    inputs = {"x": random(tokens, dim), "weight": random(3, dim), "bias": random(3, dim), "row": row.int()}
    return inputs, {"branch": random(tokens, dim), "gamma": random(dim)}


def unfused(x, weight, bias, branch, gamma):
    x = x + gamma * branch
    return F.layer_norm(x, x.shape[1:], weight, bias, 1e-6), x


def alone(x, weight, bias):
    return F.layer_norm(x, x.shape[1:], weight, bias, 1e-6)


def gradients(function, *inputs):
    """The backward pass of the function, as a call without arguments."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [torch.ones_like(o) for o in outputs]
    leaves = [t for t in leaves if t.requires_grad]
    return lambda: torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)


@shapes
@dtypes
def bench_forward(duel, tokens, dim, dtype):
    inputs, _ = make_inputs(tokens, dim, dtype)
    x, weight, bias, _ = inputs.values()
    with torch.no_grad():
        duel(
            lambda: layer_norm(**inputs),
            lambda: alone(x, weight[0], bias[0]),
            bytes=2 * x.nbytes,
            rival="F.layer_norm",
        )


@shapes
@dtypes
def bench_backward(duel, tokens, dim, dtype):
    inputs, _ = make_inputs(tokens, dim, dtype)
    x, weight, bias, _ = inputs.values()
    duel(
        gradients(layer_norm, *inputs.values()),
        gradients(alone, x, weight[0], bias[0]),
        bytes=3 * x.nbytes,
        rival="F.layer_norm",
    )


@pytest.mark.parametrize("rival", ["add + F.layer_norm", "add + F.layer_norm, compiled"])
@shapes
@dtypes
def bench_residual_forward(duel, tokens, dim, dtype, rival):
    inputs, residual = make_inputs(tokens, dim, dtype)
    x, weight, bias, _ = inputs.values()
    theirs = torch.compile(unfused) if rival.endswith("compiled") else unfused
    with torch.no_grad():
        duel(
            lambda: layer_norm(**inputs, **residual),
            lambda: theirs(x, weight[0], bias[0], *residual.values()),
            bytes=4 * x.nbytes,
            rival=rival,
        )


@pytest.mark.parametrize("rival", ["add + F.layer_norm", "add + F.layer_norm, compiled"])
@shapes
@dtypes
def bench_residual_backward(duel, tokens, dim, dtype, rival):
    inputs, residual = make_inputs(tokens, dim, dtype)
    x, weight, bias, row = inputs.values()
    theirs = torch.compile(unfused) if rival.endswith("compiled") else unfused
    duel(
        gradients(
            lambda x, weight, bias, branch, gamma: layer_norm(x, weight, bias, row, branch=branch, gamma=gamma),
            *(x, weight, bias, *residual.values()),
        ),
        gradients(theirs, x, weight[0], bias[0], *residual.values()),
        bytes=6 * x.nbytes,
        rival=rival,
    )
