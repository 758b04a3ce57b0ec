"""Which backend runs an op, and why."""

import importlib
import os
from collections import namedtuple
from contextlib import contextmanager, nullcontext
from functools import cache
from types import ModuleType

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

OPS = ("attention", "block", "layer_norm", "linear", "patch_embed", "pool", "pos_embed", "temporal_attention")
BACKENDS = ("cuda", "flash_attn", "cudnn", "cpu", "vendor", "triton", "reference")  # tried in this order
_requested = os.environ.get("REVIT_BACKEND")


def requested_backend() -> str | None:
    """The backend that REVIT_BACKEND, or `use_backend`, asks for: for every op, without falling back."""
    return _requested or None


@contextmanager
def use_backend(name: str | None):
    """Run every op on this backend, in all threads, until the block ends. None: what was asked for before."""
    global _requested
    before, _requested = _requested, name or _requested
    try:
        yield
    finally:
        _requested = before


def _disabled(names: str) -> frozenset[str]:
    """What REVIT_DISABLE switches off: "attention.cuda,pool.triton". Raises ValueError for what is not op.backend."""
    disabled = frozenset(name.strip() for name in names.split(",") if name.strip())
    for name in disabled:
        op, _, backend = name.partition(".")
        if op not in OPS or backend not in BACKENDS:
            raise ValueError(f"REVIT_DISABLE must name op.backend, of {OPS} and {BACKENDS}, got {name!r}")
    return disabled


DISABLED = _disabled(os.environ.get("REVIT_DISABLE", ""))


@cache
def load(op: str, backend: str) -> ModuleType | str:
    """The module `ops/<op>/<backend>.py`, or the reason that it cannot be imported here."""
    if f"{op}.{backend}" in DISABLED:
        return "switched off by REVIT_DISABLE"
    name = f"revit_kernels.ops.{op}.{backend}"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        return f"there is no {backend} kernel of {op}" if error.name == name else str(error)
    except (ImportError, OSError, AttributeError) as error:
        return str(error)


ARGUMENTS: dict[tuple[str, str], type] = {}  # by op and step: a NamedTuple of the schema's arguments but `backend`


def refusal(op: str, backend: str, *args, step: str = "forward") -> str | None:
    """Why `backend` cannot run a step of `op` on these arguments, the first ones at least; None if it can."""
    why = load(op, backend)
    return why if isinstance(why, str) else _refusal(op, backend, step, ARGUMENTS[op, step](*args))


def _refusal(op, backend, step, args) -> str | None:
    module = load(op, backend)
    if isinstance(module, str):
        return module
    return module.refusal(step, args)


def choose(op: str, backend: str | None, *args, step: str = "forward", order: tuple = BACKENDS) -> ModuleType:
    """The backend named, or the first of `order` that has the step and takes these arguments.

    A named one never falls back. The one that REVIT_BACKEND names for all ops is passed over by an op with an order of
    its own that does not hold it.
    """
    return _choose(op, backend, step, ARGUMENTS[op, step](*args), order)


def _choose(op, backend, step, args, order) -> ModuleType:
    if not backend and (_requested in order or _requested not in BACKENDS):
        backend = _requested
    if backend and backend not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {backend!r}")
    refusals = {}
    for name in (backend,) if backend else order:
        why = _refusal(op, name, step, args)
        if why is None:
            if hasattr(module := load(op, name), step):
                return module
            why = f"has no {step}"
        refusals[name] = why
    raise NotImplementedError(f"{op}: " + "; ".join(f"{name}: {why}" for name, why in refusals.items()))


def register(op: str, step: str, schema: str, fake, order=None, check=None):
    """The torch op `revit_kernels::<op>_<step>`, run by the function `<step>` of the backend chosen.

    A backend has `refusal(step, args)`, where args has the names of the schema, and `<step>(*args)`. The last argument
    of the schema must be `str? backend`. order: gives, from args, the backends in the order in which to try them, where
    that is not the same for all. check: raises ValueError, from args, for what the op's public function does not pass
    on; asked where PyTorch's dispatcher calls the op.
    """
    name = f"{op}_{step}"
    names = [argument.name for argument in torch._C.parse_schema(f"{name}{schema}").arguments]
    arguments = ARGUMENTS[op, step] = namedtuple(f"{op}_{step}", names[:-1], defaults=[None] * len(names[:-1]))
    torch.library.define(f"revit_kernels::{name}", schema)
    torch.library.register_fake(f"revit_kernels::{name}", fake)

    def run(*args):
        args, backend = arguments._make(args[:-1]), args[-1]
        wanted = BACKENDS if order is None else order(args)
        run_step = getattr(_choose(op, backend, step, args, wanted), step)
        if not torch.is_autocast_enabled("cpu") and not torch.is_autocast_enabled("cuda"):
            return run_step(*args)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return run_step(*args)  # an op computes in the dtypes it was given

    def run_checked(*args):
        check(arguments._make(args[:-1]))
        return run(*args)

    implementation = run if check is None else run_checked
    torch.library.impl(f"revit_kernels::{name}", "CompositeExplicitAutograd", implementation)
    registered = getattr(torch.ops.revit_kernels, name).default

    def call(*args):
        """The op; straight to the backend where no tracer, mode or autograd needs to see it as one."""
        if unwatched(*args):
            return run(*args)
        if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
            _tell_counters()
        return registered(*args)

    return call


FORMULAS = {}  # torch op: what a call of it counts, see ops/flops.py


def _tell_counters() -> None:
    """Give a FlopCounterMode that counts now our ops' formulas. Its module, slow to import, is left to its user."""
    for mode in _get_current_dispatch_mode_stack():
        registry = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if registry is not None:
            registry.update(FORMULAS)


# Types of arguments that are no tensor class of somebody's own, which would want to see the op.
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, str, list, tuple))


def unwatched(*args) -> bool:
    """Whether nobody would see an op: no autograd, compiler, tracer, mode, transform, nor tensor of another class;
    and the first tensor has values."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    kinds = set(map(type, args))
    if list in kinds:
        kinds.update(*(map(type, arg) for arg in args if type(arg) is list))
    if not kinds <= PLAIN and any(issubclass(kind, torch.Tensor) for kind in kinds - PLAIN):
        return False
    first = args[0][0] if type(args[0]) is list and args[0] else args[0]
    return not (isinstance(first, torch.Tensor) and first.is_meta)


def without_autocast(device: torch.device):
    """torch.autocast switched off on the device; tensors without values (device "meta") know none."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def contiguous(**tensors) -> None:
    """Raise ValueError unless all tensors (None is passed over) are contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}")


def contiguous_rows(**tensors) -> None:
    """Raise ValueError unless the last axis of all tensors (None is passed over) is contiguous."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"the last axis of {name} must be contiguous, got strides {tensor.stride()}")


def same_form(wanted: torch.Tensor, **tensors) -> None:
    """Raise ValueError unless all tensors have the shape and the dtype of `wanted`."""
    for name, tensor in tensors.items():
        if tensor.shape != wanted.shape or tensor.dtype != wanted.dtype:
            raise ValueError(
                f"{name} must be {tuple(wanted.shape)} of {wanted.dtype}, got {tuple(tensor.shape)} {tensor.dtype}"
            )


def one_device(**tensors) -> None:
    """Raise ValueError unless all tensors (None is passed over) are on one device."""
    first = None
    for tensor in tensors.values():
        if tensor is None:
            continue
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            break
    else:
        return
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    places = ", ".join(f"{name} on {device}" for name, device in devices.items())
    raise ValueError(f"all tensors must be on one device, got {places}")
