"""Plain pre-norm blocks through the `block` op, where it is faster than op by op: on a CPU, at inference."""

import torch
from torch import Tensor, nn

from revit_kernels import dispatch, layouts
from revit_kernels.dispatch import load
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
            if not is_plain(within[name], *classes):
                return f"{name}, a {type(within[name]).__name__}, is no plain {' or '.join(classes)}"
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
    if dispatch.FORCED not in (None, "", "cpu"):
        return f"another backend is asked for, {dispatch.FORCED}"
    if isinstance(backend := load("block", "cpu"), str):
        return backend
    return structure(module) or _unlike(module, x) or backend.unable(_widths(module), kind(module))


def _unlike(module: nn.Module, x: Tensor) -> str | None:
    """The weight that is no plain tensor of x's dtype and device: its address is all that the kernel gets."""
    parts = module._modules
    attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
    for part in (parts["norm1"], attn["qkv"], attn["proj"], parts["norm2"], mlp["fc1"], mlp["fc2"]):
        weight = part._parameters.get("weight")
        if type(weight) not in (nn.Parameter, Tensor) or weight.dtype != x.dtype or weight.device != x.device:
            found = "no parameter" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
            return f"a weight is {found}, the tokens are of {x.dtype}"
    return None


def refusal_to_be(module: nn.Module, quantised: str) -> str | None:
    """Why the block cannot be quantised so; None if it can."""
    if module.norm1.weight.device.type != "cpu":
        return f"is on {module.norm1.weight.device}: {quantised} is for CPUs"
    if isinstance(backend := load("block", "cpu"), str):
        return backend
    why = structure(module)
    return f"does not run whole: {why}" if why else backend.unable(_widths(module), quantised)


def _widths(module: nn.Module) -> tuple[int, ...]:
    parts = module._modules
    return (*parts["attn"]._modules["proj"].weight.shape, parts["mlp"]._modules["fc1"].weight.shape[0])


def kind(module: nn.Module) -> str | None:
    """What the block was quantised to."""
    return module.__dict__.get("quantised")


def _affine(norm: nn.Module, packing: Packing | None) -> tuple[Tensor, Tensor]:
    if packing is None or not isinstance(norm, _PerLength):
        return norm._parameters["weight"], norm._parameters["bias"]
    return norm.affine(packing)


def _of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    return module._parameters["weight"], module._parameters["bias"]


def weights(module: nn.Module, packing: Packing | None) -> BlockWeights:
    parts = module._modules
    attn, mlp = parts["attn"]._modules, parts["mlp"]._modules
    gamma1, gamma2 = (parts[name]._parameters.get("gamma") for name in ("ls1", "ls2"))
    return BlockWeights(
        *(*_affine(parts["norm1"], packing), *_of(attn["qkv"]), *_of(attn["proj"]), gamma1),
        *(*_affine(parts["norm2"], packing), *_of(mlp["fc1"]), *_of(mlp["fc2"]), gamma2),
    )


def _alike(module: nn.Module) -> tuple:
    """What blocks that run in one call have in common."""
    parts = module._modules
    attn, name = parts["attn"], name_of(parts["mlp"]._modules["act"])
    return attn.num_heads, (parts["norm1"].eps, parts["norm2"].eps), attn.scale, name, kind(module)


def run(modules: list[nn.Module], x: Tensor, packing: Packing) -> Tensor:
    """The output of the last of these blocks, none of which is refused, and which `together` takes as one.

    x: (capacity, dim), or (images, length, dim)
    """
    rows = x.reshape(-1, x.shape[-1])
    norms = (norm for module in modules for norm in (module._modules["norm1"], module._modules["norm2"]))
    per_length = len(packing.menu) > 1 and any(isinstance(norm, _PerLength) for norm in norms)
    row = _rows(rows, packing) if per_length else None
    parameters = [weights(module, packing) for module in modules]
    options = _alike(modules[0])
    return load("block", "cpu").forward_blocks(rows, packing.cu_seqlens, row, parameters, *options).view_as(x)


def together(modules: list[nn.Module], x: Tensor) -> list[nn.Module]:
    """The first of these blocks that can run in one call: plain, and alike in all but their weights."""
    taken, shared = [], None
    for module in modules:
        if not isinstance(module, nn.Module) or not is_plain(module, "Block") or refusal(module, x) is not None:
            break
        alike = (_alike(module), _widths(module), module._modules["norm1"].weight.dtype)
        shared = alike if shared is None else shared
        if alike != shared:
            break
        taken.append(module)
    return taken


def forget(module: nn.Module) -> None:
    """Keep no layout of the block's weights any longer."""
    for parameter in module.parameters():
        layouts.forget(parameter)


def prepack(module: nn.Module) -> int:
    """Pack the block's weights now, on trust: as `revit_kernels.gemm.prepack`. Returns how many."""
    backend = load("block", "cpu")
    if module.norm1.weight.device.type != "cpu" or isinstance(backend, str):
        return 0
    if module.norm1.weight.dtype not in (torch.float32, torch.bfloat16) or structure(module):
        return 0
    made = weights(module, None)
    if backend.unable(_widths(module), kind(module)):
        return 0
    backend.prepack(made, kind(module))
    return 4
