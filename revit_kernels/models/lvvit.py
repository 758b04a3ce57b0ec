"""VarLenLVViT: LV-ViT on images of any token lengths, and its token-labelling loss."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from revit_kernels import ops
from revit_kernels.models.vit import VarLenViT
from revit_kernels.modules.block import FixedScale
from revit_kernels.modules.conv_stem import ConvStem
from revit_kernels.modules.linear import linear, traced
from revit_kernels.packing import PackedTokens, Packing

SHARE = 0.5  # of the patches' largest logit in the answer


class TokenLogits(NamedTuple):
    """What VarLenLVViT gives in training with token labelling.

    classes: (images, classes), of the class tokens
    patches: (patch tokens, classes), of all images' patches, packed in the images' order
    packing: which row of `patches` belongs to which image; it has no prefix tokens
    """

    classes: Tensor
    patches: Tensor
    packing: Packing


class VarLenLVViT(VarLenViT):
    """LV-ViT (Jiang et al., arXiv:2104.10858), on images at different token lengths; called as VarLenViT is.

    Module tree and state_dict keys are those of its authors' `LV_ViT`. The stem is convolutional: it runs for each
    image, or each size, and its tokens are packed behind it. In training, its batch norms see one size at a time.

    The answer is `head(class token) + 0.5 * the maximum over patches of aux_head(patch)`.
    args, kwargs: of VarLenViT
    skip_lam:     each block's branches are divided by this
    stem_width:   channels of the stem
    """

    def __init__(self, *args, skip_lam: float = 1.0, stem_width: int = 64, **kwargs):
        mode = kwargs.pop("weight_init", "")
        super().__init__(*args, **kwargs, embed_layer=partial(ConvStem, width=stem_width), weight_init="skip")
        if self.global_pool != "token" or self.num_prefix_tokens != 1:
            raise ValueError("LV-ViT answers with a class token and no other prefix token: global_pool must be 'token'")
        new = {"device": kwargs.get("device"), "dtype": kwargs.get("dtype")}
        if skip_lam != 1:
            for block in self.blocks:
                block.ls1, block.ls2 = (FixedScale(self.embed_dim, 1 / skip_lam, **new) for _ in range(2))
        self.aux_head = self._new_head(self.num_classes)
        self.token_labelling = False
        self.weight_init_mode = "reset" if mode == "skip" else mode
        if mode != "skip":
            self.init_weights(needs_reset=False)

    def set_token_labelling(self, enable: bool = True) -> None:
        """Let training mode answer with TokenLogits, for `token_labelling_loss`, instead of one row per image."""
        self.token_labelling = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace both heads."""
        if global_pool not in (None, "", "token"):
            raise ValueError(f"LV-ViT pools by 'token', got global_pool {global_pool!r}")
        self.num_classes = num_classes
        self.head, self.aux_head = self._new_head(num_classes), self._new_head(num_classes)

    def forward_head(self, x, pre_logits: bool = False):
        """(images, classes), or (images, dim) of the class tokens with pre_logits; TokenLogits in token labelling."""
        if pre_logits:
            return super().forward_head(x, pre_logits=True)
        labelling = self.token_labelling and self.training
        if not isinstance(x, PackedTokens) and traced(x):
            if labelling:
                raise NotImplementedError("token labelling cannot be traced or exported")
            return self.head(self.head_drop(x[:, 0])) + SHARE * self.aux_head(x[:, 1:]).amax(1)
        tokens, packing = self._packed(x)
        classes = linear(self.head, self.head_drop(ops.pool(tokens, packing.cu_seqlens, "token")))
        if labelling:
            packing, rows = packing.without_prefix()
            return TokenLogits(classes, linear(self.aux_head, tokens[rows]), packing)
        logits = linear(self.aux_head, tokens)
        answers = classes + SHARE * ops.pool(logits, packing.cu_seqlens, "max", prefix=self.num_prefix_tokens)
        return self._answered(answers, packing) if isinstance(x, PackedTokens) else answers


def token_labelling_loss(outputs: TokenLogits, target: Tensor, token_target: Tensor, *, weight: float = 0.5) -> Tensor:
    """The cross-entropy of the class tokens plus `weight` times that of the patches, a mean over each (scalar).

    outputs:      of the model in training with `set_token_labelling()`
    target:       (images,) integer classes, or (images, classes) shares
    token_target: (patch tokens,) integer classes, or (patch tokens, classes) shares, in the order of outputs.patches
    Raises ValueError where there are not as many targets as tokens.
    """
    if len(token_target) != len(outputs.patches):
        raise ValueError(f"token_target must have a row per patch, {len(outputs.patches)}, got {len(token_target)}")
    return F.cross_entropy(outputs.classes, target) + weight * F.cross_entropy(outputs.patches, token_target)
