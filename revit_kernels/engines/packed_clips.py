"""The blocks of a model of clips on a CPU: weights packed once; plain blocks run in one call, divided ones op by op."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revit_kernels import ops
from revit_kernels.clips import ClipPacking
from revit_kernels.dispatch import load
from revit_kernels.engines.packed import HOOKS, NORMS, TRAINING, PerMenu, Table
from revit_kernels.modules import whole_block
from revit_kernels.modules.divided import DividedBlock
from revit_kernels.modules.layer_norm import _rows
from revit_kernels.modules.linear import is_plain
from revit_kernels.ops.linear.panels import multiply, pack_weight

MOST_TOKENS = 4096  # of the clips that go through the blocks together, but for one longer: their tokens stay in cache


def refusal(model: nn.Module) -> str | None:
    """Why the model's blocks cannot be packed; None if they can."""
    if not type(model).__module__.startswith("revit_kernels."):
        return f"{type(model).__name__} may run its blocks otherwise than ours"
    if model.training:
        return TRAINING
    for name, module in model.named_modules():
        own = module.__dict__
        if "forward" in own or any(own[hooks] for hooks in HOOKS):
            return f"{name or 'the model'} is hooked, or its forward replaced"
    if not len(model.blocks):
        return "it has no blocks"
    dtype = model.patch_embed.proj.weight.dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return f"no kernel for {dtype}"
    if (why := _conv(model)) is not None:
        return why
    for i, block in enumerate(model.blocks):
        if not is_plain(block, "Block", "DividedBlock"):
            return f"blocks.{i} is a {type(block).__name__}"
        if (why := whole_block.unable(block, dtype)) is not None:
            return f"blocks.{i}: {why}"
        if is_plain(block, "DividedBlock") and (why := _of_time(block, dtype)) is not None:
            return f"blocks.{i}: {why}"
    return None


def _conv(model: nn.Module) -> str | None:
    conv = model.patch_embed.proj
    if not is_plain(conv, "Conv2d", "Conv3d") or conv.weight.device.type != "cpu":
        return "its patch projection is not plain, or not on the CPU"
    return None if conv.weight[0].numel() % 4 == 0 else "a patch must have a multiple of 4 numbers"


def _of_time(block: DividedBlock, dtype: torch.dtype) -> str | None:
    """What keeps the temporal part of a block from being packed."""
    attn, norm = block.temporal_attn, block.temporal_norm1
    if (
        set(whole_block.norms(block)) != {"norm1", "norm2"}
        or whole_block.form(block).rms
        or not is_plain(block.mlp, "Mlp")
    ):
        return "op by op it runs with LayerNorms before attention and a plain MLP alone"
    parts = ((attn, "TemporalAttention"), (attn.qkv, "Linear"), (attn.proj, "Linear"), (block.temporal_fc, "Linear"))
    for part, name in parts:
        if not is_plain(part, name):
            return f"{type(part).__name__} is no plain {name}"
    if not is_plain(norm, *NORMS) or norm.weight is None or norm.bias is None:
        return "temporal_norm1 is no plain norm with an affine"
    weights = norm.weight, attn.qkv.weight, attn.proj.weight, block.temporal_fc.weight
    return None if all(w.dtype == dtype for w in weights) else f"a weight of time is not of {dtype}"


