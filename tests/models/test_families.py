"""Files of weights of another family than the model's are named."""

import pytest
import torch
from safetensors.torch import save_file

from revit_kernels import create_model
from revit_kernels.models.families import family, refuse_others

timm = pytest.importorskip("timm")

OTHERS = {
    "swin_tiny_patch4_window7_224": "a Swin Transformer",
    "swinv2_tiny_window8_256": "a Swin Transformer V2",
    "beit_base_patch16_224": "a BEiT",
    "mvitv2_tiny": "an MViT",
    "hiera_tiny_224": "a Hiera",
    "samvit_base_patch16_224": "an image encoder of SAM",
    "cait_xxs24_224": "a CaiT",
    "xcit_nano_12_p16_224": "an XCiT",
    "mixer_s32_224": "an MLP-Mixer",
    "convnext_atto": "a convolutional network",
    "resnet18": "a convolutional network",
    "davit_tiny": "a model of several stages",
}
SMALL = {"depth": 1, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
OURS = {
    "vit_tiny_patch16_224": "a plain Vision Transformer",
    "deit_tiny_distilled_patch16_224": "a distilled DeiT",
    "eva02_tiny_patch14_224": "a model of EVA's kind (timm's eva.py)",
    "vit_small_patch16_dinov3": "a Vision Transformer without a table of positions, such as DINOv3",
    "lvvit_t": "an LV-ViT",
    "timesformer_tiny_patch16_224": "a TimeSformer",
    "videomae_small_patch16_224": "a model of clips with tubelets",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures(name):
    with torch.device("meta"):
        state = timm.create_model(name).state_dict()
    with pytest.raises(ValueError, match=rf"^a\.pth holds {OTHERS[name]}, which is no plain Vision Transformer$"):
        refuse_others(state, "a.pth")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The path of a file of weights of each of OURS, which does not say what it holds."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for name in OURS:
        state = create_model(name, **SMALL).state_dict()
        assert family(state) == OURS[name]
        refuse_others(state, name)
        found[name] = folder / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in state.items()}, found[name])
    return found


@pytest.mark.parametrize("name", OURS)
def test_a_file_of_another_family(files, name):
    for other, path in files.items():
        if other == name:
            create_model(name, **SMALL, checkpoint_path=path)
        elif not (name.startswith("timesformer") and other == "vit_tiny_patch16_224"):  # which is inflated
            with pytest.raises(ValueError) as told:
                create_model(name, **SMALL, checkpoint_path=path)
            assert f"{path} holds {OURS[other]}, and {name}" in str(told.value) and OURS[name] in str(told.value)


def test_another_architecture_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(2, 2)}, path)
    for name in ("vit_tiny_patch16_224", "videomae_small_patch16_224"):
        with pytest.raises(ValueError, match="holds a Swin Transformer, which is no plain Vision Transformer"):
            create_model(name, **SMALL, checkpoint_path=path)
