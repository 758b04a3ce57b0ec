"""`revit info`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from revit_kernels.adaptive.costs import model_macs
from revit_kernels.cli.arguments import add_device, add_dtype
from revit_kernels.devices import choose_device, choose_dtype
from revit_kernels.dispatch import BACKENDS, OPS, refusal
from revit_kernels.engines.packed import refusal as block_refusal
from revit_kernels.engines.packed_clips import refusal as clip_refusal
from revit_kernels.grids import grid_text
from revit_kernels.models.registry import SHIPPED, create_model, model_file, registry, resolve
from revit_kernels.modules.lengths import cells


def add(commands):
    info = commands.add_parser(
        "info",
        help="describe a model: its size, its lengths, and what is fused on this machine",
        description="Describes a model by its name, or a file of one, and says which kernels run it on this machine.",
    )
    info.add_argument("model", nargs="?", metavar="NAME_OR_FILE", help="default: the ReViT that comes with the package")
    add_device(info)
    add_dtype(info)
    return info


def run(args) -> int:
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    name = model_file(args.model or str(SHIPPED))
    if Path(name).suffix == ".safetensors":
        model = create_model(name)
        parameters, blocks = sum(p.numel() for p in model.parameters()), len(model.blocks)
    else:  # one block stands for all of them, and needs no gigabytes
        entry = registry()["models"][resolve(name)[0]]
        parameters, blocks = entry["parameters"], entry["kwargs"].get("depth", 12)
        model = create_model(name, depth=1, weight_init="skip")
    lines = describe(model, name, parameters, blocks)
    lines += fused(model.to(device, dtype).eval(), device, dtype)
    print("\n".join(f"{title:<12}{text}".rstrip() for title, text in lines))
    return 0


def describe(model, name: str, parameters: int, blocks: int) -> list[tuple[str, str]]:
    """(title, text) lines that describe the model. blocks: how many the whole model has"""
    (rows, columns), (height, width) = model.patch_embed.grid_size, model.patch_embed.patch_size
    clips = model.per_frame is not None
    own = (model.num_frames, rows, columns) if clips else (rows, columns)
    prefix = model.num_prefix_tokens
    architecture = model.pretrained_cfg.get("architecture", type(model).__name__)
    heads = model.blocks[0].attn.num_heads
    lines = [("model", Path(name).name if Path(name).suffix else name)]
    lines.append(("built as", f"{architecture} ({type(model).__name__})"))
    lines.append(("parameters", f"{parameters:,}" + (f" ({parameters / 1e6:,.1f} M)" if parameters >= 1e6 else "")))
    lines.append(("blocks", f"{blocks} of width {model.embed_dim}, {heads} heads of {model.embed_dim // heads}"))
    sides = tuple(model.patch_embed.img_size)
    what = f"clips of {model.num_frames * model.tubelet} frames of" if clips else ""
    patches = f"{model.tubelet} x {height} x {width}" if clips else f"{height} x {width}"
    sizes = f"{what} {sides[0]} x {sides[1]} pixels, patches of {patches}; any other size is resized".strip()
    lines.append(("videos" if clips else "images", sizes))
    prefixed = f"{prefix} prefix token{'' if prefix == 1 else 's'}" + (" a frame" if model.per_frame else "")
    lines.append(("tokens", f"{grid_text(own)} = {cells(own)} patches at most, and {prefixed}"))
    if model.menu is None:
        lines.append(("menu", "none: one length. `revit train` makes a ReViT of it"))
    else:
        full = model_macs(model, model.menu[0])
        parts = (f"{grid_text(grid)} ({model_macs(model, grid) / full:.0%})" for grid in model.menu)
        lines.append(("menu", f"{', '.join(parts)}: grids, and multiply-accumulates against the longest"))
    longest = model.menu[0] if model.menu else own
    embedding = model_macs(model, longest, 0)
    macs = embedding + (model_macs(model, longest) - embedding) * blocks / len(model.blocks)
    lines.append(("work", f"{macs / 1e6:,.0f} million multiply-accumulates at full length"))
    if model.num_classes:
        labels = model.pretrained_cfg.get("label_names") or []
        names = ", ".join(map(str, labels[:6])) + (", ..." if len(labels) > 6 else "")
        lines.append(("classes", f"{model.num_classes:,}" + (f": {names}" if names else "")))
    else:
        lines.append(("classes", "none: features only"))
    if trained := model.pretrained_cfg.get("trained_on"):
        lines.append(("trained on", str(trained)))
    return lines


def fused(model, device, dtype) -> list[tuple[str, str]]:
    """(title, text) lines on the kernels that run the model here."""
    lines = [("here", f"{device}, {str(dtype).removeprefix('torch.')}")]
    why = block_refusal(model) if model.per_frame is None else clip_refusal(model)
    lines.append(("  blocks", "all in one call of an engine" if why is None else f"op by op: {why}"))
    if device.type == "cpu" and model.per_frame is None:
        why = block_refusal(model, "int8")
        lines.append(("  int8", "--quantize int8 runs" if why is None else f"no: {why}"))
    runs: dict[str, list[str]] = {}
    for op in OPS:
        sample = import_module(f"revit_kernels.ops.{op}").sample(device, dtype)
        runs.setdefault(next((b for b in BACKENDS if refusal(op, b, *sample) is None), "none"), []).append(op)
    return lines + [("  kernels", "; ".join(f"{backend}: {', '.join(ops)}" for backend, ops in runs.items()))]
