"""What all models of clips share: clips to packed tokens, through the blocks, to answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from revit_kernels import ops
from revit_kernels.clips import ClipGrid, ClipPacking, check_clip_grid
from revit_kernels.dispatch import without_autocast
from revit_kernels.grids import native_grid
from revit_kernels.models.resizable import NORMS, Resizable, fill_lengths, start_lengths
from revit_kernels.models.run_length import differences
from revit_kernels.models.surgery import _is_affine
from revit_kernels.modules.layer_norm import add, apply_norm, normalise
from revit_kernels.modules.lengths import check_menu, tokens_of
from revit_kernels.modules.linear import is_plain, is_plain_itself, linear, takes_packing
from revit_kernels.modules.patch_embed import resize_mode
from revit_kernels.packing import PackedTokens, Packing

if TYPE_CHECKING:
    from typing_extensions import Self

    from revit_kernels.engines import ClipEngine

# What a model takes: clips of one size, or clips of any sizes and frame counts.
Clips = Tensor | Sequence[Tensor | np.ndarray]

BLOCKS = ("Block", "DividedBlock")
HALF = (0.5, 0.5, 0.5)


def sampled(frames: int, wanted: int) -> list[int]:
    """Which of a clip's frames stand for `wanted` of them: the middles of as many equal parts of it."""
    return [int((i + 0.5) * frames / wanted) for i in range(wanted)]


def resized_times(table: Tensor, frames: int, nearest: bool) -> Tensor:
    """(frames, ...) of a table (own frames, ...): interpolated linearly in fp32, or the nearest."""
    if frames == table.shape[0]:
        return table
    flat = table.flatten(1).t()[None]  # (1, channels, own frames)
    if nearest:
        return F.interpolate(flat, size=frames, mode="nearest")[0].t().reshape(frames, *table.shape[1:])
    wide = flat.to(torch.promote_types(flat.dtype, torch.float32))
    wide = F.interpolate(wide, size=frames, mode="linear", align_corners=False)
    return wide[0].t().reshape(frames, *table.shape[1:]).to(table.dtype)


