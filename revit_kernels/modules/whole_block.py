"""Plain pre-norm blocks as one call of the op `block`, where it is faster than op by op: on a CPU, at inference."""

import torch
from torch import Tensor, nn

from revit_kernels import ops
from revit_kernels.dispatch import load, requested_backend
from revit_kernels.modules.layer_norm import PER_LENGTH, _PerLength, _rows
from revit_kernels.modules.linear import is_plain, name_of
from revit_kernels.ops.block import BlockWeights
from revit_kernels.packing import Packing

NORMS = ("LayerNorm", PER_LENGTH["LayerNorm"].__name__)
LINEAR, IDENTITY, DROPOUT = ("Linear",), ("Identity",), ("Identity", "Dropout")
GELUS = ("GELU", "GELUTanh", "QuickGELU")
PARTS = (
    *(("norm1", NORMS), ("norm2", NORMS)),
    *((name, ("Identity", "LayerScale")) for name in ("ls1", "ls2")),
    *((name, ("Identity", "DropPath")) for name in ("drop_path1", "drop_path2")),
)
ATTENTION = (
    *(("qkv", LINEAR), ("proj", LINEAR), ("attn_drop", DROPOUT), ("proj_drop", DROPOUT)),
    *((name, IDENTITY) for name in ("q_norm", "k_norm", "norm")),
)
MLP = (
    *(("fc1", LINEAR), ("fc2", LINEAR), ("act", GELUS)),
    *(("drop1", DROPOUT), ("drop2", DROPOUT), ("norm", IDENTITY)),
)

DROPS = ("drop_path1", "drop_path2")


def drops(part: nn.Module) -> bool:
    own = part.__dict__
    return bool(own.get("p") or own.get("drop_prob"))


def structure(module: nn.Module) -> str | None:
    """What about the block the op does not compute, or what somebody wrapped or hooked; None for a plain one."""
    parts = module._modules  # past nn.Module's slow attributes: this is asked of every block in every forward
    attn, mlp = parts["attn"], parts["mlp"]
    for part, names in ((attn, ("Attention",)), (mlp, ("Mlp",))):
        if not is_plain(part, *names) or not type(part).__module__.startswith("revit_kernels."):
            return f"{type(part).__name__} is no plain {names[0]} of ours"
    attn, mlp = attn._modules, mlp._modules
    if attn.get("gate") is not None:
        return "its attention has a gate"
    for within, names in ((parts, PARTS), (attn, ATTENTION), (mlp, MLP)):
        for name, classes in names:
            part = within[name]
            if not is_plain(part, *classes):
                return f"{name}, a {type(part).__name__}, is no plain {' or '.join(classes)}"
            if part.training and (classes is DROPOUT or name in DROPS) and drops(part):
                return f"{name} drops, as in training"
    for norm in (parts["norm1"], parts["norm2"]):
        if norm.weight is None or norm.bias is None:
            return "a norm has no affine"
    return None


def refusal(module: nn.Module, x: Tensor) -> str | None:
    """Why the block does not run whole on x; None if it does."""
    if x.device.type != "cpu":
        return "runs on CPUs only"
    if torch.compiler.is_compiling():
        return "torch.compile sees through the single ops only"
    if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters())):
        return "records no gradients"
    if module.training:
        return "is for inference: the block is in training mode"
    if torch.is_autocast_enabled("cpu"):
        return "computes in the dtype of the weights, autocast would not"
    if type(x) is not Tensor or x.dtype not in (torch.float32, torch.bfloat16):
        return f"no kernel for a {type(x).__name__} of {x.dtype}"
    return unable(module, x.dtype)


def unable(module: nn.Module, dtype: torch.dtype, kind: str | None = None) -> str | None:
    """Why the block cannot run whole on tokens of this dtype, whatever they are; None if it can.

    kind: "int8", if its products are to be
    """
    if (requested := requested_backend()) not in (None, "cpu"):
        return f"another backend is asked for, {requested}"
    if isinstance(backend := load("block", "cpu"), str):
        return backend
    return structure(module) or _unlike(module, dtype) or backend.unable(widths(module), kind)


def _unlike(module: nn.Module, dtype: torch.dtype) -> str | None:
    """The weight that is no plain tensor of this dtype on the CPU."""
    parts = module._modules
    attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
    for part in (parts["norm1"], attn["qkv"], attn["proj"], parts["norm2"], mlp["fc1"], mlp["fc2"]):
        weight = part._parameters.get("weight")
        if type(weight) not in (nn.Parameter, Tensor) or weight.dtype != dtype or weight.device.type != "cpu":
            found = "no parameter" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
            return f"a weight is {found}, the tokens are of {dtype}"
    return None


def widths(module: nn.Module) -> tuple[int, ...]:
    """Of the tokens, of what is attended, and of the hidden layer."""
    parts = module._modules
    return (*parts["attn"]._modules["proj"].weight.shape, parts["mlp"]._modules["fc1"].weight.shape[0])


def options(module: nn.Module) -> tuple:
    """What the op is told besides tensors: heads, eps of both norms, scale, activation."""
    parts = module._modules
    attn, name = parts["attn"], name_of(parts["mlp"]._modules["act"])
    return attn.num_heads, parts["norm1"].eps, parts["norm2"].eps, attn.scale, name


def _of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    return module._parameters["weight"], module._parameters["bias"]


def weights(module: nn.Module, affine) -> BlockWeights:
    """The block's parameters. affine: gives a norm's weight and bias, (dim,) or (lengths, dim)"""
    parts = module._modules
    attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
    gamma1, gamma2 = (parts[name]._parameters.get("gamma") for name in ("ls1", "ls2"))
    return BlockWeights(
        *(*affine(parts["norm1"]), *_of(attn["qkv"]), *_of(attn["proj"]), gamma1),
        *(*affine(parts["norm2"]), *_of(mlp["fc1"]), *_of(mlp["fc2"]), gamma2),
    )


def run(module: nn.Module, x: Tensor, packing: Packing) -> Tensor:
    """The output of a block that is not refused. x: (capacity, dim), or (images, length, dim)"""
    rows = x.reshape(-1, x.shape[-1])
    norms = module._modules["norm1"], module._modules["norm2"]
    per_length = len(packing.menu) > 1 and any(isinstance(norm, _PerLength) for norm in norms)
    w = weights(module, lambda norm: norm.affine(packing) if isinstance(norm, _PerLength) else _of(norm))
    heads, eps1, eps2, scale, activation = options(module)
    how = {"eps": (eps1, eps2), "scale": scale, "activation": activation}
    row = _rows(rows, packing) if per_length else None
    return ops.block(rows, packing.cu_seqlens, w, heads, row=row, **how).view_as(x)
