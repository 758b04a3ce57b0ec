"""The names of timm's Vision Transformers, with and without timm."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from revit_kernels import from_timm
from revit_kernels.models.distilled import VarLenViTDistilled
from revit_kernels.models.eva import VarLenEva
from revit_kernels.models.registry import NOT_TIMMS, create_model, get_pretrained_cfg, list_models, registry, resolve
from revit_kernels.models.vit import VarLenViT

NAMES = list_models()
NEIGHBOURS = ("naflexvit", "qwen3_vit", "deepseek_vit", "gemma4_vit")  # modules of timm's with other classes than ours


def module_of(name):
    """Where a name is from that is none of timm's three modules of plain Vision Transformers."""
    return registry()["models"][name.partition(".")[0]].get("module")


def shapes(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_every_name_has_timms_tensors():
    """Names, classes, keys and shapes, one block deep and without memory."""
    timm = pytest.importorskip("timm")
    for name in [name for name in NAMES if module_of(name) is None]:
        with torch.device("meta"):
            entry = registry()["models"][name]
            is_eva, fewer = entry.get("class") == "VarLenEva", entry["kwargs"].get("num_kv_heads")
            few = {"depth": 1} | ({"num_kv_heads": [min(fewer)]} if fewer else {})
            theirs = timm.create_model(name, **few, **({} if is_eva else {"weight_init": "skip"}))
            ours = create_model(name, **few, weight_init="skip")
        assert shapes(ours) == shapes(theirs), name
        assert list(ours.state_dict()) == list(theirs.state_dict()), f"{name}: the order differs"
        assert isinstance(ours, VarLenViTDistilled) == hasattr(theirs, "head_dist"), name
        assert isinstance(ours, VarLenEva) == is_eva == (type(theirs).__name__ == "Eva"), name


def test_every_neighbour_has_the_tensors_that_timms_become():
    timm = pytest.importorskip("timm")
    names = [name for name in NAMES if module_of(name) in NEIGHBOURS]
    assert len(names) == 20
    for name in names:
        with torch.device("meta"):
            theirs, ours = from_timm(timm.create_model(name, depth=1)), create_model(name, depth=1, weight_init="skip")
        assert type(ours) is type(theirs) and shapes(ours) == shapes(theirs), name
        for attribute in ("pos_interpolation", "pos_antialias", "pos_align_corners", "pos_square", "global_pool"):
            assert getattr(ours, attribute) == getattr(theirs, attribute), f"{name}: {attribute}"


@pytest.mark.parametrize(
    "name",
    [
        *("vit_base_patch16_224", "vit_giant_patch14_dinov2", "aimv2_1b_patch14_224", "vit_7b_patch16_dinov3"),
        *list_models("timesformer"),
        *list_models("vjepa2"),
    ],
)
def test_parameter_counts(name):
    with torch.device("meta"):
        model = create_model(name, weight_init="skip")
    assert sum(p.numel() for p in model.parameters()) == registry()["models"][name]["parameters"]


def test_every_tag_has_timms_preprocessing():
    timm = pytest.importorskip("timm")
    for name in [name for name in list_models(tags=True) if module_of(name) not in NOT_TIMMS]:
        theirs, ours = timm.get_pretrained_cfg(name).to_dict(), get_pretrained_cfg(name)
        for field, value in ours.items():
            if field == "first_conv" and module_of(name):  # by our names
                continue
            assert value == theirs.get(field), f"{name}: {field}"
        assert ours["tag"] == theirs["tag"]
    for name in [name for name in NAMES if module_of(name) not in NOT_TIMMS]:
        assert get_pretrained_cfg(name)["tag"] == timm.get_pretrained_cfg(name).tag


def test_no_name_is_left_out():
    timm = pytest.importorskip("timm")
    if timm.__version__ != registry()["timm"]:
        pytest.skip(f"the registry was made from timm {registry()['timm']}")
    assert {name for name in NAMES if module_of(name) is None} == {
        name for module in ("vision_transformer", "deit", "eva") for name in timm.list_models(module=module)
    }


def test_arguments_replace_the_names_own():
    model = create_model("vit_tiny_patch16_224.augreg_in21k", depth=1, img_size=(64, 96), drop_path_rate=None)
    assert model.head.out_features == 21843 and len(model.blocks) == 1
    assert model.patch_embed.grid_size == (4, 6)
    assert create_model("vit_tiny_patch16_224", depth=1, num_classes=0).num_classes == 0
    pooled = create_model("vit_tiny_patch16_224", depth=1, global_pool="avg")
    assert isinstance(pooled.norm, torch.nn.Identity) and pooled.global_pool == "avg"
    assert pooled.pretrained_cfg is pooled.default_cfg and pooled.pretrained_cfg["input_size"] == (3, 224, 224)


def test_list_models():
    assert list_models("vit_tiny_*_?[28]4") == ["vit_tiny_patch16_224", "vit_tiny_patch16_384"]
    assert "vit_small_patch16_224.dino" in list_models("small_patch16_224", tags=True)
    assert all("dinov2" in name for name in list_models("dinov2"))


def test_names_with_a_hub_or_of_old():
    assert resolve("hf-hub:timm/vit_tiny_patch16_224.augreg_in21k") == ("vit_tiny_patch16_224", "augreg_in21k")
    with pytest.warns(DeprecationWarning, match=r"now called vit_small_patch16_224\.dino"):
        assert resolve("vit_small_patch16_224_dino") == ("vit_small_patch16_224", "dino")


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("vit_smal_patch16_224", ValueError, "the nearest are vit_small_patch16_224"),
        ("vit_small_patch16_224.augreg", ValueError, "has no weights tagged 'augreg'; the nearest are augreg_in1k"),
        ("eva02_tiny_patch14", ValueError, "the nearest are eva02_tiny_patch14_"),
        ("vit_small_patch16_dinov3.lvd", ValueError, "has no weights tagged 'lvd'; the nearest are lvd1689m"),
        ("beit_base_patch16_224", ValueError, r"is of timm's beit\.py, not a Vision Transformer"),
        ("resnet50", ValueError, r"is of timm's resnet\.py, not a Vision Transformer"),
        ("swin_tiny_patch4_window7_224", ValueError, r"is of timm's swin_transformer\.py, not a Vision Transformer"),
        ("hiera_tiny_224", ValueError, r"is of timm's hiera\.py, not a Vision Transformer"),
        ("gemma4_vit_167m_enc", ValueError, r"is of timm's gemma4_vit\.py, .* nor a classifier of a language model's"),
        ("no such thing", ValueError, "there is no model named 'no such thing'"),
        ("x" * 10**5, ValueError, f"there is no model named '{'x' * 100}'"),
        ("weights.pth", ValueError, "does not say what model it is for"),
    ],
)
def test_wrong_names_say_so(name, error, message):
    with pytest.raises(error, match=message):
        create_model(name)


