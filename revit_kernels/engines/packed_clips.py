"""The blocks of a model of clips on a CPU: weights packed once, run in one call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from revit_kernels.dispatch import load
from revit_kernels.engines.packed import HOOKS, NORMS, TRAINING, PerMenu, Table
from revit_kernels.modules import whole_block
from revit_kernels.modules.divided import DividedBlock
from revit_kernels.modules.layer_norm import _rows
from revit_kernels.modules.linear import is_plain
from revit_kernels.ops.block import Form
from revit_kernels.ops.linear.panels import pack_weight
from revit_kernels.packing import Packing


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
    dtype, shared = model.patch_embed.proj.weight.dtype, None
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
        same = *_form(block), [t is None for t in whole_block.weights(block)]
        shared = same if shared is None else shared
        if same != shared:
            return f"blocks.{i} is of another form than blocks.0"
    return None


def _form(block: nn.Module) -> tuple[Form, tuple[float, float] | None]:
    """What the kernel is told besides tensors; and of time, the norm's eps and the attention's scale."""
    of_time = (block.temporal_norm1.eps, block.temporal_attn.scale) if is_plain(block, "DividedBlock") else None
    return whole_block.form(block), of_time


def _conv(model: nn.Module) -> str | None:
    conv = model.patch_embed.proj
    plain = is_plain(conv, "Conv2d", "Conv3d") and conv.weight.device.type == "cpu"
    return None if plain else "its patch projection is not plain, or not on the CPU"


def _of_time(block: DividedBlock, dtype: torch.dtype) -> str | None:
    """What keeps the temporal part of a block from being packed."""
    attn, norm = block.temporal_attn, block.temporal_norm1
    form = whole_block.form(block)
    if attn.num_heads != form.heads:
        return "time has another number of heads than space"
    parts = ((attn, "TemporalAttention"), (attn.qkv, "Linear"), (attn.proj, "Linear"), (block.temporal_fc, "Linear"))
    for part, name in parts:
        if not is_plain(part, name):
            return f"{type(part).__name__} is no plain {name}"
    if not is_plain(norm, *(whole_block.RMS if form.rms else NORMS)) or norm.weight is None:
        return "temporal_norm1 is no plain norm with an affine, like those of space"
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
        self._form, self._of_time = _form(model.blocks[0])
        self._norms = [{name: Table(norm) for name, norm in whole_block.norms(block).items()} for block in model.blocks]
        if self._of_time:
            for tables, block in zip(self._norms, model.blocks):
                tables["time"] = Table(block.temporal_norm1)
        self._per_length = any(table.menu for tables in self._norms for table in tables.values())
        self._packed = [load("block", "cpu").pack(whole_block.weights(block), None) for block in model.blocks]
        self._time = [_packed_time(block) for block in model.blocks] if self._of_time else []

    def _affines(self, menu) -> list[dict[str, list[Tensor]]]:
        """Of each block's norms, weight and bias in the order of this menu."""
        with torch.inference_mode(False), torch.no_grad():
            key = ("norms", menu if self._per_length else None)
            return self._keep(key, lambda: [{n: t.of(menu) for n, t in tables.items()} for tables in self._norms])

    def run(self, x: Tensor, packing: Packing, start: int, stop: int | None) -> Tensor:
        """(capacity, dim) after the blocks from `start` to before `stop`.

        x: (capacity, dim); packing: what blocks are told, of clips where they are divided
        """
        blocks = range(len(self._packed))[start:stop]
        if not blocks:
            return x
        affines, backend = self._affines(packing.menu), load("block", "cpu")
        row = _rows(x, packing) if self._per_length and len(packing.menu) > 1 else None
        weights, of_time = [], []
        for i in blocks:
            rows = {}
            for name, (weight, bias) in affines[i].items():
                if name == "time":
                    of_time += [weight, bias, *self._time[i]]
                else:
                    rows |= {name: weight, f"{name}_bias": bias}
            weights.append(self._packed[i]._replace(**rows))
        time = backend.Time(packing.frames, of_time, *self._of_time) if self._of_time else None
        return backend.run(x, packing.cu_seqlens, row, *backend.listed(weights), self._form, None, time=time)


def _packed_time(block: DividedBlock) -> tuple[Tensor, Tensor]:
    """The projections of time, of which what follows its attention is one."""
    attn, fc = block.temporal_attn, block.temporal_fc
    dtype = fc.weight.dtype
    both = (fc.weight.double() @ attn.proj.weight.double()).to(dtype)
    bias = fc.bias.double() + fc.weight.double() @ attn.proj.bias.double()
    return pack_weight(attn.qkv.weight, attn.qkv.bias, None, dtype), pack_weight(both, bias.float(), None, dtype)
