"""LV-ViT against a plain reference of ours: outputs, gradients, state_dict, token labelling, and as a ReViT."""

import copy

import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE, same
from timm_pairs import GRIDS, WHOLE, assert_gradients_near, assert_near, batch, gradients, liven, mixed
from torch import nn

from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.models.lvvit import TokenLogits, VarLenLVViT, token_labelling_loss
from revit_kernels.models.registry import constructor_kwargs, create_model

NAMES = ["lvvit_t", "lvvit_s", "lvvit_m", "lvvit_l"]
SMALL = {} if WHOLE else {"depth": 2, "img_size": (80, 64), "num_classes": 5}


class Stem(nn.Module):
    def __init__(self, width, dim):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.proj = nn.Conv2d(width, dim, 8, 8)

    def forward(self, x):
        for i in "123":
            x = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(x)).relu()
        return self.proj(x)


class PlainBlock(nn.Module):
    def __init__(self, dim, heads, lam):
        super().__init__()
        self.heads, self.lam = heads, lam
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-5), nn.LayerNorm(dim, 1e-5)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, 3 * dim), nn.Linear(3 * dim, dim)

    def forward(self, x):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        maps = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.attn.proj((maps @ v).transpose(1, 2).flatten(2)) / self.lam
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))) / self.lam


class PlainLVViT(nn.Module):
    """The definition: images of one size in, the positions resized as timm resizes them."""

    def __init__(self, grid, dim, depth, heads, lam, width, classes):
        super().__init__()
        self.grid = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        self.patch_embed = Stem(width, dim)
        self.blocks = nn.ModuleList(PlainBlock(dim, heads, lam) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, 1e-5)
        self.head, self.aux_head = nn.Linear(dim, classes), nn.Linear(dim, classes)

    def tokens(self, x):
        x = self.patch_embed(x)
        table = self.pos_embed[:, 1:].unflatten(1, self.grid).permute(0, 3, 1, 2)
        if x.shape[2:] != table.shape[2:]:
            table = F.interpolate(table, x.shape[2:], mode="bicubic", antialias=True)
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([first, (x + table).flatten(2).mT], 1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, x):
        x = self.tokens(x)
        return self.head(x[:, 0]) + 0.5 * self.aux_head(x[:, 1:]).max(1).values


def make(name):
    """The plain model, alive, and ours with its weights."""
    ours = create_model(name, **SMALL)
    kwargs = constructor_kwargs(name)
    sizes = kwargs["embed_dim"], len(ours.blocks), kwargs["num_heads"]
    plain = PlainLVViT(
        ours.patch_embed.grid_size, *sizes, kwargs.get("skip_lam", 1), kwargs.get("stem_width", 64), ours.num_classes
    )
    plain = liven(plain).to(DEVICE).eval()
    for i in "123":
        getattr(plain.patch_embed, f"bn{i}").running_mean.normal_()
        getattr(plain.patch_embed, f"bn{i}").running_var.uniform_(0.5, 2)
    ours.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(ours.state_dict(), strict=True)
    return plain, ours.to(DEVICE).eval()


@pytest.mark.parametrize("name", NAMES)
def test_answers_and_gradients(name):
    plain, ours = make(name)
    x = batch(ours)
    assert_near("dense", ours(x), plain(x))
    assert_near("tokens", ours.forward_features(x), plain.tokens(x))
    images = mixed(ours)
    expected, actual = torch.cat([plain(image[None]) for image in images]), ours(images)
    assert_near("mixed", actual, expected)

    def exact():
        wide = copy.deepcopy(plain).double()
        return gradients(wide, torch.cat([wide(image[None].double()) for image in images]))

    ours_grads, theirs = gradients(ours, actual), gradients(plain, expected)
    assert_gradients_near({key: ours_grads[key] for key in theirs}, theirs, exact)


@pytest.mark.parametrize(
    "name, size, millions",
    [("lvvit_t", 224, 8.53), ("lvvit_s", 224, 26.15), ("lvvit_m", 224, 55.83), ("lvvit_l", 448, 150.47)],
)
def test_sizes_are_those_published(name, size, millions):
    with torch.device("meta"):
        model = create_model(name, img_size=size, weight_init="skip")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == millions


