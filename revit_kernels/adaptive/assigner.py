"""TokenLengthAssigner: the light network that says how many tokens an image needs, before the model sees it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.files import write_whole
from revit_kernels.models.checkpoints import fingerprint
from revit_kernels.models.vit import VarLenViT
from revit_kernels.modules.layer_norm import add
from revit_kernels.modules.lengths import Grid, cells, check_menu
from revit_kernels.packing import Packing

KINDS = ("features", "pixels")
METADATA = "revit_kernels.assigner"
SHARE = 0.02  # of a full-length pass of the model that is served: what an assigner may cost


def vit_macs(dim: int, depth: int, tokens: int, patch: int, mlp_ratio: float = 4.0) -> int:
    """Multiply-accumulates of the blocks and the patch embedding for one image of so many tokens."""
    block = (4 + 2 * mlp_ratio) * dim * dim * tokens + 2 * dim * tokens * tokens
    return int(depth * block + patch * dim * tokens)


def model_macs(model: VarLenViT, grid: Grid, blocks: int | None = None) -> int:
    """Multiply-accumulates of one image at a grid, through all blocks or the first few; the head is not counted."""
    tokens = model.num_prefix_tokens + cells(grid)
    linears = [m for block in model.blocks[:blocks] for m in block.modules() if isinstance(m, nn.Linear)]
    attention = 2 * model.embed_dim * tokens * tokens * len(model.blocks[:blocks])
    embedding = model.patch_embed.proj.weight[0].numel() * model.embed_dim * tokens
    return sum(m.weight.numel() for m in linears) * tokens + attention + embedding


class TokenLengthAssigner(nn.Module):
    """Logits for the lengths of a menu (ReViT, arXiv:2112.01686; the two networks are ours).

    menu:      grids, longest first
    kind:      "features": the first blocks of the ReViT itself at the shortest length, and a small head on their class
               token and mean; only the head is this module's. "pixels": a micro Vision Transformer on the image at the
               shortest length's size
    embed_dim: "features": width of the ReViT's tokens; "pixels": of the micro network's
    depth:     blocks; for "features" those of the ReViT
    prefix:    "features": prefix tokens of the ReViT
    hidden:    width of the head's hidden layer
    patch_size, grid: "pixels": of the micro network
    """

    temperature: Tensor

    def __init__(
        self,
        menu,
        kind: str = "features",
        *,
        embed_dim: int,
        depth: int = 1,
        prefix: int = 1,
        hidden: int = 64,
        patch_size: int = 8,
        grid: Grid | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        self.menu = check_menu(menu)
        self.kind, self.depth, self.prefix = kind, depth, prefix
        rows, columns = grid or self.menu[-1]
        grid = (rows, columns)
        self.config = {"menu": self.menu, "kind": kind, "embed_dim": embed_dim, "depth": depth, "prefix": prefix}
        self.config |= {"hidden": hidden, "patch_size": patch_size, "grid": grid}
        self.register_buffer("temperature", torch.ones(()))
        self.fingerprint = ""  # of the model that it was trained for
        self.outcomes = None  # held-out Outcomes, with its logits: what budgets are solved from
        if kind == "features":
            self.norm = nn.LayerNorm(2 * embed_dim)
            self.fc1 = nn.Linear(2 * embed_dim, hidden)
            self.fc2 = nn.Linear(hidden, len(self.menu))
        else:
            self.grid = grid
            self.vit = VarLenViT(
                img_size=(patch_size * rows, patch_size * columns),
                patch_size=patch_size,
                embed_dim=embed_dim,
                depth=depth,
                num_heads=max(1, embed_dim // 32),
                num_classes=len(self.menu),
                class_token=False,
                global_pool="avg",
            )

    @classmethod
    def for_model(
        cls, model: VarLenViT, kind: str = "features", depth: int | None = None, embed_dim: int | None = None
    ):
        """An assigner of a resizable model that costs at most SHARE of its full-length pass, in multiply-accumulates.

        depth, embed_dim: instead of the largest that costs no more; at least one block, whatever that costs
        """
        if model.menu is None:
            raise ValueError("the model is not resizable: an assigner needs a menu of lengths")
        limit = SHARE * model_macs(model, model.menu[0])
        if kind == "features":
            block = model_macs(model, model.menu[-1], 1)
            depth = depth or max(1, min(int(limit // block), len(model.blocks) - 1))
            return cls(model.menu, kind, embed_dim=model.embed_dim, depth=depth, prefix=model.num_prefix_tokens)
        patch = max(1, model.patch_embed.patch_size[0] // 2)
        grids = [tuple(2 * n for n in model.menu[-1]), model.menu[-1]]
        sizes = [
            (d, n) for d in ((embed_dim,) if embed_dim else (128, 96, 64, 32)) for n in ((depth,) if depth else (2, 1))
        ]
        options = [(grid, *size) for grid in grids for size in sizes]
        sides = {grid: patch if grid == grids[0] else 2 * patch for grid in grids}
        fitting = [o for o in options if vit_macs(o[1], o[2], cells(o[0]), 3 * sides[o[0]] ** 2) <= limit]
        grid, dim, blocks = max(fitting or options[-1:], key=lambda o: vit_macs(o[1], o[2], cells(o[0]), 0))
        return cls(model.menu, kind, embed_dim=dim, depth=blocks, patch_size=sides[grid], grid=grid)

    def macs(self, model: VarLenViT) -> int:
        """Multiply-accumulates for one image."""
        if self.kind == "pixels":
            return model_macs(self.vit, self.grid)
        return model_macs(model, self.menu[-1], self.depth) + self.fc1.weight.numel() + self.fc2.weight.numel()

    # ------------------------------------------------------------------ forward

    def features(self, tokens: Tensor, images: int) -> Tensor:
        """(images, 2 * dim): first token and mean patch, of tokens (images * length, dim) of the shortest length."""
        x = tokens.view(images, self.prefix + cells(self.menu[-1]), -1)
        return torch.cat([x[:, 0], x[:, self.prefix :].mean(1)], 1)

    def head(self, features: Tensor) -> Tensor:
        """(images, lengths) logits of `features`."""
        features = features.to(self.fc1.weight.dtype)
        return self.fc2(nn.functional.gelu(self.fc1(self.norm(features)))).float()

    def with_tokens(self, images, model: VarLenViT, channels_last: bool = True):
        """(logits, stream, packing): the stream [tokens, None, None] after `depth` blocks at the shortest length.

        An image that stays at that length goes on from there: model.run_blocks(stream, packing, depth).
        """
        packing = Packing.uniform(len(images), self.menu[-1], self.prefix, device=self.temperature.device)
        stream = [model.embed(images, packing, channels_last), None, None]
        tokens = add(*model.run_blocks(stream, packing, 0, self.depth))
        return self.head(self.features(tokens, len(images))), [tokens, None, None], packing

    def forward(self, images, model: VarLenViT | None = None, channels_last: bool = True) -> Tensor:
        """(images, lengths) logits, float32, not yet divided by the temperature. images: as VarLenViT takes them."""
        if self.kind == "features":
            if model is None:
                raise ValueError("an assigner of kind 'features' needs the model that it was made for")
            return self.with_tokens(images, model, channels_last)[0]
        packing = Packing.uniform(len(images), self.grid, 0, device=self.temperature.device)
        return self.vit(images, packing=packing, channels_last=channels_last).float()

    def probabilities(self, logits: Tensor) -> Tensor:
        """(images, lengths): the calibrated probability that each length is the label."""
        return (logits / self.temperature.float()).softmax(-1)

    # ------------------------------------------------------------------ files

    def save(self, path) -> None:
        """Write a .safetensors file: weights, temperature, the model's fingerprint, and the held-out outcomes."""
        from safetensors.torch import save_file

        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"path must end in .safetensors, got {path}")
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.state_dict().items()}
        head = {"config": self.config, "fingerprint": self.fingerprint}
        if self.outcomes is not None:
            o = self.outcomes
            arrays = {f.name: getattr(o, f.name) for f in fields(o)}
            arrays = {k: v for k, v in arrays.items() if isinstance(v, np.ndarray) and k != "probabilities"}
            tensors |= {f"outcomes.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
            keys = "\n".join(o.keys).encode("utf-8", "surrogateescape")
            tensors["outcomes.keys"] = torch.frombuffer(bytearray(keys), dtype=torch.uint8)
            head["outcomes"] = {"fingerprint": o.fingerprint, "about": o.about}
        metadata = {"format": "pt", METADATA: json.dumps(head)}
        write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path) -> TokenLengthAssigner:
        """What `save` wrote, in eval mode. Raises ValueError for a file that is missing, broken, or none of these."""
        from safetensors import safe_open

        if not Path(path).is_file():
            raise ValueError(f"there is no assigner at {path}")
        try:
            with safe_open(path, "pt") as file:
                head = (file.metadata() or {}).get(METADATA)
                tensors = {key: file.get_tensor(key) for key in file.keys()} if head else {}
        except Exception as error:  # safetensors has one of its own, and it does not name the file
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not head:
            raise ValueError(f"{path} holds no token-length assigner")
        try:
            head = json.loads(head)
            config = head["config"]
            assigner = cls(config.pop("menu"), config.pop("kind"), **config)
            kept = {k.removeprefix("outcomes."): v.numpy() for k, v in tensors.items() if k.startswith("outcomes.")}
            assigner.load_state_dict({k: v for k, v in tensors.items() if not k.startswith("outcomes.")})
            assigner.fingerprint = head["fingerprint"]
            if kept:
                keys = tuple(kept.pop("keys").tobytes().decode("utf-8", "surrogateescape").split("\n"))
                assigner.outcomes = Outcomes(menu=assigner.menu, keys=keys, **kept, **head["outcomes"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:  # an entry or a tensor is missing, or another
            raise ValueError(f"{path} is no whole assigner: {' '.join(str(error).split())[:200]}") from error
        return assigner.eval()

    def require(self, model: VarLenViT) -> TokenLengthAssigner:
        """Raise ValueError unless it was trained for this model."""

        if self.menu != model.menu:
            raise ValueError(f"the assigner chooses from the menu {self.menu}, the model's is {model.menu}")
        if self.fingerprint and self.fingerprint != fingerprint(model):
            raise ValueError("the assigner was trained for another model, or for this one before it changed")
        return self
