"""TokenLengthAssigner: the light network that says how many tokens an image needs, before the model sees it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from revit_kernels import ops
from revit_kernels.adaptive.budgets import fitted
from revit_kernels.adaptive.costs import Costs, counted, device_name, model_device, model_dtype, model_macs
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.adaptive.policies import Policy
from revit_kernels.engines import Engine
from revit_kernels.files import write_whole
from revit_kernels.grids import Grid
from revit_kernels.models.checkpoints import fingerprint
from revit_kernels.models.embedding import Images
from revit_kernels.models.video import ClipModel, sampled
from revit_kernels.models.vit import VarLenViT
from revit_kernels.modules.layer_norm import add
from revit_kernels.modules.lengths import cells, check_menu
from revit_kernels.packing import Packing

Model = VarLenViT | ClipModel
Served = VarLenViT | ClipModel | Engine
TRUNKS = ("scout", "tokens")
METADATA = "revit_kernels.assigner"
SHARE = 0.02  # of a full-length pass of the model that is served: what an assigner may cost
CONVOLVED_SHARE = 0.025  # the same with convolutions
SMALL = 32  # pixels: up to this side a scout cuts an image into 4 x 4 patches, beyond it into 8 x 8
FRAMES = 8  # of a clip that a scout sees, at most
SIDE = 64  # pixels of the longer side of what a scout sees, at most; images of fewer are seen as they are
WIDTHS = (48, 32, 16, 8)  # of a scout's patches, and of tokens that are projected
CONVOLVED_GRID = (16, 16)  # of a scout's patches, where convolutions follow
CONVOLVED_WIDTHS = (96, 64, *WIDTHS)  # of these patches
MOST_CONVOLUTIONS = 8  # after which these patches are one
HIDDEN = (256, 192, 128, 96, 64, 32)
WIDEST = 16384  # the largest `hidden` that is accepted
KEPT = (
    "confidence",
    "margin",
    "entropy",
    "assigner",
    "mixed",
    "alone",
)  # columns that its file holds in half precision


class _Convolution(nn.Module):
    """A 3 x 3 convolution and GELU: residual, or with twice the channels at half the rows and columns.

    norm: a batch norm in training, between TokenLengthAssigner's `normalise` and `fold`
    """

    def __init__(self, width: int, halves: bool):
        super().__init__()
        self.halves = halves
        self.conv = nn.Conv2d(width, width * (1 + halves), 3, stride=1 + halves, padding=1)
        self.norm: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.norm(self.conv(x)))
        return y if self.halves else x + y


class TokenLengthAssigner(nn.Module):
    """Logits of being right at each length of a menu, and of each class (ReViT, arXiv:2112.01686; networks are ours).

    Every position is flattened into two hidden layers: a mean over positions loses what the lengths differ in.

    menu:    grids, longest first
    trunk:   "scout": patches of the image itself, resized to `grid` x `patch` pixels; "tokens": the model's tokens at
             the shortest length, which an image that stays at that length goes on from
    classes: of the model
    convolutions: how many 3 x 3 convolutions follow a scout's patches: the second, fourth, ... halve the grid's rows
             and columns and double the channels, the others are residual
    hidden:  width of both hidden layers
    width:   of a scout's patch; for "tokens" of each token's projection, 0 for none
    grid, patch, mean, std: of a scout: patches, pixels of one, and the images' statistics
    dim, depth, prefix:     for "tokens": width of the model's tokens, blocks that they went through (0: the embedding),
             and prefix tokens
    frames:  of a clip that a scout sees, the middles of as many equal parts of it; None for images
    per_frame: whether each frame of a clip has prefix tokens of its own in the model; None for images
    dropout: in training, ahead of each linear layer but the first
    """

    def __init__(
        self,
        menu: Sequence[Grid],
        trunk: str = "scout",
        *,
        classes: int,
        convolutions: int = 0,
        hidden: int = 256,
        width: int = 48,
        grid: Grid = (4, 4),
        patch: Grid = (8, 8),
        channels: int = 3,
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
        dim: int = 0,
        depth: int = 0,
        prefix: int = 1,
        frames: int | None = None,
        per_frame: bool | None = None,
        dropout: float = 0.15,
    ):
        super().__init__()
        if trunk not in TRUNKS:
            raise ValueError(f"trunk must be one of {TRUNKS}, got {trunk!r}")
        self.menu, self.trunk, self.classes = check_menu(menu), trunk, classes
        self.grid, self.patch = tuple(grid), tuple(patch)
        self.mean, self.std, self.depth, self.prefix = tuple(mean), tuple(std), depth, prefix
        self.config = {"menu": self.menu, "trunk": trunk, "classes": classes, "hidden": hidden, "width": width}
        self.config |= {"grid": self.grid, "patch": self.patch, "channels": channels, "mean": self.mean}
        self.config |= {"std": self.std, "dim": dim, "depth": depth, "prefix": prefix, "dropout": dropout}
        self.config |= {"frames": frames, "per_frame": per_frame, "convolutions": convolutions}
        self.frames, self.per_frame = frames, per_frame
        self.fingerprint = ""  # of the model that it was trained for
        self.outcomes: Outcomes | None = None  # held-out ones, with its answers: what budgets are solved from
        self.fitted: dict[str, Policy] | None = None  # of these outcomes
        self.costs: list[Costs] = []  # one for each device and dtype that was measured
        self.about: dict = {}  # how it was trained, for a person to read
        halves = [i % 2 == 1 for i in range(convolutions)]
        self.convolutions = nn.ModuleList(_Convolution(width * 2 ** (i // 2), h) for i, h in enumerate(halves))
        if trunk == "scout":
            self.proj = nn.Conv2d(channels, width, self.patch, self.patch)
            positions = cells(self.convolved(convolutions)) * (frames or 1)
            features = width * 2 ** (convolutions // 2)
        else:
            positions, features = (self.shortest if depth else cells(self.menu[-1])), width or dim
            self.norm = nn.LayerNorm(dim)
            self.proj = nn.Linear(dim, width) if width else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.fc1 = nn.Linear(positions * features, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, len(self.menu) + classes)

    def convolved(self, convolutions: int) -> Grid:
        """Rows and columns of a scout's grid after so many convolutions."""
        rows, columns = (-(-side // 2 ** (convolutions // 2)) for side in self.grid)
        return rows, columns

    @property
    def shortest(self) -> int:
        """The model's tokens at the shortest length, prefix tokens counted."""
        return cells(self.menu[-1]) + self.prefix * (self.menu[-1][0] if self.per_frame else 1)

    @classmethod
    def for_model(
        cls,
        model: Model,
        trunk: str = "scout",
        *,
        depth: int = 0,
        convolutions: int = 0,
        hidden: int | None = None,
        side: int = SIDE,
        share: float | None = None,
    ) -> TokenLengthAssigner:
        """The largest assigner of a resizable model that costs at most `share` of its full-length pass, counted in
        multiply-accumulates; the smallest there is, where none costs so little.

        depth:  for "tokens"
        convolutions: for "scout"; its grid is then 16 x 16
        hidden: instead of what fits
        side:   pixels of the longer side of the images, for "scout"
        share:  None for SHARE, and CONVOLVED_SHARE with convolutions
        """
        if model.menu is None:
            raise ValueError("the model is not resizable: an assigner needs a menu of lengths")
        if not 0 <= depth <= (len(model.blocks) if trunk == "tokens" else 0):
            most = f"must be 0 to {len(model.blocks)}" if trunk == "tokens" else "needs the trunk 'tokens'"
            raise ValueError(f"depth {most}, got {depth} with the trunk {trunk!r}")
        if not 0 <= convolutions <= (MOST_CONVOLUTIONS if trunk == "scout" else 0):
            most = f"must be 0 to {MOST_CONVOLUTIONS}" if trunk == "scout" else "need the trunk 'scout'"
            raise ValueError(f"convolutions {most}, got {convolutions} with the trunk {trunk!r}")
        if hidden is not None and not 1 <= hidden <= WIDEST:
            raise ValueError(f"hidden must be 1 to {WIDEST}, got {hidden}")
        given = {"classes": model.num_classes, "prefix": model.num_prefix_tokens, "depth": depth}
        given["per_frame"] = model.per_frame
        if trunk == "scout":
            scale = min(1.0, min(SIDE, side) / max(model.patch_embed.img_size))
            size = [pixels * scale for pixels in model.patch_embed.img_size]
            cut = CONVOLVED_GRID if convolutions else (4, 4) if max(size) <= SMALL else (8, 8)
            given |= {"grid": cut, "patch": tuple(max(1, round(pixels / cut[0])) for pixels in size)}
            if model.per_frame is not None:
                given["frames"] = min(FRAMES, model.menu[0][0] * model.tubelet)
            cfg = model.pretrained_cfg
            given |= {"channels": model.in_chans, "mean": cfg["mean"], "std": cfg["std"]}
            given |= {"convolutions": convolutions}
            widths = CONVOLVED_WIDTHS if convolutions else WIDTHS
        else:
            given |= {"dim": model.embed_dim}
            widths = (0, *(width for width in WIDTHS if width < model.embed_dim))
        if share is None:
            share = CONVOLVED_SHARE if convolutions else SHARE
        limit = share * model_macs(model, model.menu[0])
        with torch.device("meta"):
            options = [(h, w) for h in ((hidden,) if hidden else HIDDEN) for w in widths]
            work = {o: cls(model.menu, trunk, hidden=o[0], width=o[1], **given).macs(model) for o in options}
        fitting = [o for o in options if work[o] <= limit] or [min(options, key=work.get)]
        hidden, width = max(fitting, key=lambda o: (o[0], work[o]))
        return cls(model.menu, trunk, hidden=hidden, width=width, **given)

    def macs(self, model: Model) -> int:
        """Multiply-accumulates for one image, those included that an image of the shortest length goes on from."""
        dense = sum(layer.weight.numel() for layer in (self.fc1, self.fc2, self.fc3))
        if self.trunk == "scout":
            of_frame = self.proj.weight.numel() * cells(self.grid)
            for i, layer in enumerate(self.convolutions):
                of_frame += layer.conv.weight.numel() * cells(self.convolved(i + 1))
            return dense + of_frame * (self.frames or 1)
        projected = self.proj.weight.numel() * cells(self.menu[-1]) if isinstance(self.proj, nn.Linear) else 0
        return dense + projected + self.reused(model)

    def reused(self, model: Model) -> int:
        """Multiply-accumulates that an image of the shortest length is spared after it."""
        return model_macs(model, self.menu[-1], self.depth) if self.trunk == "tokens" else 0

    # ------------------------------------------------------------------ training

    def normalise(self) -> TokenLengthAssigner:
        """Put a batch norm after every convolution, for training."""
        for layer in self.convolutions:
            layer.norm = nn.BatchNorm2d(layer.conv.out_channels)
        return self

    def fold(self) -> TokenLengthAssigner:
        """Switch to eval mode, and fold the batch norms of `normalise` into their convolutions."""
        self.eval()
        for layer in self.convolutions:
            layer.conv, layer.norm = fuse_conv_bn_eval(layer.conv, layer.norm), nn.Identity()
        return self

    # ------------------------------------------------------------------ forward

    def head(self, inputs: Tensor) -> Tensor:
        """(images, lengths + classes) float32 logits.

        inputs: "scout": (images * patches, width) embedded patches; "tokens": (images, positions, dim)
        """
        if self.trunk == "scout":
            x = self._convolved(F.gelu(inputs)).reshape(-1, self.fc1.in_features)
        else:
            x = self.norm(inputs.to(self.fc1.weight.dtype))
            x = F.gelu(self.proj(x)) if isinstance(self.proj, nn.Linear) else x
            x = x.flatten(1)
        x = F.gelu(self.fc1(self.drop(x)))
        x = F.gelu(self.fc2(self.drop(x)))
        return self.fc3(self.drop(x)).float()

    def _convolved(self, x: Tensor) -> Tensor:
        if not self.convolutions:
            return x
        x = x.view(-1, *self.grid, x.shape[-1]).permute(0, 3, 1, 2)  # channels last, as oneDNN and cuDNN like them
        for layer in self.convolutions:
            x = layer(x)
        return x.permute(0, 2, 3, 1)

    def patches(self, images: Images, channels_last: bool = True) -> Tensor:
        """(images * patches, width): what the scout's first layer makes of images, or frames of clips, of any sizes."""
        count = len(images) * (self.frames or 1)
        packing = Packing.uniform(count, self.grid, 0, device=self.proj.weight.device)
        images = images if self.frames is None else self._seen(images, channels_last)
        statistics = {"mean": self.mean, "std": self.std, "channels_last": channels_last}
        return ops.patch_embed(images, self.proj.weight, self.proj.bias, packing, **statistics)

    def _seen(self, clips: Images, channels_last: bool) -> Tensor | list[Tensor]:
        """The frames of clips that a scout sees, in order."""
        time = 0 if channels_last else 1
        if isinstance(clips, Tensor) and channels_last and clips.shape[1] == self.frames:
            return clips.flatten(0, 1)
        return [clip.select(time, i) for clip in clips for i in sampled(clip.shape[time], self.frames)]

    def tokens(self, images: Images, model: Served, channels_last: bool = True) -> tuple[Tensor, Packing]:
        """(images * length, dim) of the model at the shortest length, after `depth` blocks, and their packing."""
        packing = model.packing([self.menu[-1]] * len(images), device=self.fc1.weight.device)
        stream = [model.embed(images, packing, channels_last), None, None]
        return add(*model.run_blocks(stream, packing, 0, self.depth)) if self.depth else stream[0], packing

    def inputs(self, tokens: Tensor) -> Tensor:
        """(images, positions, dim) of tokens: the class token of the embedding is the same for every image."""
        x = tokens.view(-1, self.shortest, tokens.shape[-1])
        if self.depth:
            return x
        if self.per_frame:
            return x.unflatten(1, (self.menu[-1][0], -1))[:, :, self.prefix :].flatten(1, 2)
        return x[:, self.prefix :]

    def with_tokens(self, images: Images, model: Served, channels_last: bool = True) -> tuple[Tensor, Tensor, Packing]:
        """(logits, tokens, packing), for the trunk "tokens".

        An image that stays at the shortest length goes on from there:
        model.run_blocks([tokens, None, None], packing, depth).
        """
        tokens, packing = self.tokens(images, model, channels_last)
        return self.head(self.inputs(tokens)), tokens, packing

    def forward(self, images: Images, model: Served | None = None, channels_last: bool = True) -> Tensor:
        """(images, lengths + classes) logits, float32. images: as VarLenViT takes them"""
        if self.trunk == "scout":
            return self.head(self.patches(images, channels_last))
        if model is None:
            raise ValueError("an assigner of the trunk 'tokens' needs the model that it was made for")
        return self.with_tokens(images, model, channels_last)[0]

    # ------------------------------------------------------------------ whose it is, and what it costs

    def require(self, model: Model) -> TokenLengthAssigner:
        """Raise ValueError unless it was trained for this model."""

        if self.menu != model.menu:
            raise ValueError(f"the assigner chooses from the menu {self.menu}, the model's is {model.menu}")
        if self.fingerprint and self.fingerprint != fingerprint(model):
            raise ValueError("the assigner was trained for another model, or for this one before it changed")
        return self

    def costs_for(self, model: Served) -> Costs:
        """What was measured on the device of a model, or an engine of one, in its dtype; else multiply-accumulates."""
        where = device_name(model_device(model)), model_dtype(model)
        found = [costs for costs in self.costs if (costs.device, costs.dtype) == where]
        return found[0] if found else counted(model, self)

    def keep_costs(self, costs: Costs) -> Costs | None:
        """Keep what was measured, in place of what was for the same device and dtype, which is returned."""
        where = costs.device, costs.dtype
        before = [c for c in self.costs if (c.device, c.dtype) == where]
        self.costs = [c for c in self.costs if (c.device, c.dtype) != where] + [costs]
        return before[0] if before else None

    def calibrate(self, outcomes: Outcomes) -> None:
        """Keep held-out outcomes with its answers, rounded as its file holds them, and what is fitted to them."""
        rounded = {name: getattr(outcomes, name).astype(np.float16).astype(np.float32) for name in KEPT}
        if not all(np.isfinite(values).all() for values in rounded.values()):
            raise ValueError("the assigner's answers are not finite in float16: give a smaller lr")
        self.outcomes = replace(outcomes, probabilities=None, fingerprint=self.fingerprint, **rounded)
        self.fitted = fitted(self.outcomes)

    # ------------------------------------------------------------------ files

    def save(self, path: str | Path) -> None:
        """Write a .safetensors file: weights in bfloat16, whose it is, costs, what budgets are solved from."""
        from safetensors.torch import save_file

        path = Path(path)
        if path.suffix != ".safetensors":
            raise ValueError(f"path must end in .safetensors, got {path}")
        tensors = {k: v.detach().cpu().bfloat16().contiguous() for k, v in self.state_dict().items()}
        head = {"config": self.config, "fingerprint": self.fingerprint, "about": self.about}
        head["costs"] = [costs.to_json() for costs in self.costs]
        if self.outcomes is not None:
            o = self.outcomes
            arrays = {f.name: getattr(o, f.name) for f in fields(o)}
            arrays = {k: v for k, v in arrays.items() if isinstance(v, np.ndarray)}
            arrays |= {name: arrays[name].astype(np.float16) for name in KEPT if name in arrays}
            arrays |= {name: arrays[name].astype(np.int32) for name in ("targets", "label", "predicted")}
            tensors |= {f"outcomes.{k}": torch.from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
            keys = "\n".join(o.keys).encode("utf-8", "surrogateescape")
            tensors["outcomes.keys"] = torch.frombuffer(bytearray(keys), dtype=torch.uint8)
            head["outcomes"] = {"fingerprint": o.fingerprint, "about": o.about}
            head["fitted"] = {name: policy.to_json() for name, policy in self.fitted.items()}
        metadata = {"format": "pt", METADATA: json.dumps(head)}
        write_whole(path, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: str | Path) -> TokenLengthAssigner:
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
            return cls._from(json.loads(head), tensors).eval()
        except Exception as error:  # an entry or a tensor that is missing, or is another, is noticed at its first use
            raise ValueError(f"{path} is no whole assigner: {' '.join(str(error).split())[:200]}") from error

    @classmethod
    def _from(cls, head: dict, tensors: dict[str, Tensor]) -> TokenLengthAssigner:
        with torch.device("meta"):  # before memory is asked for
            described = cls(**head["config"]).state_dict()
        kept = {k.removeprefix("outcomes."): v.numpy() for k, v in tensors.items() if k.startswith("outcomes.")}
        state = {k: v for k, v in tensors.items() if not k.startswith("outcomes.")}
        if {k: v.shape for k, v in described.items()} != {k: v.shape for k, v in state.items()}:
            raise ValueError("its tensors are not those of the network that it describes")
        assigner = cls(**head["config"])
        assigner.load_state_dict(state)
        assigner.fingerprint, assigner.about = head["fingerprint"], head["about"]
        assigner.costs = [Costs.from_json(text) for text in head["costs"]]
        if kept:
            keys = tuple(kept.pop("keys").tobytes().decode("utf-8", "surrogateescape").split("\n"))
            kept |= {name: kept[name].astype(np.float32) for name in KEPT}
            kept |= {name: kept[name].astype(np.int64) for name in ("targets", "label")}
            assigner.outcomes = Outcomes(menu=assigner.menu, keys=keys, **kept, **head["outcomes"])
            assigner.fitted = {name: Policy.from_json(text) for name, text in head["fitted"].items()}
        return assigner
