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


def patches_of(images, patch, size):
    """The images as SigLIP 2's processor gives them."""
    batch = {"pixel_values": torch.zeros(len(images), size, 3 * patch * patch)}
    batch["pixel_attention_mask"] = torch.zeros(len(images), size, dtype=torch.int32)
    batch["spatial_shapes"] = torch.zeros(len(images), 2, dtype=torch.long)
    for i, image in enumerate(images):
        cells = image.unflatten(1, (-1, patch)).unflatten(3, (-1, patch)).permute(1, 3, 2, 4, 0)
        count = cells.shape[0] * cells.shape[1]
        batch["pixel_values"][i, :count] = cells.reshape(count, -1).cpu()
        batch["pixel_attention_mask"][i, :count] = 1
        batch["spatial_shapes"][i] = torch.tensor(cells.shape[:2])
    return {key: x.to(DEVICE) for key, x in batch.items()}


@pytest.mark.parametrize("head", [True, False], ids=["pooled", "no head"])
@pytest.mark.parametrize("dim, heads, depth, patch", [(48, 2, 2, 8), (96, 3, 3, 14)], ids=["small", "larger"])
def test_siglip2_takes_its_processors_batches(tmp_path, dim, heads, depth, patch, head):
    """The same outputs by name, image by image, and gradients; from its file too."""
    from safetensors.torch import save_file

    sizes = {"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": heads, "patch_size": patch}
    config = transformers.Siglip2VisionConfig(**sizes, intermediate_size=100, num_patches=25, vision_use_head=head)
    model = liven(transformers.Siglip2VisionModel(config)).to(DEVICE).eval()
    ours = revit_kernels.from_transformers(model)
    grids = [(5, 5), (3, 4), (1, 7), (6, 4)]
    images = [torch.randn(3, h * patch, w * patch, device=DEVICE) for h, w in grids]
    batch = patches_of(images, patch, 30)
    expected, actual = model(**batch), hugging_face.encode(ours, batch)
    for i, (h, w) in enumerate(grids):
        assert_near("hidden", actual.last_hidden_state[i], expected.last_hidden_state[i, : h * w])
    assert ours.pretrained_cfg["interpolation"] == "bilinear" and ours.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    if not head:
        return
    assert_near("pooled", actual.pooler_output, expected.pooler_output)
    assert_near("images", ours(images, grids=grids), expected.pooler_output)
    expected.pooler_output.square().sum().backward()
    theirs = model.embeddings.patch_embedding.weight.grad.unflatten(1, (patch, patch, 3)).permute(0, 3, 1, 2)
    ours(batch).square().sum().backward()
    assert_near("gradient", ours.patch_embed.proj.weight.grad, theirs, scale=theirs.abs().max().item())
    save_file(
        {f"vision_model.{key}": x.contiguous() for key, x in model.state_dict().items()}, tmp_path / "w.safetensors"
    )
    made = VarLenViT(5 * patch, patch, embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=100.5 / dim, **SIGLIP2)
    made.pos_interpolation = "bilinear"
    load_checkpoint(made.to(DEVICE).eval(), tmp_path / "w.safetensors")
    made.apply(lambda m: setattr(m, "eps", 1e-6) if isinstance(m, torch.nn.LayerNorm) else None)
    assert_near("from its file", made(batch), expected.pooler_output)


SIGLIP2 = dict(class_token=False, global_pool="map", fc_norm=False, num_classes=0, act_layer="gelu_tanh")


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
    with pytest.raises(NotImplementedError, match=r"takes ViT, DeiT, .* and V-JEPA 2, got ViTMAEModel"):
        revit_kernels.from_transformers(transformers.ViTMAEModel(config))
    with pytest.raises(NotImplementedError, match=r"hidden_act must be one of .*, got 'relu'"):
        config = transformers.ViTConfig(**SMALL, intermediate_size=100, hidden_act="relu")
        revit_kernels.from_transformers(transformers.ViTModel(config))
    config = transformers.BeitConfig(**SMALL, intermediate_size=100)
    with pytest.raises(NotImplementedError, match="got BeitModel"):  # its positions are biases of attention
        revit_kernels.from_transformers(transformers.BeitModel(config))
    config = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=12, depths=[1], num_heads=[2])
    with pytest.raises(NotImplementedError, match="got SwinModel"):
        revit_kernels.from_transformers(transformers.SwinModel(config))
    config = transformers.DINOv3ViTConfig(**SMALL, intermediate_size=100, value_bias=False)
    with pytest.raises(NotImplementedError, match=r"biases of q, k and v .*, got \(True, False, False\)"):
        revit_kernels.from_transformers(transformers.DINOv3ViTModel(config))
    with pytest.raises(ValueError, match=r"decoder\.weight is no key of a Vision Transformer in Hugging Face's layout"):
        hugging_face.timm_state({"decoder.weight": torch.zeros(1)})
