"""Tensors by key out of files of weights: safetensors, PyTorch's pickles and Google's .npz; no pickle runs code."""

from __future__ import annotations

import functools
import io
import json
import pickle
import re
import tarfile
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch
from torch import Tensor

# What training scripts put weights under; an average of the weights comes first, as timm prefers it too.
WRAPPERS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "teacher", "target_encoder")
WRAPPERS += ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "network", "student")
ASIDE = ("optim", "sched", "scaler", "callbacks", "loops", "rng")  # parts of a run's state that are no model's weights
# Parts of a key that DistributedDataParallel, torch.compile, FSDP, activation checkpointing and Fabric add.
ADDED = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
ZIP = b"PK\x03\x04"  # what a zip archive starts with
LISTED = 4  # how many keys of each kind an error names


def some(items) -> str:
    """The first of the items, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more


def read_checkpoint(path, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt, .bin, .ckpt, .tar or .npz file by key, on the CPU.

    path:   such a file; an index of several, as model.safetensors.index.json; or a folder that has one of FILES. What
            a file is, its first bytes say, not its suffix alone
    prefix: take the tensors whose keys begin with this, without it; keys in nested dictionaries are joined by dots

    Dictionaries around the weights (state_dict, model, ema, teacher, ...) are taken off, an average of the weights
    before the weights themselves; and the parts of keys that DistributedDataParallel, FSDP, torch.compile and
    activation checkpointing add. Google's .npz layout gets timm's keys. Objects beside the weights are not made, and
    no code in a file is run; a pickled module gives its parameters and buffers.
    Raises ValueError for a file that cannot be read, and for one without weights, with what it holds.
    """
    path = Path(path)
    if (path / ".metadata").is_file():
        raise ValueError(
            f"{path} is a folder of torch.distributed.checkpoint: make a file of it with its "
            "format_utils.dcp_to_torch_save"
        )
    if path.is_dir():
        path = next((path / name for name in FILES if (path / name).is_file()), path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path} is none of {', '.join(READERS)}")
    try:
        tree = _reader(path)(path)
        if isinstance(tree, list | tuple):
            tree = {str(i): part for i, part in enumerate(tree)}
        state = _without_added(_unwrapped(tree)) if not prefix else _under(tree, prefix)
        if not state:
            raise ValueError(f"it holds no weights but {_held(tree)}")
        return from_flax(state) if any(key.endswith("embedding/kernel") for key in state) else state
    except Exception as error:  # each reader has its own, and none names the file
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error


def _reader(path: Path):
    """The function that reads the file: of its suffix, unless its first bytes say that it is of another kind."""
    with open(path, "rb") as file:
        start = file.read(24)
    if start == b"version https://git-lfs.":
        raise ValueError("it is a pointer of Git LFS, not the file itself: run `git lfs pull`")
    if start.lstrip().startswith(b"<"):
        raise ValueError("it is a page of a web site, not the file itself: it begins with '<'")
    reader = READERS[path.suffix.lower()]
    if is_safetensors(path):
        return _read_safetensors
    return _read_torch if reader is _read_safetensors and start[:4] == ZIP else reader


def is_safetensors(path: Path) -> bool:
    """Whether the file begins as one of safetensors: with the size of a header in JSON."""
    with open(path, "rb") as file:
        size, brace = int.from_bytes(file.read(8), "little"), file.read(1)
    return brace == b"{" and size < path.stat().st_size


def _read_index(path: Path) -> dict[str, Tensor]:
    """Of several files, in the same folder, of which the index says which tensor lies where."""
    try:
        places = json.loads(path.read_text())["weight_map"]
        names = dict.fromkeys(places.values())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"it is no index of files of weights: {error!r}") from None
    found = {}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or Path(name).suffix == ".json":
            raise ValueError(f"it names {name!r}, which is no file of weights beside it")
        found |= read_checkpoint(path.with_name(name))
    if missing := [key for key in places if key not in found]:
        raise ValueError(f"its files lack {some(missing)}")
    return {key: found[key] for key in places}


def _read_safetensors(path):
    from safetensors.torch import load_file

    return load_file(path)


def _read_npz(path):
    import numpy as np

    def tensor(array):
        if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # how numpy stores bfloat16, which it does not know
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    with np.load(path, allow_pickle=False) as arrays:
        return {key: tensor(arrays[key]) for key in arrays.files if arrays[key].dtype.kind in "fiuV"}


# ---------------------------------------------------------------------- pickles


class _StandIn:
    """In place of every object that is no tensor, container or number: keeps what it is given and does nothing."""

    name = ""
    dump_patches = False  # PyTorch's reader of old files asks modules for it

    def __new__(cls, *args, **kwargs):
        self = super().__new__(cls)
        self.state, self.items = {}, {}
        return self

    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        return _StandIn()

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        self.items[key] = value

    def append(self, item):
        pass

    extend = add = append


