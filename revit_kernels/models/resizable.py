"""ReViT: what makes a VarLenViT resizable, so that it recognises images at every length of a menu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from revit_kernels import ops
from revit_kernels.device_cache import numbers
from revit_kernels.dispatch import without_autocast
from revit_kernels.modules import layer_norm
from revit_kernels.modules.lengths import Grid, cells, check_menu, nearest, tokens_of
from revit_kernels.modules.linear import is_known, is_plain, traced
from revit_kernels.modules.patch_embed import PatchEmbed, is_grid
from revit_kernels.packing import Packing

if TYPE_CHECKING:
    from typing_extensions import Self

EMBEDDINGS = ("resize", "patch", "per_length")
POSITIONS = ("interpolate", "per_length")
NORMS = ("per_length", "shared")
# The norms that are told the packing: those of the stream, of queries and keys, and around attention pooling.
NORM_NAMES = (
    *("norm1", "norm2", "norm3", "norm4", "temporal_norm1", "in_norm", "norm", "norm_pre", "fc_norm"),
    *("q_norm", "k_norm", "pre_norm", "post_norm"),
)
NORM_OWNERS = (
    "Attention",
    "AttentionPoolPrr",
    "AttentionRope",
    "Block",
    "DiffParallelScalingBlock",
    "DividedBlock",
    "EvaAttention",
    "EvaBlock",
    "EvaBlockPostNorm",
    "ParallelScalingBlock",
    "ResPostBlock",
    "SandwichAttention",
    "SandwichBlock",
    "Sequential",
    "VarLenEva",
    "VarLenGemma4",
    "VarLenLVViT",
    "VarLenTower",
    "VarLenTimeSformer",
    "VarLenVideoViT",
    "VarLenViT",
    "VarLenViTDistilled",
)


def fill_lengths(state: dict[str, Tensor], wanted: dict[str, Tensor], prefix: str = "") -> None:
    """Start the parameters of the shorter lengths from those of the longest, where the state knows no lengths at all.

    state:  a state_dict, changed in place
    wanted: the model's own state_dict

    A state with some keys of other lengths is left as it is: what it lacks is then missing.
    """
    shorter = [key for key in wanted if ".shorter_" in f".{key}"]
    if not shorter or any(f"{prefix}{key}" in state for key in shorter):
        return
    for key in shorter:
        module, _, rest = key.rpartition("shorter_")
        name, _, index = rest.partition(".")
        base = state.get(f"{prefix}{module}{name}")
        if base is None and module.endswith("patch_embed."):
            base = state.get(f"{prefix}{module}proj.{name}")
        if base is None:
            continue
        if name in ("weight", "bias") and not index:  # a norm's rows
            state[f"{prefix}{key}"] = base.expand_as(wanted[key]).clone()
        elif name == "weight":
            state[f"{prefix}{key}"] = ops.resize_patch_weight(base, tuple(wanted[key].shape[2:]))
        elif name == "bias":
            state[f"{prefix}{key}"] = base.clone()


def start_lengths(model, state, prefix, *_) -> None:
    """Before a checkpoint is loaded into a ReViT: lengths that it lacks start from the parameters that it has."""
    if model.menu is not None:
        model.fill_lengths(state, prefix)


class Resizable:
    """The methods of VarLenViT that know a menu of lengths."""

    menu: tuple[Grid, ...] | None
    per_frame = None  # of models of clips: whether each frame has prefix tokens of its own

    def packing(self, grids: Sequence[Grid], *, device: torch.device | str | None = None) -> Packing:
        """The packing of images of these grids, as the model lays them out; on the model's device, if not given."""
        device = next(self.parameters()).device if device is None else device
        menu = self.menu if self.menu is not None and set(grids) <= set(self.menu) else None
        return Packing.from_grids(grids, self.num_prefix_tokens, menu=menu, device=device)

    def attention_pairs(self, grid: Grid) -> int:
        """Queries times keys of one image in a block's attention."""
        return tokens_of(self, grid) ** 2

    def make_resizable(
        self,
        menu: Sequence[Grid],
        embedding: str = "resize",
        positions: str = "interpolate",
        norms: str = "per_length",
    ) -> Self:
        """Turn the model, trained or not, into a ReViT (arXiv:2112.01686) of these lengths, in place.

        menu:      grids (rows, columns), longest first; the longest becomes the model's input size
        embedding: how an image is cut into fewer patches. "resize": the image is resized, one patch kernel for all.
                   "patch": the kernel is resized to larger patches instead (FlexiViT, arXiv:2212.08013), the image
                   only to a whole number of them. "per_length": likewise, with a kernel of its own for each length
        positions: "interpolate" one table to each grid, or a table "per_length"
        norms:     "per_length": an affine of its own for each length at every norm; or one "shared"

        What is added starts from what the model has, under additional keys: without them the checkpoint is a plain
        model's, at full length. Returns the model. Raises ValueError for a menu or an option that is none, and for a
        model that is resizable already.
        """
        if self.menu is not None:
            raise ValueError(f"the model is resizable already, with the menu {self.menu}")
        menu = check_menu(menu)
        if len(menu[0]) != 2:
            raise ValueError(f"a model of images has a menu of grids (rows, columns), got {menu}")
        options = {"embedding": (embedding, EMBEDDINGS), "positions": (positions, POSITIONS), "norms": (norms, NORMS)}
        for name, (value, known) in options.items():
            if value not in known:
                raise ValueError(f"{name} must be one of {known}, got {value!r}")
        plain_embed = type(self.patch_embed) is PatchEmbed and isinstance(self.patch_embed.norm, nn.Identity)
        if embedding != "resize" and not plain_embed:
            raise ValueError(f"embedding {embedding!r} needs a plain patch projection without a norm")
        if positions == "per_length" and self.pos_embed is None:
            raise ValueError("positions 'per_length' need a model with a position table")
        if tuple(self.patch_embed.grid_size) != menu[0]:
            self.set_input_size(tuple(g * p for g, p in zip(menu[0], self.patch_embed.patch_size)))
        if embedding == "per_length":
            self._add_patch_kernels(menu)
        if positions == "per_length":
            self._add_positions(menu)
        if norms == "per_length" and len(menu) > 1:
            self._add_affines(menu)
        self.menu = menu
        self.resizable = {"embedding": embedding, "positions": positions, "norms": norms}
        return self

    def patch_sizes(self, menu: tuple[Grid, ...] | None = None) -> list[tuple[int, int]]:
        """The (height, width) of a patch at each length, in pixels of the longest length's image."""
        (rows, columns), (ph, pw) = (menu or self.menu)[0], self.patch_embed.patch_size
        return [(max(1, round(rows * ph / h)), max(1, round(columns * pw / w))) for h, w in menu or self.menu]

    def _add_patch_kernels(self, menu: tuple[Grid, ...]) -> None:
        proj = self.patch_embed.proj
        sizes = self.patch_sizes(menu)[1:]
        self.patch_embed.shorter_weight = nn.ParameterList(
            nn.Parameter(_resized(proj.weight.detach(), size).clone()) for size in sizes
        )
        if proj.bias is not None:
            self.patch_embed.shorter_bias = nn.ParameterList(nn.Parameter(proj.bias.detach().clone()) for _ in sizes)

    def _add_positions(self, menu: tuple[Grid, ...]) -> None:
        table, _ = self._table()
        rows = [self._interpolated(table.detach(), grid) for grid in menu[1:]]
        self.pos_embed_shorter = nn.ParameterList(nn.Parameter(r[None].clone()) for r in rows)

    def _add_affines(self, menu: tuple[Grid, ...]) -> None:
        for owner in list(self.modules()):
            if type(owner).__name__ not in NORM_OWNERS or not type(owner).__module__.startswith(("revit_", "torch.")):
                continue
            for name, child in list(owner.named_children()):
                if name in NORM_NAMES and is_plain(child, *layer_norm.PER_LENGTH):
                    owner._modules[name] = layer_norm.PER_LENGTH[type(child).__name__].from_norm(child, menu)

    def fill_lengths(self, state: dict[str, Tensor], prefix: str = "") -> None:
        """Start the lengths that a plain model's state_dict knows nothing of from what it knows, in place."""
        fill_lengths(state, self.state_dict(), prefix)
        keys = [f"{prefix}pos_embed_shorter.{i}" for i in range(len(self.menu) - 1)]
        table = state.get(f"{prefix}pos_embed")
        if self.resizable["positions"] == "interpolate" or table is None or any(key in state for key in keys):
            return
        if table.shape == self.pos_embed.shape:
            skip = 0 if self.no_embed_class else self.num_prefix_tokens
            own = table[0, skip:].view(*self.menu[0], -1)
            state |= {key: self._interpolated(own, grid)[None] for key, grid in zip(keys, self.menu[1:])}

    # ------------------------------------------------------------------ what the forward asks

    def _table(self) -> tuple[Tensor, Tensor | None]:
        """The position table (rows, columns, dim) without the rows of prefix tokens, and those."""
        table, prefix = self.pos_embed[0], None
        if not self.no_embed_class and self.num_prefix_tokens:
            table, prefix = table[self.num_prefix_tokens :], table[: self.num_prefix_tokens]
        return table.view(*self.patch_embed.grid_size, -1), prefix

    def _interpolated(self, table: Tensor, *grids: Grid) -> Tensor:
        """(cells of all grids, dim)"""
        if not traced(table) and table.is_meta:
            return table.new_empty(sum(map(cells, grids)), table.shape[-1])
        if traced(table) or (torch.compiler.is_compiling() and not all([is_known(*grid) for grid in grids])):
            return torch.cat([self._by_torch(table, grid) for grid in grids])
        how = {"interpolation": self.pos_interpolation, "antialias": self.pos_antialias}
        how["align_corners"] = self.pos_align_corners
        own = tuple(table.shape[:2])
        if not self.pos_square or all(grid in ((max(grid),) * 2, own) for grid in grids):
            return ops.pos_embed(table, grids, **how)
        squares = tuple(grid if grid == own else (max(grid),) * 2 for grid in grids)
        rows = ops.pos_embed(table, squares, **how).split([cells(grid) for grid in squares])
        return torch.cat(
            [part.view(*square, -1)[:h, :w].flatten(0, 1) for part, square, (h, w) in zip(rows, squares, grids)]
        )

    def _by_torch(self, table: Tensor, grid: Grid) -> Tensor:
        """(cells, dim), by torch's ops alone. grid: of numbers that a tracer may know by name only"""
        own = self.patch_embed.grid_size if isinstance(table, Proxy) else tuple(table.shape[:2])
        if is_grid(grid, own):
            return table.flatten(0, 1)
        mode, antialias = self.pos_interpolation, self.pos_antialias
        if isinstance(table, Proxy) or self.pos_align_corners or self.pos_square:
            how = {"mode": mode, "antialias": antialias, "align_corners": self.pos_align_corners}
            size = (max(grid),) * 2 if self.pos_square else grid
            maps = F.interpolate(table.permute(2, 0, 1)[None].float(), size=size, **how)[0]
            return maps[:, : grid[0], : grid[1]].flatten(1).t().to(table.dtype)
        wide = table.to(torch.promote_types(table.dtype, torch.float32))
        down, across = (_weights(n, m, mode, antialias, wide) for n, m in zip(own, grid))
        maps = across @ (down @ wide.flatten(1)).unflatten(1, (own[1], -1))  # (rows, columns, dim)
        return maps.flatten(0, 1).to(table.dtype)

    def _position_rows(self, menu: tuple[Grid, ...]) -> Tensor:
        """(cells of all the grids of a packing's menu, dim), in order."""
        table, _ = self._table()
        if self.menu is None or self.resizable["positions"] == "interpolate":
            return self._interpolated(table, *menu)
        parts = []
        for grid in menu:
            i = nearest(cells(grid), self.menu)
            own = table if i == 0 else self.pos_embed_shorter[i - 1][0].view(*self.menu[i], -1)
            parts.append(own.flatten(0, 1) if grid == self.menu[i] else self._interpolated(own, grid))
        return torch.cat(parts) if parts else table.new_empty(0, table.shape[-1])

    def _kernel(self, i: int) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of the patch embedding at menu row i."""
        proj = self.patch_embed.proj
        if i == 0:
            return proj.weight, proj.bias
        if self.resizable["embedding"] == "patch":
            return ops.resize_patch_weight(proj.weight, self.patch_sizes()[i]), proj.bias
        bias = None if proj.bias is None else self.patch_embed.shorter_bias[i - 1]
        return self.patch_embed.shorter_weight[i - 1], bias

    def _embed_by_length(self, images, packing: Packing, pos, prefix, **options) -> Tensor:
        """The packed tokens where each length has a patch kernel of its own: one call per length, then in order."""
        if packing.grids is None:
            raise ValueError(
                f"embedding {self.resizable['embedding']!r} needs grids that the host knows: choose them on the host, "
                "or make the model resizable with embedding='resize'"
            )
        if not is_plain(self.patch_embed.proj, "Conv2d"):
            raise ValueError(f"embedding {self.resizable['embedding']!r} needs a patch projection without hooks")
        rows = {grid: nearest(cells(grid), self.menu) for grid in set(packing.grids)}
        if len(of_all := set(rows.values())) == 1:
            weight, bias = self._kernel(of_all.pop())
            with without_autocast(weight.device):
                return ops.patch_embed(images, weight, bias, packing, pos=pos, prefix=prefix, **options)
        groups: dict[int, list[int]] = {}
        for i, grid in enumerate(packing.grids):
            groups.setdefault(rows[grid], []).append(i)
        parts, starts, total = [], [0] * packing.images, 0
        for row, members in groups.items():
            part = Packing.from_grids(
                [packing.grids[i] for i in members], packing.prefix, menu=packing.menu, device=packing.device
            )
            weight, bias = self._kernel(row)
            chosen = images[members[0] : members[-1] + 1] if _contiguous(members) else _take(images, members)
            with without_autocast(weight.device):
                parts.append(ops.patch_embed(chosen, weight, bias, part, pos=pos, prefix=prefix, **options))
            for i in members:
                starts[i] = total
                total += packing.prefix + cells(packing.grids[i])
        if not parts:
            return self.patch_embed.proj.weight.new_zeros(packing.capacity, self.embed_dim)
        tokens = torch.cat([*parts, parts[0].new_zeros(packing.capacity - total, self.embed_dim)])
        if starts == sorted(starts):
            return tokens
        used = packing.image[:total].long()
        shift = numbers(starts, tokens.device) - packing.cu_seqlens[:-1].long()
        order = torch.arange(packing.capacity, device=tokens.device)
        return tokens[torch.cat([order[:total] + shift[used], order[total:]])]


def _weights(source: int, target: int, mode: str, antialias: bool, like: Tensor) -> Tensor:
    """(target, source): `ops.pos_embed.interpolation.matrix` for a target that an exporter may know by name only.

    Of elementary steps: what runs an exported model may know another interpolation by the same name, as OpenVINO does.
    """
    counted = torch.arange(target, dtype=like.dtype, device=like.device)
    scale = source / torch.ones_like(counted).sum()
    at = scale * (counted[:, None] + 0.5)
    if antialias:
        cells = torch.arange(source, dtype=like.dtype, device=like.device)
        weight = _filter((cells + 0.5 - at) / scale.clamp(min=1), mode, -0.5)
        return weight / weight.sum(1, keepdim=True)
    cells = torch.arange(-2, source + 2, dtype=like.dtype, device=like.device)  # outside, the border repeats
    weight = _filter(cells + 0.5 - (at if mode == "bicubic" else at.clamp(min=0.5)), mode, -0.75)
    if source == 1:
        return weight.sum(1, keepdim=True)
    first, last = weight[:, :3].sum(1, keepdim=True), weight[:, -3:].sum(1, keepdim=True)
    return torch.cat([first, weight[:, 3:-3], last], 1)


def _filter(x: Tensor, mode: str, a: float) -> Tensor:
    """Keys' cubic with parameter a, or a triangle."""
    x = x.abs()
    if mode == "bilinear":
        return (1 - x).clamp(min=0)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def _contiguous(members: list[int]) -> bool:
    return members[-1] - members[0] + 1 == len(members)


def _take(images, members: list[int]):
    if isinstance(images, Tensor):
        return images[numbers(members, images.device)]
    return [images[i] for i in members]


def _resized(weight: Tensor, size: tuple[int, int]) -> Tensor:
    return weight.new_empty(*weight.shape[:2], *size) if weight.is_meta else ops.resize_patch_weight(weight, size)
