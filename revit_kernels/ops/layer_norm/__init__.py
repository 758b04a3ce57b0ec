"""Token-length-aware LayerNorm (ReViT, arXiv:2112.01686), with the residual add and LayerScale before it.

Each token length has an affine of its own; statistics are those of each token.
"""

import torch
from torch import Tensor

from revit_kernels.dispatch import contiguous, one_device, register, same_form
from revit_kernels.ops.derivatives import once_differentiable
from revit_kernels.ops.e4m3 import E4M3


def _fake_forward(x, weight, bias, row, branch, gamma, eps, rms, backend):
    statistics = torch.promote_types(x.dtype, torch.float32)
    total = x.new_empty(0) if branch is None else torch.empty_like(x)
    return torch.empty_like(x), total, *(x.new_empty(x.shape[0], dtype=statistics) for _ in range(2))


def _fake_backward(dy, dsum, sum, weight, bias, row, branch, gamma, mean, rstd, rms, backend):
    like = (sum, branch, weight, bias, gamma)
    return tuple(mean.new_empty(0) if tensor is None else torch.empty_like(tensor) for tensor in like)


def _fake_fp8(x, weight, bias, row, branch, gamma, eps, rms, backend):
    total = x.new_empty(0) if branch is None else torch.empty_like(x)
    return torch.empty_like(x, dtype=E4M3), x.new_empty(x.shape[0], 1, dtype=torch.float32), total


_forward = register(
    "layer_norm",
    "forward",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? row, Tensor? branch, Tensor? gamma, float eps, bool rms,"
    " str? backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_forward,
    check=lambda args: _check_as_laid_out(args),
)
_backward = register(
    "layer_norm",
    "backward",
    "(Tensor dy, Tensor? dsum, Tensor sum, Tensor? weight, Tensor? bias, Tensor? row, Tensor? branch, Tensor? gamma,"
    " Tensor mean, Tensor rstd, bool rms, str? backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_backward,
    check=lambda args: _check_backward(args),
)
_fp8 = register(
    "layer_norm",
    "fp8",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? row, Tensor? branch, Tensor? gamma, float eps, bool rms,"
    " str? backend) -> (Tensor, Tensor, Tensor)",
    _fake_fp8,
    check=lambda args: _check_as_laid_out(args),
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, row, branch, gamma, eps, rms, backend):
        y, total, mean, rstd = _forward(x, weight, bias, row, branch, gamma, eps, rms, backend)
        scaled = None if gamma is None else branch  # without gamma, nothing needs the branch again
        ctx.save_for_backward(x if branch is None else total, weight, bias, row, scaled, gamma, mean, rstd)
        ctx.rms, ctx.backend = rms, backend
        ctx.branch_dtype = None if branch is None else branch.dtype
        ctx.set_materialize_grads(False)
        return y if branch is None else (y, total)

    @staticmethod
    @once_differentiable("layer_norm")
    def backward(ctx, dy, dsum=None):
        total, weight, bias, row, branch, gamma, mean, rstd = ctx.saved_tensors
        if dy is None and dsum is None:
            return (None,) * 9
        dy = torch.zeros_like(total) if dy is None else dy.contiguous()
        dsum = None if dsum is None else dsum.contiguous()
        dx, dbranch, dweight, dbias, dgamma = _backward(
            dy, dsum, total, weight, bias, row, branch, gamma, mean, rstd, ctx.rms, ctx.backend
        )
        if branch is None:
            dbranch = None if ctx.branch_dtype is None else dx.to(ctx.branch_dtype)
        grads = (None if p is None else g for p, g in ((weight, dweight), (bias, dbias)))
        return dx, *grads, None, dbranch, None if gamma is None else dgamma, None, None, None


def _check(x, weight, bias, row, branch, gamma):
    if not _plain(x, weight, bias, row, branch, gamma):
        _check_each(x, weight, bias, row, branch, gamma)
    one_device(x=x, weight=weight, bias=bias, row=row, branch=branch, gamma=gamma)


def _plain(x, weight, bias, row, branch, gamma) -> bool:
    """Whether these fit together, beyond doubt: what every block of a model asks twice, so at little cost."""
    shape = x.shape
    if len(shape) != 2 or not shape[1] or not x.dtype.is_floating_point or weight is None:
        return False
    affine = weight.shape
    return (
        (len(affine) == 1 or (len(affine) == 2 and affine[0] > 0))
        and affine[-1] == shape[1]
        and (bias is None or bias.shape == affine)
        and (row is None or (row.shape == shape[:1] and row.dtype == torch.int32))
        and (gamma is None if branch is None else branch.shape == shape)
        and (gamma is None or gamma.shape == shape[1:])
    )


