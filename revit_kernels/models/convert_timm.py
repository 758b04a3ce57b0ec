"""timm's other plain Vision Transformers, NaFlexVit and the towers of language models: as ours, with our keys.

NaFlexVit is a VisionTransformer that pads; here it becomes a VarLenViT. Towers become a VarLenTower or VarLenGemma4.
"""

from __future__ import annotations

import inspect
import re
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revit_kernels.models.naflex_inputs import projection
from revit_kernels.models.vision_towers import VarLenGemma4, VarLenTower
from revit_kernels.models.vit import VarLenViT

NORMS = {"LayerNorm": "layernorm", "RmsNorm": "rmsnorm", "RmsNormFp32": "rmsnorm"}
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_tanh", "QuickGELU": "quick_gelu", "SiLU": "silu"}
TOWERS = ("Qwen3VitClassifier", "DeepseekVitClassifier", "Gemma4VitClassifier")
TAKEN = ("NaFlexVit", *TOWERS)
USUAL = {"act_layer": "gelu", "mlp_layer": "Mlp", "norm_layer": {"name": "layernorm", "eps": 1e-6}}  # as None
PROJECTORS = re.compile(r"(?:merger|aligner|pooler)")  # of language models


class Description(NamedTuple):
    """What a model of timm's is here: a class of ours, its arguments, and how positions fit another grid."""

    cls: type[VarLenViT]
    kwargs: dict
    positions: dict


# ---------------------------------------------------------------------- what a model is


def _activation(module: nn.Module) -> str:
    if getattr(module, "approximate", "none") == "tanh":
        return "gelu_tanh"
    if type(module).__name__ not in ACTIVATIONS:
        raise NotImplementedError(f"an MLP's activation must be one of {sorted(ACTIVATIONS)}, got {module}")
    return ACTIVATIONS[type(module).__name__]


def _norm(module: nn.Module) -> dict:
    return {"name": NORMS[type(module).__name__], "eps": module.eps}


def _ratio(hidden: int, dim: int) -> float:
    """A ratio that comes to `hidden`, however it is rounded."""
    return hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim


def _rate(module: nn.Module, name: str = "p") -> float:
    return getattr(module, name, 0.0)


def _naflex(model: nn.Module) -> Description:
    embeds, block = model.embeds, model.blocks[0]
    if type(block).__name__ != "Block" or type(block.attn).__name__ != "Attention" or model.rope is not None:
        raise NotImplementedError(
            "a NaFlexVit of EVA's blocks, or with rotary positions, is not taken: make it with use_naflex=False"
        )
    if embeds.norm_input is not None or not embeds.channels_last:
        raise NotImplementedError("a NaFlexVit with input_norm_layer, or with patches that begin with channels")
    table = {"learned": "learn", "factorized": "factorized", "none": "none"}[embeds.pos_embed_type]
    grid, patch = embeds.pos_embed_grid_size or (16, 16), embeds.patch_size
    kwargs = {
        "img_size": tuple(g * p for g, p in zip(grid, patch)),
        "patch_size": patch,
        "in_chans": embeds.in_chans,
        "num_classes": model.num_classes,
        "global_pool": model.global_pool,
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": _ratio(block.mlp.fc1.out_features, model.embed_dim),
        "qkv_bias": block.attn.qkv.bias is not None,
        "qk_norm": not isinstance(block.attn.q_norm, nn.Identity),
        "scale_attn_norm": not isinstance(block.attn.norm, nn.Identity),
        "scale_mlp_norm": not isinstance(block.mlp.norm, nn.Identity),
        "proj_bias": block.attn.proj.bias is not None,
        "init_values": getattr(block.ls1, "init_values", None),
        "class_token": model.has_class_token,
        "pos_embed": table,
        "no_embed_class": True,
        "reg_tokens": model.num_reg_tokens,
        "pre_norm": not isinstance(model.norm_pre, nn.Identity),
        "final_norm": not isinstance(model.norm, nn.Identity) or not isinstance(model.fc_norm, nn.Identity),
        "fc_norm": not isinstance(model.fc_norm, nn.Identity),
        "pool_include_prefix": model.pool_include_prefix,
        "dynamic_img_pad": embeds.dynamic_img_pad,
        "drop_rate": _rate(model.head_drop),
        "pos_drop_rate": _rate(embeds.pos_drop),
        "patch_drop_rate": _rate(model.patch_drop, "prob"),
        "proj_drop_rate": _rate(block.attn.proj_drop),
        "attn_drop_rate": _rate(block.attn.attn_drop),
        "drop_path_rate": _rate(model.blocks[-1].drop_path1, "drop_prob"),
        "fix_init": model.fix_init,
        "norm_layer": _norm(block.norm1),
        "act_layer": _activation(block.mlp.act),
        "mlp_layer": type(block.mlp).__name__,
    }
    if not isinstance(embeds.norm, nn.Identity):
        kwargs["embed_norm_layer"] = _norm(embeds.norm)
    if kwargs["mlp_layer"] != "Mlp":
        raise NotImplementedError(f"a NaFlexVit's mlp_layer must be Mlp, got {kwargs['mlp_layer']}")
    positions = {
        "pos_interpolation": embeds.pos_embed_interp_mode,
        "pos_antialias": embeds.pos_embed_antialias,
        "pos_align_corners": embeds.pos_embed_align_corners,
        "pos_square": embeds.pos_embed_ar_preserving,
    }
    return Description(VarLenViT, kwargs, positions)


