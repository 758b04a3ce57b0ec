"""Models by name: timm's Vision Transformers, without timm, LV-ViT's and those of clips."""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import torch

from revit_kernels.devices import choose_device, choose_dtype
from revit_kernels.models import video_weights
from revit_kernels.models.arguments import check_arguments
from revit_kernels.models.checkpoints import check_shapes, description, fingerprint, load_checkpoint
from revit_kernels.models.distilled import VarLenViTDistilled
from revit_kernels.models.eva import VarLenEva
from revit_kernels.models.hub import hub_or_cache
from revit_kernels.models.lvvit import VarLenLVViT
from revit_kernels.models.timesformer import VarLenTimeSformer
from revit_kernels.models.video import ClipModel
from revit_kernels.models.video_vit import VarLenVideoViT
from revit_kernels.models.vision_towers import VarLenGemma4, VarLenTower
from revit_kernels.models.vit import VarLenViT
from revit_kernels.modules.script import refuse_script

OF_IMAGES = (VarLenViT, VarLenViTDistilled, VarLenEva, VarLenTower, VarLenGemma4, VarLenLVViT)
CLASSES = {cls.__name__: cls for cls in (*OF_IMAGES, VarLenTimeSformer, VarLenVideoViT)}
NOT_TIMMS = ("lvvit", "clips")  # modules of registry.json
SHIPPED = Path(__file__).with_name("shipped") / "fashion_mnist.safetensors"  # what `revit infer` runs without --model
SHIPPED_ASSIGNER = SHIPPED.with_name("fashion_mnist_assigner.safetensors")
MODULES = "vision_transformer.py, deit.py or eva.py, NaFlexVit, nor a classifier of a language model's tower"
MODEL_FILE = "model.safetensors"  # in the folder of a run


@cache
def registry() -> dict:
    """What registry.json holds; tools/make_registry.py writes it."""
    return json.loads(Path(__file__).with_name("registry.json").read_text())


def list_models(filter: str = "", tags: bool = False) -> list[str]:
    """The names that create_model knows.

    filter: a shell pattern ("vit_small_*"), or a part of the name
    tags:   list each name once for every set of weights that timm has for it ("name.tag")
    """
    names = sorted(registry()["models"])
    if tags:
        names = [f"{name}.{tag}" if tag else name for name in names for tag in registry()["models"][name]["tags"]]
    if any(c in filter for c in "*?["):
        return [name for name in names if fnmatchcase(name, filter)]
    return [name for name in names if filter in name]


def _nearest(name: str, names) -> str:
    near = difflib.get_close_matches(name, names, n=5, cutoff=0.4)
    if len(name) > 3:  # a beginning counts for more than the length
        begun = difflib.get_close_matches(name, {other[: len(name)] for other in names}, n=1, cutoff=0.8)
        same = [other for other in names if begun and other.startswith(begun[0])]
        near = [*difflib.get_close_matches(name, same, n=5, cutoff=0), *near]
    near = list(dict.fromkeys(near))[:5]
    return f"; the nearest are {', '.join(near)}" if near else "; `revit models` lists them"


def _refuse(name: str):
    """Raise what is wrong with a name that is none of ours."""
    homes = {other: module for module, names in registry()["others"].items() for other in names.split()}
    known = registry()["models"]
    if os.path.isdir(name):  # False for a name that no folder can have, where pathlib raises
        raise ValueError(f"there is no model named {name!r}, and the folder of that name has no {MODEL_FILE}")
    if name in homes:
        raise ValueError(f"{name!r} is of timm's {homes[name]}.py, not a Vision Transformer of timm's {MODULES}")
    name = name[:100]  # it may come from a file
    raise ValueError(f"there is no model named {name!r}{_nearest(name, known)}")


def resolve(name: str) -> tuple[str, str]:
    """(name, tag) of what timm calls `name`; the tag is timm's default one if `name` has none.

    Raises ValueError for an unknown name or tag.
    """
    name = name.removeprefix("hf-hub:").removeprefix("hf_hub:").removeprefix("timm/")
    current = registry()["deprecated"].get(name, name)
    if current != name:
        warnings.warn(f"{name} is now called {current}", DeprecationWarning, stacklevel=3)
    base, _, tag = current.partition(".")
    if base not in registry()["models"]:
        _refuse(base)
    tags = registry()["models"][base]["tags"]
    if tag and tag not in tags:
        raise ValueError(f"{base} has no weights tagged {tag!r}{_nearest(tag, tags)}")
    return base, tag or next(iter(tags))


def get_pretrained_cfg(name: str) -> dict:
    """The fields of timm's pretrained_cfg that preprocessing reads: input_size, mean, std, interpolation, ..."""
    base, tag = resolve(name)
    row = dict(registry()["models"][base]["tags"][tag])
    statistics = registry()["statistics"][row.pop("statistics", 0)]
    cfg = registry()["cfg"] | row | {"mean": statistics[:3], "std": statistics[3:]}
    cfg = {field: tuple(value) if isinstance(value, list) else value for field, value in cfg.items()}
    return {"architecture": base, "tag": tag} | cfg


