"""timm's ways to change a model after it was made: weights, head, pooling, input size."""

from __future__ import annotations

import math

import torch
from torch import nn

from revit_kernels.models import initialise
from revit_kernels.modules.patch_embed import pair

POOLS = ("", "avg", "avgmax", "max", "token", "map", "prr")


def _is_affine(name: str) -> bool:
    """Whether a parameter is the affine of shorter lengths, or their positions: two-dimensional, yet not to decay."""
    return name.endswith(("shorter_weight", "shorter_bias")) or name.startswith("pos_embed_shorter")


class Surgery:
    """The methods of VarLenViT that change its parameters or name groups of them."""

    @staticmethod
    def _check_pool(global_pool: str, class_token: bool) -> None:
        if global_pool not in POOLS:
            raise ValueError(f"global_pool must be one of {POOLS}, got {global_pool!r}")
        if global_pool == "token" and not class_token:
            raise ValueError("global_pool 'token' needs the class token")

    def init_weights(self, mode: str = "", needs_reset: bool = True) -> None:
        """Draw the weights anew: mode '' (truncated normal), 'jax', 'jax_nlhb', 'moco' or 'reset'."""
        initialise.initialise(self, mode or self.weight_init_mode, needs_reset)

    def _init_weights(self, module: nn.Module) -> None:
        initialise.truncated_normal(module, "", True)

    def fix_init_weight(self) -> None:
        """Scale the output projections of each block down by its depth."""
        with torch.no_grad():
            for depth, block in enumerate(self.blocks, 1):
                block.attn.proj.weight.div_(math.sqrt(2.0 * depth))
                block.mlp.fc2.weight.div_(math.sqrt(2.0 * depth))

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load a checkpoint file; see `revit_kernels.models.checkpoints.load_checkpoint`."""
        from revit_kernels.models.checkpoints import load_checkpoint

        load_checkpoint(self, checkpoint_path, prefix=prefix)

    def no_weight_decay(self) -> set[str]:
        """The names of parameters that an optimiser should not decay."""
        tables = {"pos_embed", "cls_token", "reg_token", "dist_token"}
        return tables | {name for name, _ in self.named_parameters() if _is_affine(name)}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Regular expressions of parameter groups, for optimisers with layer decay."""
        return {
            "stem": r"^cls_token|reg_token|pos_embed|patch_embed|norm_pre",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute each block again in the backward, instead of keeping what it computed."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def _new_head(self, num_classes: int) -> nn.Module:
        like = self.cls_token if self.cls_token is not None else next(self.parameters())
        if num_classes < 1:
            return nn.Identity()
        return nn.Linear(self.embed_dim, num_classes, device=like.device, dtype=like.dtype).train(self.training)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head, and optionally the pooling (attention pooling can be removed, not added)."""
        if global_pool is not None:
            self._check_pool(global_pool, self.has_class_token)
            if global_pool in ("map", "prr") and global_pool != self.global_pool:
                raise ValueError(f"attention pooling {global_pool!r} cannot be added to a model made without it")
            if global_pool not in ("map", "prr"):
                self.attn_pool = None
            self.global_pool = global_pool
        self.num_classes = num_classes
        self.head = self._new_head(num_classes)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Resample position table and patch kernel to another image size, patch size, or both, for good."""
        old_grid = self.patch_embed.grid_size
        img_size = None if img_size is None else pair(img_size)
        self.patch_embed.set_input_size(img_size, patch_size)
        grid = self.patch_embed.grid_size
        if self.pos_embed is None or grid == old_grid:
            return
        prefix = 0 if self.no_embed_class else self.num_prefix_tokens
        table = self.pos_embed.detach()[0]
        cells = self._interpolated(table[prefix:].view(*old_grid, -1), grid)
        self.pos_embed = nn.Parameter(
            torch.cat([table[:prefix], cells])[None], requires_grad=self.pos_embed.requires_grad
        )
