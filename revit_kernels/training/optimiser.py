"""AdamW with layer decay, and the schedule of its learning rate."""

from __future__ import annotations

import math
import re

import torch
from torch import nn


def layer_of(name: str, matcher: dict, depth: int) -> int:
    """The layer of a parameter: 0 for the stem, then the blocks, `depth` + 1 for what comes after them."""
    if re.match(matcher["stem"], name):
        return 0
    for pattern, fixed in matcher["blocks"]:
        found = re.match(pattern, name)
        if found:
            return depth + 1 if fixed is not None else 1 + int(found.group(1))
    return depth + 1


def parameter_groups(model, weight_decay: float, layer_decay: float = 1.0) -> list[dict]:
    """Groups for an optimiser: each layer's learning rate is `layer_decay` times that of the layer above it.

    Biases, affines and what `model.no_weight_decay()` names are not decayed. Each group has "scale", by which the
    learning rate of its layer is multiplied.
    """
    keep, matcher, depth = model.no_weight_decay(), model.group_matcher(), len(model.blocks)
    groups: dict[tuple[int, bool], dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = layer_of(name, matcher, depth)
        decays = parameter.ndim > 1 and name not in keep and not name.endswith(".bias")
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "scale": layer_decay ** (depth + 1 - layer),
                "weight_decay": weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def adamw(model: nn.Module, lr: float, weight_decay: float, layer_decay: float, betas=(0.9, 0.999)):
    """torch's AdamW, fused where the device has it."""
    groups = parameter_groups(model, weight_decay, layer_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def learning_rate(step: int, steps: int, warmup: int, lr: float, least: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine down to `least` at the last of `steps`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - 1 - warmup)
    return least + (lr - least) * (1 + math.cos(math.pi * min(1.0, share))) / 2