def constructor_kwargs(name: str) -> dict:
    """The arguments of the class's constructor that `name` stands for, where they differ from the defaults."""
    base, _ = resolve(name)
    kwargs = dict(registry()["models"][base]["kwargs"])
    num_classes = get_pretrained_cfg(name)["num_classes"]
    return kwargs if num_classes == 1000 else kwargs | {"num_classes": num_classes}


def model_file(name) -> str:
    """The file that is meant by a name: of the folder of a run, its model.safetensors; else the name as it is."""
    inside = Path(name) / MODEL_FILE
    return str(inside) if str(name) not in registry()["models"] and os.path.isfile(inside) else str(name)


def class_of(name: str) -> type[VarLenViT] | type[ClipModel]:
    """The class of the model that `name` stands for."""
    return CLASSES[registry()["models"][resolve(name)[0]].get("class", "VarLenViT")]


def create_model(
    model_name: str,
    pretrained: bool = False,
    pretrained_cfg: str | dict[str, Any] | None = None,
    pretrained_cfg_overlay: dict[str, Any] | None = None,
    checkpoint_path: str | Path | None = None,
    cache_dir: str | Path | None = None,
    scriptable: bool | None = None,
    exportable: bool | None = None,
    no_jit: bool | None = None,
    *,
    features_only: bool = False,
    out_indices: int | Sequence[int] = 3,
    **kwargs: Any,
) -> Any:
    """The model that is known by this name, or the one that a file holds. Arguments as of timm.create_model.

    model_name:      a name of list_models(), with or without a tag; or the path of a .safetensors file that
                     save_checkpoint wrote, or of the folder of a run that has it
    pretrained:      load timm's weights for this name; needs timm
    pretrained_cfg:  a tag of the name's weights; or fields, as of an overlay
    checkpoint_path: load these weights, see load_checkpoint
    pretrained_cfg_overlay: fields that replace those of `pretrained_cfg`; the model is made for its num_classes and
                     input_size
    cache_dir:       where timm keeps pretrained weights
    features_only:   return timm's FeatureGetterNet of the model instead, which gives the features after blocks
                     `out_indices`, as `forward_intermediates` does without timm
    exportable, no_jit: change nothing: every model can be exported, and none uses TorchScript
    kwargs:          arguments of the class's constructor that replace the name's own; None is passed over

    Returns the model, of class_of(model_name). Raises ValueError for a name that is unknown or belongs to another
    family, and for weights that do not fit; NotImplementedError for scriptable=True.
    """
    if scriptable:
        refuse_script()
    if features_only:
        if (feature_cls := kwargs.pop("feature_cls", "getter")) != "getter":
            raise ValueError(f"feature_cls must be 'getter' for a Vision Transformer, got {feature_cls!r}")
        options = {"checkpoint_path": checkpoint_path, "cache_dir": cache_dir} | kwargs
        model = create_model(model_name, pretrained, pretrained_cfg, pretrained_cfg_overlay, **options)
        return _feature_getter(model, out_indices)
    if isinstance(pretrained_cfg, str):
        base, _, tag = model_name.partition(".")
        if tag not in ("", pretrained_cfg):
            raise ValueError(f"{model_name} has a tag of its own: leave out pretrained_cfg={pretrained_cfg!r}")
        model_name = f"{base}.{pretrained_cfg}"
    elif pretrained_cfg:
        pretrained_cfg_overlay = pretrained_cfg | (pretrained_cfg_overlay or {})
    overlay = pretrained_cfg_overlay or {}
    kwargs = _of_overlay(overlay) | {key: value for key, value in kwargs.items() if value is not None}
    name = model_file(model_name)
    if Path(name).suffix == ".safetensors":
        if pretrained or checkpoint_path is not None:
            raise ValueError(f"{name} holds its own weights: leave out pretrained and the checkpoint")
        return _from_file(name, kwargs)
    if Path(name).suffix in (".pth", ".pt", ".bin", ".npz"):
        raise ValueError(f"{name} does not say what model it is for: use create_model(name, checkpoint_path={name!r})")
    if pretrained and checkpoint_path is not None:
        raise ValueError("give pretrained=True or checkpoint_path, not both")
    base, tag = resolve(name)
    cls, entry = class_of(base), registry()["models"][base]
    full = f"{base}.{tag}" if tag else base
    arguments = constructor_kwargs(full) | kwargs
    if pretrained:
        if entry.get("module") in NOT_TIMMS:
            raise ValueError(f"timm has no weights of {base}: pass checkpoint_path")
        source = {"pretrained_cfg_overlay": pretrained_cfg_overlay, "cache_dir": cache_dir}
        source = {key: value for key, value in source.items() if value is not None}
        model = cls.from_timm(_timm_model(full, kwargs | source))
    else:
        model = cls(**arguments)
    for attribute, value in entry.get("positions", {}).items():
        setattr(model, attribute, value)
    model.pretrained_cfg = model.default_cfg = get_pretrained_cfg(full) | overlay
    model.created_from = {"name": full, "kwargs": kwargs, "arguments": arguments}  # save_checkpoint reads it
    if checkpoint_path is not None:
        smooth = {"interpolation": "bilinear", "antialias": False} if "flexi" in base or "radio" in base else {}
        _load(model, checkpoint_path, "num_classes" in kwargs, **smooth)
    return model


