"""Weights from files: safetensors, PyTorch's and Google's .npz, checked before anything is copied."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_kernels.files import write_whole
from revit_kernels.models import hugging_face

METADATA = "revit_kernels"  # the entry of a .safetensors file's metadata that says what model it holds
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")  # what training scripts put a state_dict under
PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel and torch.compile
HEADS = ("head.", "head_dist.")
FC_NORM = {"VarLenEva": "use_fc_norm"}  # what a class calls the argument that says whether there is such a norm
UNUSED = ("mask_token", "decoder_", "pre_logits")  # of pretraining; timm's models have none of them
CFG = ("mean", "std", "label_names", "trained_on")  # fields of pretrained_cfg that a file keeps
LISTED = 4  # how many keys of each kind an error names


def read_checkpoint(path) -> dict[str, Tensor]:
    """The tensors of a .safetensors, .pth, .pt, .bin or .npz file by key, on the CPU.

    Wrappers of training scripts and prefixes of DistributedDataParallel and torch.compile are taken off; Google's
    .npz layout gets timm's keys. Raises ValueError for a file that cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    readers |= dict.fromkeys((".pth", ".pt", ".bin", ".tar", ".ckpt"), _read_torch)
    if path.suffix not in readers:
        raise ValueError(f"{path} is none of {', '.join(readers)}")
    try:
        state = readers[path.suffix](path)
    except Exception as error:  # each reader has its own, and none names the file
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:300]}") from error
    for prefix in PREFIXES:
        if state and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _read_safetensors(path):
    from safetensors.torch import load_file

    return load_file(path)


def _read_torch(path):
    with torch.serialization.safe_globals([argparse.Namespace]):  # many recipes save their arguments beside
        state = torch.load(path, map_location="cpu", weights_only=True)
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
            break
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise ValueError(f"it holds no state_dict but {type(state).__name__}")
    return tensors


def _read_npz(path):
    import numpy as np

    def tensor(array):
        if array.dtype.kind == "V" and array.dtype.itemsize == 2:  # how numpy stores bfloat16, which it does not know
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    with np.load(path, allow_pickle=False) as arrays:
        state = {key: tensor(arrays[key]) for key in arrays.files if arrays[key].dtype.kind in "fiuV"}
    return from_flax(state) if any(key.endswith("embedding/kernel") for key in state) else state


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


def resample_positions(
    table: Tensor,
    prefix: int,
    old: tuple[int, int],
    new: tuple[int, int],
    interpolation: str = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """The position table of another grid.

    table:  (1, prefix + old rows * old columns, dim)
    prefix: rows of the table that belong to prefix tokens and stay as they are

    Returns (1, prefix + new rows * new columns, dim) in the dtype of table, interpolated in fp32.
    """
    if old == new:
        return table
    image = table[:, prefix:].float().unflatten(1, old).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=new, mode=interpolation, antialias=antialias, align_corners=False)
    return torch.cat([table[:, :prefix], image.flatten(2).mT.to(table.dtype)], dim=1)


def _fit_positions(state, model, grid, interpolation, antialias):
    """Resample state["pos_embed"] to the model's grid; a table whose grid cannot be told is left for the check."""
    table, wanted = state.get("pos_embed"), getattr(model, "pos_embed", None)
    if table is None or wanted is None or table.ndim != 3:
        return
    prefix = 0 if model.no_embed_class else model.num_prefix_tokens
    new = tuple(model.patch_embed.grid_size)
    cells = table.shape[1] - prefix
    if grid is None:
        side = math.isqrt(max(cells, 0))
        grid = new if table.shape[1] == wanted.shape[1] else (side, side)
    if grid[0] * grid[1] == cells > 0:
        state["pos_embed"] = resample_positions(table, prefix, grid, new, interpolation, antialias)


