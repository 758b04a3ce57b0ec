"""A model's blocks in e4m3."""

from __future__ import annotations

import torch
from torch import nn

from revit_kernels.modules.fp8 import Fp8Linear, fits
from revit_kernels.modules.layer_norm import PLAIN, quantize_for
from revit_kernels.modules.linear import is_plain
from revit_kernels.ops.e4m3 import E4M3_SINCE


def _blocks(model: nn.Module):
    """(name, module) of every module in the model's blocks."""
    return [(f"blocks.{name}", module) for name, module in model.blocks.named_modules() if name]


def fp8(model: nn.Module) -> nn.Module:
    """Quantize the model in place, for inference: weights of the blocks in e4m3 with a scale for each output,
    activations with one for each token, found as they come.

    Where nothing stands between, activations are quantized by the kernel that makes them: LayerNorm before the
    projection to queries, keys and values and before fc1 (a scale a token), GELU before fc2 (a scale for every 128 of a
    token's columns). The attention's result is quantized on its way into the output projection. Embedding, norms,
    attention itself, pooling and head stay as they are.

    Where there is no e4m3 (a CPU), the same numbers are rounded in the same places and multiplied in fp32: as accurate,
    and slower than the model was.
    Returns the model, in eval mode, its parameters without gradients. Raises NotImplementedError on a GPU before
    compute capability 8.9, ValueError where there is nothing to quantize.
    """
    if any(is_plain(module, "Fp8Linear") for _, module in _blocks(model)):
        raise ValueError("the model is in fp8 already")
    model.eval().requires_grad_(False)
    device = next(model.parameters()).device
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
        raise ValueError("there is no plain Linear in the blocks whose sizes are multiples of 16: nothing to quantize")
    for block in model.blocks:
        if not is_plain(block, "Block"):
            continue
        if is_plain(block.norm1, *PLAIN) and is_plain(block.attn, "Attention") and block.attn.gate is None:
            quantize_for(block.norm1, block.attn, block.attn.qkv)
        if is_plain(block.norm2, *PLAIN) and is_plain(block.mlp, "Mlp"):
            quantize_for(block.norm2, block.mlp, block.mlp.fc1)
    return model
