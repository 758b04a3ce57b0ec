"""Writes revit_kernels/models/registry.json: what each Vision Transformer name of the installed timm stands for.

Run as `python tools/make_registry.py`. Each entry point is called on the meta device, so no weights are made, and the
arguments that reach the model's constructor are recorded where they differ from the constructor's own defaults.
"""

import inspect
import json
from functools import partial
from pathlib import Path

import timm
import torch
from timm.models import _registry as timm_registry
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from revit_kernels.models.convert_timm import describe as describe_timm
from revit_kernels.models.lvvit import VarLenLVViT
from revit_kernels.models.timesformer import VarLenTimeSformer
from revit_kernels.models.video_vit import VarLenVideoViT

OUTPUT = Path(__file__).parents[1] / "revit_kernels" / "models" / "registry.json"
MODULES = ("vision_transformer", "deit", "eva")
NEIGHBOURS = ("naflexvit", "qwen3_vit", "deepseek_vit", "gemma4_vit")  # whose classes become others of ours
LVVIT = {  # of its authors, not in timm: dim, depth, heads, skip_lam, channels of the stem, crop_pct
    "lvvit_t": (240, 12, 4, 1.0, 64, 0.9),
    "lvvit_s": (384, 16, 6, 2.0, 64, 0.9),
    "lvvit_m": (512, 20, 8, 2.0, 64, 1.0),
    "lvvit_l": (768, 24, 12, 3.0, 128, 1.0),
}
SMALL, TINY = {"embed_dim": 384, "num_heads": 6}, {"embed_dim": 192, "num_heads": 3}
CLIPS = {  # arguments of the constructor
    "timesformer_base_patch16_224": {},
    "timesformer_base_patch16_448": {"img_size": 448, "num_frames": 16},
    "timesformer_small_patch16_224": SMALL,
    "timesformer_small_patch14_224": SMALL | {"patch_size": 14},
    "timesformer_tiny_patch16_224": TINY,
    "videomae_base_patch16_224": {"fc_norm": True, "final_norm": False},
    "videomae_small_patch16_224": SMALL | {"fc_norm": True, "final_norm": False},
    "vivit_base_patch16_224": {"num_frames": 32, "pos_embed": "learn", "class_token": True, "global_pool": "token"},
    "vjepa2_large_patch16_256": {
        **{"img_size": 256, "num_frames": 64, "embed_dim": 1024, "depth": 24, "num_heads": 16, "pos_embed": "rope"}
    },
}
FAMILIES = {VisionTransformer: {"weight_init": "skip"}, Eva: {}}  # and what keeps their weights from being drawn
OURS = {VisionTransformerDistilled: "VarLenViTDistilled", Eva: "VarLenEva"}
# The fields of timm's pretrained_cfg that preprocessing and fine-tuning read, with their commonest values: these are
# written once, and a tag lists only what differs.
COMMON = {
    "input_size": [3, 224, 224],
    "test_input_size": None,
    "fixed_input_size": True,
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "test_crop_pct": None,
    "crop_mode": "center",
    "num_classes": 1000,
    "pool_size": None,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "apache-2.0",
}
STATISTICS = (  # mean and std of each colour; a tag lists which, where it is not the first
    (0.5, 0.5, 0.5, 0.5, 0.5, 0.5),
    (0.485, 0.456, 0.406, 0.229, 0.224, 0.225),
    (0.48145466, 0.4578275, 0.40821073, 0.26862954, 0.26130258, 0.27577711),
    (0.0, 0.0, 0.0, 1.0, 1.0, 1.0),
    (0.43, 0.411, 0.296, 0.213, 0.156, 0.143),
    (0.45, 0.45, 0.45, 0.225, 0.225, 0.225),
)
NORMS = {"LayerNorm": "layernorm", "RmsNorm": "rmsnorm", "RMSNorm": "rmsnorm"}
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}


def plain(name, value):
    """The value as JSON can hold it: a layer becomes its name, a partial layer a dict of name and arguments."""
    if isinstance(value, partial):
        return {"name": plain(name, value.func), **{k: plain(k, v) for k, v in value.keywords.items()}}
    if isinstance(value, type):
        names = {"norm_layer": NORMS, "embed_norm_layer": NORMS, "act_layer": ACTIVATIONS}.get(name, {})
        return names.get(value.__name__, value.__name__)
    if callable(value):
        raise TypeError(f"{name}={value!r} cannot be written down")
    return list(value) if isinstance(value, tuple) else value


def size(value):
    """An image or patch size: one number where it is square."""
    value = plain("size", value)
    return value[0] if isinstance(value, list) and value[0] == value[1] else value


def defaults(family):
    """The constructor's own arguments, as JSON can hold them."""
    parameters = inspect.signature(family.__init__).parameters
    return {
        name: plain(name, parameter.default)
        for name, parameter in parameters.items()
        if name not in ("self", "device", "dtype", "weight_init")
    }


def describe(kwargs, usual):
    """The arguments that differ from the constructor's defaults, as JSON can hold them."""
    described = {}
    for name, value in kwargs.items():
        if name in usual and value is not None:
            value = size(value) if name in ("img_size", "patch_size") else plain(name, value)
            if value != usual[name]:
                described[name] = value
    return described


def build(name, family):
    """The kwargs that timm's entry point passes to the constructor, and the model, on the meta device."""
    seen = []
    original = family.__init__

    def record(self, *args, **kwargs):
        bound = inspect.signature(original).bind(self, *args, **kwargs)
        seen.append({k: v for k, v in bound.arguments.items() if k != "self"})
        original(self, *args, **kwargs)

    family.__init__ = record
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **FAMILIES[family])
    finally:
        family.__init__ = original
    (kwargs,) = seen
    return describe(kwargs, defaults(family)), model