@torch.no_grad()
def test_an_image_has_the_same_bits_alone_and_in_a_batch():
    _, ours = make("lvvit_t")
    images = mixed(ours)
    together = ours(images, grids=GRIDS)
    for i, (image, grid) in enumerate(zip(images, GRIDS)):
        same(ours([image], grids=[grid]), together[i : i + 1])
    assert torch.equal(ours([], grids=[]), together[:0])
    pixels = torch.randint(256, (3, 80, 64), dtype=torch.uint8, device=DEVICE)
    mean, std = (torch.tensor(ours.pretrained_cfg[key], device=DEVICE)[:, None, None] for key in ("mean", "std"))
    assert_near("pixels", ours([pixels]), ours([(pixels / 255 - mean) / std]))


@pytest.mark.skipif(WHOLE, reason="its sizes are those of the small model")
def test_token_labelling():
    """The loss, and its gradients, of a mixed batch: those of a plain loop over images."""
    plain, ours = make("lvvit_t")
    ours.set_token_labelling()
    ours.train()
    for i in "123":  # whose statistics would be those of a batch
        getattr(ours.patch_embed, f"bn{i}").eval()
    images, grids = mixed(ours), GRIDS
    out = ours(images, grids=grids)
    assert isinstance(out, TokenLogits) and out.packing.prefix == 0
    target = torch.arange(len(images), device=DEVICE) % 5
    token_target = torch.rand(len(out.patches), 5, device=DEVICE).softmax(-1)
    loss = token_labelling_loss(out, target, token_target)
    tokens = [plain.tokens(image[None])[0] for image in images]
    classes, patches = torch.stack([t[0] for t in tokens]), torch.cat([t[1:] for t in tokens])
    expected = F.cross_entropy(plain.head(classes), target)
    expected = expected + 0.5 * F.cross_entropy(plain.aux_head(patches), token_target)
    assert_near("loss", loss, expected)
    theirs, actual = gradients(plain, expected), gradients(ours, loss)
    for name, grad in theirs.items():
        assert_near(name, actual[name], grad, scale=grad.abs().max().item())
    assert ours.eval()(images, grids=grids).shape == (len(images), 5)
    with pytest.raises(ValueError, match="token_target must have a row per patch, 68, got 3"):
        token_labelling_loss(out, target, token_target[:3])


@pytest.mark.skipif(WHOLE, reason="its sizes are those of the small model")
def test_made_resizable_and_saved(tmp_path):
    _, ours = make("lvvit_t")
    menu = [(5, 4), (3, 3), (2, 2)]
    x = batch(ours)
    before = ours(x, grids=[(3, 3)] * 2)
    ours.make_resizable(menu)
    assert_near("as it was", ours(x, grids=[(3, 3)] * 2), before)
    assert sum("shorter_weight" in key for key in ours.state_dict()) == 2 * 2 + 1
    at_all, grids = [image for image in x for _ in menu], menu * 2
    together = ours(at_all, grids=grids)
    apart = torch.cat([ours([image], grids=[grid]) for image, grid in zip(at_all, grids)])
    expected = gradients(ours, apart)
    for key, grad in gradients(ours, together).items():
        assert_near(key, grad, expected[key], scale=expected[key].abs().max().item())
    save_checkpoint(ours, tmp_path / "lvvit.safetensors")
    again = create_model(str(tmp_path / "lvvit.safetensors")).eval()
    assert isinstance(again, VarLenLVViT) and again.menu == ours.menu
    assert_near("again", again.to(DEVICE)(x), ours(x))
    assert_near("engine", ours.engine()(x), ours(x).detach())
    _, scaled = make("lvvit_s")
    engine = scaled.engine()
    assert DEVICE != "cpu" or engine.refusal is None
    assert_near("engine of scaled branches", engine(x), scaled(x).detach())


def test_wrong_use():
    with pytest.raises(ValueError, match="patch_size must be even"):
        VarLenLVViT(30, 15, embed_dim=48, num_heads=4, depth=1)
    with pytest.raises(ValueError, match="global_pool must be 'token'"):
        VarLenLVViT(32, 16, embed_dim=48, num_heads=4, depth=1, global_pool="avg")
    model = VarLenLVViT(32, 16, embed_dim=48, num_heads=4, depth=1)
    with pytest.raises(ValueError, match="keeps its patch size"):
        model.set_input_size(patch_size=8)
    with pytest.raises(ValueError, match="needs a plain patch projection"):
        model.make_resizable([(2, 2), (1, 1)], embedding="patch")
