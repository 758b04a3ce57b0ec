"""What goes between the host and another device, seen in what Python asks of torch; `meta` may stand for the device.

Under a mode of this kind nothing takes another way than without it, as it would under a TorchDispatchMode.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

MAKERS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
WAITING = ("item", "tolist", "nonzero", "unique", "masked_select", "equal", "cpu", "numpy")
NUMBERS = ("__bool__", "__int__", "__float__", "__index__")


class HostTraffic(TorchFunctionMode):
    """`seen`: ("up" to the device or "down" from it, the function's name) for each time."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if name != "__get__" and (kind := _direction(func, name, tree_leaves((args, kwargs)), result)):
            self.seen.append((kind, name))
        return result


def _away(x) -> bool:
    return x.device.type != "cpu"


def _direction(func, name, given, result) -> str | None:
    given = [x for x in given if isinstance(x, Tensor)]
    made = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
    if any(map(_away, made)) and (func in MAKERS or not all(map(_away, given))):
        return "up"
    if any(map(_away, given)):
        mask = name == "__getitem__" and any(x.dtype in (torch.bool, torch.uint8) for x in given[1:])
        if mask or name in WAITING + NUMBERS or not all(map(_away, made)):
            return "down"
    return None
