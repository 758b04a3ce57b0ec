"""`revit bench`."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from revit_kernels.adaptive.costs import device_name
from revit_kernels.cli.arguments import add_device, add_dtype, add_quantize, count, grids
from revit_kernels.cli.progress import Progress
from revit_kernels.devices import choose_device, choose_dtype
from revit_kernels.evaluation.speed import WARMUP, duels, mixed_images, rivals
from revit_kernels.evaluation.svg import THEMES, bars
from revit_kernels.files import write_whole
from revit_kernels.models.registry import SHIPPED, create_model
from revit_kernels.serving.compare import timm_model
from revit_kernels.serving.prepare import make_engine


def add(commands):
    bench = commands.add_parser(
        "bench",
        help="time a model of yours on mixed lengths against timm, on this machine",
        description="Times a batch of images of mixed lengths, packed, in turn with timm's model on one dense batch "
        "per length, padded to the longest, and one image at a time. Weights do not matter to speed: a name will do. "
        "With --quantize, timm's model is not quantized.",
    )
    bench.add_argument(
        "model", nargs="?", metavar="NAME_OR_FILE", help="default: the ReViT that comes with the package"
    )
    bench.add_argument("--grids", type=grids, metavar="HxW,...", help="default: the model's menu, or four lengths")
    bench.add_argument("--images", type=count, default=32, metavar="N", help="of a batch (default: 32)")
    bench.add_argument("--rounds", type=count, default=11, metavar="N", help="of each duel (default: 11)")
    add_quantize(bench)
    bench.add_argument("--chart", metavar="FILE", help="write an .svg chart")
    bench.add_argument("--theme", choices=tuple(THEMES), default="light", help="of the chart (default: light)")
    add_device(bench)
    add_dtype(bench)
    bench.add_argument("--quiet", "-q", action="store_true", help="no progress")
    return bench


def menu_of(model) -> tuple:
    """The model's menu; without one, four lengths from its own down to about a tenth of the patches."""
    if model.menu is not None:
        return model.menu
    rows, columns = model.patch_embed.grid_size
    return tuple(dict.fromkeys((math.ceil(rows * s), math.ceil(columns * s)) for s in (1.0, 0.7, 0.5, 0.28)))


def _timm(model, name: str):
    try:
        return timm_model(model)
    except ImportError:
        raise ValueError("the rival is timm's model: pip install timm") from None
    except Exception as error:
        why = " ".join(str(error).split())
        raise ValueError(f"timm has no model to compare {name} with: {why}") from None


def run(args) -> int:
    if args.chart and Path(args.chart).suffix != ".svg":
        raise ValueError(f"--chart must end in .svg, got {args.chart!r}")
    device = choose_device(args.device)
    dtype, name = choose_dtype(args.dtype, device), args.model or str(SHIPPED)
    model = create_model(name).to(device, dtype).eval()
    menu = sorted(args.grids or menu_of(model), key=lambda grid: -grid[0] * grid[1])
    if args.images < len(menu):
        raise ValueError(f"--images must be at least the number of grids, {len(menu)}, got {args.images}")
    dense, whose = _timm(model, name)
    patch = model.patch_embed.patch_size
    images, of_images = mixed_images(menu, args.images, patch, model.in_chans, next(model.parameters()))
    engine = make_engine(model, args.quantize)
    theirs = rivals(dense, images, of_images, patch, model.num_prefix_tokens)
    with Progress(len(theirs) * (args.rounds + WARMUP), "rounds", quiet=args.quiet) as bar:
        found = duels(lambda: engine(images, grids=of_images), theirs, device, args.rounds, bar.update)
    threads = f", {torch.get_num_threads()} threads" if device.type == "cpu" else ""
    how = args.quantize or str(dtype).removeprefix("torch.")
    shown = ", ".join(f"{h}x{w}" for h, w in menu)
    about = f"{args.images} images at {shown}, {how}; {device_name(device)}{threads}"
    title = Path(name).name
    print(f"{title}: {about}\n")
    width = max(len(duel.rival) for duel in found)
    print(f"{f'against {whose}':<{width}}  {'ours':>12}  {'theirs':>12}  {'as fast':>8}  quartiles")
    for duel in found:
        ours, other = f"{1e3 * duel.ours:,.1f} ms", f"{1e3 * duel.theirs:,.1f} ms"
        spread = f"{duel.low:.2f} to {duel.high:.2f}"
        print(f"{duel.rival:<{width}}  {ours:>12}  {other:>12}  {f'{duel.ratio:.2f}x':>8}  {spread}")
    best = found[0]
    said = "as fast as" if best.ratio < 1.005 else f"{best.ratio:.2f} times as fast as"
    if best.ratio < 0.995:
        said = f"slower ({best.ratio:.2f}x) than"
    print(f"\nPacked is {said} the strongest rival, {best.rival}: {args.images / best.ours:,.0f} images/s.")
    if args.chart:
        rows = [(duel.rival, duel.ratio) for duel in found]
        text = bars(f"{title}: how many times faster than {whose}", about, rows, args.theme)
        write_whole(Path(args.chart), lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return 0
