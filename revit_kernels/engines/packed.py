"""A model's plain blocks on a CPU: weights packed once, run in one call."""

from __future__ import annotations

import copy
from collections import OrderedDict
from threading import Lock

import torch
from torch import Tensor, nn

from revit_kernels.dispatch import load
from revit_kernels.modules import whole_block
from revit_kernels.modules.layer_norm import PER_LENGTH, _PerLength, _rows
from revit_kernels.modules.lengths import cells, exact_rows, weights
from revit_kernels.modules.linear import is_plain
from revit_kernels.modules.patch_dropout import PatchDropout
from revit_kernels.ops.attention.rotary import Rotary
from revit_kernels.ops.linear.panels import pack_weight
from revit_kernels.packing import Packing

MOST_MENUS = 64  # whose positions and affines are kept: those of native aspects are many
NORMS = ("LayerNorm", PER_LENGTH["LayerNorm"].__name__)
TRAINING = "the model is in training mode"
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
METHODS = ("forward", "forward_features", "forward_head", "pool", "_pos_embed", "_block_positions", "embed")
METHODS += ("run_blocks", "finish")
BLOCKS = ("Block", "EvaBlock")


def refusal(model: nn.Module, kind: str | None = None) -> str | None:
    """Why the model's blocks cannot be packed; None if they can. kind: "int8" or None"""
    if not type(model).__module__.startswith("revit_kernels."):
        return f"{type(model).__name__} may run its blocks otherwise than ours"
    if model.training:
        return TRAINING
    for name in METHODS:
        if not model._own(name):
            return f"its {name} was replaced"
    for name, module in model.named_modules():
        own = module.__dict__
        if not name.startswith("blocks.") and ("forward" in own or any(own[hooks] for hooks in HOOKS)):
            return f"{name or 'the model'} is hooked, or its forward replaced"
    rope = getattr(model, "rope", None)
    if rope is not None and not type(rope).__module__.startswith("revit_kernels."):
        return f"its rope, a {type(rope).__name__}, is somebody's own"
    if not model._embeds() or not isinstance(model.patch_drop, nn.Identity | PatchDropout):
        return "its patch embedding or patch dropout is somebody's own"
    if not is_plain(model.blocks, "Sequential", "ModuleList") or not len(model.blocks):
        return "its stack of blocks is hooked or replaced"
    dtype, shared = next(model.parameters()).dtype, None
    if dtype not in (torch.float32, torch.bfloat16):
        return f"no kernel for {dtype}"
    for i, block in enumerate(model.blocks):
        if not is_plain(block, *BLOCKS):
            return f"blocks.{i}, a {type(block).__name__}, is no plain {' or '.join(BLOCKS)}"
        if (why := whole_block.unable(block, dtype, kind)) is not None:
            return f"blocks.{i}: {why}"
        same = whole_block.form(block), [t is None for t in whole_block.weights(block)]
        shared = same if shared is None else shared
        if same != shared:
            return f"blocks.{i} is of another form than blocks.0"
    return None


class Table:
    """A norm's weight and bias as they were: a row for each length of its menu, or one row and no menu."""

    def __init__(self, norm: nn.Module):
        self.menu = norm.menu if isinstance(norm, _PerLength) else None
        pair = norm.table() if self.menu else (norm.weight[None], getattr(norm, "bias", None))
        weight, bias = pair[0], torch.zeros_like(pair[0]) if pair[1] is None else pair[1].view(pair[0].shape)
        self.own = [t.detach().clone() for t in (weight, bias)]
        self.wide = [t.float() for t in self.own]

    def of(self, menu) -> list[Tensor]:
        """(lengths of `menu`, dim) float32 each: interpolated in the norm's dtype where a length is between two."""
        if self.menu is None or not menu:
            return self.wide
        if (rows := exact_rows(self.menu, menu)) is not None:
            return [t[list(rows)].contiguous() for t in self.wide]
        share = torch.tensor([weights(cells(grid), self.menu) for grid in menu]).to(self.own[0].dtype)
        return [(share[:, :, None] * t).sum(1).float() for t in self.own]


