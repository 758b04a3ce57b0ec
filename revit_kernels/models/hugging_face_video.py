"""Models of clips of Hugging Face's `transformers`: from a model, or from the keys of a file of its."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from revit_kernels.models import families
from revit_kernels.models.checkpoints import check_state
from revit_kernels.models.hugging_face import _pooler, of_blocks, renamed, size_of
from revit_kernels.models.timesformer import VarLenTimeSformer
from revit_kernels.models.video import ClipModel
from revit_kernels.models.video_vit import VarLenVideoViT
from revit_kernels.models.weight_files import read_checkpoint
from revit_kernels.modules.layer_norm import LayerNorm

HALF, IMAGENET = ((0.5,) * 3,) * 2, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS = {"timesformer": HALF, "vivit": HALF, "videomae": IMAGENET, "vjepa2": IMAGENET}  # of their processors
TAKEN = (
    *("TimesformerModel", "TimesformerForVideoClassification", "VideoMAEModel", "VideoMAEForVideoClassification"),
    *("VivitModel", "VivitForVideoClassification", "VJEPA2Model"),
)

OF_BLOCK = (
    (r"temporal_layernorm\.", "temporal_norm1."),
    (r"temporal_attention\.attention\.qkv\.", "temporal_attn.qkv."),
    (r"temporal_attention\.output\.dense\.", "temporal_attn.proj."),
    (r"temporal_dense\.", "temporal_fc."),
    (r"attention\.attention\.qkv\.", "attn.qkv."),
    (r"attention\.(?:attention\.)?(?:query|q_proj)\.", "attn.q."),
    (r"attention\.(?:attention\.)?(?:key|k_proj)\.", "attn.k."),
    (r"attention\.(?:attention\.)?(?:value|v_proj)\.", "attn.v."),
    (r"attention\.attention\.([qv])_bias", r"attn.\1.bias"),
    (r"attention\.(?:output\.dense|o_proj|proj)\.", "attn.proj."),
    (r"(?:layernorm_before|norm1)\.", "norm1."),
    (r"(?:layernorm_after|norm2)\.", "norm2."),
    (r"(?:intermediate\.dense|mlp\.fc1)\.", "mlp.fc1."),
    (r"(?:output\.dense|mlp\.fc2)\.", "mlp.fc2."),
)
AROUND = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.time_embeddings", "time_embed"),
    (r"embeddings\.patch_embeddings\.(?:projection|proj)\.", "patch_embed.proj."),
    (r"layernorm\.", "norm."),
    (r"fc_norm\.", "fc_norm."),
    (r"classifier\.", "head."),
    (r"pooler\.dense\.", "pooler."),
)
PREFIX = re.compile(r"^(?:model\.|module\.)*(?:(?:timesformer|videomae|vivit|vjepa2)\.)?(?:encoder\.(?!layer\.))?")
DROPPED = re.compile(r"(?:predictor|decoder|encoder_to_decoder)\.|mask_token")


def is_hugging_face(keys) -> bool:
    """Whether these are the keys of a model of clips of `transformers`."""
    return any(re.search(r"(?:^|\.)(?:embeddings\.patch_embeddings|encoder\.layer)\.", key) for key in keys)


def our_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a model of clips of `transformers` with our keys.

    Parameters that only change their name stay the tensors they are; q, k and v are joined, with a bias of zeros for k
    where it has none: what it adds to the scores of a query is the same for all keys, so it changes nothing, and its
    gradient is zero. The pooler's projection becomes `pooler.*`; predictors and decoders are left out.
    Raises ValueError for a key that is none of that layout's.
    """
    state = {PREFIX.sub("", key): x for key, x in state.items()}
    new = {renamed(key, OF_BLOCK, AROUND): x for key, x in state.items() if not DROPPED.match(key)}
    for block in [key.removesuffix("q.weight") for key in new if key.endswith(".attn.q.weight")]:
        new[f"{block}qkv.weight"] = torch.cat([new.pop(f"{block}{x}.weight") for x in "qkv"])
        q, k, v = (new.pop(f"{block}{x}.bias", None) for x in "qkv")
        if q is not None:
            new[f"{block}qkv.bias"] = torch.cat([q, torch.zeros_like(q) if k is None else k, v])
    return new