def _tower(model: nn.Module) -> Description:
    encoder, name = model.encoder, type(model).__name__
    if model.encoder_pool not in ("", "none"):
        raise NotImplementedError(
            f"{name} with encoder_pool={model.encoder_pool!r} projects merged tokens for a language model: "
            "that is not built, its classifier with encoder_pool='' is"
        )
    if isinstance(model.norm, nn.Identity):
        raise NotImplementedError(f"{name} must have its final_norm")
    block = encoder.blocks[0]
    kwargs = {
        "num_classes": model.num_classes,
        "global_pool": "" if model.global_pool == "none" else model.global_pool,
        "in_chans": encoder.in_chans,
        "embed_dim": encoder.embed_dim,
        "depth": len(encoder.blocks),
        "num_heads": block.attn.num_heads,
        "drop_rate": _rate(model.head_drop),
        "proj_drop_rate": _rate(block.attn.proj_drop),
        "attn_drop_rate": _rate(block.attn.attn_drop),
        "rope_rotate_half": True,
        "use_post_transformer_norm": False,
    }
    if name == "Gemma4VitClassifier":
        return _gemma(encoder, kwargs)
    gated = name == "DeepseekVitClassifier"
    hidden = block.mlp.fc1.out_features // (2 if gated else 1)
    kwargs |= {
        "img_size": tuple(encoder.patch_embed.img_size),
        "patch_size": tuple(encoder.patch_embed.patch_size),
        "mlp_ratio": _ratio(hidden, encoder.embed_dim),
        "norm_layer": _norm(block.norm1),
        "attn_type": "rope",
        "rope_temperature": encoder.rope.temperature,
        "drop_path_rate": _rate(encoder.blocks[-1].drop_path1, "drop_prob"),
        "dynamic_img_pad": encoder.patch_embed.dynamic_img_pad,
    }
    if gated:
        kwargs |= {"swiglu_mlp": True, "mlp_bias": False, "use_abs_pos_emb": False, "use_post_transformer_norm": True}
    else:
        side = encoder.pos_embed_grid_size
        kwargs |= {"act_layer": _activation(block.mlp.act)}
        kwargs["img_size"] = tuple(side * p for p in kwargs["patch_size"])
    return Description(VarLenTower, kwargs, {})


def _gemma(encoder: nn.Module, kwargs: dict) -> Description:
    block, patch = encoder.blocks[0], encoder.patch_size
    if block.attn.head_dim * block.attn.num_heads != encoder.embed_dim:
        raise NotImplementedError("Gemma4VitClassifier's head_dim must be embed_dim / num_heads")
    if _activation(block.mlp.act) != "gelu_tanh":
        raise NotImplementedError("Gemma4VitClassifier's act_layer must be the default, GELU by tanh")
    kwargs |= {
        "img_size": tuple(48 * p for p in patch),
        "patch_size": patch,
        "rope_temperature": encoder.rotary_emb.rope_theta,
        "rope_grid_indexing": "xy",
        "drop_path_rate": _rate(encoder.blocks[-1].drop_path, "drop_prob"),
        "intermediate_size": block.mlp.gate_proj.linear.out_features,
        "num_positions": encoder.patch_embed.position_embedding_size,
        "use_clipped_linears": encoder.use_clipped_linears,
        "standardize": encoder.std_bias is not None,
    }
    if block.attn.num_kv_heads != block.attn.num_heads:
        kwargs["num_kv_heads"] = block.attn.num_kv_heads
    if block.norm1.eps != 1e-6:
        raise NotImplementedError("Gemma4VitClassifier's norm_eps must be 1e-6")
    return Description(VarLenGemma4, kwargs, {})


