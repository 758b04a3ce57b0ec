"""The engine of a model of clips."""

from __future__ import annotations

import torch
from torch import nn

from revit_kernels.engines.engine import STALE, StaleEngine, state_of, watched_of


class ClipEngine:
    """A model of clips made ready to answer: `engine(clips, ...)` gives what `model(clips, ...)` gives.

    model: a VarLenTimeSformer or another ClipModel
    stale: what to do in a call where the model changed: "raise" StaleEngine, or "refresh"; see `Engine`

    Raises ValueError for another `stale`, NotImplementedError for a quantization: there is none for clips.
    """

    def __init__(self, model: nn.Module, *, quantize: str | None = None, stale: str = "raise"):
        if quantize is not None:
            raise NotImplementedError(f"an engine of clips cannot be quantized, got {quantize!r}")
        if stale not in STALE:
            raise ValueError(f"stale must be one of {STALE}, got {stale!r}")
        self.model, self.quantize, self.stale = model, quantize, stale
        self.refresh()

    def __getattr__(self, name: str):
        """What describes the model (its menu, its classes, ...) describes its engine."""
        if name.startswith("__") or name == "model":
            raise AttributeError(name)
        return getattr(self.model, name)

    @torch.no_grad()
    def refresh(self) -> None:
        """Take the model's weights anew."""
        watched = watched_of(self.model)
        self._snapshot = watched, state_of(watched, self.model)

    def _current(self) -> nn.Module:
        watched, state = self._snapshot
        if state_of(watched, self.model) != state:
            if self.stale == "raise":
                raise StaleEngine("the model changed since its engine was made: call engine.refresh()")
            self.refresh()
        return self.model

    @torch.no_grad()
    def __call__(self, clips, *, grids=None, packing=None, channels_last: bool = False):
        """(clips, classes), one row per clip in the order given; arguments as of the model."""
        return self._current()(clips, grids=grids, packing=packing, channels_last=channels_last)

    @torch.no_grad()
    def features(self, clips, *, grids=None, packing=None, channels_last: bool = False):
        """What `model.forward_features` gives."""
        return self._current().forward_features(clips, grids=grids, packing=packing, channels_last=channels_last)

    @torch.no_grad()
    def embed(self, clips, packing, channels_last: bool = False):
        """As of the model."""
        return self._current().embed(clips, packing, channels_last)

    @torch.no_grad()
    def run_blocks(self, stream, packing, start: int = 0, stop: int | None = None):
        """As of the model, without visits."""
        return self._current().run_blocks(stream, packing, start, stop)

    @torch.no_grad()
    def finish(self, stream, packing):
        """As of the model."""
        return self._current().finish(stream, packing)

    @torch.no_grad()
    def forward_head(self, x, pre_logits: bool = False):
        """As of the model."""
        return self._current().forward_head(x, pre_logits)
