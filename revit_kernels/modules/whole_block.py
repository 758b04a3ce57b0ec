"""Plain pre-norm blocks as one call of the op `block`, where it is faster than op by op: on a CPU, at inference."""

import torch
from torch import Tensor, nn

from revit_kernels import ops
from revit_kernels.dispatch import load, requested_backend
from revit_kernels.modules.layer_norm import PER_LENGTH, _PerLength, _rows
from revit_kernels.modules.linear import is_plain, name_of
from revit_kernels.ops.attention.rotary import Rotary
from revit_kernels.ops.block import NORMS, BlockWeights, Eps, Form
from revit_kernels.packing import Packing

RMS = ("RmsNorm", PER_LENGTH["RmsNorm"].__name__)
NORM_CLASSES = ("LayerNorm", PER_LENGTH["LayerNorm"].__name__, *RMS)
LINEAR, DROPOUT, DROP_PATH = ("Linear",), ("Identity", "Dropout"), ("Identity", "DropPath")
ACTIVATIONS = ("GELU", "GELUTanh", "QuickGELU", "SiLU")
PARTS = {
    **dict.fromkeys(("norm1", "norm2"), NORM_CLASSES),
    **dict.fromkeys(("ls1", "ls2"), ("Identity", "LayerScale", "FixedScale")),
    **dict.fromkeys(("drop_path1", "drop_path2"), DROP_PATH),
}
ATTENTION = {
    **dict.fromkeys(("qkv", "q_proj", "k_proj", "v_proj", "proj"), LINEAR),
    **dict.fromkeys(("attn_drop", "proj_drop"), DROPOUT),
    **dict.fromkeys(("q_norm", "k_norm", "norm"), ("Identity", *NORM_CLASSES)),
}
MLP = {
    **dict.fromkeys(("fc1", "fc1_g", "fc1_x", "fc2"), LINEAR),
    **dict.fromkeys(("drop1", "drop2"), DROPOUT),
    "act": ACTIVATIONS,
    "norm": ("Identity", *NORM_CLASSES),
}
ATTENTIONS, MLPS = ("Attention", "EvaAttention", "AttentionRope"), ("Mlp", "GluMlp", "SwiGLU")


def drops(part: nn.Module) -> bool:
    own = part.__dict__
    return bool(own.get("p") or own.get("drop_prob"))


def _submodules(module: nn.Module):
    """The block's parts, those of its attention, and those of its MLP, by name."""
    parts = module._modules  # past nn.Module's slow attributes: this is asked of every block in every forward
    return parts, parts["attn"]._modules, parts["mlp"]._modules


def structure(module: nn.Module) -> str | None:
    """What about the block the op does not compute, or what somebody wrapped or hooked; None for a plain one."""
    parts = module._modules
    attn, mlp = parts["attn"], parts["mlp"]
    for part, names in ((attn, ATTENTIONS), (mlp, MLPS)):
        if not is_plain(part, *names) or not type(part).__module__.startswith("revit_kernels."):
            return f"{type(part).__name__} is no plain {names[0]} of ours"
    if attn.is_recorded():
        return "its attention maps are asked for"
    if attn._modules.get("gate") is not None:
        return "its attention has a gate"
    for within, table in zip(_submodules(module), (PARTS, ATTENTION, MLP)):
        for name, classes in table.items():
            part = within.get(name)
            if part is None:
                continue
            if not is_plain(part, *classes):
                return f"{name}, a {type(part).__name__}, is no plain {' or '.join(classes)}"
            if part.training and classes in (DROPOUT, DROP_PATH) and drops(part):
                return f"{name} drops, as in training"
    found = list(norms(module).values())
    if any(norm.weight is None for norm in found):
        return "a norm has no affine"
    if len({type(norm).__name__ in RMS for norm in found}) > 1:
        return "some of its norms subtract the mean, others do not"
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
    return structure(module) or _unlike(module, dtype) or backend.unable(form(module).widths[:2], kind)


def _unlike(module: nn.Module, dtype: torch.dtype) -> str | None:
    """The weight that is no plain tensor of this dtype on the CPU."""
    _, attn, mlp = _submodules(module)
    linears = (part for within in (attn, mlp) for part in within.values() if isinstance(part, nn.Linear))
    for part in (*norms(module).values(), *linears):
        weight = part._parameters.get("weight")
        if type(weight) not in (nn.Parameter, Tensor) or weight.dtype != dtype or weight.device.type != "cpu":
            found = "no parameter" if weight is None else f"a {type(weight).__name__} of {weight.dtype}"
            return f"a weight is {found}, the tokens are of {dtype}"
    return None


