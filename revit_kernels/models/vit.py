"""VarLenViT: timm's VisionTransformer on images of any token lengths, in one packed batch."""

# No postponed annotations: torch.fx writes the types of `forward` into the code of a graph, and cannot pickle texts.
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from revit_kernels import modules, ops
from revit_kernels.grids import Grid
from revit_kernels.models import adopt, listed
from revit_kernels.models.axis_positions import AxisPositions
from revit_kernels.models.embedding import Embedding, Images
from revit_kernels.models.intermediates import Intermediates
from revit_kernels.models.layers import ACTIVATIONS, BLOCKS, EMBEDS, MLPS, NORMS, STREAMING, Layer, layer
from revit_kernels.models.resizable import Resizable, start_lengths
from revit_kernels.models.surgery import Surgery
from revit_kernels.modules.attention import by_length, dense_packing, fitting, mask_of, per_length
from revit_kernels.modules.layer_norm import PLAIN as PLAIN_NORMS
from revit_kernels.modules.layer_norm import add, apply_norm, normalise
from revit_kernels.modules.linear import is_plain, linear, takes_packing, traced
from revit_kernels.modules.patch_dropout import PatchDropout
from revit_kernels.modules.script import refuse_script
from revit_kernels.packing import PackedTokens, Packing

if TYPE_CHECKING:
    from typing_extensions import Self

    from revit_kernels.engines import CapturedEngine, Engine


