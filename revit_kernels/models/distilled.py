"""DeiT with a distillation token."""

import torch
from torch import nn

from revit_kernels.models.vit import VarLenViT
from revit_kernels.modules.linear import linear
from revit_kernels.packing import PackedTokens


class VarLenViTDistilled(VarLenViT):
    """DeiT with a distillation token and a head of its own (Touvron et al., arXiv:2012.12877)."""

    def __init__(self, *args, **kwargs):
        weight_init = kwargs.pop("weight_init", "")
        super().__init__(*args, **kwargs, weight_init="skip")
        if self.global_pool != "token":
            raise ValueError(f"a distilled model pools by 'token', got global_pool {self.global_pool!r}")
        new = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        self.num_prefix_tokens = 2
        self.dist_token = nn.Parameter(torch.empty(1, 1, self.embed_dim, **new))
        patches = self.patch_embed.num_patches
        self.pos_embed = nn.Parameter(torch.empty(1, patches + self.num_prefix_tokens, self.embed_dim, **new))
        self.head_dist = nn.Linear(self.embed_dim, self.num_classes, **new) if self.num_classes > 0 else nn.Identity()
        self.distilled_training = False
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def set_distilled_training(self, enable: bool = True) -> None:
        """Let training mode answer with both heads, as a pair, instead of their mean."""
        self.distilled_training = enable

    def group_matcher(self, coarse: bool = False) -> dict:
        """As of VarLenViT."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed|dist_token",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def get_classifier(self):
        """Both heads: of the class token and of the distillation token."""
        return self.head, self.head_dist

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads."""
        if global_pool not in (None, "", "token"):
            raise ValueError(f"a distilled model pools by 'token', got global_pool {global_pool!r}")
        self.num_classes = num_classes
        self.head = self._new_head(num_classes)
        self.head_dist = self._new_head(num_classes)

    def forward_head(self, x, pre_logits: bool = False):
        """(images, classes): the mean of both heads, or both apart in distilled training."""
        if isinstance(x, PackedTokens):
            tokens, packing = x
            # an image without tokens, in a packing made on the device, must not read beyond the last row
            first = packing.cu_seqlens[:-1].long().clamp(max=tokens.shape[0] - 2)
            features = tokens[first], tokens[first + 1]
        else:
            features, packing = (x[:, 0], x[:, 1]), None
        features = [self.head_drop(y) for y in features]
        if not pre_logits:
            features = [linear(head, y) for head, y in zip(self.get_classifier(), features)]
        both = not pre_logits and self.distilled_training and self.training
        answers = features if both else [(features[0] + features[1]) / 2]
        answers = [y if packing is None else self._answered(y, packing) for y in answers]
        return tuple(answers) if both else answers[0]
