"""What the commands know of models of clips: their arguments, and the sets of videos that they take."""

from __future__ import annotations

import argparse
from pathlib import Path

from revit_kernels.cli.arguments import count
from revit_kernels.data.datasets import open_set
from revit_kernels.data.image_set import ImageSet
from revit_kernels.data.video_sets import open_clips
from revit_kernels.data.videos import Sampling
from revit_kernels.models.checkpoints import description
from revit_kernels.models.registry import class_of, constructor_kwargs, model_file

UNIFORM = "uniform"


def stride(text: str) -> str:
    """A number of frames, or "uniform"; as text, which a model's file keeps."""
    try:
        if text == UNIFORM or float(text) > 0:
            return text
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be a number of frames above 0, or uniform, got {text!r}")


def add_clips(parser) -> None:
    """Which frames of a video: --frames and --stride."""
    group = parser.add_argument_group("videos (of a model of clips)")
    group.add_argument("--frames", type=count, metavar="N", help="frames of a clip (default: the model's)")
    group.add_argument(
        "--stride",
        type=stride,
        metavar="N",
        help="frames of the video from one of the clip's to the next; uniform: they are spread over the whole video "
        "(default: as the model was trained, else uniform)",
    )


def described(name: str) -> dict:
    """Of a model by name or file: {"name", "kwargs", ...} as its file says. Raises ValueError where there is none."""
    file = model_file(name)
    if Path(file).suffix != ".safetensors":
        return {"name": name, "kwargs": {}}
    return description(file) or {"name": None, "kwargs": {}}


def takes_clips(name: str) -> bool:
    """Whether a model, by name or file, is one of clips."""
    found = described(name)["name"]
    return found is not None and class_of(found).per_frame is not None


def sampling_of(name: str, frames: int | None, stride: str | None, menu=None, views: int = 1) -> Sampling:
    """The frames of a video that a model of clips, by name or file, is given.

    menu: that it will get; the file's own, if not given
    """
    found = described(name)
    menu = menu or found.get("resizable", {}).get("menu")
    tubelet = class_of(found["name"]).tubelet
    kwargs = constructor_kwargs(found["name"]) | found["kwargs"]
    own = menu[0][0] * tubelet if menu else kwargs.get("num_frames", 8)
    stride = stride or found.get("cfg", {}).get("stride", UNIFORM)
    return Sampling(frames or own, None if stride == UNIFORM else float(stride), views)


def open_data(args, name: str, menu=None) -> ImageSet:
    """The set of images, or of clips where the model takes these, that --data, --split and --root name.

    name: of the model, or its file. Raises ValueError for --frames and --stride of a model of images.
    """
    if takes_clips(name):
        return open_clips(args.data, sampling_of(name, args.frames, args.stride, menu), args.split, root=args.root)
    if args.frames or args.stride:
        raise ValueError(f"--frames and --stride are of videos, and {name} is a model of images")
    return open_set(args.data, args.split, root=args.root)
