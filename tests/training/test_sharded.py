"""FSDP2 and DDP on two processes of one machine: the weights of one process, and runs that are killed and go on."""

import os
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from test_training import MENU, SMALL, FakeSet

from revit_kernels import cli
from revit_kernels.models.registry import create_model
from revit_kernels.training.loader import Augmented
from revit_kernels.training.run_folder import RunFolder
from revit_kernels.training.trainer import Recipe, Trainer

STEPS = 20
IMAGES = Augmented(FakeSet(), (16, 16))
EPOCHS = STEPS / (len(IMAGES) // 8)
CLOSE = 1e-3 * torch.finfo(torch.float64).eps ** 0.5  # as in test_training: AdamW makes of a rounding one of its own

WORKER = """
import os, signal, sys, torch, torch.distributed as dist
sys.path[:0] = {path!r}
from pathlib import Path
from test_sharded import *
dist.init_process_group("gloo")
torch.set_num_threads(1)
rank, world, folder = dist.get_rank(), dist.get_world_size(), Path(sys.argv[2])


def killed(step, steps, losses):
    if step == 12:
        dist.barrier()
        os.kill(os.getpid(), signal.SIGKILL)


seen = []
see = lambda step, steps, losses: seen.append(losses)
if sys.argv[1] == "whole":
    run = fsdp_run(folder / "whole", world)
    run.train(progress=see)
    torch.save(seen, folder / f"losses{{rank}}.pt")
    if rank == 0:
        torch.save(run.whole.state_dict(), folder / "whole.pt")
    for options in RESIZABLE:  # DDP: two steps, the second of which tells unused parameters
        Trainer(make(**options), IMAGES, Recipe(epochs=1, batch=4)).train(stop_after=2)
    unused = make()
    unused.of_no_use = torch.nn.Parameter(torch.zeros(1))
    try:
        Trainer(unused, IMAGES, Recipe(epochs=1, batch=4)).train(stop_after=1)
    except ValueError as error:
        (folder / f"unused{{rank}}").write_text(str(error))
    fsdp_run(folder / "killed", world).train(save_every=0, progress=killed)
else:
    run = fsdp_run(folder / "killed", world, resume=True)
    run.train(progress=see)
    if rank == 0:
        torch.save((run.whole.state_dict(), run.began_at, seen), folder / "two.pt")
"""
RESIZABLE = [
    {"embedding": "resize", "positions": "interpolate", "norms": "per_length"},
    {"embedding": "per_length", "positions": "per_length", "norms": "shared"},
    {"embedding": "patch", "positions": "per_length", "norms": "per_length"},
]


def make(**options):
    torch.manual_seed(0)
    return create_model("vit_tiny_patch16_224", **SMALL).make_resizable(MENU, **options)


def fsdp_run(path, world, resume=False):
    """20 steps of 8 images, in float64, with activation checkpointing."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    if rank:  # the first process makes the folder
        dist.barrier()
    folder = RunFolder(path, {}, resume or bool(rank))
    if dist.is_initialized() and not rank:
        dist.barrier()
    model = make().double()
    model.set_grad_checkpointing(True)
    run = Trainer(model, IMAGES, Recipe(epochs=EPOCHS, batch=8 // world, lr=1e-3), folder, fsdp=True)
    assert run.steps == STEPS
    load = run._load

    def loading():
        load()
        run.began_at = run.step

    run._load = loading
    return run


def launch(what, folder, script):
    script.write_text(WORKER.format(path=sys.path))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, script, what, folder], env=env, capture_output=True, text=True, timeout=300)


def same(state, expected):
    start = make().double().state_dict()
    for key, value in expected.items():
        assert (value - start[key]).abs().max() > 0, f"{key} was not trained"
        assert (value - state[key]).abs().max() <= CLOSE, key


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """The weights that one process trains, and the losses of each step."""
    run, losses = fsdp_run(tmp_path_factory.mktemp("single") / "run", 1), []
    run.train(progress=lambda step, steps, own: losses.append(own))
    return run.whole.state_dict(), losses


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes left: a whole run, and one that was killed -9 behind its 12th step."""
    folder = tmp_path_factory.mktemp("two")
    died = launch("whole", folder, folder / "worker.py")
    assert died.returncode != 0 and (folder / "killed" / "state.json").exists(), died.stderr[-3000:]
    return folder


def same_losses(losses, expected):
    assert len(losses) == len(expected) > 0
    for own, other in zip(losses, expected):
        assert (own - other).abs().max() <= CLOSE


def test_two_processes_equal_one(single, folder):
    """The weights, and the loss of each step as each process knows it: of all images, not of its share."""
    same(torch.load(folder / "whole.pt"), single[0])
    for rank in (0, 1):
        same_losses(torch.load(folder / f"losses{rank}.pt"), single[1])


def test_a_killed_run_goes_on_with_two_and_with_one(single, folder):
    alone = folder / "alone"
    shutil.copytree(folder / "killed", alone)
    done = launch("resume", folder, folder / "worker.py")
    assert done.returncode == 0, done.stderr[-3000:]
    state, began, losses = torch.load(folder / "two.pt")
    assert began in (11, 12)
    same(state, single[0])
    same_losses(losses, single[1][began:])
    run, losses = fsdp_run(alone, 1, resume=True), []
    run.train(progress=lambda step, steps, own: losses.append(own))
    assert run.began_at == began
    same_losses(losses, single[1][began:])
    same(run.whole.state_dict(), single[0])
    written = create_model(str(alone / "model.safetensors")).state_dict()
    for key, value in run.whole.state_dict().items():
        assert torch.equal(written[key], value), key
    assert len(list(alone.glob("state-*"))) == 1


def test_ddp_touches_every_parameter_or_says_which_not(folder):
    for rank in (0, 1):
        message = (folder / f"unused{rank}").read_text()
        assert message == "a step touches 1 parameters not at all (of_no_use): freeze them"


def test_what_fsdp_cannot(tmp_path):
    with pytest.raises(NotImplementedError, match="an average of the weights is not kept with FSDP"):
        Trainer(make(), IMAGES, Recipe(ema=0.9), fsdp=True)


def test_the_command(tmp_path, capsys):
    """One process: the run's state is sharded, and its model whole; a step's images stay the same."""
    arguments = [
        "train",
        "vit_tiny_patch16_224",
        "--data",
        "digits",
        "--menu",
        "4x4,2x2",
        "--output",
        f"{tmp_path}/run",
    ]
    arguments += ["--model-args", "img_size=8,patch_size=2,embed_dim=16,depth=1,num_heads=2", "--epochs", "0.1", "-q"]
    assert cli.main([*arguments, "--fsdp", "--checkpointing", "--batch", "32"]) == 0
    assert (tmp_path / "run" / "state.json").exists() and not (tmp_path / "run" / "state.pt").exists()
    assert create_model(str(tmp_path / "run")).num_classes == 10
    assert cli.main([*arguments, "--fsdp", "--checkpointing", "--batch", "16", "--resume"]) == 0  # 32, as it began
    (tmp_path / "run" / "state.json").write_text("{}")
    assert cli.main([*arguments, "--fsdp", "--checkpointing", "--resume"]) == 2
    assert "cannot be read: 'step'; without it the run starts anew" in capsys.readouterr().err
