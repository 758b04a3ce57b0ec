"""Training a ReViT: the packed step against a plain double loop, exact resume, two processes, and wrong use."""

import copy
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from contract import DEVICE
from torch import nn

from revit_kernels import create_model
from revit_kernels.data.datasets import ArraySet
from revit_kernels.training.distillation import Objective, packed_logits
from revit_kernels.training.loader import Augmented, Order
from revit_kernels.training.optimiser import MuonAdamW, layer_of, learning_rate, parameter_groups
from revit_kernels.training.run_folder import RunFolder
from revit_kernels.training.trainer import Recipe, Trainer, score_lengths

MENU = ((4, 4), (3, 3), (2, 2))
SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3}


class FakeSet(ArraySet):
    """Images whose class is the channel that is brightest."""

    def __init__(self, count=48, size=(16, 16)):
        rng = np.random.default_rng(0)
        targets = rng.integers(0, 3, count)
        array = rng.integers(0, 120, (count, *size, 3), dtype=np.uint8)
        array[np.arange(count), :, :, targets] += 100
        super().__init__("fake", ("red", "green", "blue"), targets, array)


def make(dtype=torch.float32, embedding="resize", **kwargs):
    torch.manual_seed(0)
    model = create_model("vit_tiny_patch16_224", **SMALL | {"init_values": 0.5} | kwargs)
    model.make_resizable(MENU, embedding=embedding)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return model.to(DEVICE, dtype)


# ---------------------------------------------------------------------- one packed pass is a double loop


def plain_logits(model, x, grid, row):
    """The answers at one length in plain PyTorch, each image as its own batch of one. x: (3, height, width)"""

    def norm(m, y):
        weight, bias = (m.weight, m.bias) if row == 0 else (m.shorter_weight[row - 1], m.shorter_bias[row - 1])
        return F.layer_norm(y, y.shape[-1:], weight, bias, m.eps)

    patch = model.patch_embed.patch_size[0]
    size = tuple(g * patch for g in grid)
    x = x[None] if tuple(x.shape[1:]) == size else F.interpolate(x[None], size, mode="bicubic", antialias=True)
    y = model.patch_embed.proj(x).flatten(2).mT
    table = model.pos_embed[:, 1:].unflatten(1, MENU[0]).permute(0, 3, 1, 2)
    if grid != MENU[0]:
        table = F.interpolate(table, grid, mode="bicubic", antialias=True)
    y = torch.cat([model.cls_token + model.pos_embed[:, :1], y + table.flatten(2).mT], 1)
    for block in model.blocks:
        z = norm(block.norm1, y)
        q, k, v = block.attn.qkv(z).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        attended = (q @ k.mT * 16**-0.5).softmax(-1) @ v
        y = y + block.ls1.gamma * block.attn.proj(attended.transpose(1, 2).flatten(2))
        hidden = F.gelu(block.mlp.fc1(norm(block.norm2, y)))
        y = y + block.ls2.gamma * block.mlp.fc2(hidden)
    return model.head(norm(model.norm, y)[:, 0])[0]


def plain_loss(model, images, targets, weight, temperature):
    rows = []
    for row, grid in enumerate(MENU):
        rows.append(torch.stack([plain_logits(model, x, grid, row) for x in images]))
    teacher = (rows[0].detach() / temperature).softmax(-1)
    losses = [F.cross_entropy(rows[0], targets)]
    for z in rows[1:]:
        divergence = (teacher * (teacher.log() - (z / temperature).log_softmax(-1))).sum(-1).mean()
        losses.append((1 - weight) * F.cross_entropy(z, targets) + weight * temperature**2 * divergence)
    return sum(losses) / len(losses)


def gradients(model, loss):
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("weight, temperature", [(0.5, 1.0), (0.7, 2.0), (0.0, 1.0)])
def test_packed_step_equals_a_plain_double_loop(weight, temperature):
    """Loss and every gradient: in fp32 at most twice the plain loop's own error, in fp64 the same in its units.

    The errors are relative to each tensor's largest value, the plain loop's the worst of all its tensors: by chance
    alone one of a hundred is nearer the exact value than another way of adding could be.
    """
    x = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    targets = torch.tensor([0, 1, 2, 1, 0], device=DEVICE)

    def packed(dtype):
        model = make(dtype)
        logits = packed_logits(model, x.to(dtype), MENU, 1)
        return gradients(model, Objective(weight, temperature)(logits, targets)[0])

    def plain(dtype):
        model = make(dtype)
        return gradients(model, plain_loss(model, x.to(dtype), targets, weight, temperature))

    exact, rough = plain(torch.float64), plain(torch.float32)

    def apart(found, name):
        return ((found[name] - exact[name]).abs().max() / exact[name].abs().max()).item()

    allowed = 2 * max(apart(rough, name) for name in exact)
    for dtype in (torch.float32, torch.float64):
        ours = packed(dtype)
        units = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        for name in exact:
            assert ours[name] is not None, name
            assert apart(ours, name) <= allowed * units, f"{name} in {dtype}"


