"""FSDP2: weights shared out among the processes of a run, and a state that any number of them can go on from."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from revit_kernels.files import write_whole

LATEST = "state.json"  # names the folder of the state, and is written last


def shard(model: nn.Module, bfloat16: bool = False) -> None:
    """Share the parameters of each block, and of the rest, out among all processes, in place.

    bfloat16: compute with bfloat16 weights; gradients are added up in float32, and the weights stay float32
    """
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy()
    if bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def gather(model: nn.Module) -> dict[str, Tensor]:
    """The whole state_dict on the CPU, in the first process; empty in the others. Called by all of them."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save(folder: Path, model: nn.Module, optimiser, numbers: dict) -> None:
    """Write the state, each process its part. Called by all processes; a state of before is there until this one is.

    numbers: JSON, the first process's; "step" among them
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    place = folder / f"state-{numbers['step']:08d}"
    if first:
        shutil.rmtree(place, ignore_errors=True)  # what a killed run has left of it
    weights, moments = get_state_dict(model, optimiser)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that one process saves alone
        dcp.save({"model": weights, "optimiser": moments}, checkpoint_id=place)
    if first:
        write_whole(folder / LATEST, lambda temporary: temporary.write_text(json.dumps(numbers)))
        for other in folder.glob("state-*"):
            if other != place:
                shutil.rmtree(other, ignore_errors=True)


def load(folder: Path, model: nn.Module, optimiser) -> dict | None:
    """Load the state that `save` wrote last, by however many processes; returns its numbers, None if there is none.

    Raises ValueError where it cannot be read.
    """
    if not (folder / LATEST).exists():
        return None
    try:
        numbers = json.loads((folder / LATEST).read_text())
        weights, moments = get_state_dict(model, optimiser)
        state = {"model": weights, "optimiser": moments}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(state, checkpoint_id=folder / f"state-{numbers['step']:08d}")
        set_state_dict(model, optimiser, model_state_dict=state["model"], optim_state_dict=state["optimiser"])
    except Exception as error:  # files of several kinds may be broken
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"the state in {folder} cannot be read: {why}; without it the run starts anew") from error
    return numbers
