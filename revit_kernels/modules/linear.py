"""Calling a submodule through the fast path, and stepping aside when somebody wrapped or hooked it."""

from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from revit_kernels import gemm

PLAIN = ("torch.nn.modules.", "timm.", "revit_kernels.")


def is_plain(module: nn.Module, *names: str) -> bool:
    """Whether the module is of a class so named (not a subclass), calls nobody's hook, and computes its own weights.

    Names, not classes: timm's LayerNorm or LayerScale is as plain as ours, and timm need not be installed to say so.
    The names count only in these packages: the Linear of peft or bitsandbytes computes something else.
    """
    return (
        type(module).__name__ in names
        and type(module).__module__.startswith(PLAIN)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
        and not hasattr(module, "parametrizations")
        and not global_hooks._has_any_global_hook()
    )


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) for a Linear, through the vendor's fastest matrix product. x: (..., in)"""
    if not is_plain(module, "Linear"):
        return module(x)
    return gemm.linear(x.reshape(-1, x.shape[-1]), module.weight, module.bias).view(
        *x.shape[:-1], module.weight.shape[0]
    )


def linear_then(module: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """activation(module(x)), in one call where the activation is GELU and both are plain. x: (..., in)"""
    if not (is_plain(module, "Linear") and is_plain(activation, "GELU", "GELUTanh")):
        return activation(linear(module, x))
    tanh = type(activation).__name__ == "GELUTanh" or getattr(activation, "approximate", "none") == "tanh"
    y = gemm.linear(x.reshape(-1, x.shape[-1]), module.weight, module.bias, "gelu_tanh" if tanh else "gelu")
    return y.view(*x.shape[:-1], module.weight.shape[0])
