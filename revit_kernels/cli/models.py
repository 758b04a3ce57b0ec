"""`revit models`."""

from revit_kernels.models.registry import get_pretrained_cfg, list_models, registry


def add(commands):
    models = commands.add_parser(
        "models",
        help="list the names of models",
        description="Lists the names that --model takes, one a line; with --tags once for each set of timm's weights.",
    )
    models.add_argument("filter", nargs="?", default="", metavar="PATTERN", help="a part of the name, or vit_small_*")
    models.add_argument("--tags", action="store_true", help="with every set of pretrained weights")
    models.add_argument("--long", "-l", action="store_true", help="also parameters (millions), image and patch size")
    return models


def run(args) -> int:
    names = list_models(args.filter, args.tags)
    if not names:
        raise ValueError(f"no model's name has {args.filter!r} in it")
    if not args.long:
        print("\n".join(names))
        return 0
    width = max(map(len, names))
    print(f"{'name':<{width}}  {'image':>6}  {'patch':>6}  {'classes':>8}  {'parameters':>12}")
    for name in names:
        cfg, entry = get_pretrained_cfg(name), registry()["models"][name.partition(".")[0]]
        side, patch = cfg["input_size"][-1], entry["kwargs"].get("patch_size", 16)
        patch = patch if isinstance(patch, int) else patch[0]
        print(f"{name:<{width}}  {side:>6}  {patch:>6}  {cfg['num_classes']:>8,}  {entry['parameters']:>12,}")
    return 0
