"""Pooling: one row per image out of its packed tokens."""

import torch
from torch import Tensor

from revit_kernels.dispatch import contiguous, contiguous_rows, one_device, register
from revit_kernels.ops.derivatives import once_differentiable

KINDS = ("token", "avg", "max", "avgmax")

_forward = register(
    "pool",
    "forward",
    "(Tensor x, Tensor cu_seqlens, str kind, int prefix, bool include_prefix, str? backend) -> Tensor",
    lambda x, cu_seqlens, kind, prefix, include_prefix, backend: x.new_empty(cu_seqlens.shape[0] - 1, x.shape[1]),
    check=lambda args: _check_as_laid_out(args),
)
_backward = register(
    "pool",
    "backward",
    "(Tensor grad, Tensor? x, Tensor cu_seqlens, SymInt tokens, str kind, int prefix, bool include_prefix,"
    " str? backend) -> Tensor",
    lambda grad, x, cu_seqlens, tokens, kind, prefix, include_prefix, backend: grad.new_empty(tokens, grad.shape[1]),
    check=lambda args: _check_backward(args),
)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cu_seqlens, kind, prefix, include_prefix, backend):
        ctx.save_for_backward(x if kind in ("max", "avgmax") else None, cu_seqlens)
        ctx.tokens, ctx.rest = x.shape[0], (kind, prefix, include_prefix, backend)
        return _forward(x, cu_seqlens, kind, prefix, include_prefix, backend)

    @staticmethod
    @once_differentiable("pool")
    def backward(ctx, grad):
        x, cu_seqlens = ctx.saved_tensors
        return _backward(grad.contiguous(), x, cu_seqlens, ctx.tokens, *ctx.rest), None, None, None, None, None


def _check(x, cu_seqlens, kind, prefix):
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be (tokens, dim) of a floating-point dtype, got {tuple(x.shape)} {x.dtype}")
    if cu_seqlens.ndim != 1 or not cu_seqlens.shape[0] or cu_seqlens.dtype != torch.int32:
        raise ValueError(
            f"cu_seqlens must be (images + 1,) of torch.int32, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if prefix < 0:
        raise ValueError(f"prefix must be at least 0, got {prefix}")
    one_device(x=x, cu_seqlens=cu_seqlens)


def _check_as_laid_out(args):
    """Raise ValueError for what the public function refuses or copies first: GPU kernels do not check tensors."""
    _check(args.x, args.cu_seqlens, args.kind, args.prefix)
    contiguous_rows(x=args.x)


def _check_backward(args):
    grad, x, tokens = args.grad, args.x, args.tokens
    images = args.cu_seqlens.shape[0] - 1 if args.cu_seqlens.ndim == 1 else -1
    if grad.ndim != 2 or grad.shape[0] != images:
        raise ValueError(f"grad must be ({images}, dim), of the images of cu_seqlens, got {tuple(grad.shape)}")
    if tokens < 0:
        raise ValueError(f"tokens must be at least 0, got {tokens}")
    if x is None and args.kind in ("max", "avgmax"):
        raise ValueError(f"the gradient of kind={args.kind!r} needs x")
    _check(grad if x is None else x, args.cu_seqlens, args.kind, args.prefix)
    if x is not None and x.shape != (tokens, grad.shape[1]):
        raise ValueError(f"x must be ({tokens}, {grad.shape[1]}), got {tuple(x.shape)}")
    if x is not None and x.dtype != grad.dtype:
        raise ValueError(f"grad must be of the dtype of x, {x.dtype}, got {grad.dtype}")
    one_device(grad=grad, x=x, cu_seqlens=args.cu_seqlens)
    contiguous_rows(x=x)
    contiguous(grad=grad)


def pool(
    x: Tensor,
    cu_seqlens: Tensor,
    kind: str,
    *,
    prefix: int = 1,
    include_prefix: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Pool each image's tokens into one row, as timm's `global_pool` does.

    x:              (tokens, dim); rows may lie apart
    cu_seqlens:     (images + 1,) int32, where each image begins
    kind:           "token" (the first token), "avg", "max" or "avgmax" (their mean)
    prefix:         how many tokens of each image come before its patches
    include_prefix: whether "avg", "max" and "avgmax" pool the prefix tokens too

    Returns (images, dim) in the dtype of x, computed in fp32 (fp64 where x is); zeros for an image with no tokens to
    pool. The gradient of a maximum is shared evenly among the tokens that attain it.
    Raises ValueError for a wrong shape, dtype or kind, NotImplementedError where no backend takes the arguments.
    """
    _check(x, cu_seqlens, kind, prefix)
    x = x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()
    if torch.is_grad_enabled() and x.requires_grad:
        return _Pool.apply(x, cu_seqlens, kind, prefix, include_prefix, backend)
    return _forward(x, cu_seqlens, kind, prefix, include_prefix, backend)


def sample(device="cpu", dtype=torch.float32) -> tuple:
    """The smallest arguments that a backend's `forward` takes, to ask each backend whether it runs here."""
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32, device=device)
    return torch.zeros(2, 8, device=device, dtype=dtype), cu_seqlens, "avg", 1, False