class VarLenViT(Embedding, Intermediates, Resizable, Surgery, nn.Module):
    """A Vision Transformer (Dosovitskiy et al., arXiv:2010.11929) that takes images at different token lengths.

    Constructor, module tree, state_dict keys, methods and attributes are those of timm 1.0.31's `VisionTransformer`;
    a tensor of images in gives timm's output out. Layers may also be named: norm_layer "layernorm" or "rmsnorm", or
    {"name": "layernorm", "eps": 1e-5}; act_layer "gelu", "gelu_tanh", "quick_gelu", "silu"; mlp_layer, block_fn and
    embed_layer by their class names.

    Calling the model:
        model(x)                        x: (images, channels, height, width) float -> (images, classes)
        model(x, grids=[(7, 7), ...])   the same images, each resized to its own grid of patches
        model([image, ...])             images (channels, height, width) of any sizes: each keeps its aspect, with at
                                        most `max_tokens` patches (by default as many as the model was made for)
        model([image, ...], grids=...)  images of any sizes, each resized to its own grid
        model(images, packing=...)      where a Packing, made on the device perhaps, says the grids
    Float images come normalised, as timm takes them; uint8 images are normalised with the model's mean and std, and may
    be (height, width, channels) with channels_last=True.

    Where timm's model takes one size of tensor only (`strict_img_size`), this one takes every size of whole patches.
    Raises ValueError for images whose channels, dtype or number fit neither the model nor the grids.
    """

    __prepare_scriptable__ = refuse_script
    times_trained = 0  # how often the model was put into training mode
    pretrained_cfg: dict[str, Any]
    default_cfg: dict[str, Any]
    created_from: dict[str, Any]  # of create_model
    patch_embed: nn.Module
    blocks: nn.Sequential
    norm: nn.Module
    head: nn.Module

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_attn_norm: bool = False,
        scale_mlp_norm: bool = False,
        proj_bias: bool = True,
        init_values: float | None = None,
        class_token: bool = True,
        pos_embed: str = "learn",
        no_embed_class: bool = False,
        reg_tokens: int = 0,
        pre_norm: bool = False,
        final_norm: bool = True,
        fc_norm: bool | None = None,
        pool_include_prefix: bool = False,
        dynamic_img_size: bool = False,
        dynamic_img_pad: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        weight_init: str = "",
        fix_init: bool = False,
        embed_layer: str | Callable[..., nn.Module] | None = None,
        embed_norm_layer: Layer = None,
        norm_layer: Layer = None,
        act_layer: Layer = None,
        block_fn: str | Callable[..., nn.Module] | None = None,
        mlp_layer: str | Callable[..., nn.Module] | None = None,
        attn_layer: str | Callable[..., nn.Module] = "attn",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        self._check_pool(global_pool, class_token)
        if pos_embed not in ("", "none", "learn", "factorized"):
            raise ValueError(f"pos_embed must be '', 'none', 'learn' or 'factorized', got {pos_embed!r}")
        use_fc_norm = global_pool in ("avg", "avgmax", "max") if fc_norm is None else fc_norm
        norm_layer = layer("norm_layer", norm_layer, NORMS, modules.LayerNorm)
        act_layer = layer("act_layer", act_layer, ACTIVATIONS, nn.GELU)
        embed_norm_layer = layer("embed_norm_layer", embed_norm_layer, NORMS)

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.num_reg_tokens = reg_tokens
        self.has_class_token = class_token
        self.no_embed_class = no_embed_class
        self.pool_include_prefix = pool_include_prefix or global_pool == "prr"
        self.dynamic_img_size = dynamic_img_size
        self.grad_checkpointing = False

        embed_args = {"strict_img_size": False, "output_fmt": "NHWC"} if dynamic_img_size else {}
        if embed_norm_layer is not None:
            embed_args["norm_layer"] = embed_norm_layer
        self.patch_embed = layer("embed_layer", embed_layer, EMBEDS, modules.PatchEmbed)(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            bias=not pre_norm,
            dynamic_img_pad=dynamic_img_pad,
            **embed_args,
            **kwargs,
        )
        reduction = self.patch_embed.feat_ratio()

        def tokens(count):
            return nn.Parameter(torch.empty(1, count, embed_dim, **kwargs)) if count else None

        self.cls_token = tokens(int(class_token))
        self.reg_token = tokens(reg_tokens)
        embed_len = self.patch_embed.num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        self.pos_embed = tokens(embed_len if pos_embed == "learn" else 0)
        if pos_embed == "factorized":
            self.pos_axes = AxisPositions(self.patch_embed.grid_size, embed_dim, **kwargs)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.patch_drop = PatchDropout(patch_drop_rate, self.num_prefix_tokens) if patch_drop_rate else nn.Identity()
        self.norm_pre = norm_layer(embed_dim, **kwargs) if pre_norm else nn.Identity()
        block_fn = layer("block_fn", block_fn, BLOCKS, modules.Block)
        mlp_layer = layer("mlp_layer", mlp_layer, MLPS, modules.Mlp)
        self.blocks = nn.Sequential(
            *(
                block_fn(
                    dim=embed_dim,
                    num_heads=num_heads,
                    mlp_ratio=mlp_ratio,
                    qkv_bias=qkv_bias,
                    qk_norm=qk_norm,
                    scale_attn_norm=scale_attn_norm,
                    scale_mlp_norm=scale_mlp_norm,
                    proj_bias=proj_bias,
                    init_values=init_values,
                    proj_drop=proj_drop_rate,
                    attn_drop=attn_drop_rate,
                    drop_path=drop_path_rate * i / max(depth - 1, 1),
                    norm_layer=norm_layer,
                    act_layer=act_layer,
                    mlp_layer=mlp_layer,
                    attn_layer=attn_layer,
                    depth=i,
                    **kwargs,
                )
                for i in range(depth)
            )
        )
        self.feature_info = [
            {"module": f"blocks.{i}", "num_chs": embed_dim, "reduction": reduction} for i in range(depth)
        ]
        self.norm = norm_layer(embed_dim, **kwargs) if final_norm and not use_fc_norm else nn.Identity()
        self.attn_pool = None
        if global_pool == "map":
            self.attn_pool = modules.AttentionPoolLatent(
                embed_dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                norm_layer=norm_layer,
                act_layer=act_layer,
                **kwargs,
            )
        elif global_pool == "prr":
            pool_type = "token" if class_token else "avg"
            self.attn_pool = modules.AttentionPoolPrr(
                embed_dim, num_heads=num_heads, pool_type=pool_type, norm_layer=norm_layer, **kwargs
            )
        self.fc_norm = norm_layer(embed_dim, **kwargs) if final_norm and use_fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes, **kwargs) if num_classes > 0 else nn.Identity()
        self.weight_init_mode = "reset" if weight_init == "skip" else weight_init
        self.fix_init = fix_init
        self._set_preprocessing()
        if weight_init != "skip":
            self.init_weights(needs_reset=False)

    def _set_preprocessing(self) -> None:
        """What timm's models do not have: how images become patches, and positions fit another grid."""
        if not hasattr(self, "pretrained_cfg"):
            self.pretrained_cfg = self.default_cfg = {"mean": (0.5,) * self.in_chans, "std": (0.5,) * self.in_chans}
        self.patch_method = "resize"  # or "patch": the patch kernel is resized (FlexiViT), the image is not
        self.pos_interpolation = "bicubic"
        self.pos_antialias = True
        self.pos_align_corners = False
        self.pos_square = False  # resampled to as many rows as columns, the larger number, of which the first are used
        if "pos_axes" not in self._modules:
            self.pos_axes = None  # or AxisPositions, instead of a table
        self.menu = self.resizable = None  # of make_resizable
        self.register_load_state_dict_pre_hook(start_lengths)

    def train(self, mode: bool = True) -> "Self":
        """As of nn.Module. An engine of the model is stale after training mode."""
        self.times_trained += mode  # whatever was done to the weights
        return super().train(mode)

    @classmethod
    def from_timm(cls, model: nn.Module) -> "VarLenViT":
        """The same model, packed: shares the parameters and leaf modules of a timm VisionTransformer, copies nothing.

        Raises NotImplementedError for a model of another family (Eva, NaFlexVit, ...), by name.
        """
        return adopt.from_timm(model)

    @overload
    def engine(self, *, quantize: str | None = None, stale: str = "raise", images: None = None) -> "Engine": ...

    @overload
    def engine(self, *, stale: str = "raise", images: int, **options: Any) -> "CapturedEngine": ...

    def engine(
        self, *, quantize: str | None = None, stale: str = "raise", images: int | None = None, **options: Any
    ) -> "Engine | CapturedEngine":
        """The model made ready to answer.

        Without `images`, see `revit_kernels.engines.Engine`: a snapshot of the weights, for images of any sizes. With
        it, see `revit_kernels.engines.CapturedEngine`, which also takes the options: CUDA graphs for at most so many
        images of one size.
        """
        from revit_kernels.engines import CapturedEngine, Engine  # the one import that goes up

        if images is None:
            return Engine(self, quantize=quantize, stale=stale, **options)
        if quantize is not None:
            raise ValueError(f"CUDA graphs are captured of a model as it is: leave out quantize={quantize!r} or images")
        return CapturedEngine(self, images=images, stale=stale, **options)

    # ------------------------------------------------------------------ tokens to features

    def _features(
        self, images, packing, dense, channels_last, mask, visit=None, depth=None, answers=False
    ) -> tuple[Tensor, Packing]:
        """Through the embedding, `depth` blocks and the final norm, or on to the answers; `visit` sees the stream after
        each block."""
        x, packing = self._tokens(images, packing, dense, channels_last)
        stream = [x, None, None]
        del x
        if visit is None and depth is None and not mask and self._calls_blocks(stream[0], dense):
            stream = [self.blocks(stream[0]), None, None]
        else:
            stream = self.run_blocks(stream, packing, 0, depth, visit=visit, mask=mask)
        return (self.finish(stream, packing) if answers else self._normalised(stream, packing)), packing

    def _calls_blocks(self, x: Tensor, dense: bool) -> bool:
        """Whether the stack of blocks is called as a whole, because somebody watches or replaced it."""
        if isinstance(self.blocks, nn.ModuleList) or (not traced(x) and is_plain(self.blocks, "Sequential")):
            return False
        watched = not is_plain(self.blocks, "Sequential", "ModuleList") and not _has_any_global_hook()
        per_length = self.menu is not None and self.resizable["norms"] == "per_length"
        if not dense or per_length:  # the stack is told no packing
            if watched and not self.grad_checkpointing:
                raise ValueError(
                    "hooks on `blocks` as a whole, or another module in its place, need a dense batch and a model "
                    "without norms per length: hook its blocks instead"
                )
            return False
        return not self.grad_checkpointing

    def _normalised(self, stream, packing: Packing) -> Tensor:
        x, branch, gamma = stream
        return normalise(self.norm, x, fitting(packing, x), branch, gamma)[0]

    def embed(self, images: Images, packing: Packing, channels_last: bool = False) -> Tensor:
        """(capacity, dim): the tokens before the first block, of images as `forward` takes them beside a packing.

        With `run_blocks` and `finish`, the forward in parts: for what goes on from an early block. Not in training.
        """
        images, packing, _ = self._inputs(images, None, packing, None, channels_last)
        return self._tokens(images, packing, False, channels_last)[0]

    def run_blocks(
        self,
        stream: list[Tensor | None],
        packing: Packing,
        start: int = 0,
        stop: int | None = None,
        *,
        visit: Callable[[int, Tensor, Packing], None] | None = None,
        mask: dict[str, Any] | None = None,
    ) -> list[Tensor | None]:
        """The stream [x, branch, gamma], for x + gamma * branch, after the blocks from `start` to before `stop`.

        stream: begins as [tokens, None, None]; it is emptied, unless gradients are recorded
        visit:  called with each block's number, its output (capacity, dim), and the packing
        """
        blocks, positions = list(self.blocks)[start:stop], self._block_positions(packing)
        for i, block in enumerate(blocks, start):
            own = positions[i % len(positions)] if positions else {}
            streams = is_plain(block, *STREAMING) and not traced(stream[0])
            stream = (self._stream_block if streams else self._call_block)(block, stream, packing, mask or {}, own)
            packing = packing if streams else fitting(packing, stream[0])
            if visit is not None:
                stream = [add(*stream), None, None]
                visit(i, stream[0], packing)
        return stream

    def finish(self, stream: list[Tensor | None], packing: Packing) -> Tensor:
        """(images, classes): the final norm, pooling and head, of the stream after the last block."""
        packing = fitting(packing, stream[0])
        if not traced(stream[0]) and self.answers_first_token() and is_plain(self.norm, *PLAIN_NORMS):
            x, branch, gamma = stream
            x, branch = (t if t is None else self.pool(PackedTokens(t.flatten(0, -2), packing)) for t in (x, branch))
            x = normalise(self.norm, x, packing, branch, gamma, pooled=True)[0]
            return self._head(x, packing, packing)
        x = self._normalised(stream, packing)
        return self.forward_head(x if traced(x) or x.ndim == 3 else PackedTokens(x, packing))

    def answers_first_token(self) -> bool:
        """Whether of each image's tokens the first is all that the head sees."""
        methods = ("run_blocks", "pool", "forward_head")
        own = all(getattr(type(self), name) is getattr(VarLenViT, name) for name in methods)
        return own and self._own(*methods) and self.attn_pool is None and self.global_pool == "token"

    def _block_positions(self, packing: Packing | None) -> list[dict]:
        """Keyword arguments that give a block the positions of its tokens: for each block, one for all, or none."""
        return []

    def _checkpoints(self, mask: dict) -> bool:
        return self.grad_checkpointing and torch.is_grad_enabled() and not mask

    def _stream_block(self, block, stream: list, packing: Packing, mask: dict, positions: dict) -> list:
        if self._checkpoints(mask):
            return checkpoint(block.stream, stream, packing, **positions, use_reentrant=False)
        return block.stream(stream, packing, **mask, **positions)

    def _call_block(self, block, stream: list, packing: Packing | None, mask: dict, positions: dict) -> list:
        """A block that somebody wrapped, hooked, traces or wrote."""
        x = add(*stream)
        if not takes_packing(block):
            if positions:
                raise ValueError(f"rotary positions need the model's own blocks, got {type(block).__name__}")
            if self._checkpoints(mask):
                return [checkpoint(by_length, block, x, packing, mask, use_reentrant=False), None, None]
            return [by_length(block, x, packing, mask), None, None]
        options = mask | positions | ({} if packing is None else {"packing": packing})
        if self._checkpoints(mask):
            return [checkpoint(block, x, **options, use_reentrant=False), None, None]
        return [block(x, **options), None, None]

    def forward_features(
        self,
        x: Images,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        grids: Sequence[Grid] | None = None,
        packing: Packing | None = None,
        max_tokens: int | None = None,
        channels_last: bool = False,
    ) -> Any:
        """Tokens after the last block and norm: (images, length, dim) for a dense batch, else PackedTokens."""
        images, packing, dense = self._inputs(x, grids, packing, max_tokens, channels_last)
        mask = mask_of(attn_mask, is_causal)
        x, packing = self._features(images, packing, dense, channels_last, mask)
        return x if dense else PackedTokens(x, packing)

    def normalised(self, stream: list[Tensor | None], packing: Packing, dense: bool) -> Tensor | PackedTokens:
        """What `forward_features` gives, of the stream after the last block."""
        x = self._normalised(stream, packing)
        return x if dense else PackedTokens(x, packing)

    # ------------------------------------------------------------------ features to answers

    def _packed(self, x) -> tuple[Tensor, Packing]:
        """Tokens (capacity, dim) and packing, of PackedTokens or of a dense batch (images, length, dim)."""
        if isinstance(x, PackedTokens):
            return x.tokens, x.packing
        packing = dense_packing(x)
        prefix = min(self.num_prefix_tokens, x.shape[1])
        packing = Packing.uniform(x.shape[0], (1, x.shape[1] - prefix), prefix, device=x.device) if prefix else packing
        return x.reshape(-1, x.shape[-1]), packing

    def pool(self, x: Tensor | PackedTokens, pool_type: str | None = None) -> Any:
        """(images, dim) from (images, length, dim) or PackedTokens; the tokens themselves for pool type ''."""
        skip = 0 if self.pool_include_prefix else self.num_prefix_tokens
        if self.attn_pool is not None:
            if not isinstance(x, PackedTokens):
                return self.attn_pool(x[:, skip:] if skip else x)
            tokens, packing = x
            if skip:
                packing, rows = packing.without_prefix()
                tokens = tokens[rows]
            if takes_packing(self.attn_pool):
                return self.attn_pool(tokens, packing=packing)
            return torch.stack(per_length(self.attn_pool, packing.split(tokens)))
        pool_type = self.global_pool if pool_type is None else pool_type
        if not pool_type:
            return x
        if not isinstance(x, PackedTokens) and traced(x):
            return _pool_by_torch(x, pool_type, skip)
        tokens, packing = self._packed(x)
        return ops.pool(
            tokens,
            packing.cu_seqlens,
            pool_type,
            prefix=self.num_prefix_tokens,
            include_prefix=self.pool_include_prefix,
        )

    def forward_head(self, x: Tensor | PackedTokens, pre_logits: bool = False) -> Any:
        """(images, classes), or (images, dim) with pre_logits, from (images, length, dim) or PackedTokens."""
        packing = x.packing if isinstance(x, PackedTokens) else None
        lengths = self._packed(x)[1] if packing is None and self.menu is not None else packing
        if packing is not None and not self._own("pool"):
            x = torch.stack(per_length(self.pool, x.split()))
        else:
            x = self.pool(x)
        if isinstance(x, PackedTokens):  # no pooling: an answer per token
            head = self.head_drop(apply_norm(self.fc_norm, x.tokens, x.packing))
            return PackedTokens(head if pre_logits else linear(self.head, head), x.packing)
        return self._head(x, lengths, packing, pre_logits)

    def _head(self, x: Tensor, lengths: Packing | None, packing: Packing | None, pre_logits: bool = False) -> Tensor:
        """x: (images, dim), pooled; lengths: for a norm with an affine per length; packing: of PackedTokens"""
        x = self.head_drop(apply_norm(self.fc_norm, x, lengths))
        x = x if pre_logits else linear(self.head, x)
        return x if packing is None else self._answered(x, packing)

    def _answered(self, y, packing: Packing):
        """The answers, with zeros for images that found no room in a packing made on the device."""
        if packing.host_grids is not None or packing.full or isinstance(y, PackedTokens):
            return y
        return torch.where(packing.fits[:, None], y, 0)

    def forward(
        self,
        x: Images,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        grids: Sequence[Grid] | None = None,
        packing: Packing | None = None,
        max_tokens: int | None = None,
        channels_last: bool = False,
    ) -> Any:
        """(images, classes), one row per image in the order given."""
        options = {"grids": grids, "packing": packing, "max_tokens": max_tokens, "channels_last": channels_last}
        if not self._own("forward_features", "forward_head", "pool"):
            return self._forward_in_parts(x, attn_mask, is_causal, options)
        mask = mask_of(attn_mask, is_causal)
        if not mask and grids is packing is None and listed.takes(self, x):
            return listed.answers(self, x, max_tokens, channels_last)
        images, packing, dense = self._inputs(x, **options)
        return self._features(images, packing, dense, channels_last, mask, answers=True)[0]

    def _forward_in_parts(self, x, attn_mask, is_causal, options: dict):
        """`forward` as timm's: by `forward_features` and `forward_head`, of which somebody overrode one."""
        options = {name: value for name, value in options.items() if value is not None and value is not False}
        parameters = inspect.signature(self.forward_features).parameters
        known = any(p.kind is p.VAR_KEYWORD for p in parameters.values()) or parameters.keys() >= {"grids", *options}
        if not known and (options or isinstance(x, list | tuple)):
            raise ValueError(
                f"{type(self).__name__}.forward_features, which was overridden, needs a dense batch: images of one "
                "size as a tensor, without grids"
            )
        x = self.forward_features(x, attn_mask=attn_mask, is_causal=is_causal, **options)
        if isinstance(x, PackedTokens) and not self._own("forward_head"):
            return torch.stack(per_length(self.forward_head, x.split()))
        return self.forward_head(x)


def _pool_by_torch(x: Tensor, pool_type: str, skip: int) -> Tensor:
    """(images, dim) from a dense batch (images, length, dim), of which pooling passes over the first `skip` tokens."""
    if pool_type == "token":
        return x[:, 0]
    x = x[:, skip:] if skip else x
    if pool_type == "avgmax":
        return 0.5 * (x.amax(1) + x.mean(1))
    return x.mean(1) if pool_type == "avg" else x.amax(1)
