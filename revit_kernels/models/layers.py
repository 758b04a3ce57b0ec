"""The layers that a model's constructor can be given by name."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from revit_kernels import modules

# How a constructor is told of a layer: by name, by name with options, or by what makes it; None for the default.
Layer = str | dict[str, Any] | Callable[..., nn.Module] | None

ACTIVATIONS = {
    "gelu": nn.GELU,
    "gelu_tanh": partial(nn.GELU, approximate="tanh"),
    "quick_gelu": modules.QuickGELU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
NORMS = {"layernorm": modules.LayerNorm, "rmsnorm": modules.RmsNorm}
MLPS = {
    "Mlp": modules.Mlp,
    "GluMlp": modules.GluMlp,
    "SwiGLU": modules.SwiGLU,
    "SwiGLUPacked": partial(modules.GluMlp, act_layer=nn.SiLU, gate_last=False),
}
BLOCKS = {
    block.__name__: block
    for block in (
        modules.Block,
        modules.ResPostBlock,
        modules.ParallelScalingBlock,
        modules.DiffParallelScalingBlock,
        modules.ParallelThingsBlock,
    )
}
STREAMING = (*(name for name, block in BLOCKS.items() if hasattr(block, "stream")), "EvaBlock", "EvaBlockPostNorm")
STREAMING += ("SandwichBlock",)
EMBEDS = {"PatchEmbed": modules.PatchEmbed}


def layer(argument: str, choice, table: dict, default: Callable | None = None) -> Any:
    """A layer class from a class, a name, or {"name": ..., option: ...}; the default for None."""
    if choice is None or choice == "":
        return default
    options = {}
    if isinstance(choice, dict):
        options = {k: v for k, v in choice.items() if k != "name"}
        choice = choice["name"]
    if isinstance(choice, str):
        found = table.get(choice) or table.get(choice.lower().replace("_", "")) or table.get(choice.lower())
        if found is None:
            raise ValueError(f"{argument} must be one of {sorted(table)}, got {choice!r}")
        choice = found
    return partial(choice, **options) if options else choice