def _plain(value):
    """One number where both are the same; a list where a JSON file would have one."""
    if isinstance(value, tuple):
        return value[0] if len(set(value)) == 1 else list(value)
    return value


def describe(model: nn.Module) -> Description:
    """What a model of timm's is here, leaving out the arguments that are the defaults.

    Raises NotImplementedError for a class or an option that has no counterpart, by name.
    """
    name = type(model).__name__
    if name not in TAKEN:
        raise NotImplementedError(f"timm's {name} is none of {', '.join(TAKEN)}")
    found = _naflex(model) if name == "NaFlexVit" else _tower(model)
    defaults = {}
    for cls in reversed(found.cls.__mro__):
        if issubclass(cls, VarLenViT):
            defaults |= {p.name: p.default for p in inspect.signature(cls.__init__).parameters.values()}
    kwargs = {key: _plain(value) for key, value in found.kwargs.items()}
    kwargs = {key: value for key, value in kwargs.items() if value not in (defaults.get(key), USUAL.get(key))}
    return found._replace(kwargs=kwargs)


# ---------------------------------------------------------------------- keys


def _of_naflex(state: dict[str, Tensor], patch_size) -> dict[str, Tensor]:
    names = {"embeds.proj.": "patch_embed.proj.", "embeds.norm.": "patch_embed.norm.", "embeds.pos_embed_": "pos_axes."}
    new = {}
    for key, x in state.items():
        for old, ours in (*names.items(), ("embeds.", "")):
            if key.startswith(old):
                key = ours + key.removeprefix(old)
                break
        if key == "pos_embed" and x.ndim == 4:
            x = x.flatten(1, 2)
        if key == "patch_embed.proj.weight" and x.ndim == 2:  # of pixels, row by row, each with its channels
            x = projection(x, patch_size)
        new[key] = x
    return new


def _to_naflex(state: dict[str, Tensor], grid_size) -> dict[str, Tensor]:
    new = {}
    for key, x in state.items():
        if key == "pos_embed":
            x = x.unflatten(1, tuple(grid_size))
        elif key == "patch_embed.proj.weight":
            x = x.permute(0, 2, 3, 1).flatten(1)
        key = re.sub(r"^(?:patch_embed\.|pos_axes\.|(?=(?:cls_token|reg_token|pos_embed)$))", "embeds.", key)
        new[re.sub(r"^embeds\.(?=[xy]$)", "embeds.pos_embed_", key)] = x
    return new


GEMMA = (
    (r"patch_embed\.input_proj\.", "patch_embed.proj."),
    (r"(blocks\.\d+\.attn\.[qkv]_proj\.)(?:linear\.)?", r"\1"),
    (r"(blocks\.\d+\.attn\.)o_proj\.(?:linear\.)?", r"\1proj."),
    (r"(blocks\.\d+\.mlp\.)gate_proj\.(?:linear\.)?", r"\1fc1_g."),
    (r"(blocks\.\d+\.mlp\.)up_proj\.(?:linear\.)?", r"\1fc1_x."),
    (r"(blocks\.\d+\.mlp\.)down_proj\.(?:linear\.)?", r"\1fc2."),
)


def _of_gemma(state: dict[str, Tensor], patch_size, head_dim: int) -> dict[str, Tensor]:
    """Channels are paired across the whole head here, within each half of it there: its middle quarters are swapped."""
    order = torch.arange(head_dim).view(4, -1)[[0, 2, 1, 3]].flatten()
    new = {}
    for key, x in state.items():
        for pattern, name in GEMMA:
            key = re.sub(f"^{pattern}", name, key)
        if key == "patch_embed.position_embedding_table":
            new["pos_axes.x"], new["pos_axes.y"] = x[:1], x[1:]
            continue
        if key == "patch_embed.proj.weight" and x.ndim == 2:
            x = x.unflatten(1, (-1, *patch_size))
        if re.search(r"\.attn\.[qk]_proj\.weight$", key):
            x = x.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)
        elif re.search(r"\.attn\.[qk]_norm\.weight$", key):
            x = x[order]
        new[key] = x
    return new