def _check_each(x, weight, bias, row, branch, gamma):
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(f"x must be (tokens, dim) of a floating-point dtype, got {tuple(x.shape)} {x.dtype}")
    tokens, dim = x.shape
    if not dim:
        raise ValueError(f"x must have at least one column, got {tuple(x.shape)}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and (parameter.ndim not in (1, 2) or parameter.shape[-1] != dim):
            raise ValueError(f"{name} must be (lengths, {dim}) or ({dim},), got {tuple(parameter.shape)}")
        if parameter is not None and parameter.ndim == 2 and not len(parameter):
            raise ValueError(f"{name} must have at least one row, got {tuple(parameter.shape)}")
    if weight is not None and bias is not None and weight.shape != bias.shape:
        raise ValueError(f"bias must have the shape of weight, {tuple(weight.shape)}, got {tuple(bias.shape)}")
    if row is not None and (row.shape != (tokens,) or row.dtype != torch.int32):
        raise ValueError(f"row must be ({tokens},) of torch.int32, got {tuple(row.shape)} {row.dtype}")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch must have the shape of x, {tuple(x.shape)}, got {tuple(branch.shape)}")
    if gamma is not None and branch is None:
        raise ValueError("gamma scales the branch: it needs one")
    if gamma is not None and gamma.shape != (dim,):
        raise ValueError(f"gamma must be ({dim},), got {tuple(gamma.shape)}")


def _check_as_laid_out(args):
    """What the public functions see to by themselves, too: kernels in Triton read what they are told to."""
    _check(*args[:6])
    _check_rows(args)
    contiguous(x=args.x, row=args.row, branch=args.branch)


def _check_rows(args):
    for name in ("weight", "bias"):
        if (parameter := getattr(args, name)) is not None and parameter.ndim != 2:
            raise ValueError(f"{name} must be (lengths, {parameter.shape[-1]}), got {tuple(parameter.shape)}")
    for name in ("weight", "bias", "branch", "gamma"):
        if (tensor := getattr(args, name)) is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be of a floating-point dtype, got {tensor.dtype}")


def _check_backward(args):
    if args.gamma is None and args.branch is not None:
        raise ValueError("the branch has a gradient of its own only where there is a gamma")
    _check(args.sum, args.weight, args.bias, args.row, args.branch, args.gamma)
    _check_rows(args)
    same_form(args.sum, dy=args.dy, **({} if args.dsum is None else {"dsum": args.dsum}))
    of_row = args.sum.new_empty(args.sum.shape[0], dtype=torch.promote_types(args.sum.dtype, torch.float32))
    same_form(of_row, mean=args.mean, rstd=args.rstd)
    one_device(sum=args.sum, dy=args.dy, dsum=args.dsum, mean=args.mean, rstd=args.rstd)
    tensors = {name: getattr(args, name) for name in ("dy", "dsum", "sum", "row", "branch", "mean", "rstd")}
    contiguous(**tensors)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Tensor | None = None,
    *,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Add the scaled branch, normalise each token, then scale and shift it with the affine of its token length.

    x:      (tokens, dim)
    weight: (lengths, dim), or (dim,) for one affine, or None for ones
    bias:   like weight, or None for zeros
    row:    (tokens,) int32, which affine each token uses (with one affine, only the sign counts); -1 for a token of
            no image, whose results are zeros and whose values are never read; None where every token uses row 0
    branch: (tokens, dim), what the block before computed, of any floating-point dtype, or None
    gamma:  (dim,), the LayerScale of the branch, or None for ones
    rms:    x * rsqrt(mean(x^2) + eps) in place of the standardisation, as timm's RmsNorm

    Returns y (tokens, dim) in the dtype of x; with a branch, (y, sum) where sum = x + gamma * branch, computed in fp32
    and rounded once to the dtype of x. Statistics are fp32, those of the rounded sum; all is fp64 where x is.
    Raises ValueError for a wrong shape or dtype, NotImplementedError where no backend takes the arguments.
    """
    _check(x, weight, bias, row, branch, gamma)
    weight, bias = [p.unsqueeze(0) if p is not None and p.ndim == 1 else p for p in (weight, bias)]
    x = x.contiguous()
    row, branch = [t if t is None else t.contiguous() for t in (row, branch)]
    args = (x, weight, bias, row, branch, gamma, eps, rms, backend)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, branch, gamma)):
        return _LayerNorm.apply(*args)
    y, total, _, _ = _forward(*args)
    return y if branch is None else (y, total)


def layer_norm_fp8(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    row: Tensor | None = None,
    *,
    branch: Tensor | None = None,
    gamma: Tensor | None = None,
    eps: float = 1e-6,
    rms: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`layer_norm` with y quantized before it leaves the chip, for a product in e4m3: no gradients.

    Returns y (tokens, dim) in float8_e4m3fn, its scale (tokens, 1) in float32, by which y is to be multiplied, and
    the sum, which is x itself where there is no branch. y is quantized from its wide dtype.
    """
    _check(x, weight, bias, row, branch, gamma)
    weight, bias = (p[None] if p is not None and p.ndim == 1 else p for p in (weight, bias))
    x = x.contiguous()
    row, branch = (t if t is None else t.contiguous() for t in (row, branch))
    y, scale, total = _fp8(x, weight, bias, row, branch, gamma, eps, rms, backend)
    return y, scale, x if branch is None else total


def sample(device="cpu", dtype=torch.float32) -> tuple:
    """The smallest arguments that a backend's `forward` takes, to ask each backend whether it runs here."""
    x, affine = torch.zeros(2, 8, device=device, dtype=dtype), torch.zeros(1, 8, device=device, dtype=dtype)
    return x, affine, affine, torch.zeros(2, dtype=torch.int32, device=device), x, affine[0], 1e-6, False
