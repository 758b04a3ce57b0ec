"""Whether `revit infer` lets a policy choose each image's length, and which."""

from __future__ import annotations

from pathlib import Path

from revit_kernels import models
from revit_kernels.adaptive.costs import measure_costs
from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.models.assigner import TokenLengthAssigner

SHIPPED = Path(models.__file__).with_name("shipped") / "fashion_mnist.safetensors"  # runs where no --model is named
SHIPPED_ASSIGNER = SHIPPED.with_name("fashion_mnist_assigner.safetensors")


def make_adaptive(args, model) -> AdaptiveViT | None:
    """The model with the policy that the arguments ask for; None where each image's size decides its length.

    Without --policy: the cascade, where the model is a ReViT and held-out answers of it are at hand, unless --grids,
    --max-tokens, --features, --compare or --method say otherwise.
    Raises ValueError where a policy is asked for that cannot be had.
    """
    otherwise = args.grids or args.max_tokens or args.features or args.compare or args.method == "patch"
    file = args.assigner or (SHIPPED_ASSIGNER if not args.model else None)
    known = file is not None or args.outcomes
    if not args.policy and (otherwise or not known or model.menu is None):
        if args.assigner or args.outcomes or args.budget:
            raise ValueError("--assigner, --outcomes and --budget go with a --policy and a ReViT")
        return None
    if model.menu is None:
        raise ValueError(f"--policy {args.policy} needs a ReViT: {args.model} knows one length only")
    parameter = next(model.parameters())
    assigner = None
    if file is not None:
        assigner = TokenLengthAssigner.load(file).to(parameter.device, parameter.dtype)
    outcomes = Outcomes.load(args.outcomes) if args.outcomes else None
    policy = args.policy or "cascade"
    if policy == "oracle":
        raise ValueError("--policy oracle asks the truth: it is for `revit evaluate`")
    costs = measure_costs(model, assigner, batch=32, rounds=3) if assigner is not None or outcomes is not None else None
    return AdaptiveViT(
        model, policy, assigner=assigner, outcomes=outcomes, budget=args.budget or "full", costs=costs
    ).eval()