def load(model: ClipModel, path, prefix: str = "") -> None:
    """See ClipModel.load_pretrained."""
    read = read_checkpoint(path, prefix)
    try:
        if is_hugging_face(read):
            state = {key: x for key, x in our_state(read).items() if not key.startswith("pooler.")}
        else:
            state = {re.sub(r"^(?:model\.|module\.)+", "", key): x for key, x in read.items()}
        if not model.num_classes:
            state = {key: x for key, x in state.items() if not key.startswith("head.")}
        if model.menu is not None:
            model.fill_lengths(state)
        check_state(state, model, path)
    except ValueError:
        families.refuse_others(read, path)
        raise
    model.load_state_dict(state)


def _common(config) -> dict:
    if getattr(config, "attention_probs_dropout_prob", 0.0):
        raise NotImplementedError("attention_probs_dropout_prob must be 0: there is no dropout of attention of clips")
    return of_blocks(config)


def _timesformer(config, name: str) -> VarLenTimeSformer:
    kwargs = {"img_size": size_of(config.image_size), "patch_size": size_of(config.patch_size)}
    kwargs |= {"in_chans": config.num_channels, "num_frames": config.num_frames, "qkv_bias": config.qkv_bias}
    kwargs |= {"attention_type": config.attention_type, "drop_path_rate": float(config.drop_path_rate)}
    kwargs |= {"pos_drop_rate": config.hidden_dropout_prob, "proj_drop_rate": config.hidden_dropout_prob}
    new = VarLenTimeSformer(**_common(config), **kwargs)
    new.pos_interpolation = "nearest"
    return new


def _videomae(config, name: str) -> VarLenVideoViT:
    mean = config.use_mean_pooling
    kwargs = {"img_size": size_of(config.image_size), "patch_size": size_of(config.patch_size)}
    kwargs |= {"in_chans": config.num_channels, "num_frames": config.num_frames, "tubelet_size": config.tubelet_size}
    kwargs |= {"qkv_bias": config.qv_bias, "proj_drop_rate": config.hidden_dropout_prob, "final_norm": not mean}
    new = VarLenVideoViT(**_common(config), **kwargs, global_pool="avg" if mean else "token")
    if mean and name == "VideoMAEForVideoClassification":
        new.fc_norm = LayerNorm(config.hidden_size, 1e-5, device="meta")
    return new


def _vivit(config, name: str) -> VarLenVideoViT:
    frames, *patch = config.tubelet_size
    kwargs = {"img_size": size_of(config.image_size), "patch_size": tuple(patch), "tubelet_size": frames}
    kwargs |= {"in_chans": config.num_channels, "num_frames": config.num_frames, "qkv_bias": config.qkv_bias}
    kwargs |= {"proj_drop_rate": config.hidden_dropout_prob, "pos_drop_rate": config.hidden_dropout_prob}
    return VarLenVideoViT(**_common(config), **kwargs, pos_embed="learn", class_token=True, global_pool="token")


def _vjepa2(config, name: str) -> VarLenVideoViT:
    kwargs = {"img_size": config.crop_size, "patch_size": size_of(config.patch_size), "in_chans": config.in_chans}
    kwargs |= {"num_frames": config.frames_per_clip, "tubelet_size": config.tubelet_size}
    kwargs |= {"qkv_bias": config.qkv_bias, "drop_path_rate": float(config.drop_path_rate)}
    return VarLenVideoViT(**_common(config), **kwargs, pos_embed="rope")


BUILD = {"timesformer": _timesformer, "videomae": _videomae, "vivit": _vivit, "vjepa2": _vjepa2}


def from_transformers(model: nn.Module) -> ClipModel:
    """A model of clips of `transformers`; see `revit_kernels.from_transformers`."""
    name, config = type(model).__name__, model.config
    new = BUILD[config.model_type](config, name)
    state = our_state(dict(model.named_parameters()))
    pooler = {key: state.pop(f"pooler.{key}") for key in ("weight", "bias") if f"pooler.{key}" in state}
    if "head.weight" in state:
        new.num_classes = len(state["head.weight"])
        new.head = nn.Linear(config.hidden_size, new.num_classes, device="meta")
    new.load_state_dict(state, strict=True, assign=True)
    if pooler:
        new.num_classes, new.head = len(pooler["weight"]), _pooler(pooler, model)
    if new.in_chans == 3:
        mean, std = STATISTICS[config.model_type]
        new.pretrained_cfg = new.default_cfg = {"mean": mean, "std": std, "interpolation": "bilinear"}
    return new.train(model.training)
