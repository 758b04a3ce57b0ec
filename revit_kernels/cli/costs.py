"""`revit costs`."""

import copy
import sys

from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.costs import measure_costs
from revit_kernels.cli.arguments import add_device, add_dtype, add_quantize, count
from revit_kernels.models.registry import SHIPPED, SHIPPED_ASSIGNER, load_resizable
from revit_kernels.serving.prepare import make_engine


def add(commands):
    costs = commands.add_parser(
        "costs",
        help="measure what each length costs on this machine",
        description="Times a ReViT at each length of its menu, and its assigner, on this device and in this dtype. The "
        "costs are kept in the assigner's file, where budgets are solved with them.",
    )
    costs.add_argument("model", nargs="?", metavar="FILE", help="of `revit train` (default: the shipped model)")
    costs.add_argument("--assigner", metavar="FILE", help="of `revit train-assigner` (default: the shipped model's)")
    costs.add_argument("--batch", type=count, default=64, metavar="N", help="images of a batch (default: 64)")
    costs.add_argument("--rounds", type=count, default=21, metavar="N", help="the median counts (default: 21)")
    add_quantize(costs)
    costs.add_argument("--dry-run", action="store_true", help="measure, but keep nothing")
    add_device(costs)
    add_dtype(costs)
    return costs


def run(args) -> int:
    model = load_resizable(args.model or str(SHIPPED), args.device, args.dtype)
    file = args.assigner or (None if args.model else str(SHIPPED_ASSIGNER))
    engine = make_engine(model, args.quantize)
    assigner, served, parameter = None, None, next(model.parameters())
    if file is not None:
        assigner = TokenLengthAssigner.load(file).require(model)
        served = copy.deepcopy(assigner).to(parameter.device, parameter.dtype)
    costs = measure_costs(engine, served, batch=args.batch, rounds=args.rounds)
    full = f"{1e6 * costs.per_length[0]:,.1f} us an image at full length"
    print(f"{costs.device}, {costs.dtype}, batches of {costs.batch}: {full}")
    before = None if assigner is None else assigner.keep_costs(costs)
    for name, then, now in costs.changes(before or costs):
        print(f"{name}: {now:.3f} of full length" + (f", {then:.3f} before" if before else ""))
    if assigner is not None and not args.dry_run:
        assigner.save(file)
        print(f"kept in {file}", file=sys.stderr)
    return 0