def test_longest_is_not_taught():
    model = make()
    logits = torch.randn(3, 4, 3, requires_grad=True)
    Objective(1.0, 1.0)(logits, torch.zeros(4, dtype=torch.long))[0].backward()
    alone = torch.autograd.grad(F.cross_entropy(logits[0], torch.zeros(4, dtype=torch.long)) / 3, logits)[0]
    torch.testing.assert_close(logits.grad[0], alone[0])
    assert model.menu == MENU


def test_soft_targets():
    logits = torch.randn(3, 4, 3)
    hard = torch.tensor([0, 2, 1, 1])
    soft = F.one_hot(hard, 3).float()
    torch.testing.assert_close(Objective()(logits, hard)[0], Objective()(logits, soft)[0])


# ---------------------------------------------------------------------- recipe


def test_layers_and_decay():
    model = make()
    matcher = model.group_matcher()
    layers = {name: layer_of(name, matcher, 2) for name, _ in model.named_parameters()}
    assert layers["pos_embed"] == layers["patch_embed.proj.weight"] == 0
    assert layers["blocks.1.norm1.shorter_weight"] == 2 and layers["head.weight"] == layers["norm.weight"] == 3
    groups = parameter_groups(model, 0.1, 0.5)
    of = {id(p): g for g in groups for p in g["params"]}
    assert len(of) == len(list(model.parameters()))
    assert of[id(model.blocks[0].norm1.shorter_weight)]["weight_decay"] == 0
    assert of[id(model.blocks[0].mlp.fc1.weight)]["weight_decay"] == 0.1
    assert of[id(model.head.weight)]["scale"] == 1 and of[id(model.cls_token)]["scale"] == 0.125


def test_muon_takes_the_weights_of_the_blocks_linear_layers():
    model = make()
    optimiser = MuonAdamW(model, 1e-2, 0.1, 0.5)
    muon, adamw = ({id(p): g for g in o.param_groups for p in g["params"]} for o in (optimiser.muon, optimiser.adamw))
    expected = [w for b in model.blocks for w in (b.attn.qkv, b.attn.proj, b.mlp.fc1, b.mlp.fc2)]
    assert set(muon) == {id(layer.weight) for layer in expected} and not set(muon) & set(adamw)
    assert set(muon) | set(adamw) == {id(p) for p in model.parameters()}
    assert muon[id(model.blocks[0].attn.qkv.weight)]["scale"] == 0.25
    for block in model.blocks:
        block.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing to train"):
        MuonAdamW(model, 1e-2, 0.1, 0.5)


