"""The engine of a model of clips."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from revit_kernels.clips import ClipGrid, ClipPacking
from revit_kernels.engines.engine import Engine, _without_blocks
from revit_kernels.engines.packed_clips import PackedClipBlocks, refusal
from revit_kernels.models.video import Clips
from revit_kernels.modules.layer_norm import add


class ClipEngine(Engine):
    """A model of clips made ready to answer: `engine(clips, ...)` gives what `model(clips, ...)` gives.

    A snapshot of the model's weights, as `Engine` is. On a CPU it packs them once (temporal_fc and the projection
    before it as one) and runs all blocks in one call. Where the model cannot be packed, `engine.refusal` says why, and
    the engine runs the model as it is.

    model: a VarLenTimeSformer or another ClipModel
    stale: what to do in a call where the model changed: "raise" StaleEngine, or "refresh"; see `Engine`

    Many threads may call one engine. Raises ValueError for another `stale`, NotImplementedError for a quantization:
    there is none for clips.
    """

    def __init__(self, model: nn.Module, *, quantize: str | None = None, stale: str = "raise"):
        if quantize is not None:
            raise NotImplementedError(f"an engine of clips cannot be quantized, got {quantize!r}")
        super().__init__(model, stale=stale)

    def _packed(self) -> tuple[nn.Module, PackedClipBlocks | None]:
        self.refusal = refusal(self.model)
        if self.refusal is None:
            return _without_blocks(self.model), PackedClipBlocks(self.model)
        return self.model, None

    def _after_blocks(self, clips, grids, packing, channels_last, run_length):
        """The module to run, the tokens after the last block, their packing, and whether the answer is dense."""
        running, blocks = self._current(clips)
        frames, packing, dense = running._inputs(clips, grids, packing, channels_last)
        known = () if blocks is None else (blocks.positions(running, packing.menu), blocks.patch)
        x = running._tokens(frames, packing, channels_last, *known)
        x, packing = running._without_runs(x, frames, packing, run_length, channels_last)
        dense = dense and run_length is None
        if blocks is None:
            return running, add(*running.run_blocks([x, None, None], packing)), packing, dense
        return running, blocks.run(x, running._of_blocks(packing), 0, None), packing, dense

    @torch.no_grad()
    def __call__(
        self,
        clips: Clips,
        *,
        grids: Sequence[ClipGrid] | None = None,
        packing: ClipPacking | None = None,
        channels_last: bool = False,
        run_length: float | None = None,
    ) -> Any:
        """(clips, classes), one row per clip in the order given; arguments as of the model."""
        running, x, packing, _ = self._after_blocks(clips, grids, packing, channels_last, run_length)
        return running.finish([x, None, None], packing)

    @torch.no_grad()
    def features(
        self,
        clips: Clips,
        *,
        grids: Sequence[ClipGrid] | None = None,
        packing: ClipPacking | None = None,
        channels_last: bool = False,
        run_length: float | None = None,
    ) -> Any:
        """What `model.forward_features` gives."""
        running, x, packing, dense = self._after_blocks(clips, grids, packing, channels_last, run_length)
        found = running._features(x, packing)
        return running._dense(found) if dense else found

    @torch.no_grad()
    def embed(self, clips: Clips, packing: ClipPacking, channels_last: bool = False) -> Tensor:
        """As of the model."""
        running, blocks = self._current(clips)
        if blocks is None:
            return running.embed(clips, packing, channels_last)
        frames, packing, _ = running._inputs(clips, None, packing, channels_last)
        return running._tokens(frames, packing, channels_last, blocks.positions(running, packing.menu), blocks.patch)

    @torch.no_grad()
    def run_blocks(
        self, stream: list[Tensor | None], packing: ClipPacking, start: int = 0, stop: int | None = None
    ) -> list[Tensor | None]:
        """As of the model, without visits."""
        running, blocks = self._current(stream[0])
        if blocks is None:
            return running.run_blocks(stream, packing, start, stop)
        return [blocks.run(add(*stream), running._of_blocks(packing), start, stop), None, None]
