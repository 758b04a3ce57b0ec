"""Plain pre-norm blocks through the `block` op, where it is faster than op by op: on a CPU, at inference."""

from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revit_kernels import dispatch, layouts
from revit_kernels.dispatch import load
from revit_kernels.modules.layer_norm import PER_LENGTH, _PerLength, _rows
from revit_kernels.modules.lengths import exact_rows
from revit_kernels.modules.linear import is_plain, name_of
from revit_kernels.modules.unchanged import Unchanged
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

# What the op's result depends on, of the attributes of a block and of its parts.
WATCHED = ("training", "num_heads", "scale", "eps", "approximate", "menu", "gate", "quantised", "p", "drop_prob")
_memory, _version = Tensor.data_ptr, attrgetter("_version")


DROPS = ("drop_path1", "drop_path2")


def _drops(part: nn.Module) -> bool:
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
            if part.training and (classes is DROPOUT or name in DROPS) and _drops(part):
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
    rows, backend = x.reshape(-1, x.shape[-1]), load("block", "cpu")
    trusted = modules.trusted(rows, packing) if isinstance(modules, Together) else None
    if trusted is not None:
        addresses, _, row = trusted
        how = modules.widths, *modules.options
        return backend.forward_trusted(rows, packing.cu_seqlens, addresses, row, *how).view_as(x)
    norms = (norm for module in modules for norm in (module._modules["norm1"], module._modules["norm2"]))
    per_length = len(packing.menu) > 1 and any(isinstance(norm, _PerLength) for norm in norms)
    row = _rows(rows, packing) if per_length else None
    parameters = [weights(module, packing) for module in modules]
    return backend.forward_blocks(rows, packing.cu_seqlens, row, parameters, *_alike(modules[0])).view_as(x)


class Tail(NamedTuple):
    """What makes answers of the last block's tokens: of each image's first one."""

    norm: nn.Module
    fc_norm: nn.Module
    drop: nn.Module
    head: nn.Module

    def plain(self, dtype: torch.dtype) -> bool:
        """Whether it is what the op computes: a LayerNorm and a Linear of this dtype, and nothing between."""
        if not (is_plain(self.norm, *NORMS) and is_plain(self.head, "Linear") and is_plain(self.fc_norm, *IDENTITY)):
            return False
        if not is_plain(self.drop, *DROPOUT) or (self.drop.training and _drops(self.drop)):
            return False
        weights = self.norm.weight, self.norm.bias, self.head.weight
        plain = all(type(w) in (nn.Parameter, Tensor) and w.dtype == dtype and w.device.type == "cpu" for w in weights)
        return plain and self.head.in_features % 4 == 0

    def prepack(self) -> None:
        """Pack the head's weight now, on trust: as `revit_kernels.gemm.prepack`."""
        backend = load("block", "cpu")
        if not isinstance(backend, str) and (self.plain(torch.float32) or self.plain(torch.bfloat16)):
            backend.heads.trust(self.head.weight, self.head.bias)


class _Kept(dict):
    """What `together` found, by the number of blocks that it was asked of, and whether of a tail; lies with the first
    of the blocks."""

    def __reduce__(self):  # a copy of the block begins without
        return _Kept, ()

    def __deepcopy__(self, memo):
        return _Kept()


