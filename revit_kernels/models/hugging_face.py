"""Vision Transformers of Hugging Face's `transformers`: from a model, or from the keys of a file of its."""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from revit_kernels.models.distilled import VarLenViTDistilled
from revit_kernels.models.eva import VarLenEva
from revit_kernels.models.naflex_inputs import projection
from revit_kernels.models.vit import VarLenViT
from revit_kernels.packing import PackedTokens

HALF, IMAGENET = ((0.5,) * 3,) * 2, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
STATISTICS = {"deit": IMAGENET, "dinov2": IMAGENET, "dinov2_with_registers": IMAGENET, "dinov3_vit": IMAGENET}
STATISTICS |= {"vit": HALF, "clip_vision_model": CLIP, "siglip_vision_model": HALF, "siglip2_vision_model": HALF}
BILINEAR = ("vit", "dinov3_vit", "siglip2_vision_model")  # how their image processors resize; the others bicubically
ACTIVATIONS = dict.fromkeys(("gelu_new", "gelu_fast", "gelu_pytorch_tanh"), "gelu_tanh")
ACTIVATIONS |= {"gelu": "gelu", "quick_gelu": "quick_gelu"}
TAKEN = (
    *("ViTModel", "ViTForImageClassification", "DeiTModel", "DeiTForImageClassification"),
    *("DeiTForImageClassificationWithTeacher", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"),
    *("CLIPVisionModel", "CLIPVisionModelWithProjection", "SiglipVisionModel", "Siglip2VisionModel"),
)
FAMILIES = "ViT, DeiT, DINOv2, DINOv3, the vision models of CLIP and SigLIP, TimeSformer, VideoMAE, ViViT and V-JEPA 2"

# Keys of one block and around the blocks, as transformers 4 and 5 write them, and timm's for them.
OF_BLOCK = (
    (r"(?:attention|self_attn)\.(?:attention\.)?(?:q_proj|query)\.", "attn.q."),
    (r"(?:attention|self_attn)\.(?:attention\.)?(?:k_proj|key)\.", "attn.k."),
    (r"(?:attention|self_attn)\.(?:attention\.)?(?:v_proj|value)\.", "attn.v."),
    (r"(?:attention|self_attn)\.(?:output\.dense|o_proj|out_proj)\.", "attn.proj."),
    (r"(?:layernorm_before|layer_norm1|norm1)\.", "norm1."),
    (r"(?:layernorm_after|layer_norm2|norm2)\.", "norm2."),
    (r"mlp\.gate_proj\.", "mlp.fc1_g."),
    (r"(?:intermediate\.dense|mlp\.fc1|mlp\.up_proj)\.", "mlp.fc1."),
    (r"mlp\.weights_in\.", "mlp.fc1_both."),
    (r"(?:output\.dense|mlp\.fc2|mlp\.down_proj|mlp\.weights_out)\.", "mlp.fc2."),
    (r"layer_scale([12])\.lambda1", r"ls\1.gamma"),
)
AROUND = (
    (r"embeddings\.(?:cls_token|class_embedding)", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.(?:position_embeddings|position_embedding\.weight)", "pos_embed"),
    (r"embeddings\.(?:patch_embeddings\.projection|patch_embeddings|patch_embedding)\.", "patch_embed.proj."),
    (r"pre_layrnorm\.", "norm_pre."),
    (r"(?:layernorm|norm|post_layernorm)\.", "norm."),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.in_proj_(weight|bias)", r"attn_pool.qkv.\1"),
    (r"head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"head\.layernorm\.", "attn_pool.norm."),
    (r"head\.mlp\.", "attn_pool.mlp."),
    (r"(?:classifier|cls_classifier|visual_projection)\.", "head."),
    (r"distillation_classifier\.", "head_dist."),
    (r"pooler\.dense\.", "pooler."),
)
DROPPED = re.compile(r".*(?:mask_token|position_ids|inv_freq|logit_scale|logit_bias)$|(?:text_model|text_projection)\.")
PREFIX = re.compile(
    r"^(?:model\.)?(?:vit|deit|dinov2|dinov2_with_registers|vision_model|model)\."
    r"(?=embeddings|encoder|layer|norm|pooler|pre_|post_|head)"
)


def is_hugging_face(keys) -> bool:
    """Whether these are the keys of a Vision Transformer of `transformers`."""
    return any(re.search(r"(?:^|\.)embeddings\.(?:patch_embedding|cls_token|class_embedding)", key) for key in keys)


def renamed(key: str, of_block, around) -> str:
    """timm's key for one of transformers', by the rules (pattern, name) of blocks, or of what is around them."""
    block = re.match(r"(?:encoder\.|model\.)*layers?\.(\d+)\.(.+)", key)
    rules, start, rest = (of_block, f"blocks.{block[1]}.", block[2]) if block else (around, "", key)
    for pattern, name in rules:
        if found := re.match(pattern, rest):
            return start + found.expand(name) + rest[found.end() :]
    raise ValueError(f"{key} is no key of a Vision Transformer in Hugging Face's layout")


def _take(state: dict[str, Tensor], *keys: str) -> list[Tensor | None]:
    return [state.pop(key, None) for key in keys]


def _join(state: dict[str, Tensor], block: str) -> None:
    """q, k and v as one projection, in place: timm's `qkv`, with q_bias and v_bias apart where k has no bias."""
    state[f"{block}attn.qkv.weight"] = torch.cat(_take(state, *(f"{block}attn.{x}.weight" for x in "qkv")))
    q, k, v = _take(state, *(f"{block}attn.{x}.bias" for x in "qkv"))
    if k is not None:
        state[f"{block}attn.qkv.bias"] = torch.cat([q, k, v])
    elif q is not None:
        state[f"{block}attn.q_bias"], state[f"{block}attn.v_bias"] = q, v


def timm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a Vision Transformer of `transformers`, of a whole CLIP or SigLIP too, in timm's layout.

    Parameters that only change their name stay the tensors they are; q, k and v are joined, and the position of the
    class token is added to it where register tokens have none. The pooler's projection becomes `pooler.*`.
    Raises ValueError for a key that is none of that layout's.
    """
    if any(key.startswith("text_model.") for key in state):
        state = {key: x for key, x in state.items() if key.startswith(("vision_model.", "visual_projection."))}
    state = {PREFIX.sub("", key): x for key, x in state.items()}
    new = {renamed(key, OF_BLOCK, AROUND): x for key, x in state.items() if not DROPPED.match(key) and x.numel()}
    blocks = {key[: key.index(".", len("blocks.")) + 1] for key in new if key.startswith("blocks.")}
    rotary = "pos_embed" not in new
    for block in blocks:
        _join(new, block)
        for part in ("weight", "bias"):
            if f"{block}mlp.fc1_both.{part}" in new:
                gate, up = new.pop(f"{block}mlp.fc1_both.{part}").chunk(2)
                new[f"{block}mlp.fc1_g.{part}"], new[f"{block}mlp.fc1_x.{part}"] = gate, up
            elif f"{block}mlp.fc1_g.{part}" in new:
                new[f"{block}mlp.fc1_x.{part}"] = new.pop(f"{block}mlp.fc1.{part}")
        if rotary:
            for i in (1, 2):
                new[f"{block}gamma_{i}"] = new.pop(f"{block}ls{i}.gamma")
    if "cls_token" in new and new["cls_token"].ndim == 1:
        new["cls_token"] = new["cls_token"].view(1, 1, -1)
    if "pos_embed" in new and new["pos_embed"].ndim == 2:
        new["pos_embed"] = new["pos_embed"][None]
    if "reg_token" in new and "pos_embed" in new:
        new["cls_token"] = new["cls_token"] + new["pos_embed"][:, :1]
        new["pos_embed"] = new["pos_embed"][:, 1:]
    for part in ("weight", "bias"):
        if f"attn_pool.qkv.{part}" in new:
            qkv = new.pop(f"attn_pool.qkv.{part}")
            new[f"attn_pool.q.{part}"], new[f"attn_pool.kv.{part}"] = qkv[: len(qkv) // 3], qkv[len(qkv) // 3 :]
    if "head.weight" in new and "head.bias" not in new:
        new["head.bias"] = new["head.weight"].new_zeros(len(new["head.weight"]))
    return new


def size_of(size):
    return size if isinstance(size, int) else tuple(size)


def of_blocks(config, mlp: str | None = None) -> dict:
    """The constructor's arguments that every model has, of images or of clips."""
    activation = getattr(config, "hidden_act", "gelu")
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"hidden_act must be one of {sorted(ACTIVATIONS)}, got {activation!r}")
    hidden = getattr(config, "intermediate_size", None) or int(config.hidden_size * config.mlp_ratio)
    if mlp == "SwiGLU":
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    return {
        "num_classes": 0,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (hidden + 0.5) / config.hidden_size,  # which comes to `hidden`, however it is rounded
        "norm_layer": {"name": "layernorm", "eps": config.layer_norm_eps},
        "act_layer": ACTIVATIONS[activation],
        "weight_init": "skip",
        "device": "meta",
    }


def _common(config, mlp: str | None = None) -> dict:
    """The constructor's arguments that every model of images has."""
    sizes = {"img_size": size_of(config.image_size), "patch_size": size_of(config.patch_size)}
    return of_blocks(config, mlp) | sizes | {"in_chans": config.num_channels, "global_pool": "token"}


def _plain(config, **kwargs) -> VarLenViT:
    return VarLenViT(**_common(config) | {"qkv_bias": getattr(config, "qkv_bias", True)} | kwargs)


def _dinov2(config) -> VarLenViT:
    mlp = "SwiGLU" if config.use_swiglu_ffn else "Mlp"
    registers = getattr(config, "num_register_tokens", 0) if config.model_type == "dinov2_with_registers" else 0
    kwargs = {"qkv_bias": config.qkv_bias, "init_values": config.layerscale_value, "mlp_layer": mlp}
    kwargs |= {"reg_tokens": registers, "no_embed_class": registers > 0, "drop_path_rate": config.drop_path_rate}
    kwargs |= {"act_layer": "silu"} if config.use_swiglu_ffn else {}
    return VarLenViT(**_common(config, mlp) | kwargs)


def _dinov3(config) -> VarLenEva:
    biases = config.query_bias, config.key_bias, config.value_bias
    if biases not in ((True, False, True), (True, True, True), (False, False, False)):
        raise NotImplementedError(f"biases of q, k and v must be all, none or those of q and v, got {biases}")
    if not config.proj_bias or not config.mlp_bias:
        raise NotImplementedError("proj_bias and mlp_bias must be True")
    if (config.hidden_act, config.use_gated_mlp) not in (("gelu", False), ("silu", True)):
        raise NotImplementedError(f"hidden_act must be 'gelu', or 'silu' with use_gated_mlp, got {config.hidden_act!r}")
    kwargs = _common(config if not config.use_gated_mlp else _With(config, hidden_act="gelu"))  # it has its own
    del kwargs["act_layer"]
    kwargs |= {"qkv_bias": config.query_bias, "attn_type": "rope" if config.key_bias else "eva"}
    kwargs |= {"swiglu_mlp": config.use_gated_mlp, "swiglu_align_to": 1, "init_values": config.layerscale_value}
    kwargs |= {"drop_path_rate": config.drop_path_rate, "num_reg_tokens": config.num_register_tokens}
    kwargs |= {"use_abs_pos_emb": False, "use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True}
    kwargs |= {f"rope_{name}_coords": getattr(config, f"pos_embed_{name}") for name in ("shift", "jitter", "rescale")}
    return VarLenEva(**kwargs, rope_temperature=config.rope_theta)


class _With:
    """A configuration with some of its entries replaced."""

    def __init__(self, config, **entries):
        self.__dict__ |= entries
        self._config = config

    def __getattr__(self, name):
        return getattr(self._config, name)


def _siglip(config) -> VarLenViT:
    return _plain(config, class_token=False, global_pool="map" if config.vision_use_head else "", fc_norm=False)


def _siglip2(config) -> VarLenViT:
    side = math.isqrt(config.num_patches)
    new = _siglip(_With(config, image_size=side * config.patch_size))
    new.pos_interpolation = "bilinear"
    return new


def _build(name: str, config) -> VarLenViT:
    """The model, without memory, of a class of `transformers` with its head."""
    if name == "DeiTForImageClassificationWithTeacher":
        return VarLenViTDistilled(**_common(config) | {"qkv_bias": config.qkv_bias, "num_classes": config.num_labels})
    if name.startswith("DeiT"):  # only the class token is answered from: the other is as good as a register token
        return _plain(config, reg_tokens=1)
    if name.startswith("DINOv3"):
        return _dinov3(config)
    if name.startswith("Dinov2"):
        return _dinov2(config)
    if name.startswith("CLIP"):
        return _plain(config, pre_norm=True, fc_norm=True)
    if name.startswith("Siglip2"):
        return _siglip2(config)
    return _siglip(config) if name.startswith("Siglip") else _plain(config)


def from_transformers(model: nn.Module) -> VarLenViT:
    """A Vision Transformer of `transformers` as VarLenViT or VarLenEva: `model(x)` gives what its pooler or head gives.

    Models of clips become one that takes (clips, channels, frames, height, width): TimesformerModel and
    TimesformerForVideoClassification a VarLenTimeSformer; VideoMAEModel, VideoMAEForVideoClassification, VivitModel,
    VivitForVideoClassification and VJEPA2Model (its encoder, whose tokens are averaged) a VarLenVideoViT.

    Of images are taken ViTModel, DeiTModel, Dinov2Model, Dinov2WithRegistersModel, DINOv3ViTModel, CLIPVisionModel,
    SiglipVisionModel, Siglip2VisionModel (its processor's batches are taken as they are), and those of them with a
    linear head on the first token. `forward_features` gives its `last_hidden_state`, and `encode` both by name.
    Positions are interpolated as that model interpolates them. uint8 images are normalised with the constants of its
    image processor.

    Parameters are shared where only their names differ; copied are q, k and v, joined to one `qkv`, a class token of
    another shape or with its position added, what attention pooling joins, and SigLIP 2's patch projection.
    Raises NotImplementedError for another class, or for an option of it that has no counterpart, by name.
    """
    from revit_kernels.models import hugging_face_video as video  # which is built on this file

    name, config = type(model).__name__, model.config
    if name in video.TAKEN:
        return video.from_transformers(model)
    if name not in TAKEN:
        raise NotImplementedError(f"from_transformers takes {FAMILIES}, got {name}")
    new = _build(name, config)
    state = timm_state(dict(model.named_parameters()))
    pooler = {key: state.pop(f"pooler.{key}", None) for key in ("weight", "bias")}
    if name.startswith("CLIP"):
        state |= {f"fc_norm.{key}": state.pop(f"norm.{key}") for key in ("weight", "bias")}
    if name.startswith("DeiT") and not isinstance(new, VarLenViTDistilled):
        state["reg_token"] = state.pop("dist_token")
    if state["patch_embed.proj.weight"].ndim == 2:
        weight = state["patch_embed.proj.weight"]
        state["patch_embed.proj.weight"] = projection(weight, new.patch_embed.patch_size)
    if "head.weight" in state and isinstance(new.head, nn.Identity):
        new.num_classes = len(state["head.weight"])
        new.head = nn.Linear(config.hidden_size, new.num_classes, device="meta")
    new.load_state_dict(state, strict=True, assign=True)
    if pooler["weight"] is not None:
        new.num_classes, new.head = len(pooler["weight"]), _pooler(pooler, model)
    statistics = STATISTICS[config.model_type]
    if len(statistics[0]) == new.in_chans:
        size = (new.in_chans, *new.patch_embed.img_size)
        how = "bilinear" if config.model_type in BILINEAR else "bicubic"
        cfg = dict(zip(("mean", "std"), statistics), input_size=size, interpolation=how)
        new.pretrained_cfg = new.default_cfg = cfg
    new.pos_antialias = config.model_type in ("dinov2_with_registers", "siglip2_vision_model")
    return new.train(model.training)


def _pooler(parameters: dict, model: nn.Module) -> nn.Sequential:
    """The projection of the first token, and the activation behind it, with the model's own parameters."""
    owner = next(module for name, module in model.named_modules() if name.rpartition(".")[2] == "pooler")
    dense = nn.Linear(*parameters["weight"].shape[::-1], device="meta")
    dense.weight, dense.bias = parameters["weight"], parameters["bias"]
    return nn.Sequential(OrderedDict(dense=dense, activation=owner.activation))


class EncoderOutput(NamedTuple):
    """What a vision model of `transformers` returns, by its names.

    last_hidden_state: (images, length, dim) for a tensor of images, else a tuple of (length, dim), one per image
    pooler_output:     (images, dim)
    """

    last_hidden_state: Tensor | tuple[Tensor, ...]
    pooler_output: Tensor


def encode(model: VarLenViT, pixel_values, **inputs) -> EncoderOutput:
    """`last_hidden_state` and `pooler_output` of images as the model takes them. inputs: grids=, packing=, ..."""
    features = model.forward_features(pixel_values, **inputs)
    pooled = model.forward_head(features)
    return EncoderOutput(features.split() if isinstance(features, PackedTokens) else features, pooled)
