"""Models of clips of Hugging Face's `transformers`: from a model, or from the keys of a file of its."""

from __future__ import annotations

import re

from torch import Tensor, nn

from revit_kernels.models.hugging_face import ACTIVATIONS
from revit_kernels.models.timesformer import VarLenTimeSformer
from revit_kernels.models.video import ClipModel
from revit_kernels.models.weight_files import read_checkpoint, some

HALF, IMAGENET = ((0.5,) * 3,) * 2, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
STATISTICS = {"timesformer": HALF}  # what its processor takes
TAKEN = ("TimesformerModel", "TimesformerForVideoClassification")

OF_BLOCK = (
    (r"temporal_layernorm\.", "temporal_norm1."),
    (r"temporal_attention\.attention\.qkv\.", "temporal_attn.qkv."),
    (r"temporal_attention\.output\.dense\.", "temporal_attn.proj."),
    (r"temporal_dense\.", "temporal_fc."),
    (r"attention\.attention\.qkv\.", "attn.qkv."),
    (r"attention\.output\.dense\.", "attn.proj."),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"intermediate\.dense\.", "mlp.fc1."),
    (r"output\.dense\.", "mlp.fc2."),
)
AROUND = (
    (r"embeddings\.cls_token", "cls_token"),
    (r"embeddings\.position_embeddings", "pos_embed"),
    (r"embeddings\.time_embeddings", "time_embed"),
    (r"embeddings\.patch_embeddings\.(?:projection|proj)\.", "patch_embed.proj."),
    (r"layernorm\.", "norm."),
    (r"fc_norm\.", "fc_norm."),
    (r"classifier\.", "head."),
)
PREFIX = re.compile(r"^(?:model\.|module\.)*(?:timesformer\.)?")


def is_hugging_face(keys) -> bool:
    """Whether these are the keys of a model of clips of `transformers`."""
    return any(re.search(r"(?:^|\.)(?:embeddings\.patch_embeddings|encoder\.layer)\.", key) for key in keys)


def _renamed(key: str) -> str:
    block = re.match(r"(?:encoder\.)?layers?\.(\d+)\.(.+)", key)
    rules, start, rest = (OF_BLOCK, f"blocks.{block[1]}.", block[2]) if block else (AROUND, "", key)
    for pattern, name in rules:
        if found := re.match(pattern, rest):
            return start + found.expand(name) + rest[found.end() :]
    raise ValueError(f"{key} is no key of a model of clips in Hugging Face's layout")


def our_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of a model of clips of `transformers` with our keys; its parameters stay the tensors they are.

    Raises ValueError for a key that is none of that layout's.
    """
    return {_renamed(PREFIX.sub("", key)): x for key, x in state.items()}


def load(model: ClipModel, path, prefix: str = "") -> None:
    """See ClipModel.load_pretrained."""
    state = read_checkpoint(path, prefix)
    if is_hugging_face(state):
        state = our_state(state)
    else:
        state = {re.sub(r"^(?:model\.|module\.)+", "", key): x for key, x in state.items()}
    wanted = model.state_dict()
    if not model.num_classes:
        state = {key: x for key, x in state.items() if not key.startswith("head.")}
    if model.menu is not None:
        model.fill_lengths(state)
    wrong = [
        f"{key} is {tuple(state[key].shape)} where the model has {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    missing, unexpected = ([k for k in a if k not in b] for a, b in ((wanted, state), (state, wanted)))
    wrong = ([some(wrong)] if wrong else []) + ([f"missing: {some(missing)}"] if missing else [])
    wrong += [f"unexpected: {some(unexpected)}"] if unexpected else []
    if wrong:
        raise ValueError(f"{path} does not fit the model: {'; '.join(wrong)}")
    model.load_state_dict(state)


def _common(config) -> dict:
    if config.hidden_act not in ACTIVATIONS:
        raise NotImplementedError(f"hidden_act must be one of {sorted(ACTIVATIONS)}, got {config.hidden_act!r}")
    if getattr(config, "attention_probs_dropout_prob", 0.0):
        raise NotImplementedError(
            "attention_probs_dropout_prob must be 0: dropout of attention maps of clips is not built"
        )
    size, patch = (x if isinstance(x, int) else tuple(x) for x in (config.image_size, config.patch_size))
    return {
        "img_size": size,
        "patch_size": patch,
        "in_chans": config.num_channels,
        "num_classes": 0,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": (config.intermediate_size + 0.5) / config.hidden_size,
        "qkv_bias": config.qkv_bias,
        "num_frames": config.num_frames,
        "norm_layer": {"name": "layernorm", "eps": config.layer_norm_eps},
        "act_layer": ACTIVATIONS[config.hidden_act],
        "weight_init": "skip",
        "device": "meta",
    }


def _timesformer(config) -> VarLenTimeSformer:
    kwargs = {"attention_type": config.attention_type, "drop_path_rate": float(config.drop_path_rate)}
    kwargs |= {"pos_drop_rate": config.hidden_dropout_prob, "proj_drop_rate": config.hidden_dropout_prob}
    new = VarLenTimeSformer(**_common(config), **kwargs)
    new.pos_interpolation = "nearest"
    return new


def from_transformers(model: nn.Module) -> ClipModel:
    """A model of clips of `transformers`; see `revit_kernels.from_transformers`."""
    config = model.config
    new = _timesformer(config)
    state = our_state(dict(model.named_parameters()))
    if "head.weight" in state:
        new.num_classes = len(state["head.weight"])
        new.head = nn.Linear(config.hidden_size, new.num_classes, device="meta")
    new.load_state_dict(state, strict=True, assign=True)
    statistics = STATISTICS[config.model_type]
    if new.in_chans == 3:
        new.pretrained_cfg = new.default_cfg = dict(zip(("mean", "std"), statistics))
    return new.train(model.training)
