"""The engine: a model made ready to answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from revit_kernels.engines.packed import HOOKS, TRAINING, PackedBlocks, refusal
from revit_kernels.grids import Grid
from revit_kernels.models.embedding import Images
from revit_kernels.models.quantize import fp8
from revit_kernels.modules.layer_norm import add
from revit_kernels.modules.linear import traced
from revit_kernels.packing import PackedTokens, Packing

QUANTIZE = (None, "int8", "fp8")
STALE = ("raise", "refresh")
PLAIN = int, float, str, bool, type(None)  # attributes that are compared by value

_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)


class StaleEngine(RuntimeError):
    """The model changed after its engine was made."""


class Engine:
    """A model made ready to answer, for inference: `engine(images, ...)` gives what `model(images, ...)` gives.

    An engine is a snapshot of the model's weights, as an exported model is. On a CPU it packs them once and runs all
    blocks, the final norm and the head in one call; the model itself packs each weight in each call. Where the model
    is not made of plain pre-norm blocks, is hooked, has a method replaced, is on a GPU or in training mode,
    `engine.refusal` says so, and the engine runs the model as it is: that is no snapshot then.

    model:    a VarLenViT
    quantize: None; "int8": products of the blocks in int8 (CPUs with AVX512-VNNI and AVX512-BF16), activations
              quantized per token; or "fp8": in e4m3 (GPUs from compute capability 8.9; emulated elsewhere). The model
              itself is left as it is
    stale:    what to do in a call where the model went through `train()`, or the versions, memory, identities or
              requires_grad of its parameters, numbers and texts among its modules' attributes, or hooks on these, show
              a change: "raise" StaleEngine, or "refresh". A write through `.data` (PEFT merges so: of a model that was
              not frozen before, requires_grad tells), a NumPy view or, without `train()`, a fused optimizer raises no
              version and goes unnoticed: call `refresh()` after one

    Many threads may call one engine. Raises ValueError for another `quantize` or `stale`, NotImplementedError where the
    model cannot be quantized here.
    """

    def __init__(self, model: nn.Module, *, quantize: str | None = None, stale: str = "raise"):
        if quantize not in QUANTIZE:
            raise ValueError(f"quantize must be one of {QUANTIZE}, got {quantize!r}")
        if stale not in STALE:
            raise ValueError(f"stale must be one of {STALE}, got {stale!r}")
        self.model, self.quantize, self.stale = model, quantize, stale
        self.refresh()

    def __getattr__(self, name: str):
        """What describes the model (its menu, its classes, ...) describes its engine."""
        if name.startswith("__") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    def __reduce__(self):
        return _remade, (type(self), self.model, self.quantize, self.stale)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the model's weights anew."""
        watched = watched_of(self.model)
        state = state_of(watched, self.model)  # of before: what is written while weights are packed shows in a call
        self._snapshot = watched, state, *self._packed()

    def _packed(self) -> tuple[nn.Module, Any]:
        """The module to run and the packed blocks, None where they cannot be: `refusal` says why."""
        model = self.model
        self.refusal = refusal(model, "int8" if self.quantize == "int8" else None)
        if self.quantize == "fp8":
            return fp8(copy.deepcopy(model)), None
        if self.refusal is None:
            return _without_blocks(model), PackedBlocks(model, self.quantize)
        if self.quantize:
            raise NotImplementedError(f"{self.quantize}: {self.refusal}")
        return model, None

    def _current(self, x: Any) -> tuple[Any, Any]:
        """The module to run and the packed blocks, of weights that are still the model's as far as can be seen.

        x: images or tokens. Raises NotImplementedError where a tracer follows them.
        """
        if traced(x):
            raise NotImplementedError("an engine is not traced, exported or transformed: use its model, engine.model")
        watched, state, running, _ = self._snapshot
        if running is not self.model and state_of(watched, self.model) != state:
            if self.stale == "raise":
                raise StaleEngine("the model changed since its engine was made: call engine.refresh()")
            self.refresh()
        elif self.refusal == TRAINING and self.stale == "refresh" and not self.model.training:
            self.refresh()
        if _has_any_global_hook() and self._snapshot[3] is not None:  # which is to see every module
            if self.quantize:
                raise NotImplementedError(f"an engine in {self.quantize} calls no modules for a global hook to see")
            return self.model, None
        return self._snapshot[2:]

    # ------------------------------------------------------------------ answers

    @torch.no_grad()
    def __call__(
        self,
        images: Images,
        *,
        grids: Sequence[Grid] | None = None,
        packing: Packing | None = None,
        max_tokens: int | None = None,
        channels_last: bool = False,
    ) -> Any:
        """(images, classes), one row per image in the order given; arguments as of VarLenViT."""
        running, blocks = self._current(images)
        options = {"grids": grids, "packing": packing, "max_tokens": max_tokens, "channels_last": channels_last}
        if blocks is None:
            return running(images, **{k: v for k, v in options.items() if v is not None and v is not False})
        images, packing, dense = running._inputs(images, **options)
        x = _embedded(running, blocks, images, packing, channels_last)
        if blocks.head is not None:
            return running._answered(blocks.answers(x, packing), packing)
        x = blocks.run(x, packing, 0, None)
        return running.finish([_dense(x, packing) if dense else x, None, None], packing)

    @torch.no_grad()
    def features(
        self,
        images: Images,
        *,
        grids: Sequence[Grid] | None = None,
        packing: Packing | None = None,
        max_tokens: int | None = None,
        channels_last: bool = False,
    ) -> Any:
        """What `model.forward_features` gives: (images, length, dim) for a dense batch, else PackedTokens."""
        running, blocks = self._current(images)
        options = {"grids": grids, "packing": packing, "max_tokens": max_tokens, "channels_last": channels_last}
        if blocks is None:
            return running.forward_features(images, **options)
        images, packing, dense = running._inputs(images, **options)
        x = blocks.run(_embedded(running, blocks, images, packing, channels_last), packing, 0, None)
        return running.normalised([_dense(x, packing) if dense else x, None, None], packing, dense)

    # ------------------------------------------------------------------ in parts, for what goes on from an early block

    @torch.no_grad()
    def embed(self, images: Images, packing: Packing, channels_last: bool = False) -> Tensor:
        """As VarLenViT.embed."""
        running, blocks = self._current(images)
        if blocks is None:
            return running.embed(images, packing, channels_last)
        images, packing, _ = running._inputs(images, None, packing, None, channels_last)
        return _embedded(running, blocks, images, packing, channels_last)

    @torch.no_grad()
    def run_blocks(
        self, stream: list[Tensor | None], packing: Packing, start: int = 0, stop: int | None = None
    ) -> list[Tensor | None]:
        """As VarLenViT.run_blocks, without masks and visits."""
        running, blocks = self._current(stream[0])
        if blocks is None:
            return running.run_blocks(stream, packing, start, stop)
        x = add(*stream)
        return [blocks.run(x.flatten(0, -2), packing, start, stop).view_as(x), None, None]

    @torch.no_grad()
    def finish(self, stream: list[Tensor | None], packing: Packing) -> Tensor:
        """As VarLenViT.finish."""
        return self._current(stream[0])[0].finish(stream, packing)

    def forward_head(self, x: Tensor | PackedTokens, pre_logits: bool = False) -> Any:
        """As VarLenViT.forward_head."""
        with torch.no_grad():
            return self._current(x)[0].forward_head(x, pre_logits)