class PackedClipBlocks(PerMenu):
    """The blocks' weights, packed, and the patch projection's.

    patch: what `ops.patch_embed` takes as `packed`
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        conv = model.patch_embed.proj
        weight = conv.weight if conv.weight.ndim == 4 else conv.weight.flatten(1, 2)
        self.patch = load("patch_embed", "cpu").pack(weight, conv.bias)
        self.divided = isinstance(model.blocks[0], DividedBlock)
        self._forms = [whole_block.form(block) for block in model.blocks]
        self._norms = [{name: Table(norm) for name, norm in whole_block.norms(block).items()} for block in model.blocks]
        if self.divided:
            for tables, block in zip(self._norms, model.blocks):
                tables["time"] = Table(block.temporal_norm1)
        self._per_length = any(table.menu for tables in self._norms for table in tables.values())
        self._packed = [load("block", "cpu").pack(whole_block.weights(block), None) for block in model.blocks]
        self._time = [_packed_time(block) for block in model.blocks] if self.divided else []

    def _affines(self, menu) -> list[dict[str, list[Tensor]]]:
        """Of each block's norms, weight and bias in the order of this menu."""
        with torch.inference_mode(False), torch.no_grad():
            key = ("norms", menu if self._per_length else None)
            return self._keep(key, lambda: [{n: t.of(menu) for n, t in tables.items()} for tables in self._norms])

    def run(self, x: Tensor, packing: ClipPacking, of_blocks, start: int, stop: int | None) -> Tensor:
        """(capacity, dim) after the blocks from `start` to before `stop`. x: (capacity, dim)

        of_blocks: gives the packing that blocks are told, of a packing
        """
        blocks = range(len(self._packed))[start:stop]
        lengths = [len(part) for part in packing.split(x)]
        if not lengths or not blocks:
            return x
        y, first = torch.empty_like(x), 0
        for members in _groups(lengths):
            part = packing
            if len(members) < len(lengths) or not packing.full:
                grids, per_frame = packing.grids[members.start : members.stop], packing.per_frame
                part = ClipPacking.from_grids(grids, packing.prefix, per_frame=per_frame, menu=packing.menu)
            rows = x[first : first + part.capacity]
            step = self._divided if self.divided else self._whole
            y[first : first + part.capacity] = step(rows, of_blocks(part), blocks)
            first += part.capacity
        y[first:] = 0
        return y

    def _row(self, x, packing) -> Tensor | None:
        return _rows(x, packing) if self._per_length and len(packing.menu) > 1 else None

    def _whole(self, x: Tensor, packing, blocks) -> Tensor:
        affines, backend = self._affines(packing.menu), load("block", "cpu")
        row = self._row(x, packing)
        for i in blocks:
            rows = {}
            for name, (weight, bias) in affines[i].items():
                rows |= {name: weight, f"{name}_bias": bias}
            told = backend.listed([self._packed[i]._replace(**rows)])
            x = backend.run(x, packing.cu_seqlens, row, *told, self._forms[i], None)
        return x

    def _divided(self, x: Tensor, packing: ClipPacking, blocks) -> Tensor:
        affines, frames, row = self._affines(packing.menu), packing.by_frame, self._row(x, packing)
        branch = None
        for i in blocks:
            form, packed = self._forms[i], self._packed[i]
            dim, width, hidden = form.widths
            heads, scale, activation, eps1, eps2 = (
                form.heads,
                form.scale,
                form.activation,
                form.eps.norm1,
                form.eps.norm2,
            )
            of_time, first, second = (affines[i][name] for name in ("time", "norm1", "norm2"))
            time, between, time_eps, time_scale = self._time[i]
            qkv, proj, fc1, fc2 = packed.qkv, packed.proj, packed.fc1, packed.fc2
            shape = (-1, 3, heads, width // heads)
            y = ops.layer_norm(x, *of_time, row, branch=branch, eps=time_eps)
            y, x = (y, x) if branch is None else y
            told = packing.cu_seqlens, packing.frames, packing.max_frames
            y = ops.temporal_attention(
                *multiply(y, time, 3 * width).view(shape).unbind(1), *told, prefix=packing.prefix, scale=time_scale
            )
            branch = multiply(y.flatten(1), between, dim).index_fill_(0, packing.prefix_rows, 0)
            y, x = ops.layer_norm(x, *first, row, branch=branch, eps=eps1)
            y = ops.attention(
                *multiply(y, qkv, 3 * width).view(shape).unbind(1), frames.cu_seqlens, frames.max_seqlen, scale=scale
            )
            branch = multiply(y.flatten(1), proj, dim)
            mean = ops.pool(branch[packing.prefix_rows], packing.cu_frames, "avg", include_prefix=True)
            branch.index_copy_(0, packing.prefix_rows, mean[packing.clip])
            y, x = ops.layer_norm(x, *second, row, branch=branch, eps=eps2)
            branch = multiply(multiply(y, fc1, hidden, activation), fc2, dim)
        return x + branch


def _groups(lengths: list[int]) -> list[range]:
    """Clips that go through the blocks together: as many, one after the other, as have MOST_TOKENS."""
    groups, first, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > first and total + length > MOST_TOKENS:
            groups.append(range(first, i))
            first, total = i, 0
        total += length
    return [*groups, range(first, len(lengths))]


def _packed_time(block: DividedBlock) -> tuple:
    """The projections of time, of which what follows its attention is one, its norm's eps, and its scale."""
    attn, fc = block.temporal_attn, block.temporal_fc
    dtype = fc.weight.dtype
    both = (fc.weight.double() @ attn.proj.weight.double()).to(dtype)
    bias = fc.bias.double() + fc.weight.double() @ attn.proj.bias.double()
    packed = pack_weight(attn.qkv.weight, attn.qkv.bias, None, dtype), pack_weight(both, bias.float(), None, dtype)
    return *packed, block.temporal_norm1.eps, attn.scale