class Together(list):
    """Blocks that run in one call: the first of those asked for, for as long as nothing about these changes."""

    def __init__(self, taken: list[nn.Module], asked: list[nn.Module], x: Tensor, tail: Tail | None):
        super().__init__(taken)
        self._asked, self._dtype, self._forced = [*asked, *(tail or ())], x.dtype, dispatch.FORCED
        self._unchanged = Unchanged(self._asked, WATCHED)
        self._tail = tail if tail and len(taken) == len(asked) and tail.plain(x.dtype) else None
        self._norms = [module._modules[name] for module in taken for name in ("norm1", "norm2")]
        self._norms += [self._tail.norm] if self._tail else []
        self._menus = {norm.menu for norm in self._norms if isinstance(norm, _PerLength)}
        self._kept = None  # state of the weights, what was read of them, addresses by row of the menu
        self.options, self.widths = _alike(taken[0]), _widths(taken[0])

    def still(self, asked: list[nn.Module], x: Tensor, tail: Tail | None) -> bool:
        """Whether these and no more would be found once more."""
        return (
            type(x) is Tensor
            and x.dtype == self._dtype
            and x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not torch.is_autocast_enabled("cpu")
            and dispatch.FORCED == self._forced
            and [*asked, *(tail or ())] == self._asked
            and self._unchanged.holds()
        )

    def trusted(self, rows: Tensor, packing: Packing) -> tuple[Tensor, Tensor | None, Tensor | None] | None:
        """Addresses, the tail's too, and `row`; None where a weight was not prepacked, or was written to since."""
        which = (0,)
        if self._menus and packing.menu:
            which = exact_rows(next(iter(self._menus)), packing.menu) if len(self._menus) == 1 else None
        if which is None:  # of an affine that lies between two, or of several menus
            return None
        try:
            parameters = self._unchanged.parameters
            state = layouts.changes(), [*map(_memory, parameters)], [*map(_version, parameters)]
        except RuntimeError:  # inference tensors have no version
            return None
        kept = self._kept
        if kept is None or kept[0] != state:
            kept = self._kept = state, self._read(), {}
        _, read, at = kept
        if read is None:
            return None
        first = which[0] if len(which) == 1 else 0
        if first not in at:
            at[first] = self._addresses(*read, first)
        if len(which) == 1:
            return *at[first], None
        row = _rows(rows, packing)
        if which != tuple(range(len(which))):
            row = torch.tensor(which, dtype=torch.int32)[row.long()]
        return *at[first], row

    def _addresses(self, blocks: list, tail: tuple | None, first: int) -> tuple[Tensor, Tensor | None]:
        backend = load("block", "cpu")
        head = backend.head_addresses(*tail, self._tail.head.out_features, first) if tail else None
        return backend.addresses(blocks, first), head

    def _read(self) -> tuple[list, tuple | None] | None:
        read, tail = [], None
        for module in self:
            w, norms = weights(module, None), (module._modules["norm1"], module._modules["norm2"])
            products = load("block", "cpu").trusted(w, kind(module))
            if products is None:
                return None
            read.append(([t for norm in norms for t in _table(norm)], products))
        if self._tail:
            packed = load("block", "cpu").heads.trusted(*_of(self._tail.head))
            tail = (_table(self._tail.norm), packed) if packed is not None else None
        return read, tail


def _table(norm: nn.Module) -> tuple[Tensor, Tensor]:
    return norm.table() if isinstance(norm, _PerLength) else _of(norm)


def together(modules: list[nn.Module], x: Tensor, tail: Tail | None = None) -> list[nn.Module]:
    """The first of these blocks that can run in one call: plain, and alike in all but their weights."""
    kept = modules[0].__dict__.get("whole", {}) if modules else {}
    found = kept.get(key := (len(modules), tail is None))
    if found is not None and found.still(modules, x, tail):
        return found
    taken = _together(modules, x)
    if taken:
        kept = modules[0].__dict__.setdefault("whole", _Kept())
        taken = kept[key] = Together(taken, modules, x, tail)
    return taken


def answers(modules: list[nn.Module], tail: Tail, x: Tensor, packing: Packing) -> Tensor | None:
    """(images, classes), where all these blocks and the tail run in one call, with weights that are kept on trust."""
    backend = load("block", "cpu")
    if isinstance(backend, str) or backend.heads.trusted(*_of(tail.head)) is None:
        return None
    found = together(modules, x, tail)
    if not isinstance(found, Together) or found._tail is None:
        return None
    rows = x.reshape(-1, x.shape[-1])
    trusted = found.trusted(rows, packing)
    if trusted is None or trusted[1] is None:
        return None
    addresses, head, row = trusted
    last = head, tail.norm.eps
    return backend.forward_trusted(rows, packing.cu_seqlens, addresses, row, found.widths, *found.options, *last)


def _together(modules: list[nn.Module], x: Tensor) -> list[nn.Module]:
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
