"""Calling a submodule through the fast path, and stepping aside when somebody wrapped, hooked or traces it."""

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn.modules import module as global_hooks

from revit_kernels import ops

PLAIN = ("torch.nn.modules.", "timm.", "revit_kernels.")


def is_plain(module: nn.Module, *names: str) -> bool:
    """Whether the module is plain by itself, and no global hook watches all modules."""
    return is_plain_itself(module, *names) and not global_hooks._has_any_global_hook()


def is_plain_itself(module: nn.Module, *names: str) -> bool:
    """Whether the module is of a class so named (not a subclass), has no hook, and computes with its own weights.

    Names, not classes: timm's LayerNorm or LayerScale is as plain as ours, and timm need not be installed to say so.
    The names count only in these packages: the Linear of peft or bitsandbytes computes something else.
    """
    own = module.__dict__  # asked some twenty times a block: past nn.Module's slow attributes
    return (
        type(module).__name__ in names
        and type(module).__module__.startswith(PLAIN)
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and "forward" not in own
        and "_compiled_call_impl" not in own  # of `module.compile()`
        and "parametrizations" not in own["_modules"]
    )


def is_known(*sizes) -> bool:
    """Whether these are numbers, for certain: a tracer, or a graph compiled for all sizes, knows some by name only."""
    if not torch.compiler.is_compiling():
        return all(type(size) is int for size in sizes)
    from torch.fx.experimental.symbolic_shapes import has_static_value  # slow to import, and loaded by then

    return all([has_static_value(size) for size in sizes])


def traced(x) -> bool:
    """Whether a tracer or a transform that knows torch's own ops alone follows what becomes of x: torch.fx, ONNX's
    exporters, torch.export, torch.func, forward-mode derivatives; and torch.compile, of a dense batch whose images'
    sizes vary. Submodules are then called, by torch's ops."""
    if torch.compiler.is_compiling():
        exporting = torch.compiler._is_exporting_flag  # torch.compile takes is_exporting() to be true
        return exporting or (isinstance(x, Tensor) and x.ndim > 2 and not is_known(*x.shape[1:]))
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return transformed or torch.jit.is_tracing() or forward_ad._current_level >= 0 or isinstance(x, Proxy)


def takes_packing(module: nn.Module) -> bool:
    """Whether the module's forward is one of ours that is told the packing: not one that somebody put in its place."""
    return "forward" not in module.__dict__ and type(module).forward.__module__.startswith("revit_kernels.")


def _product(x: Tensor, module: nn.Linear, activation: str | None = None, gate: str | None = None) -> Tensor:
    y = ops.linear(x.reshape(-1, x.shape[-1]), module.weight, module.bias, activation=activation, gate=gate)
    return y.view(*x.shape[:-1], y.shape[-1])


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) for a Linear, by the op where it is plain. x: (..., in)"""
    return _product(x, module) if is_plain(module, "Linear") and not traced(x) else module(x)


ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}


def name_of(activation: nn.Module) -> str | None:
    """What the ops call an activation of this class, whether or not somebody hooked it; None if they do not know it."""
    if getattr(activation, "approximate", "none") == "tanh":
        return "gelu_tanh"
    return ACTIVATIONS.get(type(activation).__name__)


def activation_name(activation: nn.Module) -> str | None:
    """What the op `linear` calls the activation, or None where it has no name for it, or somebody hooked it."""
    return name_of(activation) if is_plain(activation, "GELU", "GELUTanh", "SiLU") else None


def linear_then(module: nn.Module, activation: nn.Module, x: Tensor) -> Tensor:
    """activation(module(x)), in one call where both are plain. x: (..., in)"""
    name = None if traced(x) else activation_name(activation)
    if name is not None and is_plain(module, "Fp8Linear"):
        return module(x, name)
    if name is None or not is_plain(module, "Linear"):
        return activation(linear(module, x))
    return _product(x, module, name)


def linear_gated(module: nn.Module, activation: nn.Module, x: Tensor, gate: str) -> Tensor:
    """module(x) in two halves, of which `gate`, "first" or "last", goes through the activation and gates the other."""
    name = None if traced(x) else activation_name(activation)
    if name is not None and is_plain(module, "Linear"):
        return _product(x, module, name, gate)
    first, second = linear(module, x).chunk(2, -1)
    return activation(first) * second if gate == "first" else first * activation(second)
