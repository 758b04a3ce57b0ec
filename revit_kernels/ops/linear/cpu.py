"""Our own product on CPUs, at inference: csrc/linear. Behind it runs what its epilogue lacks."""

from revit_kernels import native
from revit_kernels.ops.linear import reference
from revit_kernels.ops.linear.panels import ACTIVATIONS, KINDS, multiply, pack_weight
from revit_kernels.ops.linear.products import finish, keeps, rows_are_independent

native.load("cpu")


def refusal(step, args):
    if step not in ("forward", "backward"):
        return "has no e4m3"
    x, weight = args.x, args.weight
    if not x.is_cpu:
        return f"needs CPU tensors, got one on {x.device}"
    if step == "backward" or (args.recorded and rows_are_independent()):
        return "is for inference: in training oneDNN is as fast"
    if x.dtype not in KINDS or x.dtype != weight.dtype:
        return f"no kernel for {x.dtype} and a weight of {weight.dtype}"
    return None


def forward(x, weight, bias, activation, gate, recorded):
    fused = activation if activation in ACTIVATIONS and gate is None and not recorded else None
    h = multiply(x, pack_weight(weight, bias, None, x.dtype), len(weight), fused)
    y = finish(h, None if fused else activation, gate)
    return y, h if keeps(recorded, activation, gate) else x.new_empty(0)


backward = reference.backward