def test_learning_rate():
    rates = [learning_rate(step, 100, 10, 1.0, 0.1) for step in range(100)]
    assert rates[0] == 0.1 and max(rates) == rates[9] == rates[10] == 1.0 and rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_order_begins_anywhere_and_is_dealt_out():
    whole = list(Order(50, 8, seed=1, epoch=2))
    assert list(Order(50, 8, seed=1, epoch=2, start=3)) == whole[3:]
    assert whole != list(Order(50, 8, seed=1, epoch=3))
    halves = [list(Order(50, 4, seed=1, epoch=2, rank=rank, world=2)) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        assert sorted(halves[0][step] + halves[1][step]) == sorted(batch)


def test_augmentation_depends_on_the_seed_alone():
    pytest.importorskip("torchvision")
    from revit_kernels.training.augmentation import augmentation, mixing

    images = Augmented(FakeSet(), (16, 16), augmentation((16, 16), "resized", True, (1, 5), 0.2))
    first = images[3, 77][0]
    torch.rand(5)
    assert torch.equal(images[3, 77][0], first) and not torch.equal(images[3, 78][0], first)
    assert first.dtype == torch.uint8 and first.shape == (16, 16, 3)
    mixed, soft = mixing(3, 0.8, 1.0)(torch.stack([images[i, 0][0] for i in range(4)]), torch.tensor([0, 1, 2, 0]))
    assert mixed.shape == (4, 16, 16, 3) and mixed.dtype == torch.uint8
    torch.testing.assert_close(soft.sum(1), torch.ones(4))


# ---------------------------------------------------------------------- runs


RECIPE = Recipe(epochs=2, batch=8, lr=3e-3, ema=0.9, layer_decay=0.8)


def trainer(path, recipe=RECIPE, resume=False, **kwargs):
    folder = RunFolder(path, asdict(recipe), resume) if path else None
    model = make(drop_path_rate=0.2, **kwargs)
    return Trainer(model, Augmented(FakeSet(), (16, 16)), recipe, folder)


def assert_same_state(first, second):
    for key, value in first["model"].items():
        assert torch.equal(value, second["model"][key]), key
    for key, value in first["average"].items():
        assert torch.equal(value, second["average"][key]), key
    assert first["step"] == second["step"]


SAMPLED = replace(RECIPE, lengths=2, teacher="average")
MUON = replace(RECIPE, optimiser="muon")


@pytest.mark.parametrize("recipe, killed_after", [(RECIPE, 4), (RECIPE, 6), (RECIPE, 9), (SAMPLED, 4), (MUON, 4)])
def test_resumed_run_is_bitwise_the_same(tmp_path, recipe, killed_after):
    whole = trainer(tmp_path / "whole", recipe)
    whole.train()
    killed = trainer(tmp_path / "killed", recipe)
    killed.train(save_every=0.0, stop_after=killed_after)  # the state is written every step: a kill loses the last
    again = trainer(tmp_path / "killed", recipe, resume=True)
    again.train()
    assert again.step == 12
    assert_same_state(whole.state(), again.state())
    logs = [(tmp_path / name / "log.csv").read_text().splitlines() for name in ("whole", "killed")]
    without_rate = [[line.split(",")[:3] + line.split(",")[4:] for line in log] for log in logs]
    assert without_rate[0] == without_rate[1]


def test_the_average_of_a_short_run_has_left_its_first_weights():
    run = trainer(None, replace(RECIPE, ema=0.999), dtype=torch.float64)
    expected = None
    for step in range(5):
        run.train(stop_after=step + 1)
        weights = run.model.norm.weight.detach().clone()
        expected = weights if step == 0 else expected + (1 - (1 + step) / (10 + step)) * (weights - expected)
    torch.testing.assert_close(run.average.module.norm.weight, expected)


def test_lengths_of_a_step_are_drawn():
    run, other = (trainer(None, replace(SAMPLED, seed=seed)) for seed in (0, 1))
    drawn = [run.lengths_of(step) for step in range(50)]
    assert set(drawn) == {(0, 1), (0, 2)}
    assert drawn == [run.lengths_of(step) for step in range(50)] != [other.lengths_of(step) for step in range(50)]
    assert trainer(None).lengths_of(0) == (0, 1, 2)


def test_a_step_of_some_lengths_taught_by_the_average():
    """Its losses, and the gradients, are those of each length by itself; the log's means count the steps of each."""
    run = trainer(None, replace(SAMPLED, clip=0.0), dtype=torch.float64)
    model, images = run.model.eval(), torch.from_numpy(FakeSet().array[:8]).to(DEVICE)
    targets = torch.from_numpy(FakeSet().targets[:8]).to(DEVICE)
    with torch.no_grad():
        for p in run.average.parameters():
            p.mul_(1.5)  # else it would answer as the model does
    z = {i: model(images, grids=[MENU[i]] * 8, channels_last=True) for i in run.lengths_of(0)}
    (short,) = set(z) - {0}
    with torch.no_grad():
        teacher = run.average.module.eval()(images, grids=[MENU[0]] * 8, channels_last=True).log_softmax(-1)
    truth = {i: F.cross_entropy(logits, targets) for i, logits in z.items()}
    apart = F.kl_div(z[short].log_softmax(-1), teacher, reduction="batchmean", log_target=True)
    losses = {0: truth[0], short: 0.5 * truth[short] + 0.5 * apart}
    expected = torch.autograd.grad(sum(losses.values()) / 2, list(model.parameters()), materialize_grads=True)
    run.optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    for group in run.optimiser.param_groups:
        group["scale"] = 1.0
    before = [p.detach().clone() for p in model.parameters()]
    found = run.train_step(images, targets)
    lr = run.optimiser.param_groups[0]["lr"]
    assert found.isnan().tolist() == [i not in losses for i in range(3)]
    torch.testing.assert_close(found[[0, short]], torch.stack([losses[0], losses[short]]).detach())
    for old, new, gradient in zip(before, model.parameters(), expected):
        torch.testing.assert_close(old - new, lr * gradient)


def test_it_learns():
    run = trainer(None, Recipe(epochs=12, batch=8, lr=3e-3))
    before = score_lengths(run.model.eval(), FakeSet())
    after = score_lengths(run.train().eval(), FakeSet())
    assert list(after) == ["accuracy_4x4", "accuracy_3x3", "accuracy_2x2"]
    assert min(after.values()) > max(before.values())


def test_accumulation_changes_nothing_but_rounding():
    whole, parts = trainer(None, Recipe(batch=8)), trainer(None, Recipe(batch=8, accumulate=2))
    for run in (whole, parts):
        for m in run.model.modules():
            if type(m).__name__ == "DropPath":
                m.drop_prob = 0.0
    images = torch.from_numpy(FakeSet().array[:8]).to(DEVICE)
    targets = torch.from_numpy(FakeSet().targets[:8]).to(DEVICE)
    exact = trainer(None, Recipe(batch=8))
    for run in (whole, parts):
        run.optimiser = torch.optim.SGD(run.model.parameters(), lr=0.1)
        for group in run.optimiser.param_groups:
            group["scale"] = 1.0
        run.train_step(images, targets)
    moved = [
        (a - c).norm() / (1e-12 + (b - c).norm())
        for a, b, c in zip(whole.model.parameters(), parts.model.parameters(), exact.model.parameters())
        if (b - c).norm() > 1e-4 * b.norm()
    ]
    assert moved and max((m - 1).abs() for m in moved) < 100 * torch.finfo(torch.float32).eps ** 0.5


WORKER = """
import sys, torch, torch.distributed as dist
sys.path[:0] = {path!r}
from test_training import Recipe, trainer
if "RANK" in __import__("os").environ:
    dist.init_process_group("gloo")
torch.set_num_threads(1)
recipe = Recipe(epochs=1, batch=int(sys.argv[1]), lr=1e-3, lengths={lengths}, seed=1)
run = trainer(None, recipe, dtype=torch.float64, embedding="per_length")
for m in run.model.modules():
    if type(m).__name__ == "DropPath":
        m.drop_prob = 0.0
run.train(stop_after=3)
if run.rank == 0:
    torch.save(run.model.state_dict(), sys.argv[2])
"""


@pytest.mark.parametrize("lengths", [0, 2])
def test_two_processes_equal_one_with_the_double_batch(tmp_path, lengths):
    """In fp64, so that what differs but by rounding is far from what differs at all."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(path=sys.path, lengths=lengths))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    subprocess.run([sys.executable, script, "8", one], check=True, env=env)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launch, script, "4", two], check=True, env=env, capture_output=True)
    first, second = torch.load(one), torch.load(two)
    start = make(torch.float64, "per_length", drop_path_rate=0.2).state_dict()
    for key, value in first.items():
        assert (value - start[key].cpu()).abs().max() > 0, f"{key} was not trained"
        # AdamW divides by the gradient's own size: an error of rounding in it is one of rounding in the step
        assert (value - second[key]).abs().max() <= 1e-3 * torch.finfo(torch.float64).eps ** 0.5, key


# ---------------------------------------------------------------------- wrong use


def test_folder_of_another_run(tmp_path):
    RunFolder(tmp_path / "run", {"lr": 1})
    with pytest.raises(ValueError, match="go on with --resume"):
        RunFolder(tmp_path / "run", {"lr": 1})
    with pytest.raises(ValueError, match=r"other settings \(lr\)"):
        RunFolder(tmp_path / "run", {"lr": 2}, resume=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(ValueError, match="no run that could be resumed"):
        RunFolder(tmp_path / "other", {}, resume=True)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".run.json.4711.tmp").write_text("{")  # before its settings had their name
    assert RunFolder(tmp_path / "killed", {"lr": 1}, resume=True).state() is None


def test_broken_state(tmp_path):
    folder = RunFolder(tmp_path / "run", {})
    (tmp_path / "run" / "state.pt").write_bytes(b"PK\x03\x04 broken")
    with pytest.raises(ValueError, match=r"state\.pt cannot be read"):
        folder.state()


def test_full_disk_keeps_the_state_of_before(tmp_path, monkeypatch):
    run = trainer(tmp_path / "run")
    run.train()
    before = (tmp_path / "run" / "state.pt").read_bytes()

    def full(state, path):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(RuntimeError, match="No space left on device"):
        run.folder.save_state(run.state())
    assert (tmp_path / "run" / "state.pt").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "run").iterdir() if "state" in p.name) == ["state.pt"]


def test_wrong_recipes():
    wrongs = ({"epochs": 0}, {"batch": 9, "accumulate": 2}, {"ema": 1.0}, {"lengths": 1}, {"teacher": "other"})
    for wrong in (*wrongs, {"optimiser": "sgd"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Recipe(**wrong)
    with pytest.raises(ValueError, match="smaller batch"):
        Order(5, 8, 0, 0)
    with pytest.raises(ValueError, match="made resizable"):
        Trainer(nn.Module.__new__(type("Plain", (nn.Module,), {"menu": None})), None, RECIPE)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Objective(1.5)


def test_deep_copies_are_apart():
    model = make()
    other = copy.deepcopy(model)
    state = {k: v + 1 for k, v in model.state_dict().items() if "shorter" not in k}
    before = model.blocks[0].norm1.shorter_weight.clone()
    other.load_state_dict(state)
    assert torch.equal(model.blocks[0].norm1.shorter_weight, before)
    assert torch.equal(other.blocks[0].norm1.shorter_weight, (model.blocks[0].norm1.weight + 1).expand(2, -1))