# Of partial, so that a pickle that sets attributes sets them on nothing of PyTorch's.
_CALLED = {
    "torch._utils._rebuild_tensor": torch._utils._rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": torch._utils._rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._tensor._rebuild_from_type_v2": lambda rebuild, kind, args, state: rebuild(*args),
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
}


class _Unpickler(pickle.Unpickler):
    """Makes tensors, containers and numbers; of everything else a _StandIn, whose class is never imported."""

    def find_class(self, module: str, name: str):
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return OrderedDict
        if full == "torch.storage.UntypedStorage":  # of tensors in e4m3 and other newer dtypes: bytes
            return types.SimpleNamespace(dtype=torch.uint8)
        if full in _CALLED:
            return functools.partial(_CALLED[full])
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        return type("_StandIn", (_StandIn,), {"name": full})


_PICKLE = types.SimpleNamespace(
    __name__="pickle", Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load()
)


def _read_torch(path):
    with open(path, "rb") as file:
        is_zip = file.read(4) == ZIP  # at the start: a tar archive may end with one
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("constants.pkl") for name in archive.namelist()):
                return _read_script(archive)
    elif tarfile.is_tarfile(path):
        raise ValueError("it is a tar archive, not a file of torch.save")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the sources of pickled modules, which are not there
        # _Unpickler makes fewer objects than PyTorch's own of weights alone, and goes on where that one stops.
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE)


class _ScriptUnpickler(_Unpickler):
    """Of the data of a TorchScript program, whose tensors lie in files of their own in the archive."""

    def __init__(self, archive: zipfile.ZipFile, start: str):
        super().__init__(io.BytesIO(archive.read(f"{start}data.pkl")))
        self.archive, self.start = archive, start

    def find_class(self, module: str, name: str):
        if module == "torch" and name.endswith("Storage") and hasattr(torch, name):
            return getattr(torch, name)
        return super().find_class(module, name)

    def persistent_load(self, saved):
        _, kind, key, *_ = saved
        data = bytearray(self.archive.read(f"{self.start}data/{key}"))
        untyped = torch.frombuffer(data, dtype=torch.uint8).untyped_storage() if data else torch.UntypedStorage(0)
        return torch.storage.TypedStorage(wrap_storage=untyped, dtype=kind.dtype, _internal=True)