def _to_gemma(state: dict[str, Tensor], head_dim: int) -> dict[str, Tensor]:
    names = {"proj": "o_proj", "fc1_g": "gate_proj", "fc1_x": "up_proj", "fc2": "down_proj"}
    order = torch.arange(head_dim).view(4, -1)[[0, 2, 1, 3]].flatten()
    new = {}
    for key, x in state.items():
        if re.search(r"\.attn\.[qk]_proj\.weight$", key):
            x = x.unflatten(0, (-1, head_dim))[:, order].flatten(0, 1)
        elif re.search(r"\.attn\.[qk]_norm\.weight$", key):
            x = x[order]
        elif key == "patch_embed.proj.weight":
            x = x.flatten(1)
        key = re.sub(r"(?<=\.)(proj|fc1_g|fc1_x|fc2)(?=\.)", lambda found: names[found[0]], key)
        key = re.sub(r"^(blocks\..*_proj\.)(weight|bias)$", r"\1linear.\2", key)
        new[key.replace("patch_embed.o_proj.", "patch_embed.input_proj.")] = x
    new["patch_embed.position_embedding_table"] = torch.cat([new.pop("pos_axes.x"), new.pop("pos_axes.y")])
    return new


def timm_state(model: VarLenViT) -> dict[str, Tensor]:
    """The state_dict of the model with the keys and axes of timm's NaFlexVit, or of its tower where it is one.

    What a tower has for a language model's projector is not in it. Raises ValueError for models of other classes, whose
    keys are timm's already, and for resizable ones, which have parameters that timm's lack.
    """
    if type(model) not in (VarLenViT, VarLenTower, VarLenGemma4):
        raise ValueError(f"timm_state takes a VarLenViT, VarLenTower or VarLenGemma4, got {type(model).__name__}")
    if model.menu is not None:
        raise ValueError("the model is resizable: timm's have no parameters for each length")
    state = model.state_dict()
    if type(model) is VarLenViT:
        if not model.no_embed_class and model.num_prefix_tokens and model.pos_embed is not None:
            raise ValueError("NaFlexVit has no positions of prefix tokens, and the model has")
        return _to_naflex(state, model.patch_embed.grid_size)
    if type(model) is VarLenGemma4:
        state = _to_gemma(state, model.embed_dim // model.blocks[0].attn.num_heads)
    return {key if key.startswith("head.") else f"encoder.{key}": x for key, x in state.items()}


def is_timms(keys, model: nn.Module) -> bool:
    """Whether these are the keys of timm's NaFlexVit, or of a tower where the model is one."""
    start = r"embeds\.|encoder\.(?:patch_embed|blocks)\.|patch_embed\.input_proj\."
    start = start if isinstance(model, VarLenTower | VarLenGemma4) else r"embeds\."
    return any(re.match(start, key) for key in keys)


def our_state(state: dict[str, Tensor], model: VarLenViT) -> dict[str, Tensor]:
    """The state_dict of timm's NaFlexVit or of a tower, with our keys and axes; projectors are left out."""
    state = {key.removeprefix("encoder."): x for key, x in state.items()}
    state = {key: x for key, x in state.items() if not PROJECTORS.match(key)}
    patch_size = model.patch_embed.patch_size
    if isinstance(model, VarLenGemma4):
        return _of_gemma(state, patch_size, model.embed_dim // model.blocks[0].attn.num_heads)
    return _of_naflex(state, patch_size)


def from_timm(model: nn.Module) -> VarLenViT:
    """A NaFlexVit or a tower of timm's as ours; shares the parameters whose axes are the same, copies the others."""
    cls, kwargs, positions = describe(model)
    new = cls(**kwargs, weight_init="skip", device="meta")
    for name, value in positions.items():
        setattr(new, name, value)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    state = our_state({key: own[key] for key in model.state_dict()}, new)
    new.load_state_dict(state, strict=True, assign=True)
    cfg = getattr(model, "pretrained_cfg", None)
    if cfg:
        new.pretrained_cfg = new.default_cfg = dict(cfg)
    return new.train(model.training)