def tag_row(full, kwargs, family):
    """The fields of timm's pretrained_cfg for this tag that differ from COMMON.

    A tag changes nothing of the architecture but num_classes, which is one of those fields.
    """
    cfg = timm.get_pretrained_cfg(full)
    fields = {field: plain(field, getattr(cfg, field)) for field in COMMON}
    row = {field: value for field, value in fields.items() if value != COMMON[field]}
    statistics = STATISTICS.index(tuple(cfg.mean) + tuple(cfg.std))
    if statistics:
        row["statistics"] = statistics
    here, _ = build(full, family)
    num_classes = here.pop("num_classes", 1000)
    if here != kwargs or num_classes != cfg.num_classes:
        raise ValueError(f"{full} differs from {full.partition('.')[0]} in more than num_classes: {here}, {kwargs}")
    return row


def neighbour(name, module):
    """The entry of a name of NEIGHBOURS; None for one that is not built."""
    with torch.device("meta"):
        model = timm.create_model(name)
    try:
        cls, kwargs, positions = describe_timm(model)
    except NotImplementedError:
        return None
    kwargs.pop("num_classes", None)
    tags = {}
    for full in timm_registry._model_with_tags[name]:
        cfg = timm.get_pretrained_cfg(full)
        fields = {field: plain(field, getattr(cfg, field)) for field in COMMON}
        fields["first_conv"] = COMMON["first_conv"]  # by our names
        row = {field: value for field, value in fields.items() if value != COMMON[field]}
        statistics = STATISTICS.index(tuple(cfg.mean) + tuple(cfg.std))
        tags[full.partition(".")[2]] = row | ({"statistics": statistics} if statistics else {})
    entry = {"parameters": sum(p.numel() for p in model.parameters()), "module": module}
    usual = {"pos_interpolation": "bicubic", "pos_antialias": True, "pos_align_corners": False, "pos_square": False}
    positions = {key: value for key, value in positions.items() if value != usual[key]}
    entry |= {"class": cls.__name__} if cls.__name__ != "VarLenViT" else {}
    entry |= {"positions": positions} if positions else {}
    return entry | {"kwargs": kwargs, "tags": tags}


def lvvit(name):
    dim, depth, heads, lam, width, crop = LVVIT[name]
    kwargs = {"embed_dim": dim, "depth": depth, "num_heads": heads, "mlp_ratio": 3.0, "qkv_bias": False}
    kwargs |= {"norm_layer": {"name": "layernorm", "eps": 1e-05}, "skip_lam": lam, "stem_width": width}
    with torch.device("meta"):
        parameters = sum(p.numel() for p in VarLenLVViT(**kwargs, weight_init="skip").parameters())
    row = {"crop_pct": crop, "statistics": 1, "first_conv": "patch_embed.conv1", "fixed_input_size": False}
    row = {key: value for key, value in row.items() if value != COMMON.get(key)}
    return {"parameters": parameters, "module": "lvvit", "class": "VarLenLVViT", "kwargs": kwargs, "tags": {"": row}}


def clips(name):
    kwargs, family = CLIPS[name], name.partition("_")[0]
    cls = VarLenTimeSformer if family == "timesformer" else VarLenVideoViT
    with torch.device("meta"):
        parameters = sum(p.numel() for p in cls(**kwargs, num_classes=400, weight_init="skip").parameters())
    row = {"num_classes": 400, "interpolation": "bilinear", "license": None}
    row |= {"input_size": [3, kwargs["img_size"], kwargs["img_size"]]} if "img_size" in kwargs else {}
    if statistics := {"timesformer": 5, "vivit": 0}.get(family, 1):
        row["statistics"] = statistics
    return {"parameters": parameters, "module": "clips", "class": cls.__name__, "kwargs": kwargs, "tags": {"": row}}


def main():
    deprecated = timm_registry._deprecated_models
    models = {}
    for module in MODULES:
        for name in sorted(timm_registry._module_to_models[module] - deprecated.keys()):
            family = Eva if module == "eva" else VisionTransformer
            kwargs, model = build(name, family)
            entry = {"parameters": sum(p.numel() for p in model.parameters())}
            if type(model) in OURS:
                entry["class"] = OURS[type(model)]
            kwargs.pop("num_classes", None)
            full_names = timm_registry._model_with_tags[name]  # timm's default first
            entry["kwargs"] = kwargs
            entry["tags"] = {full.partition(".")[2]: tag_row(full, kwargs, family) for full in full_names}
            models[name] = entry
    for module in NEIGHBOURS:
        for name in sorted(timm_registry._module_to_models[module] - deprecated.keys()):
            if entry := neighbour(name, module):
                models[name] = entry
    models |= {name: lvvit(name) for name in LVVIT} | {name: clips(name) for name in CLIPS}
    renamed = {}
    for old, new in sorted(deprecated.items()):
        base, _, tag = (new or "").partition(".")
        if base in models:
            renamed[old] = new if tag in models[base]["tags"] else base
    others = {
        module: " ".join(sorted(names - deprecated.keys() - models.keys()))
        for module, names in sorted(timm_registry._module_to_models.items())
        if module not in MODULES
    }
    data = {
        "timm": timm.__version__,
        "cfg": COMMON,
        "statistics": STATISTICS,
        "deprecated": renamed,
        "others": others,
        "models": models,
    }
    lines = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in data.items() if k != "models"]
    rows = [f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in models.items()]
    lines.append('"models": {\n' + ",\n".join(rows) + "\n}")
    OUTPUT.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
