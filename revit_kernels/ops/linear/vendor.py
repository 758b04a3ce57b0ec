"""The vendor's matrix product: cuBLASLt on NVIDIA GPUs, oneDNN on CPUs. What its epilogue lacks runs after it."""

import torch

from revit_kernels.ops.e4m3 import E4M3_SINCE
from revit_kernels.ops.linear.products import activate, derivative_products, finish, keeps, product


def refusal(step, args):
    if step == "fp8":
        return _fp8_refusal(args)
    if not args.x.is_floating_point():
        return f"no product of {args.x.dtype}"
    return None


def _fp8_refusal(args):
    x = args.x
    if not x.is_cuda:
        return f"an e4m3 product needs a CUDA tensor, got one on {x.device}"
    if (found := torch.cuda.get_device_capability(x.device)) < E4M3_SINCE:
        return "an e4m3 product needs compute capability {}.{}, {} has {}.{}".format(*E4M3_SINCE, x.device, *found)
    if args.x_scale.shape[1] != 1:
        return f"takes one scale a row, got {args.x_scale.shape[1]}"
    if args.quantized:
        return "gives no e4m3"
    if args.dtype != torch.bfloat16:
        return f"with a scale a row it gives torch.bfloat16 alone, wanted {args.dtype}"
    if any(size % 16 for size in args.weight.shape):
        return f"weight must be of multiples of 16, got {tuple(args.weight.shape)}"
    return None


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)


def forward(x, weight, bias, activation, gate, recorded):
    bias = None if bias is None else bias.to(x.dtype)
    keep = keeps(recorded, activation, gate)
    if x.is_cuda and bias is not None and activation == "gelu_tanh" and gate is None and not keep:
        # The only GELU that cuBLASLt's epilogue has.
        return torch._addmm_activation(bias, x, weight.t(), use_gelu=True), x.new_empty(0)
    h = product(x, weight, bias)
    return finish(h, activation, gate), h if keep else x.new_empty(0)


def _slope_times(dy, h, activation):
    if activation is None:
        return dy
    if activation == "silu":
        return torch.ops.aten.silu_backward(dy, h)
    return torch.ops.aten.gelu_backward(dy, h, approximate="tanh" if activation == "gelu_tanh" else "none")


def backward(dy, x, weight, bias, kept, activation, gate, need_x, need_weight):
    if gate is not None:
        first, second = kept.chunk(2, -1)
        acted, other = (first, second) if gate == "first" else (second, first)
        parts = _slope_times(dy * other, acted, activation), dy * activate(acted, activation)
        dh = torch.cat(parts if gate == "first" else parts[::-1], -1)
    else:
        dh = _slope_times(dy, kept, activation)
    dbias = x.new_empty(0) if bias is None else dh.sum(0, dtype=_wide(x.dtype)).to(bias.dtype)
    return *derivative_products(dh, x, weight, need_x, need_weight), dbias


def fp8(x, x_scale, weight, weight_scale, bias, activation, gate, dtype, quantized):
    bias = None if bias is None else bias.to(dtype)
    scales = {"scale_a": x_scale, "scale_b": weight_scale[None]}
    h = torch._scaled_mm(x, weight.t(), **scales, bias=bias, out_dtype=dtype, use_fast_accum=True)
    return finish(h, activation, gate), x_scale.new_empty(0)
