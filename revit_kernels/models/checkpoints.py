"""A model's weights from a file and into one, checked before anything is copied."""

from __future__ import annotations

import hashlib
import json
import math
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from revit_kernels.files import write_whole
from revit_kernels.models import convert_timm, families, hugging_face, openai_clip
from revit_kernels.models.arguments import PLACES, check_arguments, check_description, constructor_arguments
from revit_kernels.models.naflex_inputs import projection
from revit_kernels.models.weight_files import is_safetensors, read_checkpoint, some

METADATA = "revit_kernels"  # the entry of a .safetensors file's metadata that says what model it holds
HEADS = ("head.", "head_dist.", "aux_head.")
# What a class calls the argument that says whether there is a norm behind pooling.
FC_NORM = dict.fromkeys(("VarLenEva", "VarLenTower", "VarLenGemma4"), "use_fc_norm")
UNUSED = ("mask_token", "decoder_", "pre_logits", "n_averaged")  # of pretraining; timm's models have none of them
AVERAGES = {"ema", "model_ema", "ema_model", "teacher", "target_encoder"}  # which of several models in a file is taken
# Fields of pretrained_cfg that a file keeps.
CFG = ("mean", "std", "interpolation", "label_names", "trained_on", "stride")


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


def _fit_positions(state, model, path, grid, interpolation, antialias):
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
    if grid != new and grid[0] * grid[1] == cells > 0:
        warnings.warn(f"the positions of {path} were resampled from {_by(grid)} to {_by(new)} patches", stacklevel=3)
        state["pos_embed"] = resample_positions(table, prefix, grid, new, interpolation, antialias)


def _by(grid) -> str:
    return f"{grid[0]}x{grid[1]}"


def _of_model(state: dict[str, Tensor], model: nn.Module, path) -> dict[str, Tensor]:
    """The tensors under the prefix (model., backbone., teacher.backbone., ...) at which the model's keys begin.

    Without one, all of them. Of several models in a file the average is taken: a teacher before its student. Raises
    ValueError where that does not tell which.
    """
    wanted, fitting = model.state_dict().keys(), {}
    for key in state:
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in wanted:
                prefix = ".".join([*parts[:i], ""])
                fitting[prefix] = fitting.get(prefix, 0) + 1
    prefixes = [prefix for prefix, count in fitting.items() if count >= len(wanted) / 2]
    if "" in prefixes or not prefixes:
        return state
    if len(prefixes) > 1 and len(averages := [one for one in prefixes if AVERAGES & set(one.split("."))]) == 1:
        prefixes = averages
    if len(prefixes) > 1:
        raise ValueError(f"{path} holds several models, under {some(prefixes)}: name one, as prefix={prefixes[0]!r}")
    return {key.removeprefix(prefixes[0]): value for key, value in state.items() if key.startswith(prefixes[0])}


