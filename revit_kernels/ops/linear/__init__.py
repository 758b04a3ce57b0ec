"""Linear layers with what follows them in one call: bias, and activation or gated activation.

Tried here for NVIDIA GPUs: the vendor's product with the rest behind it (`vendor`), and a Triton product with all of it
in the epilogue (`triton`). `choice` says which runs, from measurements where there are some. cuBLASLt itself has a
GELU epilogue for the tanh form only, and none for erf or a gate. A residual add is left to the norm after it.

A CUTLASS route was looked at and left: CuTe's Python DSL (nvidia-cutlass-dsl 4.8.1 with its cu13 libraries, 262 MB)
compiles for sm_90a without a GPU, but has no interpreter, so nothing could be shown right where there is none, and
brings no product of its own; quack-kernels 0.6.5 on top of it has one for Hopper, whose interface offers the tanh GELU
and SiLU but not erf. To be taken up where it can be measured.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from revit_kernels.dispatch import PLAIN, contiguous, one_device, register, same_form
from revit_kernels.ops.derivatives import once_differentiable
from revit_kernels.ops.linear import choice
from revit_kernels.ops.linear.products import finish, keeps

ACTIVATIONS = (None, "gelu", "gelu_tanh", "silu")
GATES = (None, "first", "last")


def _fake_forward(x, weight, bias, activation, gate, recorded, backend):
    out, keep = weight.shape[0], keeps(recorded, activation, gate)
    y = x.new_empty(x.shape[0], out // 2 if gate else out)
    return y, x.new_empty(x.shape[0], out) if keep else x.new_empty(0)


def _fake_backward(dy, x, weight, bias, kept, activation, gate, need_x, need_weight, backend):
    none = x.new_empty(0)
    dx = x.new_empty(x.shape) if need_x else none
    dweight = weight.new_empty(weight.shape) if need_weight else none
    return dx, dweight, none if bias is None else bias.new_empty(bias.shape)


_forward = register(
    "linear",
    "forward",
    "(Tensor x, Tensor weight, Tensor? bias, str? activation, str? gate, bool recorded, str? backend)"
    " -> (Tensor, Tensor)",
    _fake_forward,
    lambda args: choice.forward_order(*args),
    check=lambda args: _check(*args[:5]),
)
_backward = register(
    "linear",
    "backward",
    "(Tensor dy, Tensor x, Tensor weight, Tensor? bias, Tensor kept, str? activation, str? gate,"
    " bool need_x, bool need_weight, str? backend) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    lambda args: choice.backward_order(*args),
    check=lambda args: _check_backward(args),
)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, activation, gate, backend):
        y, kept = _forward(x, weight, bias, activation, gate, True, backend)
        ctx.save_for_backward(x, weight, bias, kept)
        ctx.form = activation, gate, backend
        return y

    @staticmethod
    @once_differentiable("linear")
    def backward(ctx, dy):
        x, weight, bias, kept = ctx.saved_tensors
        activation, gate, backend = ctx.form
        need_x, need_weight, *_ = ctx.needs_input_grad
        args = (x, weight, bias, kept, activation, gate, need_x, need_weight)
        dx, dweight, dbias = _backward(dy.contiguous(), *args, backend)
        return (
            dx if need_x else None,
            dweight if need_weight else None,
            None if bias is None else dbias,
            None,
            None,
            None,
        )


def check(x, weight, bias, activation, gate) -> None:
    """Raise ValueError unless these fit one another; dtypes are the caller's matter."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if gate not in GATES:
        raise ValueError(f"gate must be one of {GATES}, got {gate!r}")
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"x and weight must be (rows, in) and (out, in), got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    out = weight.shape[0]
    if not weight.numel():
        raise ValueError(f"weight must have at least one number, got {tuple(weight.shape)}")
    if gate is not None and out % 2:
        raise ValueError(f"a gated weight has two halves: out must be even, got {out}")
    if bias is not None and (bias.shape != (out,) or not bias.is_floating_point()):
        raise ValueError(f"bias must be ({out},) of a floating-point dtype, got {tuple(bias.shape)} {bias.dtype}")
    one_device(x=x, weight=weight, bias=bias)


def _check(x, weight, bias, activation, gate) -> None:
    check(x, weight, bias, activation, gate)
    if not x.is_floating_point() or x.dtype != weight.dtype:
        raise ValueError(f"x and weight must be of one floating-point dtype, got {x.dtype} and {weight.dtype}")


def _check_backward(args) -> None:
    x, (out, _) = args.x, args.weight.shape if args.weight.ndim == 2 else (0, 0)
    _check(*args[1:4], args.activation, args.gate)
    same_form(x.new_empty(x.shape[0], out // 2 if args.gate else out), dy=args.dy)
    if keeps(True, args.activation, args.gate):
        same_form(x.new_empty(x.shape[0], out), kept=args.kept)
    one_device(x=x, dy=args.dy, kept=args.kept)
    contiguous(dy=args.dy, kept=args.kept)


def _autocasts(x: Tensor) -> bool:
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


def _is_pytorchs(x: Tensor, weight: Tensor, bias: Tensor | None, fuses: bool) -> bool:
    """Whether PyTorch's own functions are the better: a compiler fuses them itself, subclasses know them alone."""
    return (
        torch.compiler.is_compiling()
        or any(type(t) not in PLAIN for t in (x, weight, bias) if t is not None)
        or (x.is_cuda and not fuses)
        or (not x.is_cuda and _autocasts(x))
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    gate: str | None = None,
    backend: str | None = None,
) -> Tensor:
    """activation(x @ weight.T + bias), or with a gate, the product of the activation and the rest.

    x:        (rows, in); rows may be apart, as those of a view
    weight:   (out, in), in the dtype of x
    bias:     (out,) or None for zeros
    activation: None, "gelu" (erf), "gelu_tanh" or "silu"
    gate:     "first" or "last": the product's halves are multiplied, the activation acting on this one only (SwiGLU,
              Shazeer, arXiv:2002.05202, is "first" with "silu")

    Returns (rows, out), or with a gate (rows, out / 2), in the dtype of x, accumulated in fp32: at inference on a CPU
    by our own product (csrc/linear), in training there by oneDNN. `triton` rounds once; the others round after
    the product and after every step that is not in their epilogue. On a CPU, and by `triton`, a row's bits do not
    depend on the other rows; cuBLAS picks its algorithm by their number.
    Under autocast, x, weight and bias are cast to its dtype. Where there is nothing to fuse on a GPU, under
    torch.compile, under autocast on a CPU, and for subclasses of Tensor it is PyTorch's own functions.
    Raises ValueError for a wrong shape or dtype, NotImplementedError where no backend takes the arguments.
    """
    if backend is None and _is_pytorchs(x, weight, bias, activation is not None or gate is not None):
        return finish(F.linear(x, weight, bias), activation, gate)
    if _autocasts(x):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    _check(x, weight, bias, activation, gate)
    args = (x, weight, bias, activation, gate)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:3]):
        return _Linear.apply(*args, backend)
    return _forward(*args, False, backend)[0]


def sample(device="cpu", dtype=torch.float32) -> tuple:
    """The smallest arguments that a backend's `forward` takes, to ask each backend whether it runs here."""
    x = torch.zeros(2, 8, device=device, dtype=dtype)
    return x, x, None, None, None, False
