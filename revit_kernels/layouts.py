"""What is made of weights on a CPU, such as the layout that its matrix product reads fastest, kept while they stay."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from revit_kernels import native


class _Kept(NamedTuple):
    """A packed layout, and what the tensors it was made of were then."""

    state: tuple
    fingerprint: tuple | None  # None: taken on trust
    packed: object


def _state(tensors: tuple[Tensor | None, ...]) -> tuple:
    return tuple(
        None if t is None else (t.data_ptr(), t.shape, t.dtype, 0 if t.is_inference() else t._version) for t in tensors
    )


@cache
def _fingerprint_op():
    """The op that reads a weight once and sums it up in one number, or None where it was not built."""
    try:
        native.load("cpu")
    except (ImportError, OSError):
        return None
    return torch.ops.revit_kernels.fingerprint_cpu.default


def _fingerprint(tensors: tuple[Tensor | None, ...]) -> tuple:
    return tuple(None if t is None else _fingerprint_op()(t.detach()) for t in tensors)


KINDS = {torch.float32: 0, torch.bfloat16: 1, "int8": 2}


def panels(weight: Tensor, bias: Tensor | None, gamma: Tensor | None, kind) -> Tensor:
    """The weight (out, in), with what is added to and multiplied with its product (out,), as csrc/gemm packs them."""
    floats = (None if t is None else t.detach().float().contiguous() for t in (bias, gamma))
    return torch.ops.revit_kernels.pack_cpu.default(weight.detach().contiguous(), *floats, KINDS[kind])


_all: "WeakSet[Layouts]" = WeakSet()
_changes = 0


def changes() -> int:
    """How often layouts were trusted or forgotten so far: who keeps what `trusted` gave keeps it while this stays."""
    return _changes


class Layouts:
    """What `pack(*tensors, *how)` made of a weight, the first of the tensors, and of what is packed beside it (a bias).

    Kept as long as the weight lives. Every get reads the tensors to see whether they changed;
    after `trust` it asks their versions only, which every write raises but one through `.data`.
    """

    def __init__(self, pack: Callable, most: int | None = None):
        """most: how many layouts of one weight are kept, of any number that may be asked for"""
        self._pack, self._most = pack, most
        self._kept = WeakIdKeyDictionary()  # weight: {how: _Kept}
        _all.add(self)

    def _keep(self, tensors, how, state, fingerprint, make=None) -> object:
        kept = _Kept(state, fingerprint, make() if make else self._pack(*tensors, *how))
        of_weight = self._kept.setdefault(tensors[0], {})
        of_weight[how] = kept
        while self._most and len(of_weight) > self._most:
            del of_weight[next(iter(of_weight))]
        return kept.packed

    def get(self, *tensors: Tensor | None, how: tuple = (), make: Callable | None = None) -> object | None:
        """The layout, made anew where a tensor changed; None where nothing can be kept: for temporaries.

        make: makes it in place of `pack`
        """
        kept, state = self._kept.get(tensors[0], {}).get(how), _state(tensors)
        if kept is not None and kept.state == state and kept.fingerprint is None:
            return kept.packed
        lasting = all(t is None or (isinstance(t, torch.nn.Parameter) and t.is_contiguous()) for t in tensors)
        if not lasting or _fingerprint_op() is None:
            return None
        fingerprint = _fingerprint(tensors)
        same = kept is not None and kept.fingerprint == fingerprint
        if same and all(a is b is None or a[:3] == b[:3] for a, b in zip(kept.state, state)):
            return kept.packed
        return self._keep(tensors, how, state, fingerprint, make)

    def trusted(self, *tensors: Tensor | None, how: tuple = ()) -> object | None:
        """The layout, if there is one that is trusted, and versions and memory are as they were; makes none."""
        kept = self._kept.get(tensors[0], {}).get(how)
        return kept.packed if kept and kept.fingerprint is None and kept.state == _state(tensors) else None

    def trust(self, *tensors: Tensor | None, how: tuple = ()) -> None:
        """Make the layout now, and read the tensors no more."""
        global _changes
        _changes += 1
        # Writes to an inference tensor raise no version.
        trusted = not any(t is not None and t.is_inference() for t in tensors)
        self._keep(tensors, how, _state(tensors), None if trusted else _fingerprint(tensors))


def forget(weight: Tensor) -> None:
    """Keep no layout of this weight any longer."""
    global _changes
    _changes += 1
    for layouts in _all:
        layouts._kept.pop(weight, None)