def _read_script(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The parameters and buffers of a TorchScript program, as of OpenAI's CLIP; the program itself is not read."""

    def tensors(module, start: str) -> dict[str, Tensor]:
        found = {}
        for name, value in (module.state if isinstance(getattr(module, "state", None), dict) else {}).items():
            found |= {f"{start}{name}": value} if isinstance(value, Tensor) else tensors(value, f"{start}{name}.")
        return found

    start = next(name for name in archive.namelist() if name.endswith("data.pkl")).removesuffix("data.pkl")
    return tensors(_ScriptUnpickler(archive, start).load(), "")


READERS = {".safetensors": _read_safetensors, ".npz": _read_npz, ".json": _read_index}
READERS |= dict.fromkeys((".pth", ".pt", ".bin", ".tar", ".ckpt"), _read_torch)


# ---------------------------------------------------------------------- what is around the weights


def _entries(tree) -> dict:
    """The entries of a dictionary or of what stands in for one; of a pickled module, its tensors by dotted key."""
    if not isinstance(tree, _StandIn):
        return tree if isinstance(tree, dict) else {}
    if not isinstance(tree.state, dict) or not isinstance(tree.state.get("_parameters"), dict):
        return tree.items
    found = {}
    for part in ("_parameters", "_buffers", "_modules"):
        for name, value in _entries(tree.state.get(part)).items():
            inner = {name: value} if part != "_modules" else {f"{name}.{k}": v for k, v in _entries(value).items()}
            found |= {key: tensor for key, tensor in inner.items() if isinstance(tensor, Tensor)}
    return found


def _unwrapped(tree) -> dict[str, Tensor]:
    """The weights in nested dictionaries; of several that no name tells apart, all, their keys joined by dots."""
    entries = {key: value for key, value in _entries(tree).items() if isinstance(key, str)}
    for wrapper in WRAPPERS:
        if wrapper in entries and (found := _unwrapped(entries[wrapper])):
            return found
    if tensors := {key: value for key, value in entries.items() if isinstance(value, Tensor)}:
        return tensors
    parts = {key: _unwrapped(value) for key, value in entries.items() if not any(a in key.lower() for a in ASIDE)}
    parts = {key: found for key, found in parts.items() if found}
    if len(parts) == 1:
        return next(iter(parts.values()))
    return {f"{part}.{key}": value for part, found in parts.items() for key, value in found.items()}


def _without_added(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without the parts of keys that wrappers add; as it is where two keys would become one."""
    found = {".".join(part for part in key.split(".") if part not in ADDED): value for key, value in state.items()}
    return found if len(found) == len(state) else state


def _flat(tree, start: str = "") -> dict[str, Tensor]:
    found = {}
    for key, value in _entries(tree).items():
        found |= {f"{start}{key}": value} if isinstance(value, Tensor) else _flat(value, f"{start}{key}.")
    return found


def _under(tree, prefix: str) -> dict[str, Tensor]:
    """The tensors whose keys begin with the prefix, with the dictionaries around them or without."""
    state = _unwrapped(tree)
    for keys in (state, _without_added(state), _flat(tree), _without_added(_flat(tree))):
        found = {key.removeprefix(prefix): value for key, value in keys.items() if key.startswith(prefix)}
        if found:
            return _without_added(found)
    starts = dict.fromkeys(key.rpartition(".")[0].split(".blocks.")[0] for key in _flat(tree))
    raise ValueError(f"no key begins with {prefix!r}; keys begin with {some(starts)}")


def _held(tree) -> str:
    """What a file without weights holds, in a few words."""
    entries = _entries(tree)
    if not entries:
        return _kind(tree)
    return some(f"{key} ({_kind(value)})" for key, value in entries.items())


def _kind(value) -> str:
    return f"an object of {value.name}" if isinstance(value, _StandIn) else type(value).__name__


# ---------------------------------------------------------------------- Google's layout


FLAX = [  # modules in Google's vision_transformer and big_vision, and timm's names of them
    (r"^embedding$", "patch_embed.proj"),
    (r"^Transformer/encoder_norm$", "norm"),
    (r"^Transformer/encoderblock_(\d+)/", r"blocks.\1."),
    (r"^MAPHead_0/", "attn_pool."),
    (r"^attn_pool\.LayerNorm_0$", "attn_pool.norm"),
    (r"LayerNorm_0$", "norm1"),
    (r"LayerNorm_[12]$", "norm2"),
    (r"MlpBlock_\d/Dense_0$", "mlp.fc1"),
    (r"MlpBlock_\d/Dense_1$", "mlp.fc2"),
    (r"^attn_pool\.MultiHeadDotProductAttention_\d/", "attn_pool."),
    (r"MultiHeadDotProductAttention_\d/", "attn."),
    (r"\.out$", ".proj"),
]
FLAX_TENSORS = {
    "cls": "cls_token",
    "pos_embedding": "pos_embed",
    "Transformer/posembed_input/pos_embedding": "pos_embed",
    "MAPHead_0/probe": "attn_pool.latent",
}
FLAX_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def from_flax(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Google's layout (vision_transformer, big_vision; blocks apart or stacked) with timm's keys and axes."""
    start = next(key for key in state if key.endswith("embedding/kernel")).removesuffix("embedding/kernel")
    state = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
    for key in [key for key in state if key.startswith("Transformer/encoderblock/")]:
        rest = key.removeprefix("Transformer/encoderblock/")
        state |= {f"Transformer/encoderblock_{i}/{rest}": layer for i, layer in enumerate(state.pop(key))}
    converted = {}
    for key, value in state.items():
        module, _, leaf = key.rpartition("/")
        if key in FLAX_TENSORS:
            converted[FLAX_TENSORS[key]] = value
        elif module.startswith("pre_logits"):
            continue  # timm has no such layer
        elif leaf in FLAX_LEAVES:
            for pattern, name in FLAX:
                module = re.sub(pattern, name, module)
            converted[f"{module}.{FLAX_LEAVES[leaf]}"] = _flax_tensor(module, leaf, value)
        else:
            converted[key] = value
    return _join_attention(converted)


def _flax_tensor(module: str, leaf: str, value: Tensor) -> Tensor:
    if leaf != "kernel":
        return value.flatten()
    if value.ndim == 4:
        return value.permute(3, 2, 0, 1)  # height, width, in, out
    if value.ndim == 3:  # an attention's: in, heads, head_dim; but heads, head_dim, out for its output
        value = value.flatten(0, 1) if module.endswith(".proj") else value.flatten(1)
    return value.T


def _join_attention(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """query, key, value as timm's qkv; in attention pooling, as its q and kv."""
    joined = {}
    for key, value in state.items():
        module, name, leaf = (key.rsplit(".", 2) + ["", ""])[:3]
        if name == "query" and module == "attn_pool":
            joined[f"{module}.q.{leaf}"] = value
        elif name == "query":
            joined[f"{module}.qkv.{leaf}"] = torch.cat(
                [state[f"{module}.{n}.{leaf}"] for n in ("query", "key", "value")]
            )
        elif name == "key" and module == "attn_pool":
            joined[f"{module}.kv.{leaf}"] = torch.cat([value, state[f"{module}.value.{leaf}"]])
        elif name not in ("key", "value"):
            joined[key] = value
    return joined
