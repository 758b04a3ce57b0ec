"""Fewer bits for a model's weights and activations, at inference: one way by name, for all of its blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from revit_kernels.modules import whole_block
from revit_kernels.modules.fp8 import Fp8Linear, fits
from revit_kernels.modules.layer_norm import PLAIN, quantise_for
from revit_kernels.modules.linear import is_plain
from revit_kernels.ops.e4m3 import E4M3_SINCE


def _blocks(model: nn.Module):
    """(name, module) of every module in the model's blocks."""
    return [(f"blocks.{name}", module) for name, module in model.blocks.named_modules() if name]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def fp8(model: nn.Module) -> None:
    """Weights of the blocks in e4m3, with a scale for each output; activations per token, as they come.

    Where nothing stands between, activations are quantised by the kernel that makes them: LayerNorm before the
    projection to queries, keys and values and before fc1 (a scale a token), GELU before fc2 (a scale for every 128 of a
    token's columns). The attention's result is quantised on its way into the output projection. Embedding, norms,
    attention itself, pooling and head stay as they are.

    Where there is no e4m3 (a CPU), the same numbers are rounded in the same places and multiplied in fp32: as accurate,
    and slower than the model was.
    Raises NotImplementedError on a GPU before compute capability 8.9.
    """
    device = _device(model)
    if device.type == "cuda" and (found := torch.cuda.get_device_capability(device)) < E4M3_SINCE:
        raise NotImplementedError(
            "fp8 needs a GPU of compute capability {}.{} (Ada, Hopper or newer), {} has {}.{}".format(
                *E4M3_SINCE, device, *found
            )
        )
    replaced = 0
    for name, module in _blocks(model):
        if is_plain(module, "Linear") and fits(module):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, Fp8Linear.from_linear(module))
            replaced += 1
    if not replaced:
        raise ValueError("there is no plain Linear in the blocks whose sizes are multiples of 16: nothing to quantise")
    for block in model.blocks:
        if not is_plain(block, "Block"):
            continue
        if is_plain(block.norm1, *PLAIN) and is_plain(block.attn, "Attention") and block.attn.gate is None:
            quantise_for(block.norm1, block.attn, block.attn.qkv)
        if is_plain(block.norm2, *PLAIN) and is_plain(block.mlp, "Mlp"):
            quantise_for(block.norm2, block.mlp, block.mlp.fc1)


def int8(model: nn.Module) -> None:
    """The blocks' products in int8, on a CPU: weights in 255 steps per output, and what they multiply in 256 steps per
    token, found as it comes. Products are exact; norms, attention, GELU, residual adds and all else stay as they are.

    Raises NotImplementedError where the CPU has no such instructions, or a block does not run whole.
    """
    for i, block in enumerate(model.blocks):
        why = "is no plain Block" if not is_plain(block, "Block") else whole_block.refusal_to_be(block, "int8")
        if why is not None:
            raise NotImplementedError(f"int8: blocks.{i} {why}")
    for block in model.blocks:
        block.quantised = "int8"
        whole_block.forget(block)
        whole_block.prepack(block)


KINDS: dict[str, Callable[[nn.Module], None]] = {"fp8": fp8, "int8": int8}


def quantise(model: nn.Module, kind: str) -> nn.Module:
    """Quantise the model in place, for inference only: it is put into eval mode, and its parameters get no gradients.

    kind: "fp8" (GPUs; emulated on a CPU) or "int8" (CPUs)

    Returns the model. Raises ValueError for a kind that there is not, or a model that was quantised before,
    NotImplementedError where this device cannot run it.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {sorted(KINDS)}, got {kind!r}")
    if (before := getattr(model, "quantised", None)) is not None:
        raise ValueError(f"the model is quantised to {before} already")
    model.eval().requires_grad_(False)
    KINDS[kind](model)
    model.quantised = kind
    return model
