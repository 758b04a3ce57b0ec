"""The engine of CUDA graphs: choice, packing, encoder and head as one graph per budget of tokens."""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from revit_kernels.device_cache import to_device
from revit_kernels.engines.answers import Answers
from revit_kernels.engines.engine import STALE, StaleEngine, state_of, watched_of
from revit_kernels.modules.lengths import Grid, cells
from revit_kernels.packing import Packing

WARMUP = 3  # forwards on a side stream ahead of a capture: they fill caches and compile kernels, which a capture cannot


def ladder(fewest: int, most: int, waste: float) -> tuple[int, ...]:
    """The fewest budgets, ascending, such that for any number of tokens from `fewest` to `most` the smallest budget
    that holds them is at most `waste`, a share of the budget, empty."""
    if not 0 < waste < 1:
        raise ValueError(f"waste must be a share between 0 and 1, got {waste}")
    budgets = [most]
    while (least := math.ceil(budgets[-1] * (1 - waste))) > fewest:
        budgets.append(least - 1)
    return tuple(reversed(budgets))


class _Batch:
    """Images of one call, and room for their answers, which come from one replay or several."""

    def __init__(self, images: Tensor, logits: Tensor):
        self.images, self.left, self.rows = images, len(images), 0.0
        self.logits = logits.new_empty(len(images), *logits.shape[1:])
        self.choice, self.tokens = torch.empty(2, len(images), dtype=torch.int64, device=logits.device).unbind()

    def answers(self) -> Answers:
        return Answers(self.logits, self.choice, self.tokens, self.rows)


class _Part(NamedTuple):
    """The images `start` to `stop` of a batch."""

    batch: _Batch
    start: int
    stop: int


class _Flight(NamedTuple):
    """A replay that was queued: what it answers, how many of those images fitted (a copy to the host that may still be
    under way), and the event behind that copy."""

    parts: list[_Part]
    fitted: Tensor
    copied: torch.cuda.Event | None


def _on_cuda(device: torch.device) -> bool:
    return device.type == "cuda"


def _uncapturable(device: torch.device, modules: Iterable[nn.Module]) -> str | None:
    """Why a graph of these modules would not be what a call of them is; None where it would."""
    if not _on_cuda(device):
        return f"CUDA graphs need a CUDA device, the model is on {device}"
    for root in modules:
        for name, module in root.named_modules():
            where = f"{type(root).__name__}{'.' if name else ''}{name}"
            if module.training:
                return f"{where} is in training mode"
            if module._forward_hooks or module._forward_pre_hooks:
                return f"{where} has hooks, and a graph calls none"
    return None


