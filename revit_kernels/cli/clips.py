"""Arguments of commands for models of clips, and the sets of videos that they open."""

from __future__ import annotations

import argparse
from inspect import signature
from pathlib import Path

from revit_kernels.cli.arguments import count
from revit_kernels.data.datasets import open_set
from revit_kernels.data.image_set import ImageSet
from revit_kernels.data.video_sets import open_clips
from revit_kernels.data.videos import Sampling
from revit_kernels.models.checkpoints import description
from revit_kernels.models.registry import class_of, constructor_kwargs, model_file
from revit_kernels.serving.clips import UNIFORM, sampling


def stride(text: str) -> str:
    """A number of frames, or "uniform", as text: a model's file keeps it."""
    try:
        if text == UNIFORM or float(text) > 0:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number of frames above 0, or uniform, got {text!r}")


def views(text: str) -> tuple[int, int]:
    """(views, crops) of "4" or "4x3"."""
    try:
        found = [int(n) for n in text.lower().split("x")]
    except ValueError:
        found = []
    if len(found) not in (1, 2) or min(found) < 1:
        raise argparse.ArgumentTypeError(f"must be VIEWS or VIEWSxCROPS such as 4 or 4x3, got {text!r}")
    return found[0], (found + [1])[1]


def add_clips(parser, several: bool = False) -> None:
    """--frames, --stride and, with `several`, --clips and --run-length: which frames of a video the model sees."""
    group = parser.add_argument_group("videos (of a model of clips)")
    group.add_argument("--frames", type=count, metavar="N", help="frames of a clip (default: the model's)")
    group.add_argument(
        "--stride",
        type=stride,
        metavar="N",
        help="frames of the video from one of the clip's to the next; uniform: they are spread over the whole video "
        "(default: as the model was trained, else uniform)",
    )
    if several:
        group.add_argument(
            "--clips",
            type=views,
            metavar="VIEWS[xCROPS]",
            help="clips of each video, whose answers are averaged; of each frame 1 crop or 3, with a list of --grids "
            "or a policy (default: 1)",
        )
        group.add_argument(
            "--run-length",
            type=float,
            metavar="T",
            help="leave out tokens that differ from the one before at their place by at most T, in the mean of "
            "normalised pixels (run-length tokens; of models that attend over whole clips)",
        )


def described(name: str) -> dict:
    """{"name", "kwargs", ...} of a model by name or file. Raises ValueError if the file does not exist."""
    file = model_file(name)
    if Path(file).suffix != ".safetensors":
        return {"name": name, "kwargs": {}}
    return description(file) or {"name": None, "kwargs": {}}


def takes_clips(name: str) -> bool:
    """Whether a model, by name or file, is one of clips."""
    found = described(name)["name"]
    return found is not None and class_of(found).per_frame is not None


def _sampling(args, name: str, menu) -> Sampling:
    """The frames of a video that a model of clips, by name or file, sees."""
    found = described(name)
    menu = menu or found.get("resizable", {}).get("menu")
    defaults = {key: one.default for key, one in signature(class_of(found["name"])).parameters.items()}
    kwargs = defaults | constructor_kwargs(found["name"]) | found["kwargs"] | getattr(args, "model_args", {})
    own = menu[0][0] * kwargs.get("tubelet_size", 1) if menu else kwargs["num_frames"]
    return sampling(args.frames or own, args.stride or found.get("cfg", {}).get("stride"))


def open_data(args, name: str, menu=None) -> ImageSet:
    """The set of images, or of clips where the model takes these, that --data, --split and --root name.

    name: of the model, or its file. Raises ValueError for --frames and --stride of a model of images.
    """
    if takes_clips(name):
        return open_clips(args.data, _sampling(args, name, menu), args.split, root=args.root)
    if args.frames or args.stride:
        raise ValueError(f"--frames and --stride are of videos, and {name} is a model of images")
    return open_set(args.data, args.split, root=args.root)