def _to_timm(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state with timm's keys: small differences here, whole foreign layouts by timm's own converter."""

    def body(keys):
        return {key for key in keys if not key.startswith(HEADS)}

    wanted = model.state_dict().keys()
    if hugging_face.is_hugging_face(state):
        state = {k: v for k, v in hugging_face.timm_state(state).items() if not k.startswith("pooler.")}
    scale = r".gamma_\1" if any(k.endswith(".gamma_1") for k in wanted) else r".ls\1.gamma"
    known = {re.sub(r"\.gamma_([12])$", scale, k): v for k, v in state.items() if not k.startswith(UNUSED)}
    if body(known) != body(wanted):
        converted = _by_timm(state, model)
        if len(body(converted) & body(wanted)) > len(body(known) & body(wanted)):
            known = converted
    return known if model.num_classes else {k: v for k, v in known.items() if not k.startswith(HEADS)}


def _by_timm(state, model) -> dict[str, Tensor]:
    """What timm's converter makes of the state; nothing where timm is missing or does not know the layout."""
    try:
        if type(model).__name__ == "VarLenEva":
            from timm.models.eva import checkpoint_filter_fn

            converted = checkpoint_filter_fn(dict(state), model)
        else:
            from timm.models.vision_transformer import checkpoint_filter_fn

            converted = checkpoint_filter_fn(dict(state), model, adapt_layer_scale=True)
    except Exception:  # the check then says what is missing
        return {}
    return {key: value for key, value in converted.items() if isinstance(value, Tensor)}


def _some(items) -> str:
    items = list(items)
    more = f" and {len(items) - LISTED} more" if len(items) > LISTED else ""
    return ", ".join(items[:LISTED]) + more


def _check(state, model, source, strict):
    """Raise one ValueError that lists everything that does not fit."""
    wanted = model.state_dict()
    shape = [
        f"{key} is {tuple(state[key].shape)} where the model has {tuple(value.shape)}"
        for key, value in wanted.items()
        if key in state and state[key].shape != value.shape
    ]
    missing = [key for key in wanted if key not in state] if strict else []
    unexpected = [key for key in state if key not in wanted] if strict else []
    wrong = [_some(shape)] if shape else []
    wrong += [f"missing: {_some(missing)}"] if missing else []
    wrong += [f"unexpected: {_some(unexpected)}"] if unexpected else []
    if not wrong:
        return
    advice = ""
    if shape and all(line.startswith("head") for line in shape):
        advice = " (to begin a new head, load into a model with num_classes=0 and call reset_classifier)"
    raise ValueError(f"{source} does not fit the model: {'; '.join(wrong)}{advice}")


def load_checkpoint(
    model: nn.Module, path, strict: bool = True, *, interpolation: str = "bicubic", antialias: bool = True
):
    """Load the weights of a file into the model, all or nothing.

    path:          .safetensors, .pth, .pt, .bin or .npz (timm's keys or Google's layout). Facebook's DeiT III, MAE and
                   DINOv2 files load as they are; other layouts (OpenAI's CLIP, ...) need timm, whose converter is used
    strict:        every key must be there and no other; otherwise only shapes must agree
    interpolation: how a position table of another grid is resampled, with `antialias`. A table with as many rows as the
                   model's is taken for the same grid; any other must be square

    A model with num_classes=0 takes no head. Returns what load_state_dict does: the missing and unexpected keys.
    Raises ValueError, naming keys and shapes, before anything is copied.
    """
    state = _to_timm(read_checkpoint(path), model)
    _fit_positions(state, model, _grid_of(path), interpolation, antialias)
    if model.menu is not None:
        model.fill_lengths(state)
    _check(state, model, path, strict)
    return model.load_state_dict(state, strict=strict)


def description(path) -> dict | None:
    """What save_checkpoint wrote of the model into a .safetensors file: name, kwargs, grid, dtype; None if nothing."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    return json.loads(text) if text else None


def _grid_of(path):
    found = description(path) if Path(path).suffix == ".safetensors" else None
    return tuple(found["grid"]) if found and "grid" in found else None


def _describe(model: nn.Module) -> dict:
    """Name and arguments from which create_model makes a model of the same tensors, the changes since included."""
    created = getattr(model, "created_from", None)
    if created is None:
        raise ValueError("the model was not made by create_model: save its state_dict() instead")
    changes = {
        "num_classes": model.num_classes,
        "img_size": list(model.patch_embed.img_size),
        "patch_size": list(model.patch_embed.patch_size),
        "global_pool": model.global_pool,
        FC_NORM.get(type(model).__name__, "fc_norm"): not isinstance(model.fc_norm, nn.Identity),
        "depth": len(model.blocks),
    }
    kwargs = created["kwargs"] | changes
    try:
        json.dumps(kwargs)
    except TypeError:
        raise ValueError(f"the arguments of the model cannot be written down: {kwargs}") from None
    resizable = None if model.menu is None else {"menu": [list(grid) for grid in model.menu], **model.resizable}
    with torch.device("meta"):
        again = type(model)(**created["arguments"] | changes)
        again = (again.make_resizable(**resizable) if resizable else again).state_dict()
    here = model.state_dict()
    shared = [k for k in here.keys() & again.keys() if here[k].shape == again[k].shape]
    if differ := (here.keys() | again.keys()) - set(shared):
        raise ValueError(
            f"the model is no longer what create_model({created['name']!r}) makes: {_some(sorted(differ))}"
        )
    dtype = str(model.patch_embed.proj.weight.dtype).removeprefix("torch.")
    found = {"name": created["name"], "kwargs": kwargs, "grid": list(model.patch_embed.grid_size), "dtype": dtype}
    cfg = {field: model.pretrained_cfg[field] for field in CFG if model.pretrained_cfg.get(field) is not None}
    return found | ({"resizable": resizable} if resizable else {}) | {"cfg": cfg}


def fingerprint(model: nn.Module) -> str:
    """The sha256 of the weights, rounded to bfloat16, and of the menu: what labels and assigners know their model by.

    The same in float32 and bfloat16; a model turned to float16 keeps the one of the file that it came from.
    """
    created = getattr(model, "created_from", None) or {}
    if model.patch_embed.proj.weight.dtype == torch.float16 and "fingerprint" in created:
        return created["fingerprint"]
    digest = hashlib.sha256(json.dumps([model.menu, model.resizable]).encode())
    for key, value in sorted(model.state_dict().items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(model: nn.Module, path) -> None:
    """Write a .safetensors file from which create_model(path) rebuilds the model, class, size and weights.

    The file appears whole or not at all. Raises ValueError for a model that create_model did not make, or that was
    changed since in a way that its arguments cannot say.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}")
    metadata = {"format": "pt", METADATA: json.dumps(_describe(model))}
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))