class CapturedEngine:
    """An engine for batches of at most so many images of one size: one CUDA graph per budget of tokens.

    A graph holds everything from the images to the logits: the choice of lengths, the packing made from it on the
    device, embedding, blocks, pooling and head. A call copies its images into fixed buffers and replays the graph of
    one budget: a handful of launches, whatever the model's depth, the number of images and their lengths.

        engine = model.engine(images=64)
        logits = engine(images, grids=[(14, 14), (7, 7), ...])      # what model(images, grids=...) gives
        answers = engine.answer(images, [0, 2, 1, ...])             # the same by menu rows, with what it cost

        engine = model.engine(images=64, choose=choose, mix=(0.2, 0.3, 0.5))        # lengths chosen on the device
        logits = engine(images)                             # the budget that the mix needs: see Answers.fits
        for answers in engine.answers(batches): ...         # the images beyond a budget go into the next graph

    model:   a VarLenViT
    choose:  from the images (slots, ...) to (slots,) menu rows, on the device and without waiting for it. It sees every
             slot of the batch; what it says of slots without an image is not used
    images:  slots of a batch; more are split
    budgets: rows of the packed buffers; if not given, as many as it takes to keep to `waste`
    waste:   the largest share of the rows computed that may be no image's: of every batch whose lengths the host knows,
             and of the tokens expected where the device chooses
    mix:     share of each menu row in what `choose` gives; the longest alone, if not given, which wastes the most
    margin:  standard deviations of a batch's tokens that its budget keeps free beyond the mix's mean
    size:    (height, width) of the images, in pixels; what the model was made for, if not given
    dtype:   of the images
    channels_last: images are (images, height, width, channels)
    menu:    the grids to choose from; the model's own, if not given
    stale:   what to do in a call after the model changed so that its graphs would answer with what it was: "raise"
             StaleEngine, or "refresh", which captures anew

    Where there can be no graph, `refusal` says why, a warning says it once, and the very same computation (buffers,
    packing, budgets) runs eagerly. What a model cannot do on a packing made on the device is an error either way.

    A graph reads the parameters where they were when it was captured: values written in place (an optimizer's step,
    `load_state_dict`) are seen by the next replay. After `.to()`, `load_state_dict(assign=True)`, `train()`, or with
    another module, parameter or hook, in the model or in a `choose` that is a module, the engine is stale.

    No gradients are recorded, and autocast does not reach inside. Calls share the buffers: one at a time, though on any
    stream. Images in pinned memory are copied without waiting: leave them alone until the answers are there.

    Raises ValueError for budgets, mix or waste that fit neither menu nor slots, and for images, grids or a choice that
    are not of the shape, dtype and menu captured.
    """

    def __init__(
        self,
        model: nn.Module,
        choose: Callable[[Tensor], Tensor] | None = None,
        *,
        images: int = 64,
        budgets: Sequence[int] | None = None,
        waste: float = 0.25,
        mix: Sequence[float] | None = None,
        margin: float = 2.0,
        size: tuple[int, int] | None = None,
        dtype: torch.dtype = torch.uint8,
        channels_last: bool = False,
        menu: Sequence[Grid] | None = None,
        stale: str = "raise",
    ):
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        if stale not in STALE:
            raise ValueError(f"stale must be one of {STALE}, got {stale!r}")
        self.stale = stale
        self.model, self.choose, self.slots = model, choose, images
        self.menu = tuple(map(tuple, menu or model.menu or (model.patch_embed.grid_size,)))
        self.channels_last = channels_last
        size = tuple(size or model.patch_embed.img_size)
        self._shape = (images, *size, model.in_chans) if channels_last else (images, model.in_chans, *size)
        self._dtype = dtype
        self.lengths = tuple(model.num_prefix_tokens + cells(grid) for grid in self.menu)
        self._set_mix(mix, margin)
        longest = max(self.lengths)
        if budgets is not None:
            self.budgets = tuple(sorted({int(budget) for budget in budgets}))
        elif choose is not None:
            self.budgets = ladder(longest, self.expected(images), waste)
        else:
            self.budgets = ladder(min(self.lengths), images * longest, waste)
        # Where the device chooses, the first image must fit at any length, or it would wait forever.
        if not self.budgets or (self.budgets[-1] if choose is None else self.budgets[0]) < longest:
            which = "the largest budget" if choose is None else "every budget"
            raise ValueError(f"{which} must hold the longest image's {longest} tokens, got {self.budgets}")
        self.refresh()

    def _set_mix(self, mix: Sequence[float] | None, margin: float) -> None:
        if mix is None:
            mix = [float(length == max(self.lengths)) for length in self.lengths]
        if len(mix) != len(self.menu) or not (min(mix) >= 0 and 0 < sum(mix) < math.inf) or not margin >= 0:
            raise ValueError(
                f"mix must be {len(self.menu)} shares, none below 0 and not all 0, and margin at least 0, got "
                f"{tuple(mix)} and {margin}"
            )
        shares = [share / sum(mix) for share in mix]
        self._mean = sum(share * n for share, n in zip(shares, self.lengths))
        variance = sum(share * (n - self._mean) ** 2 for share, n in zip(shares, self.lengths))
        self._spread = margin * math.sqrt(variance)

    # ------------------------------------------------------------------ capture

    @torch.inference_mode(False)
    @torch.no_grad()
    def refresh(self) -> None:
        """Capture every budget anew, where the model is now; `waste` begins again."""
        modules = [m for m in (self.model, self.choose) if isinstance(m, nn.Module)]
        watched = [watched_of(module) for module in modules]
        self._snapshot = watched, self._state(watched)
        self.device = self.model._device()
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self._stream = None
        self._images = torch.zeros(self._shape, dtype=self._dtype, device=self.device)
        self._given = torch.full((self.slots,), -1, dtype=torch.int32, device=self.device)  # a menu row; -1: no image
        self._count = 0  # the images of `_given`, where the device chooses
        self._choice, self._tokens = torch.zeros(2, self.slots, dtype=torch.int64, device=self.device).unbind()
        logits, _ = self._forward(self.budgets[0])  # what fails here fails eagerly too: it is no refusal
        if not isinstance(logits, Tensor):
            raise ValueError("the model must pool its tokens: one answer an image is captured")
        self._logits = torch.zeros_like(logits)
        self._total = torch.zeros((), dtype=torch.int64, device=self.device)
        # Held, so that a graph never reads what was freed when a parameter was replaced.
        self._held = [t.detach() for m in modules for t in chain(m.parameters(), m.buffers())]
        self.refusal: str | None = _uncapturable(self.device, modules) or self._capture()
        if self.refusal:
            warnings.warn(f"CapturedEngine runs without CUDA graphs: {self.refusal}", RuntimeWarning, stacklevel=5)
        self._total.zero_()
        self._rows = 0

    def _capture(self) -> str | None:
        """A graph for each budget; returns why there are none, if it fails."""
        current, graphs, why = torch.cuda.current_stream(self.device), {}, None
        # Two streams: cuBLAS keeps a workspace for each, and that of the captures must lie in the graphs' own memory.
        warm, side = torch.cuda.Stream(self.device), torch.cuda.Stream(self.device)
        pool = torch.cuda.graph_pool_handle()
        warm.wait_stream(current)
        try:
            with torch.cuda.device(self.device):
                for budget in reversed(self.budgets):  # the largest first: the others fit into its memory
                    with torch.cuda.stream(warm):
                        for _ in range(WARMUP):
                            self._step(budget)
                    graphs[budget] = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graphs[budget], pool=pool, stream=side):
                        self._step(budget)
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a capture that fails at its end leaves its own stream set
            while error.__context__ is not None:  # ending a broken capture fails once more, and says less
                error = error.__context__
            graphs, why = {}, f"the capture failed: {' '.join(str(error).split())[:200]}"
        current.wait_stream(warm)
        self._graphs = graphs
        return why

    def _forward(self, budget: int) -> tuple[Tensor, Packing]:
        with torch.autocast(self.device.type, enabled=False):
            choice = self._given
            if self.choose is not None:
                chosen = self.choose(self._images)
                if chosen.shape != choice.shape or chosen.is_floating_point() or chosen.dtype == torch.bool:
                    raise ValueError(
                        f"choose must give ({self.slots},) menu rows, got {tuple(chosen.shape)} {chosen.dtype}"
                    )
                # A row below 0 would leave an image without tokens: it would wait for room forever.
                choice = chosen.clamp(min=0).masked_fill(choice < 0, -1)
            packing = Packing.from_choice(choice, self.menu, self.model.num_prefix_tokens, capacity=budget)
            return self.model(self._images, packing=packing, channels_last=self.channels_last), packing

    def _step(self, budget: int) -> None:
        """What a graph holds: from the fixed buffers to the fixed buffers.

        The results are copied out of the graphs' memory, which all of them share: another replay writes over it.
        """
        logits, packing = self._forward(budget)
        rows = packing.cu_seqlens
        self._logits.copy_(logits)
        self._choice.copy_(packing.length_index)
        self._tokens.copy_(rows[1:] - rows[:-1])
        self._total.add_(rows[-1])

    # ------------------------------------------------------------------ calls

    @property
    def waste(self) -> float:
        """The share of all rows computed since the capture that were no image's. Waits for the device."""
        return 1 - self._total.item() / self._rows if self._rows else 0.0

    def expected(self, images: int) -> int:
        """The tokens that so many images are given room for, where the device chooses: at least the longest's."""
        longest = max(self.lengths)
        wanted = math.ceil(images * self._mean + self._spread * math.sqrt(images))
        return max(longest, min(wanted, images * longest))

    def _state(self, watched: list) -> list:
        return [state_of(of_module, self.model, written=False) for of_module in watched]

    def _current(self) -> None:
        watched, state = self._snapshot
        if self._state(watched) != state:
            if self.stale == "raise":
                raise StaleEngine("the model changed since its engine was made: call engine.refresh()")
            self.refresh()

    def __call__(
        self, images: Tensor, *, grids: Sequence[Grid] | None = None, packing: Packing | None = None
    ) -> Tensor:
        """(images, classes), one row per image in the order given; nothing waits for the device.

        images:  (images, ...) of the size and dtype captured, in any number, on the device or the host
        grids:   (rows, columns) of each image, of the menu; or `packing`, which has them. Where the device chooses,
                 neither; else the grid of the images' size, if neither is given
        """
        if packing is not None:
            grids = packing.grids
            if grids is None:
                raise ValueError("packing must be one whose grids the host knows: give the engine a `choose` instead")
        if self.choose is None and grids is None:
            shape = self._shape[1:3] if self.channels_last else self._shape[2:]
            own = tuple(pixels // patch for pixels, patch in zip(shape, self.model.patch_embed.patch_size))
            grids = [own] * len(images)
        if grids is None:
            return self.answer(images).logits
        unknown = [grid for grid in grids if tuple(grid) not in self.menu]
        if unknown:
            raise ValueError(f"grids must be of the menu {self.menu}, got {tuple(unknown[0])}")
        return self.answer(images, [self.menu.index(tuple(grid)) for grid in grids]).logits

    def features(self, images: Tensor, **options: Any) -> Any:
        """What `model.forward_features` gives, launch by launch: graphs hold the pooled answers alone."""
        with torch.no_grad():
            return self.model.forward_features(images, channels_last=self.channels_last, **options)

    @torch.no_grad()
    def answer(self, images: Tensor, choice: Sequence[int] | Tensor | None = None) -> Answers:
        """Answers to the images, in order; nothing waits for the device.

        images: (images, ...) of the size and dtype captured, in any number, on the device or the host
        choice: (images,) menu rows that the host knows, where there is no `choose`

        Where the device chooses, an image beyond its budget has no answer: see `Answers.fits`, or use `answers`.
        """
        self._current()
        batch = self._batch(images)
        rows = self._known(choice, len(images))
        start = 0
        while start < len(images):
            stop = min(start + self.slots, len(images))
            if rows is not None:
                held = accumulate(self.lengths[row] for row in rows[start:stop])
                stop = start + sum(tokens <= self.budgets[-1] for tokens in held)
            self._run([_Part(batch, start, stop)], None if rows is None else rows[start:stop])
            start = stop
        return batch.answers()

    @torch.no_grad()
    def answers(self, batches: Iterable[Tensor], ahead: int = 1) -> Iterator[Answers]:
        """Answers to batches of images, in order, each with an answer to every one of its images.

        batches: of (images, ...), each of any number of images; taken as slots are free
        ahead:   replays that are queued before the host looks how many images of the first fitted

        The slots are filled across batches. One number a replay is copied to the host behind it and read when `ahead`
        more are queued, so the device has work while the host waits. Images that found no room go into the next graph,
        ahead of new ones. Only where the device chooses: ValueError otherwise.
        """
        if self.choose is None:
            raise ValueError(
                "answers is for lengths chosen on the device: call `answer` with a choice, which is never too much"
            )
        if ahead < 0:
            raise ValueError(f"ahead must be at least 0, got {ahead}")
        self._current()
        source, order = iter(batches), deque()
        waiting: deque[_Part] = deque()
        flying: deque[_Flight] = deque()
        while True:
            while source is not None and sum(part.stop - part.start for part in waiting) < self.slots:
                images = next(source, None)
                if images is None:
                    source = None
                    break
                order.append(self._batch(images))
                if len(images):
                    waiting.append(_Part(order[-1], 0, len(images)))
            if waiting:
                flying.append(self._fly(waiting))
            elif flying:  # nothing is left to queue, until what is in flight overflows
                self._land(flying.popleft(), waiting)
            if len(flying) > ahead:
                self._land(flying.popleft(), waiting)
            while order and not order[0].left:
                yield order.popleft().answers()
            if source is None and not waiting and not flying:
                return

    def _fly(self, waiting: deque[_Part]) -> _Flight:
        """Queue a replay of as many images as there are slots."""
        parts, free = [], self.slots
        while waiting and free:
            batch, start, stop = waiting.popleft()
            if stop - start > free:
                waiting.appendleft(_Part(batch, start + free, stop))
                stop = start + free
            parts.append(_Part(batch, start, stop))
            free -= stop - start
        self._run(parts)
        fitted = (self._tokens > 0).sum().to("cpu", non_blocking=True)  # into pinned memory
        copied = None
        if _on_cuda(self.device):
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(self.device))
        return _Flight(parts, fitted, copied)

    def _land(self, flight: _Flight, waiting: deque[_Part]) -> None:
        """See how many images fitted: a packing leaves out the last ones. They wait again, ahead of the others."""
        if flight.copied is not None:
            flight.copied.synchronize()
        fitted, again = int(flight.fitted), []
        for batch, start, stop in flight.parts:
            answered = min(fitted, stop - start)
            fitted -= answered
            batch.left -= answered
            if start + answered < stop:
                again.append(_Part(batch, start + answered, stop))
        waiting.extendleft(reversed(again))

    def _run(self, parts: list[_Part], given: Sequence[int] | None = None) -> None:
        """Replay the smallest budget that holds these images, and copy their answers to their batches."""
        count = sum(stop - start for _, start, stop in parts)
        tokens = self.expected(count) if given is None else sum(self.lengths[row] for row in given)
        budget = next((b for b in self.budgets if b >= tokens), self.budgets[-1])
        if _on_cuda(self.device):
            current = torch.cuda.current_stream(self.device)
            if self._stream is not None and self._stream != current:
                current.wait_stream(self._stream)  # which may still use the buffers
            self._stream = current
        at = 0
        for batch, start, stop in parts:
            self._images[at : at + stop - start].copy_(batch.images[start:stop], non_blocking=True)
            at += stop - start
        self._give(count, given)
        graph = self._graphs.get(budget)
        if graph is None:
            self._step(budget)
        else:
            graph.replay()
        self._rows += budget
        at = 0
        for batch, start, stop in parts:
            for name in ("logits", "choice", "tokens"):
                getattr(batch, name)[start:stop].copy_(getattr(self, f"_{name}")[at : at + stop - start])
            batch.rows += budget * (stop - start) / count
            at += stop - start

    def _give(self, count: int, given: Sequence[int] | None) -> None:
        """Which slots hold an image and, where the host knows, its menu row."""
        if given is not None:
            column = torch.tensor([*given] + [-1] * (self.slots - count), dtype=torch.int32)
            self._given.copy_(to_device([column], self.device)[0])
        elif count != self._count:
            self._given[:count].zero_()
            self._given[count:].fill_(-1)
            self._count = count

    def _batch(self, images: Tensor) -> _Batch:
        if tuple(images.shape[1:]) != self._shape[1:] or images.dtype != self._dtype:
            expected = f"{('images', *self._shape[1:])} {self._dtype}".replace("'", "")
            raise ValueError(f"images must be {expected}, got {tuple(images.shape)} {images.dtype}")
        return _Batch(images, self._logits)

    def _known(self, choice, images: int) -> list[int] | None:
        """The choice as numbers, checked; None where the device makes it."""
        if self.choose is not None:
            if choice is not None:
                raise ValueError("the device chooses by `choose`: give no choice")
            return None
        if isinstance(choice, Tensor) and choice.device.type != "cpu":
            raise ValueError(f"choice must be known to the host, got a tensor on {choice.device}: give a `choose`")
        rows = None if choice is None else torch.as_tensor(choice).tolist()
        if rows is None or len(rows) != images or not all(r in range(len(self.menu)) for r in rows):
            raise ValueError(f"choice must be {images} rows, 0 to {len(self.menu) - 1} of the menu, got {choice}")
        return rows
