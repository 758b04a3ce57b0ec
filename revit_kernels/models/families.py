"""What kind of model a file's weights are of, told by their keys: for errors that name it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

# Keys that only such a model has, the first that is there; those below have some keys of the last one too.
OTHERS = (
    (r"\.(?:cpb_mlp|meta_mlp|continuous_position_bias_mlp)\.", "a Swin Transformer V2"),
    (r"layers\.\d+\.blocks\.\d+\..*relative_position_bias_table$", "a Swin Transformer"),
    (r"relative_position_(?:bias_table|index)$", "a BEiT"),
    (r"\.attn\.pool_[qkv]\.", "an MViT"),
    (r"(?:^|\.)pos_embed_(?:spatial|win)|^blocks\.\d+\.proj\.", "a Hiera"),
    (r"\.attn\.rel_pos_[hw]$", "an image encoder of SAM"),
    (r"blocks_token_only\.", "a CaiT"),
    (r"\.local_mp\.", "an XCiT"),
    (r"\.mlp_tokens\.", "an MLP-Mixer"),
    (r"(?:^|\.)(?:conv_dw|dwconv|conv_stem|downsample_layers|layer[1-4]\.\d+\.conv\d)\.", "a convolutional network"),
    (r"(?:^|\.)stages\.\d+\.", "a model of several stages"),
)
PLAIN = (
    (r"temporal_(?:attn|attention|fc|dense)\.|(?:^|\.)time_embed", "a TimeSformer"),
    (r"^dist_token$", "a distilled DeiT"),
    (r"^patch_embed\.bn\d\.", "an LV-ViT"),
    (r"^blocks\.\d+\.(?:attn\.(?:q_bias|q_proj\.)|mlp\.(?:fc1_g|w1)\.)|^rope", "a model of EVA's kind (timm's eva.py)"),
)
EMBEDDING = re.compile(r"(?:patch_embed\.proj|patch_embeddings\.(?:projection|proj))\.weight$")
TUBELETS, PLAINEST = "a model of clips with tubelets", "a plain Vision Transformer"


def _first(keys, families) -> str | None:
    for pattern, family in families:
        if any(map(re.compile(pattern).search, keys)):
            return family
    return None


def family(state: Mapping[str, Tensor]) -> str | None:
    """What a state_dict in our layout is of, in a few words; None where it has no blocks of a Vision Transformer."""
    if any(EMBEDDING.search(key) and value.ndim == 5 for key, value in state.items()):
        return TUBELETS
    if found := _first(state, PLAIN):
        return found
    if not any(key.startswith("blocks.0.attn.") for key in state):
        return None
    return PLAINEST if "pos_embed" in state else "a Vision Transformer without a table of positions, such as DINOv3"


def refuse_others(state: Mapping[str, Tensor], path) -> None:
    """Raise ValueError where the weights of a file are of a model that is no plain Vision Transformer."""
    if found := _first(state, OTHERS):
        raise ValueError(f"{path} holds {found}, which is no plain Vision Transformer") from None


def mismatch(state: Mapping[str, Tensor], model: nn.Module, path) -> str | None:
    """A sentence, where the weights of a file are of another family than the model. state: in our layout"""
    found, own = family(state), family(model.state_dict())
    name = (getattr(model, "created_from", None) or {}).get("name", "the model")
    return f"{path} holds {found}, and {name} is {own}" if None not in (found, own) and found != own else None
