"""What every backend of every op must satisfy."""

from pathlib import Path

import pytest
import torch

from revit_kernels import native
from revit_kernels.dispatch import BACKENDS, refusal

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CUDA = DEVICE == "cuda" or bool(native.CUDA_ON_HOST)
DTYPES = [torch.float32, torch.bfloat16] + ([torch.float16] if CUDA else [])

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_close(name, actual, exact, rough):
    """The error against fp64 is at most twice that of the reference run in the same dtype, plus rounding.

    Both are maxima: a case needs some hundred numbers, or the reference's is small by luck.
    """
    assert actual.shape == rough.shape and actual.dtype == rough.dtype, name
    assert torch.isfinite(actual).all(), f"{name} is not finite"
    if actual.numel():
        rounding = torch.finfo(actual.dtype).eps * exact.abs().max()
        allowed = 2 * ((rough - exact).abs().max() + rounding)
        error = (actual - exact).abs().max()
        assert error <= allowed, f"{name}: error {error:.2e} exceeds {allowed:.2e}"


def same(actual, expected):
    """Bit for bit on a CPU; on a GPU its library of matrix products decides by the batch how it adds."""
    if DEVICE == "cpu":
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected)


def _cast(value, dtype, gradients):
    """The value in `dtype` where it is a floating-point tensor; lists of tensors alike."""
    if isinstance(value, list | tuple) and any(isinstance(v, torch.Tensor) for v in value):
        return [_cast(v, dtype, gradients) for v in value]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    value = value.detach().to(dtype or value.dtype)
    return value.requires_grad_() if gradients else value


def run(op, inputs, backend, dtype=None, constant=()):
    """The outputs of the op and the gradient of each floating-point input not named in `constant`, by name."""
    inputs = {k: _cast(v, dtype, k not in constant) for k, v in inputs.items()}
    floats = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor) and v.requires_grad}
    outputs = op(**inputs, backend=backend)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    seeds = [torch.cos(torch.arange(o.numel(), device=o.device) * (i + 1.0)).view_as(o) for i, o in enumerate(outputs)]
    result = {f"output {i}": o.detach() for i, o in enumerate(outputs)}
    if floats:
        loss = sum((o * seed.to(o)).sum() for o, seed in zip(outputs, seeds))
        grads = torch.autograd.grad(loss, list(floats.values()))
        result |= {f"grad of {k}": grad for k, grad in zip(floats, grads)}
    return result


def must_run(backend, why=""):
    """Whether every op has to run on this backend here, in every dtype of DTYPES: then a refusal is a failure.

    A GPU's backends may refuse for what the interpreter cannot do; those of the CPU have no excuse once built, but that
    an op has no kernel in csrc yet.
    """
    if backend == "reference":
        return True
    _, none_of, op = str(why).partition(f"there is no {backend} kernel of ")
    if none_of and not (ROOT / "csrc" / op / "cpu.cpp").exists():
        return False
    return backend == "cpu" and DEVICE == "cpu" and Path(native.__file__).with_name("_cpu.so").exists()


def require(op_name, backend, *args):
    """Skip the test, with the backend's own reason, if the backend refuses these arguments."""
    if why := refusal(op_name, backend, *args):
        assert not must_run(backend, why), f"refused where it always ran: {why}"
        pytest.skip(f"{backend}: {why}")


def check(op, inputs, backend, constant=()):
    """Forward and every gradient against fp64, by the rule of `assert_close`; skips where the backend refuses."""
    try:
        actual = run(op, inputs, backend, constant=constant)
    except NotImplementedError as refused:
        assert not must_run(backend, refused), f"refused where it always ran: {refused}"
        pytest.skip(str(refused))
    rough = run(op, inputs, "reference", constant=constant)
    exact = run(op, inputs, "reference", torch.float64, constant=constant)
    for name in actual:
        assert_close(name, actual[name], exact[name], rough[name])
    again = run(op, inputs, backend, constant=constant)
    for name in actual:
        assert torch.equal(actual[name], again[name]), f"{name} differs from run to run"
