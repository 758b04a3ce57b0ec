"""The definition of the op, in plain PyTorch: every other backend is tested against this file."""

import torch

from revit_kernels.ops.e4m3 import E4M3, E4M3_MAX


def refusal(step, args):
    return None


def _wide(x):
    return torch.promote_types(x.dtype, torch.float32)


def _affine(parameter, row, like):
    """The parameter's row for each token, in the wide dtype: (tokens, dim)."""
    index = torch.zeros(like.shape[0], dtype=torch.long, device=like.device) if row is None else row.long()
    return parameter[index.clamp(0, parameter.shape[0] - 1)].to(like.dtype)


def _used(tensor, row):
    """The tensor with the rows of unused tokens set to zero."""
    return tensor if row is None else torch.where(row[:, None] >= 0, tensor, 0)


def _normalised(x, weight, bias, row, branch, gamma, eps, rms):
    """y in the wide dtype, the sum in the dtype of x, mean and rstd."""
    wide = _wide(x)
    total = x.to(wide)
    if branch is not None:
        scale = 1 if gamma is None else gamma.to(wide)
        total = (total + scale * branch.to(wide)).to(x.dtype).to(wide)
    total = _used(total, row)
    mean = torch.zeros_like(total[:, 0]) if rms else total.mean(1)
    centred = total - mean[:, None]
    rstd = torch.rsqrt(centred.square().mean(1) + eps)
    y = centred * rstd[:, None]
    if weight is not None:
        y = y * _affine(weight, row, y)
    if bias is not None:
        y = y + _affine(bias, row, y)
    y = _used(y, row)
    return y, x.new_empty(0) if branch is None else total.to(x.dtype), mean, rstd


def forward(x, *args):
    y, total, mean, rstd = _normalised(x, *args)
    return y.to(x.dtype), total, mean, rstd


def fp8(x, *args):
    y, total, _, _ = _normalised(x, *args)
    scale = y.abs().amax(1, keepdim=True) / E4M3_MAX
    scale = torch.where(scale == 0, 1, scale)
    return (y / scale).to(E4M3), scale.float(), total


def backward(dy, dsum, sum, weight, bias, row, branch, gamma, mean, rstd, rms):
    wide = _wide(sum)
    none = mean.new_empty(0)
    dy, total = _used(dy.to(wide), row), _used(sum.to(wide), row)
    normed = (total - mean[:, None]) * rstd[:, None]
    scaled = dy if weight is None else dy * _affine(weight, row, dy)
    along_ones = 0 if rms else scaled.mean(1, keepdim=True)
    ds = (scaled - along_ones - normed * (scaled * normed).mean(1, keepdim=True)) * rstd[:, None]
    if dsum is not None:
        ds = ds + _used(dsum.to(wide), row)

    def grouped(parameter, contributions):
        if parameter is None:
            return none
        index = torch.zeros(len(dy), dtype=torch.long, device=dy.device) if row is None else row.long()
        zeros = torch.zeros_like(parameter, dtype=wide)
        return zeros.index_add(0, index.clamp(0, len(parameter) - 1), contributions).to(parameter.dtype)

    dbranch = dgamma = none
    if branch is not None:
        dbranch = (ds * gamma.to(wide)).to(branch.dtype)
        dgamma = (ds * _used(branch.to(wide), row)).sum(0).to(gamma.dtype)
    return ds.to(sum.dtype), dbranch, grouped(weight, dy * normed), grouped(bias, dy), dgamma
