"""The vision tower of OpenAI's CLIP and of open_clip, by the keys of its files: in timm's layout."""

from __future__ import annotations

import re

from torch import Tensor

BLOCK = (
    (r"ln_([12])\.", r"norm\1."),
    (r"ls_([12])\.", r"ls\1."),
    (r"attn\.in_proj_(weight|bias)$", r"attn.qkv.\1"),
    (r"attn\.out_proj\.", "attn.proj."),
    (r"mlp\.c_fc\.", "mlp.fc1."),
    (r"mlp\.c_proj\.", "mlp.fc2."),
)
AROUND = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    "conv1.bias": "patch_embed.proj.bias",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
    "ln_post.weight": "norm.weight",
    "ln_post.bias": "norm.bias",
    "proj": "head.weight",
}


def _start(keys) -> str | None:
    """What the keys of the vision tower begin with; None where there is none."""
    for key in keys:
        if key.endswith(("conv1.weight", "layer1.0.conv1.weight")):
            start = key.removesuffix("conv1.weight").removesuffix("layer1.0.")
            if (
                f"{start}transformer.resblocks.0.attn.in_proj_weight" in keys
                or f"{start}attnpool.c_proj.weight" in keys
            ):
                return start
    return None


def is_clip(keys) -> bool:
    """Whether these are the keys of a vision tower of CLIP in its authors' layout."""
    return _start(keys) is not None


def timm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of the vision tower, in timm's layout; text is left out, and the projection becomes the head.

    Raises ValueError for a key that is none of that layout's.
    """
    start = _start(state)
    tower = {key.removeprefix(start): x for key, x in state.items() if key.startswith(start)}
    new = {}
    for key, x in tower.items():
        if found := re.match(r"transformer\.resblocks\.(\d+)\.(.+)", key):
            rest = found[2]
            for pattern, name in BLOCK:
                rest = re.sub(f"^{pattern}", name, rest)
            new[f"blocks.{found[1]}.{rest}"] = x
        elif key in AROUND:
            new[AROUND[key]] = x
        elif start:
            raise ValueError(f"{start}{key} is no key of a vision tower of CLIP that is built")
    new["cls_token"] = new["cls_token"].view(1, 1, -1)
    new["pos_embed"] = new["pos_embed"][None]
    if "head.weight" in new:  # which has no bias there
        new["head.weight"] = new["head.weight"].T
        new["head.bias"] = new["head.weight"].new_zeros(len(new["head.weight"]))
    return new
