"""AdamW and Muon with layer decay, and the schedule of their learning rate."""

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


def adamw(model: nn.Module, lr: float, weight_decay: float, layer_decay: float):
    """torch's AdamW, fused where the device has it."""
    return torch.optim.AdamW(parameter_groups(model, weight_decay, layer_decay), lr=lr, fused=True)


class MuonAdamW:
    """torch's Muon for the weights of the blocks' linear layers, AdamW for all other parameters, as one optimiser.

    Muon's steps are scaled to the size of AdamW's ("match_rms_adamw", Liu et al., arXiv 2502.16982), so one learning
    rate and weight decay serve both. Raises ValueError where no such weight is trained.
    """

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, layer_decay: float):
        matrices = {id(layer.weight) for layer in model.blocks.modules() if isinstance(layer, nn.Linear)}
        muon, adamw = [], []
        for group in parameter_groups(model, weight_decay, layer_decay):
            for groups, chosen in ((muon, True), (adamw, False)):
                if params := [p for p in group["params"] if (id(p) in matrices) == chosen]:
                    groups.append(group | {"params": params})
        if not muon:
            raise ValueError("Muon has nothing to train: no weight of the blocks' linear layers requires a gradient")
        self.muon = torch.optim.Muon(muon, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(adamw, lr=lr, fused=True)

    @property
    def param_groups(self) -> list[dict]:
        return self.muon.param_groups + self.adamw.param_groups

    def step(self) -> None:
        self.muon.step()
        self.adamw.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.muon.zero_grad(set_to_none)
        self.adamw.zero_grad(set_to_none)

    def state_dict(self) -> dict:
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


OPTIMISERS = {"adamw": adamw, "muon": MuonAdamW}


def learning_rate(step: int, steps: int, warmup: int, lr: float, least: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine down to `least` at the last of `steps`."""
    if step < warmup:
        return lr * (step + 1) / warmup
    share = (step - warmup) / max(1, steps - 1 - warmup)
    return least + (lr - least) * (1 + math.cos(math.pi * min(1.0, share))) / 2
