"""An AdaptiveViT of one pass as an engine of CUDA graphs, its assigner in the graph."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from revit_kernels.adaptive.model import AdaptiveViT
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.adaptive.policies import Assign, Fixed, Own
from revit_kernels.engines import CapturedEngine


class _Assigned(nn.Module):
    """The choice of an assigner's policy, from the images alone."""

    def __init__(self, adaptive: AdaptiveViT, channels_last: bool):
        super().__init__()
        self.model, self.assigner = adaptive.model, adaptive.assigner
        self.policy, self.channels_last = adaptive.policy, channels_last
        self.training = False  # of itself: the mode of the parts is theirs

    def forward(self, images: Tensor) -> Tensor:
        return self.policy.decide(self.assigner(images, model=self.model, channels_last=self.channels_last))


def captured_engine(adaptive: AdaptiveViT, *, images: int = 64, outcomes: Outcomes | None = None, **options):
    """A CapturedEngine of an AdaptiveViT of one pass: policy "fixed", "assigner", or a function that does not wait for
    the device.

    images:   slots of a batch, and `options`, as of CapturedEngine
    outcomes: of held-out images, for the mix that the policy gives; the assigner's own, if not given

    Raises ValueError for a policy that the host is part of.
    """
    policy, channels_last = adaptive.policy, options.get("channels_last", False)
    rows = None
    if isinstance(policy, Assign):
        choose = _Assigned(adaptive, channels_last)
        outcomes = outcomes or adaptive.assigner.outcomes
        rows = None if outcomes is None else policy.rows_run(outcomes)[0]
    elif isinstance(policy, Fixed):
        rows = np.array([policy.row])

        def choose(images: Tensor) -> Tensor:
            return torch.full((len(images),), policy.row, dtype=torch.int32, device=images.device)

    elif isinstance(policy, Own):
        choose = policy.choose
    else:
        raise ValueError(
            f"policy {policy.name!r} asks the host: only one pass at lengths chosen on the device is one graph"
        )
    if rows is not None:
        options.setdefault("mix", tuple(np.bincount(rows, minlength=len(adaptive.menu)).tolist()))
    return CapturedEngine(adaptive.model, choose, images=images, **options)
