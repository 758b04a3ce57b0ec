"""Ops with arguments of wrong boundaries, sizes, strides, types and ranges: at the kernels, the torch ops and the
public functions. What is not refused must be answered, without touching what it was given."""

from ctypes import string_at

import torch

from revit_kernels.ops.attention.rotary import Rotary
from revit_kernels.packing import Packing

from .op_arguments import CALLS, KERNELS, TORCH_OPS, Making, prepare, torch_ops_of

__all__ = ["attempt", "prepare"]

# NumPy's, Python's and PyTorch's own words for arguments that they cannot take are accepted below the public functions.
PUBLIC = (ValueError, NotImplementedError, TypeError)
PRIVATE = (*PUBLIC, RuntimeError, IndexError, OverflowError, MemoryError)
NO_MEMORY = ("can't allocate memory", '"aten::new_empty", "", stack')  # PyTorch's words, and those of its stable ABI
SIZES = (-(2**63), -(2**31), -7, -1, 0, 1, 2, 3, 5, 2**31 - 1, 2**31, 2**32 + 1, 2**40, 2**62, 2**63 - 1)
NUMBERS = (0.0, -1.0, 1e-12, -1 + 1e-12, 1e-300, 1e300, float("nan"), float("inf"), float("-inf"))
WORDS = ("", "avg", "mean", "token", "max", "bicubic", "bilinear", "gelu", "gelu_tanh", "relu", "int8", "cpu", "fast")
DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
)


# ------------------------------------------------------------------ mutations


def _boundaries(r, x):
    """An integer tensor with some other numbers in it."""
    x = x.clone(memory_format=torch.contiguous_format)
    for _ in range(r.randrange(1, 3)):
        if x.numel() and not x.is_meta:
            low, high = (torch.iinfo(x.dtype).min, torch.iinfo(x.dtype).max)
            number = r.choice((low, high, -1, 0, 1, 7, 10**6, int(x.max()) + 1))
            x.view(-1)[r.randrange(x.numel())] = max(low, min(high, number))
    return x


def _other_tensor(r, x):
    kind = r.randrange(10)
    if kind == 0:
        return x.to(r.choice(DTYPES))
    if kind == 1 and x.ndim:
        axis = r.randrange(x.ndim)
        return x.narrow(axis, 0, max(0, x.shape[axis] - r.choice((1, 2, x.shape[axis]))))
    if kind == 2 and x.ndim:
        axis = r.randrange(x.ndim)
        return torch.cat([x, x.narrow(axis, 0, min(1, x.shape[axis]))], axis)
    if kind == 3:
        return x.flatten() if r.random() < 0.5 else x[None]
    if kind == 4 and x.ndim > 1:  # the same numbers, other strides
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 5 and x.ndim:  # every other number of a larger one
        return torch.stack([x, x], -1)[..., 0]
    if kind == 6 and x.ndim and x.numel():
        axis = r.randrange(x.ndim)
        size = r.choice((x.shape[axis], 2**31, 2**40))
        return x.narrow(axis, 0, 1).expand(*x.shape[:axis], size, *x.shape[axis + 1 :])
    if kind == 7:
        return x.to("meta")
    if kind == 8 and x.is_floating_point() and x.numel() and not x.is_meta:
        x = x.clone(memory_format=torch.contiguous_format)
        x.view(-1)[r.randrange(x.numel())] = r.choice((float("nan"), float("inf"), float("-inf"), 3e38))
        return x
    if not x.is_floating_point() and x.dtype != torch.bool:
        return _boundaries(r, x)
    return x.new_empty(r.choice(((0,), (0, 0), (), (1, 1, 1, 1, 1))))


