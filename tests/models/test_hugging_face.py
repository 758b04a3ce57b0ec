"""Vision Transformers of transformers: the same outputs, dense and image by image, from the model and from its keys."""

import pytest
import torch
from contract import DEVICE
from timm_pairs import assert_near, liven

import revit_kernels
from revit_kernels.models import hugging_face
from revit_kernels.models.checkpoints import load_checkpoint
from revit_kernels.models.eva import VarLenEva
from revit_kernels.models.registry import create_model
from revit_kernels.models.vit import VarLenViT

transformers = pytest.importorskip("transformers")
pytest.importorskip("timm")

SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=40, patch_size=8)
LARGER = dict(hidden_size=96, num_hidden_layers=3, num_attention_heads=3, image_size=56, patch_size=14)
WITH = dict(intermediate_size=100)
CASES = {  # class, configuration, its arguments beside the sizes
    "ViTModel": ("ViTModel", "ViTConfig", WITH),
    "ViTModel, no bias, tanh": ("ViTModel", "ViTConfig", WITH | dict(qkv_bias=False, hidden_act="gelu_new")),
    "ViTForImageClassification": ("ViTForImageClassification", "ViTConfig", WITH | dict(num_labels=7)),
    "DeiTModel": ("DeiTModel", "DeiTConfig", WITH),
    "DeiTForImageClassification": ("DeiTForImageClassification", "DeiTConfig", WITH | dict(num_labels=7)),
    "DeiT with teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", WITH | dict(num_labels=7)),
    "Dinov2Model": ("Dinov2Model", "Dinov2Config", {}),
    "Dinov2Model, gated": ("Dinov2Model", "Dinov2Config", dict(use_swiglu_ffn=True)),
    "Dinov2WithRegistersModel": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", dict(num_register_tokens=3)),
    "DINOv3ViTModel": ("DINOv3ViTModel", "DINOv3ViTConfig", WITH | dict(num_register_tokens=4)),
    "DINOv3ViTModel, gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        WITH | dict(use_gated_mlp=True, hidden_act="silu", key_bias=True),
    ),
    "CLIPVisionModel": ("CLIPVisionModel", "CLIPVisionConfig", WITH),
    "CLIPVisionModelWithProjection": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        WITH | dict(projection_dim=9),
    ),
    "SiglipVisionModel": ("SiglipVisionModel", "SiglipVisionConfig", WITH),
    "SiglipVisionModel, no head": ("SiglipVisionModel", "SiglipVisionConfig", WITH | dict(vision_use_head=False)),
}
GRIDS = [(5, 5), (3, 4), (7, 2)]


def make(name, sizes=SMALL):
    cls, config, kwargs = CASES[name]
    config = getattr(transformers, config)(**sizes | kwargs)
    return liven(getattr(transformers, cls)(config)).to(DEVICE).eval()


def theirs(model, pixels):
    """Its last hidden state, and its answer: logits, embeddings, or the pooler's output."""
    options = {} if "ino" in type(model).__name__.lower() else {"interpolate_pos_encoding": True}
    out = model(pixels, **options)
    answer = next(out[key] for key in ("logits", "image_embeds", "pooler_output") if out.get(key) is not None)
    return out.get("last_hidden_state"), answer


@pytest.mark.parametrize("sizes", [SMALL, LARGER], ids=["small", "larger"])
@pytest.mark.parametrize("name", CASES)
def test_outputs_by_name(name, sizes):
    model = make(name, sizes)
    ours = revit_kernels.from_transformers(model)
    assert isinstance(ours, VarLenEva if "v3" in name else VarLenViT)
    x = torch.randn(2, 3, sizes["image_size"], sizes["image_size"], device=DEVICE)
    if "no head" in name:
        expected = model(x).last_hidden_state
        return assert_near(name, ours(x), expected)
    hidden, answer = theirs(model, x)
    out = hugging_face.encode(ours, x)
    assert_near(name, out.pooler_output, answer)
    assert_near(name, ours(x), answer)
    if hidden is not None:
        assert_near(name, out.last_hidden_state, hidden)
    patch = sizes["patch_size"]
    images = [torch.randn(3, h * patch, w * patch, device=DEVICE) for h, w in GRIDS]
    out, expected = hugging_face.encode(ours, images, grids=GRIDS), [theirs(model, image[None]) for image in images]
    assert_near(name, out.pooler_output, torch.cat([answer for _, answer in expected]))
    for actual, (hidden, _) in zip(out.last_hidden_state, expected):
        if hidden is not None:
            assert_near(name, actual, hidden[0])


@pytest.mark.parametrize("name", CASES)
def test_parameters_are_shared_where_only_their_names_differ(name):
    model = make(name)
    ours = revit_kernels.from_transformers(model)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in ours.parameters()}
    copied = {key for key, p in ours.named_parameters() if id(p) not in shared}
    joined = ("qkv.", "q_bias", "v_bias", "attn_pool.q.", "attn_pool.kv.", "cls_token", "pos_embed", "head.bias")
    assert shared and all(any(part in key for part in joined) for key in copied), copied