class ClipModel(nn.Module):
    """A Vision Transformer on clips. A model of this class has

    patch_embed:   a PatchEmbed or TubeletEmbed with `proj`, `patch_size`, `img_size`, `grid_size`
    tubelet:       frames of a clip that one token sees
    num_frames:    frames of tokens that the model was made for: those of its clips over `tubelet`
    per_frame:     whether each frame has class tokens of its own (see ClipPacking)
    blocks, norm, fc_norm, head_drop, head, cls_token (or None), global_pool ("token" or "avg")
    _positions:    gives the rows of positions for a menu
    """

    tubelet = 1
    per_frame = False
    times_trained = 0  # how often the model was put into training mode
    menu: tuple[ClipGrid, ...] | None = None
    resizable: dict | None = None
    grad_checkpointing = False

    def _set_preprocessing(self) -> None:
        self.pretrained_cfg = self.default_cfg = {"mean": HALF[: self.in_chans], "std": HALF[: self.in_chans]}
        self.pos_interpolation = "bicubic"  # or "nearest"
        self.pos_antialias = True
        self.register_load_state_dict_pre_hook(start_lengths)

    def train(self, mode: bool = True) -> Self:
        """As of nn.Module. An engine of the model is stale after training mode."""
        self.times_trained += mode
        return super().train(mode)

    # ------------------------------------------------------------------ clips to tokens

    def packing(self, grids: Sequence[ClipGrid], *, device: torch.device | str | None = None) -> ClipPacking:
        """The packing of clips of these (frames, rows, columns) of tokens, as the model lays them out."""
        device = self.patch_embed.proj.weight.device if device is None else device
        return ClipPacking.from_grids(grids, self.num_prefix_tokens, per_frame=self.per_frame, device=device)

    def attention_pairs(self, grid: ClipGrid) -> int:
        """Queries times keys of one clip in a block's attention, over space and over time."""
        if not self.per_frame:
            return tokens_of(self, grid) ** 2
        frames, patches = grid[0], grid[1] * grid[2]
        in_time = patches * frames**2 if hasattr(self.blocks[0], "temporal_attn") else 0
        return frames * (self.num_prefix_tokens + patches) ** 2 + in_time

    def _inputs(self, x, grids, packing, channels_last) -> tuple[list[Tensor] | Tensor, ClipPacking, bool]:
        """The frames of all clips, as `ops.patch_embed` takes images, the packing, and whether the answer is dense."""
        if not isinstance(x, Tensor | list | tuple):
            raise ValueError(f"clips must be a tensor or a list of tensors, got {type(x).__name__}")
        dense = isinstance(x, Tensor) and grids is None and packing is None
        layout = "(frames, height, width, channels)" if channels_last else "(channels, frames, height, width)"
        if isinstance(x, Tensor) and x.ndim != 5:
            raise ValueError(f"clips must be a tensor of {layout} each, got {tuple(x.shape)}")
        if not isinstance(x, Tensor):
            x = [torch.from_numpy(clip).to(self._device()) if isinstance(clip, np.ndarray) else clip for clip in x]
            for i, clip in enumerate(x):
                if not isinstance(clip, Tensor) or clip.ndim != 4:
                    found = tuple(clip.shape) if isinstance(clip, Tensor) else type(clip).__name__
                    raise ValueError(f"clips[{i}] must be {layout}: frames of one size, got {found}")
        shapes = [tuple(x.shape[1:])] * len(x) if isinstance(x, Tensor) else [tuple(clip.shape) for clip in x]
        at = (0, slice(1, 3), 3) if channels_last else (1, slice(2, 4), 0)
        for shape in dict.fromkeys(shapes):
            if shape[at[2]] != self.in_chans:
                which = f"{shape[at[2]]} (clips[{shapes.index(shape)}])"
                raise ValueError(f"expected clips of {self.in_chans} channels, got {which}")
            if 0 in shape:
                raise ValueError(f"clips[{shapes.index(shape)}] is empty: {shape}")
        sizes = [(shape[at[0]], *shape[at[1]]) for shape in shapes]
        if packing is not None:
            if grids is not None:
                raise ValueError("give grids or packing, not both")
            layouts = (packing.prefix, getattr(packing, "per_frame", None))
            if layouts != (self.num_prefix_tokens, self.per_frame):
                raise ValueError(
                    f"packing must be a ClipPacking of prefix {self.num_prefix_tokens} and per_frame {self.per_frame}, "
                    "as model.packing(grids) makes it"
                )
        else:
            packing = self.packing(self._grids(sizes, grids, dense))
        if packing.clips != len(sizes):
            raise ValueError(f"grids and packings must be of as many clips: {len(sizes)} clips, {packing.clips} grids")
        frames = [grid[0] * self.tubelet for grid in packing.grids]
        return self._frames(x, [size[0] for size in sizes], frames, channels_last), packing, dense

    def _grids(self, sizes, grids, dense: bool) -> list[ClipGrid]:
        """(frames, rows, columns) of each clip. sizes: (frames, height, width) of each, in pixels"""
        ph, pw = self.patch_embed.patch_size
        if grids is not None:
            if len(grids) != len(sizes):
                raise ValueError(f"grids must name one grid per clip: {len(sizes)} clips, {len(grids)} grids")
            whole = []
            for i, (grid, size) in enumerate(zip(grids, sizes)):
                flat = hasattr(grid, "__len__") and len(grid) == 2 and not hasattr(grid[0], "__len__")
                whole.append(
                    check_clip_grid(f"grids[{i}]", (self._tokens_in_time(i, size[0]), *grid) if flat else grid)
                )
            return whole
        whole = []
        for i, (frames, height, width) in enumerate(sizes):
            if dense and (height % ph or width % pw):
                raise ValueError(f"the frames' size {(height, width)} must be a multiple of the patch size {(ph, pw)}")
            most = self.patch_embed.grid_size[0] * self.patch_embed.grid_size[1]
            grid = (height // ph, width // pw) if dense else native_grid((height, width), (ph, pw), most)
            whole.append((self._tokens_in_time(i, frames), *grid))
        return whole

    def _tokens_in_time(self, i: int, frames: int) -> int:
        if frames % self.tubelet:
            raise ValueError(f"the frames of a clip must be a multiple of {self.tubelet}, got {frames} (clips[{i}])")
        return frames // self.tubelet

    def _frames(self, x, own: list[int], wanted: list[int], channels_last: bool) -> Tensor | list[Tensor]:
        """What becomes tokens, clip by clip: frames, or tubelets as images of `tubelet` times the channels."""
        if isinstance(x, Tensor) and len(x):
            x = x if channels_last else x.transpose(1, 2)  # (clips, frames, ...)
            if own != wanted:
                frame = [i * n + j for i, (n, count) in enumerate(zip(own, wanted)) for j in sampled(n, count)]
                x = x.flatten(0, 1).index_select(0, self._numbers(frame))[None]
            if self.tubelet > 1:
                return self._tubelets(x, channels_last).flatten(0, 1)
            if x.stride(0) == x.stride(1) * x.shape[1]:
                return x.flatten(0, 1)  # a view
            return [frame for clip in x for frame in clip]
        found = []
        for clip, n, count in zip(x, own, wanted):
            clip = clip if channels_last else clip.transpose(0, 1)
            clip = clip if n == count else clip.index_select(0, self._numbers(sampled(n, count)))
            found += (clip if self.tubelet == 1 else self._tubelets(clip, channels_last)).unbind()
        return found

    def _tubelets(self, frames: Tensor, channels_last: bool) -> Tensor:
        """(..., tubelets, height, width, channels * tubelet), or channels first, of (..., frames, height, ...)."""
        x = frames.unflatten(-4, (-1, self.tubelet))
        return x.movedim(-4, -1).flatten(-2) if channels_last else x.transpose(-4, -3).flatten(-4, -3)

    def _numbers(self, values) -> Tensor:
        return torch.tensor(values, device=self._device())

    def _device(self) -> torch.device:
        return self.patch_embed.proj.weight.device

    def _statistics(self) -> dict:
        """mean and std of uint8 frames, a number for each channel that the projection sees."""
        found = {}
        for name in ("mean", "std"):
            values = self.pretrained_cfg[name]
            if len(values) != self.in_chans:
                raise ValueError(
                    f"uint8 frames need {name} of {self.in_chans} channels in pretrained_cfg, got {values}"
                )
            found[name] = [value for value in values for _ in range(self.tubelet)]
        return found

    def _tokens(self, frames, packing: ClipPacking, channels_last: bool, positions=None, packed=None) -> Tensor:
        """(capacity, dim): the tokens before the first block.

        positions, packed: what `_positions` gives for the packing's menu, and the packed patch weight, from an engine
        """
        conv = self.patch_embed.proj
        if not is_plain_itself(conv, "Conv2d", "Conv3d"):
            raise ValueError(f"patch_embed.proj, a {type(conv).__name__}, is wrapped or hooked: clips need a plain one")
        cells, prefix = self._positions(packing.menu) if positions is None else positions
        first = frames if isinstance(frames, Tensor) else frames[0] if frames else None
        options = self._statistics() if first is not None and first.dtype == torch.uint8 else {}
        options |= {"channels_last": channels_last, "packed": packed, "pos": cells}
        options["interpolation"] = resize_mode(self.pretrained_cfg)
        weight = conv.weight if conv.weight.ndim == 4 else conv.weight.flatten(1, 2)
        if self.per_frame:
            options["prefix"] = prefix
        with without_autocast(weight.device):
            x = ops.patch_embed(frames, weight, conv.bias, packing.by_frame, **options)
        if not self.per_frame and not (packing.full and prefix is None):
            y = x.new_zeros(packing.capacity, x.shape[1]).index_copy(0, packing.patch_rows, x)
            x = y if prefix is None else y.index_copy(0, packing.prefix_rows, prefix.repeat(packing.clips, 1))
        return self.pos_drop(x)

    def _spatial(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """(cells, channels) of a table (rows, columns, channels)."""
        if tuple(table.shape[:2]) == grid:
            return table.flatten(0, 1)
        if self.pos_interpolation == "nearest":
            maps = F.interpolate(table.permute(2, 0, 1)[None], size=grid, mode="nearest")
            return maps[0].flatten(1).t()
        return ops.pos_embed(table, [grid], interpolation=self.pos_interpolation, antialias=self.pos_antialias)

    def _without_runs(
        self, x: Tensor, frames, packing: ClipPacking, run_length: float | None, channels_last: bool
    ) -> tuple[Tensor, Packing]:
        """The tokens that are no repetition, and their packing; all, where run_length is None.

        x: (capacity, dim) of `_tokens`; frames: what they were made of
        """
        if run_length is None:
            return x, packing
        if self.per_frame:
            raise ValueError(
                f"run_length needs attention over whole clips: this {type(self).__name__} attends within frames"
            )
        if math.isnan(run_length):
            raise ValueError("run_length must be a number, got NaN")
        std = self._statistics()["std"] if len(frames) and frames[0].dtype == torch.uint8 else None
        how = (self.patch_embed.patch_size, std, resize_mode(self.pretrained_cfg), channels_last)
        repeated = differences(frames, packing.grids, *how) <= run_length
        kept = packing.keep(~repeated.to(x.device))
        return x[kept.rows], kept

    # ------------------------------------------------------------------ tokens to answers

    def embed(self, clips: Clips, packing: ClipPacking, channels_last: bool = False) -> Tensor:
        """(capacity, dim): the tokens before the first block, of clips as `forward` takes them beside a packing.

        With `run_blocks` and `finish`, the forward in parts: for what goes on from an early block.
        """
        frames, packing, _ = self._inputs(clips, None, packing, channels_last)
        return self._tokens(frames, packing, channels_last)

    def _block_options(self, packing: Packing) -> dict:
        """What blocks are told beside the packing."""
        return {}

    def _of_blocks(self, packing: ClipPacking) -> Packing:
        """The packing that blocks are given."""
        return packing

    def run_blocks(
        self,
        stream: list[Tensor | None],
        packing: ClipPacking,
        start: int = 0,
        stop: int | None = None,
        *,
        visit: Callable[[int, Tensor, ClipPacking], None] | None = None,
    ) -> list[Tensor | None]:
        """The stream [x, branch, gamma], for x + gamma * branch, after the blocks from `start` to before `stop`.

        stream: begins as [tokens, None, None]; it is emptied, unless gradients are recorded
        visit:  called with each block's number, its output (capacity, dim), and the packing
        """
        options, given = self._block_options(packing), self._of_blocks(packing)
        for i, block in enumerate(list(self.blocks)[start:stop], start):
            if not is_plain(block, *BLOCKS):
                if not takes_packing(block):
                    raise ValueError(f"blocks.{i}, a {type(block).__name__}, takes no packing of clips")
                stream = [block(add(*stream), packing=given, **options), None, None]
            elif self.grad_checkpointing and torch.is_grad_enabled():
                stream = checkpoint(block.stream, stream, given, **options, use_reentrant=False)
            else:
                stream = block.stream(stream, given, **options)
            if visit is not None:
                stream = [add(*stream), None, None]
                visit(i, stream[0], packing)
        return stream

    def finish(self, stream: list[Tensor | None], packing: ClipPacking) -> Tensor:
        """(clips, classes): the final norm, pooling and head, of the stream after the last block."""
        x, branch, gamma = stream
        if self.global_pool == "token":
            x, branch = (t if t is None else self._class(t, packing) for t in (x, branch))
            return self._head(normalise(self.norm, x, packing, branch, gamma, pooled=True)[0], packing)
        return self.forward_head(PackedTokens(normalise(self.norm, x, packing, branch, gamma)[0], packing))

    def _class(self, x: Tensor, packing: ClipPacking) -> Tensor:
        """(clips, dim): the class token of each clip, of (capacity, dim)."""
        return ops.pool(x, packing.cu_seqlens, "token")

    def pool(self, x: PackedTokens) -> Tensor:
        """(clips, dim) from the tokens that `forward_features` gives of a list of clips."""
        prefix = x.packing.prefix
        return ops.pool(x.tokens, x.packing.cu_seqlens, self.global_pool, prefix=prefix)

    def forward_head(self, x: PackedTokens, pre_logits: bool = False) -> Tensor:
        """(clips, classes), or (clips, dim) with pre_logits, from PackedTokens."""
        return self._head(self.pool(x), x.packing, pre_logits)

    def _head(self, x: Tensor, packing: ClipPacking, pre_logits: bool = False) -> Tensor:
        x = self.head_drop(apply_norm(self.fc_norm, x, packing))
        return x if pre_logits else linear(self.head, x)

    def _features(self, x: Tensor, packing: ClipPacking) -> PackedTokens:
        """The normalised tokens, of those after the last block."""
        return PackedTokens(normalise(self.norm, x, packing)[0], packing)

    def _dense(self, x: PackedTokens) -> Tensor:
        """(clips, length, dim) of clips of one grid, in the order of the model that this one stands for."""
        return x.tokens.view(x.packing.clips, -1, x.tokens.shape[1])

    def forward_features(
        self,
        x: Clips,
        *,
        grids: Sequence[ClipGrid] | None = None,
        packing: ClipPacking | None = None,
        channels_last: bool = False,
        run_length: float | None = None,
    ) -> Tensor | PackedTokens:
        """Tokens after the last block and norm: PackedTokens, frame after frame; of a tensor of clips alone
        (clips, length, dim) in the order of the original model.

        run_length: as of `forward`; the answer is PackedTokens of what was kept, whose packing is a KeptPacking
        """
        frames, packing, dense = self._inputs(x, grids, packing, channels_last)
        x = self._tokens(frames, packing, channels_last)
        x, packing = self._without_runs(x, frames, packing, run_length, channels_last)
        found = self._features(add(*self.run_blocks([x, None, None], packing)), packing)
        return self._dense(found) if dense and run_length is None else found

    def forward(
        self,
        x: Clips,
        *,
        grids: Sequence[ClipGrid] | None = None,
        packing: ClipPacking | None = None,
        channels_last: bool = False,
        run_length: float | None = None,
    ) -> Tensor:
        """(clips, classes), one row per clip in the order given.

        run_length: leave out each token whose pixels, as the model sees them (normalised), differ from those of the
                    token one step earlier at its place by at most this, in the mean of absolute differences
                    (run-length tokens, arXiv:2411.05222, without the embedding of lengths, which is trained). The
                    others keep their own positions. Below 0: none is left out. Needs attention over whole clips, and
                    waits for the device once

        Raises ValueError for run_length of a model that attends within frames.
        """
        frames, packing, _ = self._inputs(x, grids, packing, channels_last)
        x = self._tokens(frames, packing, channels_last)
        x, packing = self._without_runs(x, frames, packing, run_length, channels_last)
        return self.finish(self.run_blocks([x, None, None], packing), packing)

    def engine(self, *, quantize: str | None = None, stale: str = "raise") -> ClipEngine:
        """The model made ready to answer; see `revit_kernels.engines.ClipEngine`."""
        from revit_kernels.engines import ClipEngine  # the one import that goes up

        return ClipEngine(self, quantize=quantize, stale=stale)

    # ------------------------------------------------------------------ changes

    _add_affines = Resizable._add_affines

    def make_resizable(
        self,
        menu: Sequence[ClipGrid],
        embedding: str = "resize",
        positions: str = "interpolate",
        norms: str = "per_length",
    ) -> Self:
        """Turn the model, trained or not, into a ReViT (arXiv:2112.01686) of these lengths, in place.

        menu:  (frames, rows, columns) of tokens, longest first, each of fewer patches than the one before; the longest
               becomes the model's own size
        norms: "per_length": an affine of its own for each length at every norm, those before temporal attention
               included; or one "shared"
        embedding, positions: "resize" and "interpolate" only, as of VarLenViT

        Returns the model. Raises ValueError for a menu or an option that is none, and for a model that is resizable
        already.
        """
        if self.menu is not None:
            raise ValueError(f"the model is resizable already, with the menu {self.menu}")
        if (embedding, positions) != ("resize", "interpolate"):
            raise ValueError(f"clips need embedding 'resize' and positions 'interpolate', got {embedding}, {positions}")
        if norms not in NORMS:
            raise ValueError(f"norms must be one of {NORMS}, got {norms!r}")
        menu = tuple(check_clip_grid("menu", grid) for grid in menu)
        check_menu([(grid[0], grid[1] * grid[2]) for grid in menu])
        self.set_input_size(tuple(g * p for g, p in zip(menu[0][1:], self.patch_embed.patch_size)), menu[0][0])
        if norms == "per_length" and len(menu) > 1:
            self._add_affines(menu)
        self.menu, self.resizable = menu, {"embedding": embedding, "positions": positions, "norms": norms}
        return self

    def fill_lengths(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Start the norms of the lengths that a plain model's state_dict knows nothing of from its own, in place."""
        fill_lengths(state, self.state_dict(), prefix)

    def set_input_size(self, img_size: tuple[int, int] | None = None, num_frames: int | None = None) -> None:
        """Resample the positions to another size of frames, another number of frames of tokens, or both, for good."""
        raise NotImplementedError(f"{type(self).__name__} keeps the size that it was made for")

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load a file with this model's keys, or in the layout of its authors or of `transformers`.

        prefix: where in the file the model is; if not given, "model." and "module." are passed over

        Raises ValueError, naming keys and shapes, before anything is copied.
        """
        from revit_kernels.models.hugging_face_video import load

        load(self, checkpoint_path, prefix)

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head."""
        like = self.patch_embed.proj.weight
        self.num_classes = num_classes
        if num_classes < 1:
            self.head = nn.Identity()
            return
        self.head = nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype).train(self.training)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def no_weight_decay(self) -> set[str]:
        """The names of parameters that an optimiser should not decay."""
        tables = {"pos_embed", "cls_token", "time_embed"}
        return tables | {name for name, _ in self.named_parameters() if _is_affine(name)}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions of parameter groups, for optimisers with layer decay."""
        return {
            "stem": r"^cls_token|pos_embed|time_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward, instead of keeping what it computed."""
        self.grad_checkpointing = enable

    def _draw(self) -> None:
        """Draw the weights: truncated normal, as TimeSformer's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name in ("pos_embed", "cls_token"):
            if getattr(self, name, None) is not None:
                nn.init.trunc_normal_(getattr(self, name), std=0.02)