def mutate(r, value):
    """Another value in its place."""
    if isinstance(value, torch.Tensor):
        if value.numel() > 10**7:  # an expanded one: no copy of it could be made
            return value
        if value.dtype == torch.int32 and r.random() < 0.7:
            return _boundaries(r, value)
        return _other_tensor(r, value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return r.choice(SIZES) if r.random() < 0.7 else min(value + r.choice((-1, 1, 4)), max(SIZES))
    if isinstance(value, float):
        return r.choice(NUMBERS)
    if isinstance(value, str):
        return r.choice(WORDS)
    if isinstance(value, Packing):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):  # a block's weights, or a rotary
        name = r.choice(value._fields)
        return value._replace(**{name: mutate(r, getattr(value, name))})
    if isinstance(value, list | tuple):
        value = list(value)
        kind = r.randrange(4)
        if not value or kind == 0:
            return value[:-1] if r.random() < 0.5 else value + value[-1:]
        at = r.randrange(len(value))
        return [*value[:at], mutate(r, value[at]), *value[at + 1 :]]
    return value


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _bytes(args):
    """The bytes of all tensors that are on this machine, by where they lie, and how many they are."""
    storages = [tensor.untyped_storage() for tensor in _tensors(list(args)) if tensor.device.type == "cpu"]
    places = {(storage.data_ptr(), storage.nbytes()) for storage in storages}
    return {(at, size): string_at(at, size) for at, size in places if size}


def attempt(seed: int) -> str:
    m = Making(seed)
    r = m.random
    torch.set_num_threads(r.choice((1, 2)))
    changes, chance, backend = r.choice((0, 1, 1, 1, 2, 3)), r.random(), None
    if chance < 0.7:
        if chance < 0.5:
            name = r.choice(list(KERNELS))
            args = KERNELS[name](m)
        else:
            name = r.choice([name for name in (*TORCH_OPS, *CALLS) if name != "resize_patch_weight"])
            name, args = r.choice(torch_ops_of(name, m) if name in CALLS else [(name, TORCH_OPS[name](m))])
        for _ in range(changes):
            at = r.randrange(len(args))
            args[at] = None if name in KERNELS and r.random() < 0.02 else mutate(r, args[at])
        call, refusals = lambda: getattr(torch.ops.revit_kernels, name)(*args), PRIVATE
        given = args[1:] if name == "place_cpu" else args
    else:
        name = r.choice(list(CALLS))
        function, named = CALLS[name](m)
        backend = None if name.endswith("fp8") else r.choice((None, "cpu"))
        for _ in range(changes):
            key = r.choice(list(named))
            named[key] = mutate(r, named[key])
        call, refusals = lambda: function(**named, backend=backend), PUBLIC
        given = list(named.values())
        if any(t.dtype not in (torch.float32, torch.bfloat16) for t in _tensors(given) if t.is_floating_point()):
            refusals = PRIVATE  # of the reference, which is plain PyTorch
    if name.endswith("fp8") and any(t.numel() > 10**7 for t in _tensors(given)):
        return "left out: the definition would sum for hours, as asked"
    before = _bytes(given)
    try:
        with torch.no_grad():
            call()
        word = f"{name} answered"
    except (*refusals, RuntimeError, MemoryError) as refused:
        no_memory = isinstance(refused, MemoryError) or any(said in str(refused) for said in NO_MEMORY)
        if not isinstance(refused, refusals) and not no_memory:
            raise
        if not str(refused).strip() and not no_memory:
            raise AssertionError(f"{name} was refused with {type(refused).__name__} and no word") from refused
        if not changes and not (backend and isinstance(refused, NotImplementedError)):
            raise AssertionError(f"{name} refused arguments that fit: {refused}") from refused
        word = f"{name} refused"
    for place, content in before.items():
        assert string_at(*place) == content, f"{name} wrote to its arguments"
    if refusals is PUBLIC and not changes and not name.endswith("fp8") and word.endswith("answered"):
        _compare(function, named, name)
    return word


def _compare(function, named, name):
    """The answer against the definition's in float64: within 200 roundings, or twice as far as the definition itself in
    the dtype of the arguments."""

    def wide(value):
        if isinstance(value, torch.Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, Rotary):
            return value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*map(wide, value))
        return [wide(v) for v in value] if isinstance(value, list) else value

    def found(**options):
        with torch.no_grad():
            answer = function(**options)
        return answer if isinstance(answer, tuple) else (answer,)

    exact = found(**{key: wide(value) for key, value in named.items()}, backend="reference")
    for i, (one, other) in enumerate(zip(found(**named), exact)):
        if not other.numel() or not torch.isfinite(other).all():
            continue
        allowed = 200 * torch.finfo(one.dtype).eps * max(1.0, other.abs().max().item())
        error = (one - other).abs().max().item()
        if error > allowed:
            allowed = 2 * (found(**named, backend="reference")[i] - other).abs().max().item()
        assert error <= allowed, f"{name} answers wrong by {error:.3g}, {allowed:.3g} allowed"