class PerMenu:
    """What is made of a model's weights for a menu of grids, kept for the menus used last. Many threads may ask."""

    def __init__(self):
        self._kept, self._lock = OrderedDict(), Lock()

    def _keep(self, key, make):
        """What `make` gives, kept for the keys used last."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = make()
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > 2 * MOST_MENUS:
                self._kept.popitem(last=False)
        return made

    def positions(self, running, menu) -> tuple:
        """What `running._positions` gives for this menu."""
        with torch.inference_mode(False), torch.no_grad():
            return self._keep(("positions", menu), lambda: running._positions(menu))


class PackedBlocks(PerMenu):
    """The blocks' weights, packed; and the patch projection's and the head's, where the kernels take those.

    patch: what `ops.patch_embed` takes as `packed`, or None
    head:  the final norm's Table, the packed weight, the norm's eps, classes; None where the answers are not of each
           image's first token
    """

    def __init__(self, model: nn.Module, kind: str | None):
        super().__init__()
        backend = load("block", "cpu")
        self.form, self._run, self._list = whole_block.form(model.blocks[0]), backend.run, backend.listed
        self._norms = [{name: Table(norm) for name, norm in whole_block.norms(block).items()} for block in model.blocks]
        self._kind, self._packed = kind, [backend.pack(whole_block.weights(block), kind) for block in model.blocks]
        self._rope = copy.deepcopy(getattr(model, "rope", None))
        self.patch, self.head = _packed_patch(model), _packed_head(model)
        tables = [table for norms in self._norms for table in norms.values()] + ([self.head[0]] if self.head else [])
        self._per_length = any(table.menu for table in tables)

    def _rotary(self, packing: Packing) -> list[Rotary]:
        """The angles of the blocks' queries and keys."""
        if self._rope is None:
            return []
        with torch.inference_mode(False), torch.no_grad():
            tables = self._keep(("rotary", packing.menu), lambda: self._rope.tables(packing.menu, packing.device))
            return self._rope.of(tables, packing)

    def _weights(self, menu) -> tuple[tuple[list[Tensor], list[int]], list[Tensor]]:
        """Of all blocks, and of the head, with the norms' rows in the order of this menu."""

        def make():
            of_blocks = []
            for norms, packed in zip(self._norms, self._packed):
                rows = {}
                for name, table in norms.items():
                    rows[name], rows[f"{name}_bias"] = table.of(menu)
                of_blocks.append(packed._replace(**rows))
            return self._list(of_blocks), [] if self.head is None else [*self.head[0].of(menu), self.head[1]]

        with torch.inference_mode(False), torch.no_grad():
            return self._keep(("weights", menu if self._per_length else None), make)

    def _call(self, x, packing: Packing, start: int, stop: int | None, *head) -> Tensor:
        (tensors, fields), _ = self._weights(packing.menu)
        row = _rows(x, packing) if self._per_length and len(packing.menu) > 1 else None
        rotary = self._rotary(packing)
        if (start, stop) != (0, None):
            each = len(fields)
            tensors = tensors[each * start : None if stop is None else each * stop]
            rotary = rotary if len(rotary) < 2 else rotary[start:stop]
        how = (fields, self.form, self._kind, rotary)
        return self._run(x, packing.cu_seqlens, row, tensors, *how, *head) if tensors else x

    def run(self, x: Tensor, packing: Packing, start: int, stop: int | None) -> Tensor:
        """(capacity, dim) after the blocks from `start` to before `stop`. x: (capacity, dim)"""
        return self._call(x, packing, start, stop)

    def answers(self, x: Tensor, packing: Packing) -> Tensor:
        """(images, classes) of x (capacity, dim), by all blocks, the final norm and the head."""
        return self._call(x, packing, 0, None, self._weights(packing.menu)[1], *self.head[2:])


def _packed_patch(model: nn.Module) -> Tensor | None:
    backend, conv = load("patch_embed", "cpu"), model.patch_embed.proj
    if isinstance(backend, str) or not is_plain(conv, "Conv2d"):
        return None
    if conv.weight.dtype not in (torch.float32, torch.bfloat16) or conv.weight.device.type != "cpu":
        return None
    if model.menu is not None and model.resizable["embedding"] != "resize":
        return None
    return backend.pack(conv.weight, conv.bias)


def _packed_head(model: nn.Module) -> tuple | None:
    norm, head, drop = model.norm, model.head, model.head_drop
    plain = is_plain(norm, *NORMS) and norm.weight is not None and norm.bias is not None
    if not plain or not model.answers_first_token() or not is_plain(head, "Linear"):
        return None
    if not is_plain(model.fc_norm, "Identity") or not is_plain(drop, "Dropout", "Identity"):
        return None
    if drop.training and whole_block.drops(drop):  # as for Monte Carlo dropout
        return None
    dtype = model.blocks[0].norm1.weight.dtype
    if any(type(w) is not nn.Parameter or w.dtype != dtype for w in (norm.weight, head.weight)) or head.in_features % 4:
        return None
    return Table(norm), pack_weight(head.weight, head.bias, None, head.weight.dtype), norm.eps, head.out_features