def engine_of(model: Any) -> Any:
    """The model's engine, refreshed where the model changes; an engine itself as it is."""
    return model.engine(stale="refresh") if isinstance(model, nn.Module) else model


def _remade(engine, model, quantize, stale):
    return engine(model, quantize=quantize, stale=stale)


def watched_of(model: nn.Module) -> tuple[list, ...]:
    """What the model keeps its modules, parameters, attributes and hooks in, for `state_of`."""
    modules = list(model.modules())
    watched = [m._modules for m in modules if m._modules], [m._parameters for m in modules if m._parameters]
    hooks, values = [m.__dict__[name] for m in modules for name in HOOKS], []
    for own in (owned := [m.__dict__ for m in modules]):
        if names := [name for name, value in own.items() if type(value) in PLAIN and name not in _OF_EVERY_MODULE]:
            values.append((itemgetter(*names), own))
    return *watched, modules, owned, hooks, values


def state_of(watched: tuple[list, ...], model: nn.Module, written: bool = True) -> tuple:
    """What shows a change: which modules and parameters there are, where these lie, how often they were written to, and
    whether they are frozen (as PEFT leaves the weights that it merged into); of what classes the modules are, their
    attributes' number and plain values, and whether any is hooked.

    written: False leaves out writes in place
    """
    modules, parameters = (chain.from_iterable(map(dict.values, dicts)) for dicts in watched[:2])
    parameters = [p for p in parameters if p is not None]
    versions = [(p.requires_grad, 0 if p.is_inference() else p._version) for p in parameters] if written else []
    identities = [*map(id, modules)], [*map(id, parameters)]
    touched = [*map(type, watched[2])], [*map(len, watched[3])], any(watched[4]), [get(own) for get, own in watched[5]]
    return model.times_trained, touched, identities, versions, [*map(Tensor.data_ptr, parameters)]


def _without_blocks(model: nn.Module) -> nn.Module:
    """A copy of all that is not in the blocks; its `blocks` are the model's own, and are not run."""
    shell = copy.copy(model)
    shell.__dict__ = model.__dict__ | {"_modules": {}, "_parameters": {}, "_buffers": model._buffers.copy()}
    for name, parameter in model._parameters.items():
        copied = None if parameter is None else nn.Parameter(parameter.detach().clone(), requires_grad=False)
        shell._parameters[name] = copied
    for name, module in model._modules.items():
        own = module is None or name == "blocks"
        shell._modules[name] = module if own else copy.deepcopy(module).requires_grad_(False)
    return shell


def _embedded(running, blocks, images, packing, channels_last) -> Tensor:
    positions = blocks.positions(running, packing.menu)
    return running._tokens(images, packing, False, channels_last, positions, blocks.patch)[0]


def _dense(x: Tensor, packing) -> Tensor:
    return x.view(packing.images, packing.max_seqlen, x.shape[-1])
