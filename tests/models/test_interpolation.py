"""Images are resized to their grids by the interpolation that the model's preprocessing names."""

import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE
from timm_pairs import assert_near, liven

from revit_kernels.models.checkpoints import save_checkpoint
from revit_kernels.models.registry import create_model
from revit_kernels.models.timesformer import VarLenTimeSformer
from revit_kernels.training.augmentation import augmentation
from revit_kernels.training.loader import Augmented

GRIDS = [(5, 4), (2, 3)]
SMALL = {"depth": 1, "img_size": (80, 64), "num_classes": 5}
FAMILIES = {
    "vit": "vit_tiny_patch16_224",
    "rotary": "vit_tiny_patch16_dinov3_qkvb",
    "stem": "lvvit_t",
    "axes": "gemma4_vit_167m",
}
WAYS = ["model", "engine", "hooked", "compiled", "a kernel for each length"]


def photos():
    return [(torch.rand(3, *size) * 255).byte().to(DEVICE) for size in ((97, 75), (61, 130))]


def made(name="vit_tiny_patch16_224", mode="bilinear", **kwargs):
    torch.manual_seed(0)
    return liven(create_model(name, pretrained_cfg_overlay={"interpolation": mode}, **SMALL | kwargs)).to(DEVICE).eval()


def resized(images, mode, patches=((16, 16), (16, 16))):
    """The images as floats from 0 to 255, at the sizes of GRIDS of these patches."""
    sizes = [(h * p, w * q) for (h, w), (p, q) in zip(GRIDS, patches)]
    return [F.interpolate(x[None].float(), size, mode=mode, antialias=True)[0] for x, size in zip(images, sizes)]


def answers_to(model, images, mode):
    """The model's answers to the images, resized before by torch."""
    mean, std = (torch.tensor(model.pretrained_cfg[field], device=DEVICE)[:, None, None] for field in ("mean", "std"))
    sizes = (model.patch_sizes(),) if model.menu else ()
    return model([(x / 255 - mean) / std for x in resized(images, mode, *sizes)], grids=GRIDS)


def assert_is_only(mode, actual, model, images):
    assert_near(mode, actual, answers_to(model, images, mode))
    other = answers_to(model, images, {"bilinear": "bicubic", "bicubic": "bilinear"}[mode])
    assert (actual - other).abs().max() > 100 * (actual - answers_to(model, images, mode)).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("family", FAMILIES)
def test_of_every_family(family, mode):
    model, images = made(FAMILIES[family], mode), photos()
    assert_is_only(mode, model(images, grids=GRIDS), model, images)


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_on_every_way(way):
    model, images = made(), photos()
    if way == "a kernel for each length":
        model.make_resizable(GRIDS, embedding="per_length")
    grids = {"grids": GRIDS}
    if way == "hooked":
        model.patch_embed.proj.register_forward_hook(lambda module, inputs, output: None)
    if way == "compiled":
        run, grids = torch.compile(model, fullgraph=True, backend="eager"), {}
        images = [F.pad(images[0], (0, 0, 0, 20)), images[1]]
        native = model(images)
        assert_near("compiled", run(images), native)
        model.pretrained_cfg["interpolation"] = "bicubic"
        assert (native - model(images)).abs().max() > 1e-2
        return
    run = model.engine() if way == "engine" else model
    assert_is_only("bilinear", run(images, **grids), model, images)


@torch.no_grad()
def test_a_mode_that_there_is_not_is_refused_where_something_is_resized():
    model, images = made(mode="lanczos"), photos()
    with pytest.raises(ValueError, match="interpolation 'lanczos', and images are resized by one of"):
        model(images, grids=GRIDS)
    fitting = [x.round().byte() for x in resized([x // 2 for x in images], "bilinear")]
    assert model(fitting, grids=GRIDS).shape == (2, 5)
    assert model(torch.rand(1, 3, 80, 64, device=DEVICE)).shape == (1, 5)


def test_a_file_keeps_it(tmp_path):
    model = made()
    save_checkpoint(model, tmp_path / "model.safetensors")
    assert create_model(str(tmp_path / "model.safetensors")).pretrained_cfg["interpolation"] == "bilinear"


@torch.no_grad()
def test_of_clips():
    options = {"depth": 1, "num_heads": 2, "embed_dim": 32, "num_frames": 2, "img_size": (32, 32), "num_classes": 5}
    model = liven(VarLenTimeSformer(**options)).to(DEVICE).eval()
    model.pretrained_cfg |= {"interpolation": "bilinear"}
    clip = (torch.rand(3, 2, 50, 41) * 255).byte().to(DEVICE)
    fitting = F.interpolate(clip.transpose(0, 1).float(), (32, 32), mode="bilinear", antialias=True).transpose(0, 1)
    mean, std = (torch.tensor(model.pretrained_cfg[field], device=DEVICE).view(3, 1, 1, 1) for field in ("mean", "std"))
    answer = model([clip], grids=[(2, 2, 2)])
    assert_near("bilinear", answer, model([(fitting / 255 - mean) / std], grids=[(2, 2, 2)]))
    model.pretrained_cfg |= {"interpolation": "bicubic"}
    assert (answer - model([clip], grids=[(2, 2, 2)])).abs().max() > 1e-2


class OneImage:
    targets = [0]

    def __len__(self):
        return 1

    def pixels(self, index):
        return photos()[0].cpu().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("crop", ["none", "resized"])
def test_training_sees_images_as_the_model_does(crop):
    if crop == "resized":
        pytest.importorskip("torchvision")
    found = {}
    for mode in ("bilinear", "bicubic"):
        augment = augmentation((32, 32), crop, interpolation=mode)
        torch.manual_seed(0)
        found[mode] = Augmented(OneImage(), (32, 32), augment, mode)[0, 7][0].float()
    assert (found["bilinear"] - found["bicubic"]).abs().max() > 2
    if crop == "none":
        torch.manual_seed(0)
        image = OneImage().pixels(0)
        expected = F.interpolate(
            torch.from_numpy(image).permute(2, 0, 1)[None].float(), (32, 32), mode="bilinear", antialias=True
        )
        assert torch.equal(found["bilinear"], expected[0].permute(1, 2, 0).round().clamp(0, 255))
