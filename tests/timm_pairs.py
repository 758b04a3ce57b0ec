"""A model of timm's and ours of the same weights, and how near their answers must be."""

import os

import pytest
import torch
from contract import DEVICE

from revit_kernels.models.registry import registry
from revit_kernels.models.vit import VarLenViT

timm = pytest.importorskip("timm")

LIMIT = 1e-4  # of outputs and gradients in fp32, relative to the largest where that exceeds one
LARGEST = 40_000_000  # parameters; larger entries are tried with two heads, everything else as it is
WHOLE = os.environ.get("REVIT_WHOLE_ZOO") == "1"  # try every entry up to 130 M parameters as it is: half an hour
GRID = (5, 4)  # of the models' position tables: not square, so that rows and columns cannot be mistaken
GRIDS = [(3, 5), (6, 2), (5, 4), (1, 1), (5, 4)]  # of the mixed batches


def assert_near(name, actual, expected, scale=None):
    """The difference is within LIMIT of the largest value expected, or of `scale`."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
    if expected.numel():
        scale = max(1.0, expected.abs().max().item()) if scale is None else scale
        error = (actual - expected).abs().max().item()
        assert error <= LIMIT * scale, f"{name}: differs by {error:.2e} where {LIMIT * scale:.2e} is allowed"


def liven(model, seed=0):
    """Give every parameter values of its own, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            if name.endswith("gamma"):
                p.copy_(0.3 + 0.1 * noise)
            elif p.ndim > 1 and p.shape[0] > 1:
                p.copy_(noise * p.shape[1:].numel() ** -0.5)
            elif name.endswith("weight"):
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(0.2 * noise)
    return model


def small_kwargs(name):
    """Arguments that make an entry small without changing what it computes: two blocks, GRID patches, five classes."""
    if WHOLE:
        return {}
    entry = registry()["models"][name]
    kwargs = entry["kwargs"]
    patch = kwargs.get("patch_size", 16)
    small = {"depth": 2, "img_size": tuple(g * patch for g in GRID), "num_classes": 5}
    if entry["parameters"] > LARGEST:
        heads = kwargs.get("num_heads", 12)
        small |= {"num_heads": 2, "embed_dim": 2 * kwargs.get("embed_dim", 768) // heads}
    if "num_kv_heads" in kwargs:  # a number for each block: as many as heads in the first, fewer in the second or not
        small["num_kv_heads"] = [small.get("num_heads", heads_of(name)), small.get("num_heads", heads_of(name)) // 2]
    return small


def heads_of(name):
    return registry()["models"][name]["kwargs"].get("num_heads", 12)


def unwritten(name):
    """What tells timm not to draw the weights, which takes long; its Eva cannot be told."""
    return {} if registry()["models"][name].get("class") == "VarLenEva" else {"weight_init": "skip"}


def make_timm(name, seed=0, **kwargs):
    return liven(timm.create_model(name, **unwritten(name), **kwargs), seed).to(DEVICE).eval()


def pair(name="vit_tiny_patch16_224", **kwargs):
    """timm's model, its parameters alive, and ours that shares them."""
    model = make_timm(name, **small_kwargs(name) | kwargs)
    return model, VarLenViT.from_timm(model)


def batch(model, count=2, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, model.in_chans, *model.patch_embed.img_size, generator=generator).to(DEVICE)


def mixed(model, grids=GRIDS, seed=1):
    """Images (channels, height, width) whose sizes are those grids of whole patches."""
    generator = torch.Generator().manual_seed(seed)
    h, w = model.patch_embed.patch_size
    shapes = [(model.in_chans, rows * h, columns * w) for rows, columns in grids]
    return [torch.randn(shape, generator=generator).to(DEVICE) for shape in shapes]


def seeds(out):
    return torch.cos(torch.arange(out.numel(), device=out.device)).view_as(out).to(out.dtype)


def gradients(model, out):
    """The gradient of every parameter, by name, None where there is none."""
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad((out * seeds(out)).sum(), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, grads))


def assert_gradients_near(actual, expected, exact):
    """Every gradient is near timm's; where it is not, it must be nearer to the exact one than timm's own.

    exact: a function that gives the gradients in fp64. Some are sums that cancel: there fp32 itself is farther off.
    """
    assert actual.keys() == expected.keys()
    far = []
    for name, grad in expected.items():
        if grad is None:
            assert actual[name] is None or not actual[name].any(), name
            continue
        assert grad.abs().max() > 0, f"{name}: the test would prove nothing"
        try:
            assert_near(name, actual[name], grad, scale=grad.abs().max().item())
        except AssertionError as error:
            far.append((name, error))
    truth = exact() if far else {}
    for name, error in far:
        ours, theirs = ((grads[name] - truth[name]).abs().max() for grads in (actual, expected))
        assert ours <= theirs, f"{error}; {ours:.2e} from the exact gradient, timm's {theirs:.2e}"