def _load(model: VarLenViT | ClipModel, path, new_head: bool, **resampling) -> None:
    """Load the weights of a file; a model of clips also takes those of a model of images, with their statistics."""
    if not isinstance(model, ClipModel):
        load_checkpoint(model, path, new_head=new_head, **resampling)
        return
    found = description(path) if str(path).endswith(".safetensors") else None
    of_clips = found is not None and issubclass(class_of(found["name"]), ClipModel)
    if of_clips or not video_weights.inflate(model, path, found):
        video_weights.load(model, path, new_head)
    elif found:
        cfg = get_pretrained_cfg(found["name"]) | found.get("cfg", {})
        statistics = {field: tuple(cfg[field]) for field in ("mean", "std")}
        model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | statistics


def _of_overlay(overlay: dict) -> dict:
    """The arguments of the constructor that a pretrained_cfg's fields stand for."""
    arguments = {} if "num_classes" not in overlay else {"num_classes": overlay["num_classes"]}
    if "input_size" in overlay:
        arguments |= {"in_chans": overlay["input_size"][0], "img_size": tuple(overlay["input_size"][1:])}
    return arguments


def _feature_getter(model: VarLenViT, out_indices):
    try:
        from timm.models._features import FeatureGetterNet
    except ImportError:
        raise ValueError("features_only=True needs timm: without it, use model.forward_intermediates") from None
    getter = FeatureGetterNet(model, out_indices=out_indices)
    getter.pretrained_cfg = getter.default_cfg = model.pretrained_cfg
    getter.in_chans = model.in_chans
    return getter


def _from_file(path: str, kwargs: dict) -> VarLenViT:
    """The model that a file of save_checkpoint describes, with its weights."""
    found = description(path)
    if found is None:
        raise ValueError(f"{path} does not say what model it is for: use create_model(name, checkpoint_path={path!r})")
    _check_described(found, path)
    model = create_model(found["name"], **found["kwargs"] | kwargs).to(getattr(torch, found["dtype"]))
    cfg = {k: tuple(v) if k in ("mean", "std") else v for k, v in found.get("cfg", {}).items()}
    model.pretrained_cfg = model.default_cfg = model.pretrained_cfg | cfg
    if "resizable" in found:
        model.make_resizable(**found["resizable"])
    _load(model, path, "num_classes" in kwargs)
    model.created_from["fingerprint"] = fingerprint(model)
    return model


def _check_described(found: dict, path: str) -> None:
    """Raise ValueError unless the file describes the model whose tensors it holds; nothing is allocated."""
    cls = class_of(found["name"])
    try:
        check_arguments(cls, found["kwargs"])
        with torch.device("meta"):
            # Drawing on the meta device would import torch's compiler, which takes seconds.
            model = create_model(found["name"], **found["kwargs"] | {"weight_init": "skip"})
            if "resizable" in found:
                model.make_resizable(**found["resizable"])
    except Exception as error:  # a size that fits no other is noticed wherever it is first used
        raise ValueError(f"{path} does not describe a model: {' '.join(str(error).split())[:200]}") from error
    check_shapes(model, path)


def _timm_model(name: str, kwargs: dict):
    try:
        import timm
    except ImportError:
        raise ValueError(
            f"the pretrained weights of {name} come through timm: install it (pip install timm), "
            "or pass checkpoint_path"
        ) from None
    try:
        with hub_or_cache():
            return timm.create_model(name, pretrained=True, **kwargs)
    except OSError as error:
        why = " ".join(str(error).split())
        raise ValueError(
            f"the pretrained weights of {name} are not in the cache and cannot be downloaded: {why}"
        ) from None


def load_resizable(path: str, device_name: str | None, dtype: str | None):
    """A ReViT from its file, in eval mode. Raises ValueError for a file of another kind of model."""
    path = model_file(path)
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"{path} is no .safetensors file of a ReViT: train one with `revit train`")
    device = choose_device(device_name)
    model = create_model(path)
    if model.menu is None:
        raise ValueError(f"{path} knows one length only: make it a ReViT with `revit train {path} --menu ...`")
    return model.to(device, choose_dtype(dtype, device)).eval()
