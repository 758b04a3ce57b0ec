"""How a new VarLenViT's weights are drawn, by timm's names for it."""

import math
from functools import partial

from torch import nn


def _rest(module: nn.Module, needs_reset: bool) -> None:
    """What a module that is no Linear does for itself."""
    if hasattr(module, "init_weights"):
        module.init_weights()
    elif needs_reset and hasattr(module, "reset_parameters"):
        module.reset_parameters()


def truncated_normal(module: nn.Module, name: str, needs_reset: bool) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    else:
        _rest(module, needs_reset)


def jax(module: nn.Module, name: str, needs_reset: bool, head_bias: float = 0.0) -> None:
    if isinstance(module, nn.Linear):
        if name.startswith("head"):
            nn.init.zeros_(module.weight)
            nn.init.constant_(module.bias, head_bias)
            return
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.normal_(module.bias, std=1e-6) if "mlp" in name else nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_in = module.weight[0].numel()
        nn.init.trunc_normal_(module.weight, std=math.sqrt(1 / fan_in) / 0.87962566103423978)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    else:
        _rest(module, needs_reset)


def moco(module: nn.Module, name: str, needs_reset: bool) -> None:
    if isinstance(module, nn.Linear):
        if "qkv" in name:  # queries, keys and values are three matrices
            bound = math.sqrt(6.0 / (module.weight.shape[0] // 3 + module.weight.shape[1]))
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    else:
        _rest(module, needs_reset)


def reset(module: nn.Module, name: str, needs_reset: bool) -> None:
    if needs_reset and hasattr(module, "reset_parameters"):
        module.reset_parameters()


MODES = {"": truncated_normal, "jax": jax, "jax_nlhb": jax, "moco": moco, "reset": reset}


def initialise(model: nn.Module, mode: str, needs_reset: bool) -> None:
    """Draw all weights of a VarLenViT. ValueError for a mode that is not one of MODES."""
    if mode not in MODES:
        raise ValueError(f"weight_init must be one of {sorted(MODES)} or 'skip', got {mode!r}")
    rule = MODES[mode]
    if mode == "jax_nlhb":
        rule = partial(jax, head_bias=-math.log(model.num_classes))
    for token, std in (("pos_embed", 0.02), ("dist_token", 0.02)):
        if getattr(model, token, None) is not None:
            nn.init.trunc_normal_(getattr(model, token), std=std)
    for token in ("cls_token", "reg_token"):
        if getattr(model, token) is not None:
            nn.init.normal_(getattr(model, token), std=1e-6)
    for name, module in reversed(list(model.named_modules())):  # children first: a parent's own rule has the last word
        if module is not model:
            rule(module, name, needs_reset)
    if model.fix_init:
        model.fix_init_weight()