def test_gradients():
    """Through what was joined, as through what is shared."""
    model = make("DINOv3ViTModel")
    ours, x = revit_kernels.from_transformers(model), torch.randn(2, 3, 40, 40, device=DEVICE)
    theirs(model, x)[1].square().sum().backward()
    attention = model.model.layer[1].attention
    expected = [attention.q_proj.weight.grad, attention.v_proj.bias.grad, model.embeddings.cls_token.grad.clone()]
    model.zero_grad()
    ours(x).square().sum().backward()
    attention = ours.blocks[1].attn
    actual = [attention.qkv.weight.grad[:48], attention.v_bias.grad, ours.cls_token.grad]
    for a, e in zip(actual, expected):
        assert_near("gradient", a, e, scale=e.abs().max().item())


def old_names(state):
    """The keys that transformers 4 wrote of a ViT."""
    names = {"attention.q_proj": "attention.attention.query", "attention.k_proj": "attention.attention.key"}
    names |= {"attention.v_proj": "attention.attention.value", "attention.o_proj": "attention.output.dense"}
    names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "layers.": "encoder.layer."}
    for new, old in names.items():
        state = {key.replace(new, old): x for key, x in state.items()}
    return state


def test_keys_of_files_of_old_and_of_whole_models():
    state = make("ViTForImageClassification").state_dict()
    new, old = hugging_face.timm_state(state), hugging_face.timm_state(old_names(state))
    assert any("encoder.layer.0.attention.attention.query" in key for key in old_names(state))
    assert new.keys() == old.keys() and all(torch.equal(new[key], old[key]) for key in new)
    ours = VarLenViT(40, 8, embed_dim=48, depth=2, num_heads=2, mlp_ratio=100.5 / 48, num_classes=7)
    ours.load_state_dict(new, strict=True)
    tower = make("CLIPVisionModel").state_dict()
    whole = {f"vision_model.{key}": x for key, x in tower.items()}
    whole |= {"text_model.embeddings.position_ids": torch.zeros(1), "logit_scale": torch.zeros(())}
    whole |= {"text_projection.weight": torch.zeros(3, 3)}
    alone = hugging_face.timm_state(tower)
    both = hugging_face.timm_state(whole)
    assert alone.keys() == both.keys() and all(torch.equal(alone[key], both[key]) for key in alone)
    assert hugging_face.is_hugging_face(state) and hugging_face.is_hugging_face(whole)
    assert not hugging_face.is_hugging_face(new)


@torch.no_grad()
@pytest.mark.parametrize("old", [False, True], ids=["names of 5", "names of 4"])
def test_a_file_into_a_model_made_by_name(tmp_path, old):
    from safetensors.torch import save_file

    config = transformers.ViTConfig(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768)
    model = liven(transformers.ViTForImageClassification(config)).eval()
    state = old_names(model.state_dict()) if old else model.state_dict()
    save_file({key: x.contiguous() for key, x in state.items()}, tmp_path / "model.safetensors")
    ours = create_model("vit_tiny_patch16_224", depth=2, num_classes=config.num_labels).eval()
    load_checkpoint(ours, tmp_path / "model.safetensors")
    ours.blocks.apply(lambda m: setattr(m, "eps", 1e-12) if isinstance(m, torch.nn.LayerNorm) else None)
    ours.norm.eps = 1e-12
    x = torch.randn(1, 3, 224, 224)
    assert_near("logits", ours(x), model(x).logits)


def test_constants_of_its_image_processor():
    ours = revit_kernels.from_transformers(make("CLIPVisionModel"))
    pixels = torch.randint(256, (3, 40, 40), dtype=torch.uint8, device=DEVICE)
    mean, std = (torch.tensor(values, device=DEVICE)[:, None, None] for values in hugging_face.CLIP)
    with torch.no_grad():
        assert_near("pixels", ours([pixels]), ours([(pixels / 255 - mean) / std]))


def test_wrong_use():
    config = transformers.ViTMAEConfig(**SMALL, intermediate_size=100)
    with pytest.raises(NotImplementedError, match=r"from_transformers takes ViTModel, .*, got ViTMAEModel"):
        revit_kernels.from_transformers(transformers.ViTMAEModel(config))
    with pytest.raises(NotImplementedError, match=r"hidden_act must be one of .*, got 'relu'"):
        config = transformers.ViTConfig(**SMALL, intermediate_size=100, hidden_act="relu")
        revit_kernels.from_transformers(transformers.ViTModel(config))
    config = transformers.DINOv3ViTConfig(**SMALL, intermediate_size=100, value_bias=False)
    with pytest.raises(NotImplementedError, match=r"biases of q, k and v .*, got \(True, False, False\)"):
        revit_kernels.from_transformers(transformers.DINOv3ViTModel(config))
    with pytest.raises(ValueError, match=r"decoder\.weight is no key of a Vision Transformer in Hugging Face's layout"):
        hugging_face.timm_state({"decoder.weight": torch.zeros(1)})
