"""A whole ViT on a batch of mixed lengths, end to end, against what a user would run instead.

Images are uniform over the menu {4, 7, 10, 14}^2 and already of their grid's size. What prepares a rival's inputs
(padding, sorting by length, compiling) is not timed: the rival is shown at its best.
"""

import copy

import cpu_rivals
import gpu_vit_rivals
import pytest
import torch
from conftest import TINY

from revit_kernels import Packing, VarLenViT

timm = pytest.importorskip("timm", reason="the rivals are timm's models: pip install revit_kernels[timm]")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MENU = [(4, 4), (7, 7), (10, 10), (14, 14)]
MODELS = ["vit_small_patch16_224", "vit_base_patch16_224"]
ROTARY = ["vit_small_patch16_dinov3", "eva02_small_patch14_224"]
IMAGES = [2] if TINY else [32] if DEVICE == "cpu" else [4, 32, 256, 1024]
ROUNDS = 11 if DEVICE == "cpu" else 30


class Case:
    """One model with random weights, and one batch of images, sorted by length."""

    @torch.inference_mode(False)  # of an inference tensor nobody can tell whether it was written to since it was packed
    def __init__(self, name, images, dtype, menu=MENU):
        torch.manual_seed(0)
        self.name, self.dtype = name, dtype
        self.timm = self._made().to(DEVICE, dtype)
        self.model = VarLenViT.from_timm(self.timm)
        self.engine = self.model.engine()  # as a server would; the rivals compile theirs
        grids = [menu[i * len(menu) // images] for i in range(images)]
        p, q = self.timm.patch_embed.patch_size
        self.images = [torch.randn(3, p * h, q * w, device=DEVICE).to(dtype) for h, w in grids]
        self.grids = grids
        self.batches = [
            torch.stack([x for x, g in zip(self.images, grids) if g == grid]) for grid in dict.fromkeys(grids)
        ]

    def _made(self):
        """timm's model with a head, which the entries of some names lack."""
        return timm.create_model(self.name, dynamic_img_size=True, num_classes=1000).eval()

    @property
    def flops(self):
        """Of the linears and attention of the blocks, and of the patch embedding, for the tokens that there are."""
        tokens = [h * w + self.timm.num_prefix_tokens for h, w in self.grids]
        block = self.timm.blocks[0]
        weights = sum(p.numel() for p in block.parameters() if p.ndim == 2)
        pairs = 4 * block.attn.proj.in_features * sum(n * n for n in tokens)
        patches = self.timm.patch_embed.proj.weight.numel() * sum(h * w for h, w in self.grids)
        return len(self.timm.blocks) * (2 * weights * sum(tokens) + pairs) + 2 * patches

    @torch.inference_mode(False)
    def float32(self):
        """A copy of timm's model, its weights as they are rounded, in float32."""
        model = self._made()
        model.load_state_dict({k: v.float() for k, v in self.timm.state_dict().items()})
        return model

    def ours(self):
        return self.engine(self.images, grids=self.grids)

    def ours_graphed(self):
        """The same as one CUDA graph, as its rivals are: for a batch whose grids do not change."""
        packing = Packing.from_grids(self.grids, 1, device=DEVICE)
        return gpu_vit_rivals.graph_of(lambda: self.model(self.images, packing=packing))


def bucketed(case):
    """timm, one dense batch for each length."""
    return lambda: torch.cat([case.timm(batch) for batch in case.batches])


def loop(case):
    """timm, one image at a time."""
    return lambda: torch.cat([case.timm(image[None]) for image in case.images])


def naflex_inputs(case):
    """Flattened patches padded to the longest image, with coordinates and a mask, as timm's loader makes them."""
    longest = max(h * w for h, w in case.grids)
    count = len(case.images)
    patches = torch.zeros(count, longest, 768, device=DEVICE, dtype=case.dtype)
    coordinates = torch.zeros(count, longest, 2, device=DEVICE, dtype=torch.long)
    valid = torch.zeros(count, longest, device=DEVICE, dtype=torch.bool)
    for i, (image, (h, w)) in enumerate(zip(case.images, case.grids)):
        cut = image.unflatten(1, (h, 16)).unflatten(3, (w, 16)).permute(1, 3, 2, 4, 0).reshape(h * w, 768)
        patches[i, : h * w], valid[i, : h * w] = cut, True
        coordinates[i, : h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2).to(DEVICE)
    return {"patches": patches, "patch_coord": coordinates, "patch_valid": valid}


def _naflex(case, **kwargs):
    model = timm.create_model(case.name, use_naflex=True, **kwargs)
    model.load_state_dict(_naflex_weights(case.timm, model))
    model = model.eval().to(DEVICE, case.dtype)
    inputs = naflex_inputs(case)
    return lambda: model(inputs)


def _naflex_weights(vit, naflex):
    from timm.models.naflexvit import checkpoint_filter_fn

    return checkpoint_filter_fn({k: v.float().cpu().clone() for k, v in vit.state_dict().items()}, naflex)


def naflex(case):
    """timm's NaFlexVit, padded, as it comes."""
    return _naflex(case)


def naflex_fastest(case):
    """timm's NaFlexVit, padded, with its cheapest mask and position interpolation."""
    return _naflex(case, use_key_only_attn_mask=True, pos_embed_use_grid_sample=True)


def nested(case):
    """timm's layers on one nested tensor with the jagged layout, between attention per head."""
    if DEVICE == "cpu":
        pytest.skip("nested: on a CPU its attention asks the CUDA driver for its kernels, or is not implemented")
    vit, packing = case.timm, Packing.from_grids(case.grids, 1, device=DEVICE)
    offsets = packing.cu_seqlens.long()

    def heads(x, attn):
        y = torch.nested.nested_tensor_from_jagged(x.reshape(-1, attn.num_heads, attn.head_dim), offsets)
        return y.transpose(1, 2)

    def run():
        x = case.model._embed(case.images, packing, False)[0]
        for block in vit.blocks:
            qkv = block.attn.qkv(block.norm1(x)).chunk(3, -1)
            y = torch.nn.functional.scaled_dot_product_attention(*(heads(t, block.attn) for t in qkv))
            x = x + block.attn.proj(y.transpose(1, 2).values().flatten(1))
            x = x + block.mlp(block.norm2(x))
        return vit.head(vit.norm(x)[offsets[:-1]])

    return run


def _on_cpu(case, make, *options):
    """A rival of cpu_rivals, ready for the case's batches."""
    if DEVICE != "cpu":
        pytest.skip("for CPUs")
    batches = [batch.float() for batch in case.batches]
    with torch.inference_mode(False), torch.no_grad():  # tracers want ordinary tensors
        found = make(case.float32(), case.dtype, *options, [batches])
    run = found.prepare(batches)
    run.settings = found.settings
    return run


def openvino(case):
    """OpenVINO, one compiled model for each length, at the precision and threads that it does best with."""
    return _on_cpu(case, cpu_rivals.openvino, "static")


def zentorch(case):
    """AMD's plugin for torch.compile, one dense batch for each length."""
    return _on_cpu(case, cpu_rivals.zentorch)


RIVALS = [bucketed, naflex, naflex_fastest, loop, nested, openvino, zentorch, *gpu_vit_rivals.RIVALS]


@pytest.mark.parametrize("rival", RIVALS, ids=lambda rival: rival.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("images", IMAGES)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def bench_vit(duel, name, images, dtype, rival):
    case = Case(name, images, dtype)
    theirs = rival(case)
    ours = case.ours_graphed() if rival in gpu_vit_rivals.GRAPHED else case.ours
    a, b = ours().float(), theirs().float()
    if rival not in (naflex_fastest, *gpu_vit_rivals.INEXACT):  # grid_sample interpolates the positions differently
        assert (a - b).abs().max() <= 2 * torch.finfo(dtype).eps ** 0.5 * a.abs().max(), "it computes something else"
    duel(ours, theirs, rounds=ROUNDS, flops=case.flops, rival=rival.__name__)


def unrotated(case):
    """Ours without rotation: what that costs. It answers something else."""
    model = copy.deepcopy(case.model)
    model.rope = None
    engine = model.engine()
    return lambda: engine(case.images, grids=case.grids)


@pytest.mark.parametrize("rival", [bucketed, openvino, unrotated], ids=lambda rival: rival.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ROTARY)
@torch.inference_mode()
def bench_rotary(duel, name, dtype, rival):
    """Models with rotary positions."""
    case = Case(name, IMAGES[-1] if DEVICE == "cpu" else 256, dtype)
    theirs = rival(case)
    if rival is not unrotated:
        a, b = case.ours().float(), theirs().float()
        assert (a - b).abs().max() <= 2 * torch.finfo(dtype).eps ** 0.5 * a.abs().max(), "it computes something else"
    duel(case.ours, theirs, rounds=ROUNDS, flops=case.flops, rival=rival.__name__)


@pytest.mark.parametrize("grid", MENU, ids=str)
@pytest.mark.parametrize("images", [1, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def bench_vit_one_length(duel, dtype, images, grid):
    """Where packing has nothing to save: all images of one length, timm's home ground."""
    case = Case(MODELS[0], images, dtype, [grid])
    duel(case.ours, bucketed(case), rounds=ROUNDS, flops=case.flops, rival="bucketed")