def _to_timm(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The state with timm's keys: small differences here, whole foreign layouts by timm's own converter."""

    def body(keys):
        return {key for key in keys if not key.startswith(HEADS)}

    wanted = model.state_dict().keys()
    if hugging_face.is_hugging_face(state):
        state = {k: v for k, v in hugging_face.timm_state(state).items() if not k.startswith("pooler.")}
        if state["patch_embed.proj.weight"].ndim == 2:
            weight = projection(state["patch_embed.proj.weight"], model.patch_embed.patch_size)
            state["patch_embed.proj.weight"] = weight
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


def check_state(state, model, source, strict=True) -> None:
    """Raise one ValueError that lists everything that does not fit."""
    wanted = model.state_dict()
    both = [key for key in wanted if key in state]
    shape = [
        f"{key} is {tuple(state[key].shape)} where the model has {tuple(wanted[key].shape)}"
        for key in both
        if state[key].shape != wanted[key].shape
    ]
    whole = [key for key in both if wanted[key].is_floating_point() and not state[key].is_floating_point()]
    missing = [key for key in wanted if key not in state] if strict else []
    unexpected = [key for key in state if key not in wanted] if strict else []
    wrong = [some(shape)] if shape else []
    wrong += [f"of integers or another dtype than floats: {some(whole)}"] if whole else []
    wrong += [f"missing: {some(missing)}"] if missing else []
    wrong += [f"unexpected: {some(unexpected)}"] if unexpected else []
    if not wrong:
        return
    if told := families.mismatch(state, model, source):
        raise ValueError(told)
    advice = ""
    if shape and all(line.startswith(HEADS) for line in shape):
        advice = " (to begin a new head, give num_classes to create_model, or new_head=True)"
    elif missing and all(key.startswith(HEADS) for key in missing):
        advice = " (it has no head: load it into a model with num_classes=0, or give new_head=True)"
    raise ValueError(f"{source} does not fit the model: {'; '.join(wrong)}{advice}")


def _begin_head(state, model, path) -> None:
    """Give the state the model's own head where it has none, or one of another number of classes; say so."""
    heads = {key: value for key, value in model.state_dict().items() if key.startswith(HEADS)}
    if all(key in state and state[key].shape == value.shape for key, value in heads.items()):
        return
    had = [value.shape[0] for key, value in state.items() if key.startswith(HEADS)]
    for key in [key for key in state if key.startswith(HEADS)]:
        del state[key]
    state |= heads
    was = f"the head of {path} has {had[0]} classes" if had else f"{path} has no head"
    warnings.warn(f"{was}: the model's of {model.num_classes} begins anew", stacklevel=3)


def load_checkpoint(
    model: nn.Module,
    path,
    strict: bool = True,
    *,
    prefix: str = "",
    new_head: bool = False,
    interpolation: str = "bicubic",
    antialias: bool = True,
):
    """Load the weights of a file into the model, all or nothing.

    path:          .safetensors, .pth, .pt, .bin, .ckpt or .npz (timm's keys or Google's layout), an index of several
                   such files, or a folder of transformers', see `read_checkpoint`. Facebook's DeiT III, MAE and DINOv2
                   files load as they are, as do OpenAI's CLIP, open_clip's and transformers'; other layouts need timm,
                   whose converter is used
    strict:        every key must be there and no other; otherwise only shapes must agree
    prefix:        where in the file the model is, as "student.backbone."; if not given, what all its keys begin with is
                   found, and of several models an average or a teacher is taken
    new_head:      a head of another number of classes, or none, leaves the model's own as it is, with a warning
    interpolation: how a position table of another grid is resampled, with `antialias` and a warning. A table with as
                   many rows as the model's is taken for the same grid; any other must be square

    A model with num_classes=0 takes no head. Weights in other floating-point types become the model's. Returns what
    load_state_dict does: the missing and unexpected keys. Raises ValueError, naming keys and shapes, before anything is
    copied.
    """
    state = read_checkpoint(path, prefix)
    try:
        state = _fitted(state, model, path, strict, new_head, interpolation, antialias)
    except ValueError:
        families.refuse_others(state, path)
        raise
    return model.load_state_dict(state, strict=strict)


def _fitted(state, model, path, strict, new_head, interpolation, antialias) -> dict[str, Tensor]:
    """The state with the model's keys and shapes; see `load_checkpoint`."""
    if convert_timm.is_timms(state, model):
        state = convert_timm.our_state(state, model)
    elif openai_clip.is_clip(state):
        state = openai_clip.timm_state(state)
    state = _to_timm(_of_model(state, model, path), model)
    _fit_positions(state, model, path, _grid_of(path), interpolation, antialias)
    if new_head and model.num_classes:
        _begin_head(state, model, path)
    if model.menu is not None:
        model.fill_lengths(state)
    check_state(state, model, path, strict)
    return state


def description(path) -> dict | None:
    """What save_checkpoint wrote of the model into a .safetensors file: name, kwargs, grid, dtype; None if nothing.

    Raises ValueError where there is no such file, and for a description whose entries are none.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise ValueError(f"there is no checkpoint at {path}")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(METADATA)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not text:
        return None
    try:
        return check_description(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} does not describe a model: {error}") from None


def check_shapes(model: nn.Module, path) -> None:
    """Raise ValueError unless a .safetensors file has the tensors of the model, which may be on the meta device."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        found = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    if differ := [key for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]:
        raise ValueError(f"{path} does not hold the model that it describes: they differ in {some(differ)}")


def _grid_of(path):
    path = Path(path)
    found = description(path) if path.suffix == ".safetensors" and is_safetensors(path) else None
    return tuple(found["grid"]) if found and "grid" in found else None


def _describe(model: nn.Module) -> dict:
    """Name and arguments from which create_model makes a model of the same tensors, the changes since included."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{type(model).__name__} is no model: save its model, and make it anew (a quantization too)")
    if quantized := [name for name, module in model.named_modules() if type(module).__name__ == "Fp8Linear"]:
        raise ValueError(f"the model is quantized ({quantized[0]}): save it before, and quantize it once it is loaded")
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
        "num_frames": None if model.per_frame is None else model.num_frames * model.tubelet,
    }
    changes = {name: value for name, value in changes.items() if name in constructor_arguments(type(model))}
    kwargs = {name: value for name, value in created["kwargs"].items() if name not in PLACES} | changes
    try:
        check_arguments(type(model), kwargs)
    except ValueError as error:
        raise ValueError(f"the arguments of the model cannot be written down: {error}") from None
    resizable = None if model.menu is None else {"menu": [list(grid) for grid in model.menu], **model.resizable}
    with torch.device("meta"):
        again = type(model)(**created["arguments"] | changes)
        again = (again.make_resizable(**resizable) if resizable else again).state_dict()
    here = model.state_dict()
    shared = [k for k in here.keys() & again.keys() if here[k].shape == again[k].shape]
    if differ := (here.keys() | again.keys()) - set(shared):
        raise ValueError(f"the model is no longer what create_model({created['name']!r}) makes: {some(sorted(differ))}")
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
        digest.update(value.detach().cpu().to(torch.bfloat16).flatten().view(torch.uint8).numpy().tobytes())
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