def norms(module: nn.Module) -> dict[str, nn.Module]:
    """The norms there are, by their names in BlockWeights."""
    parts, attn, mlp = _submodules(module)
    found = (parts["norm1"], attn["q_norm"], attn["k_norm"], attn["norm"], parts["norm2"], mlp["norm"])
    return {name: norm for name, norm in zip(NORMS, found) if type(norm).__name__ != "Identity"}


def form(module: nn.Module) -> Form:
    """What the op is told besides tensors."""
    parts, attn, mlp = _submodules(module)
    found = norms(module)
    return Form(
        widths=(*attn["proj"].weight.shape, mlp["fc2"].weight.shape[1]),
        heads=parts["attn"].num_heads,
        eps=Eps(**{name: norm.eps for name, norm in found.items()}),
        rms=type(found["norm1"]).__name__ in RMS,
        scale=parts["attn"].kernel_scale(),
        activation=name_of(mlp["act"]),
    )


def _of(module: nn.Module) -> tuple[Tensor, Tensor | None]:
    return module._parameters["weight"], module._parameters.get("bias")


def _joined(biases: list[Tensor | None], widths: list[int]) -> Tensor | None:
    """One bias of several, zeros where there is none among them."""
    some = next((bias for bias in biases if bias is not None), None)
    if some is None:
        return None
    return torch.cat([some.new_zeros(n) if bias is None else bias for bias, n in zip(biases, widths)])


def _for_each_head(rows: Tensor | None, attn: nn.Module) -> Tensor | None:
    """Rows of a weight or bias for each head of queries, where a group of them shares keys and values."""
    if rows is None or len(rows) == attn.num_heads * attn.head_dim:
        return rows
    of_heads = rows.unflatten(0, (-1, attn.head_dim))
    return of_heads.repeat_interleave(attn.num_heads // len(of_heads), 0).flatten(0, 1)


def _to_qkv(attn: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The projection to queries, keys and values, whether it is one or three."""
    qkv = attn._modules.get("qkv")
    if qkv is None:
        pairs = [_of(layer) for layer in attn._apart()]
        pairs[1:] = [tuple(_for_each_head(t, attn) for t in pair) for pair in pairs[1:]]
        weights, biases = zip(*pairs)
        return torch.cat(weights), _joined(biases, [len(weight) for weight in weights])
    weight, bias = _of(qkv)
    own = attn._parameters
    if own.get("q_bias") is not None:
        bias = _joined([own["q_bias"], None, own["v_bias"]], [len(weight) // 3] * 3)
    return weight, bias


def _halves(mlp: nn.Module) -> tuple:
    """Weight and bias before the activation, and those of what its result is multiplied with, None without a gate."""
    parts = mlp._modules
    if "fc1_g" in parts:
        return _of(parts["fc1_g"]), _of(parts["fc1_x"])
    weight, bias = _of(parts["fc1"])
    if type(mlp).__name__ != "GluMlp":
        return (weight, bias), (None, None)
    halves = list(zip(weight.chunk(2), (None, None) if bias is None else bias.chunk(2)))
    return tuple(reversed(halves)) if mlp.gate_last else tuple(halves)


def weights(module: nn.Module, affine=_of) -> BlockWeights:
    """The block's parameters. affine: gives a norm's weight and bias, (dim,) or (lengths, dim)"""
    parts, attn, mlp = _submodules(module)
    own = module._parameters
    fields = {}
    for name, norm in norms(module).items():
        fields |= _pair(name, affine(norm))
    fields |= _pair("qkv", _to_qkv(parts["attn"])) | _pair("proj", _of(attn["proj"])) | _pair("fc2", _of(mlp["fc2"]))
    fc1, fc1_x = _halves(parts["mlp"])
    fields |= _pair("fc1", fc1) | _pair("fc1_x", fc1_x)
    for i in "12":
        scale = parts.get(f"ls{i}")
        fields[f"gamma{i}"] = own.get(f"gamma_{i}") if scale is None else getattr(scale, "gamma", None)
    return BlockWeights(**fields)


def _pair(name: str, pair: tuple[Tensor | None, Tensor | None]) -> dict:
    return {name: pair[0], f"{name}_bias": pair[1]}


def run(module: nn.Module, x: Tensor, packing: Packing, rope: Rotary | None = None) -> Tensor:
    """The output of a block that is not refused. x: (capacity, dim), or (images, length, dim)"""
    rows = x.reshape(-1, x.shape[-1])
    per_length = len(packing.menu) > 1 and any(isinstance(norm, _PerLength) for norm in norms(module).values())
    w = weights(module, lambda norm: norm.affine(packing) if isinstance(norm, _PerLength) else _of(norm))
    _, heads, *how = form(module)
    how = dict(zip(Form._fields[2:], how)) | {"row": _rows(rows, packing) if per_length else None}
    return ops.block(rows, packing.cu_seqlens, w, heads, rotary=rope, **how).view_as(x)