def test_pretrained_without_timm_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"pip install timm"):
        create_model("vit_tiny_patch16_224", pretrained=True)
    for name in ("lvvit_s", "vivit_base_patch16_224"):
        with pytest.raises(ValueError, match=f"timm has no weights of {name}: pass checkpoint_path"):
            create_model(name, pretrained=True)
    with pytest.raises(ValueError, match="not both"):
        create_model("vit_tiny_patch16_224", pretrained=True, checkpoint_path="x.pth")


def test_pretrained_comes_through_timm(monkeypatch):
    timm = pytest.importorskip("timm")
    made = timm.create_model("vit_tiny_patch16_224", depth=1)
    asked = {}
    monkeypatch.setattr(timm, "create_model", lambda name, **kwargs: asked.update(name=name, **kwargs) or made)
    model = create_model("vit_tiny_patch16_224.augreg_in21k", pretrained=True, depth=1)
    name = "vit_tiny_patch16_224.augreg_in21k"
    assert asked.items() >= {"name": name, "pretrained": True, "depth": 1}.items()
    assert isinstance(model, VarLenViT) and torch.equal(model.head.weight, made.head.weight)
    assert model.pretrained_cfg["tag"] == "augreg_in21k"


def test_timm_is_never_imported():
    code = (
        "import sys; sys.modules['timm'] = None\n"
        "import torch\n"
        "from revit_kernels.models.registry import create_model\n"
        "model = create_model('deit_tiny_distilled_patch16_224', depth=1).eval()\n"
        "assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)\n"
        "for name in ('lvvit_t', 'naflexvit_base_patch16_gap', 'qwen3_vit_88m', 'vit_tiny_patch16_dinov3_qkvb'):\n"
        "    model = create_model(name, depth=1, num_classes=3).eval()\n"
        "    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
