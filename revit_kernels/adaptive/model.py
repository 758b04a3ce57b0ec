"""AdaptiveViT: a resizable model and a policy that gives each image as few tokens as it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.budgets import Budget, solve
from revit_kernels.adaptive.costs import Costs, check_resizable, confidence_of, device_name, measure_costs, pick
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.adaptive.policies import POLICIES, Assign, AssignedCascade, Cascade, Fixed, Oracle, Policy, Random
from revit_kernels.engines import Engine
from revit_kernels.models.registry import load_resizable
from revit_kernels.models.vit import VarLenViT
from revit_kernels.modules.layer_norm import add
from revit_kernels.modules.lengths import Grid, cells
from revit_kernels.packing import Packing


class Prediction(NamedTuple):
    """Answers, and what each cost.

    logits: (images, classes)
    choice: (images,) int64, the menu row of the length that answered
    tokens: (images,) int64, the tokens of all passes of the model that the image went through, prefix tokens counted,
            the assigner's own not
    fits:   (images,) bool: whether the image found room; only with a packing made on the device can it be False
    """

    logits: Tensor
    choice: Tensor
    tokens: Tensor
    fits: Tensor


class AdaptiveViT(nn.Module):
    """Gives each image a length by a policy, and all of them to the model in packed batches.

    model:    a VarLenViT that was made resizable, or an engine of one; of a model an engine is made at the first
              prediction, which is refreshed where the model changes
    policy:   "fixed", "random", "assigner", "cascade", "assigner+cascade", "oracle" (needs the truth: evaluation only);
              a Policy whose numbers are known; or a function from the images to (images,) menu rows
    assigner: a TokenLengthAssigner of the model
    outcomes: of held-out images, to solve the policy's numbers from; the assigner's own, if not given
    budget:   see budgets.Budget: "2.0x", "80 tokens", "95%", "full-0.3", or "full": the cheapest that loses nothing
    costs:    of `measure_costs`; measured now, if they are needed and not given
    capacity: rows of a packing made on the device; the worst case if not given
    reuse:    let images that stay at the shortest length go on from a "features" assigner's tokens

    A fixed, random or assigner policy makes one packed pass, and on a GPU never waits for the device. A cascade is a
    pass per stage, each of which waits to know who goes on.
    Raises ValueError where policy, model, assigner, outcomes and costs do not belong together, and for a budget that
    cannot be met.
    """

    def __init__(
        self,
        model: VarLenViT | Engine,
        policy: str | Policy | Callable = "cascade",
        *,
        assigner: TokenLengthAssigner | None = None,
        outcomes: Outcomes | None = None,
        budget: str | Budget = "full",
        costs: Costs | None = None,
        capacity: int | None = None,
        reuse: bool = True,
    ):
        super().__init__()
        check_resizable(model)
        self._engine = model if isinstance(model, Engine) else None
        self.model = model = model.model if isinstance(model, Engine) else model
        self.assigner = None if assigner is None else assigner.require(model)
        self.capacity, self.reuse, self._turn = capacity, reuse, 0
        outcomes = assigner.outcomes if outcomes is None and assigner is not None else outcomes
        if outcomes is not None:
            outcomes.require(model)
        self.costs = costs
        if isinstance(policy, str):
            policy = self._solved(policy, outcomes, budget)
        elif not isinstance(policy, Policy) and not callable(policy):
            raise ValueError(f"policy must be one of {POLICIES}, a Policy or a function, got {policy!r}")
        if isinstance(policy, Policy) and policy.uses_assigner() and assigner is None:
            raise ValueError(f"policy {policy.name!r} needs an assigner")
        self.policy = policy.require(model.menu) if isinstance(policy, Policy) else policy

    @property
    def engine(self) -> Engine:
        """What answers."""
        if self._engine is None:
            self._engine = self.model.engine(stale="refresh")
        return self._engine

    def _solved(self, name: str, outcomes: Outcomes | None, budget) -> Policy:
        if name not in POLICIES:
            raise ValueError(f"policy must be one of {POLICIES}, got {name!r}")
        if name == "oracle":
            return Oracle()
        if "assigner" in name and self.assigner is None:
            raise ValueError(f"policy {name!r} needs an assigner")
        if outcomes is None:
            raise ValueError(
                f"policy {name!r} needs held-out outcomes to solve its budget from: an assigner's or labels"
            )
        device = next(self.model.parameters()).device
        if self.costs is None:
            self.costs = measure_costs(self.engine, self.assigner)
        elif self.costs.device and self.costs.device != device_name(device):
            raise ValueError(f"the costs were measured on {self.costs.device}, this is {device_name(device)}")
        temperature = float(self.assigner.temperature) if self.assigner is not None else 1.0
        prefix = self.model.num_prefix_tokens
        return solve(name, outcomes, self.costs, budget, temperature=temperature, prefix=prefix)

    @classmethod
    def from_files(
        cls, model, assigner=None, labels=None, *, policy="cascade", budget="full", device=None, dtype=None, **options
    ) -> AdaptiveViT:
        """From the files of `revit train`, `revit train-assigner` and `revit label`; in eval mode."""
        model = load_resizable(str(model), device, dtype)
        parameter = next(model.parameters())
        if assigner is not None:
            assigner = TokenLengthAssigner.load(assigner).to(parameter.device, parameter.dtype)
        outcomes = Outcomes.load(labels) if labels is not None else None
        return cls(model, policy, assigner=assigner, outcomes=outcomes, budget=budget, **options).eval()

    @property
    def menu(self) -> tuple[Grid, ...]:
        return check_resizable(self.model)

    def forward(self, images, channels_last: bool = False) -> Tensor:
        """(images, classes) logits. images: as VarLenViT takes them."""
        return self.predict(images, channels_last=channels_last).logits

    @torch.inference_mode()
    def predict(
        self, images, *, channels_last: bool = False, labels: Tensor | None = None, device_choice: bool | None = None
    ) -> Prediction:
        """The answers, and at which lengths they were found.

        images:        a tensor, or a list of images of any sizes
        labels:        (images,) true menu rows, for the policy "oracle" alone
        device_choice: pack on the device, without waiting for it; by default where the model is on a GPU
        """
        count, device = len(images), next(self.model.parameters()).device
        if device_choice is None:
            device_choice = device.type != "cpu"
        if count == 0:
            empty = torch.zeros(0, dtype=torch.long, device=device)
            logits = torch.zeros(0, self.model.num_classes, device=device, dtype=next(self.model.parameters()).dtype)
            return Prediction(logits, empty, empty, empty.bool())
        policy = self.policy
        if isinstance(policy, Cascade):
            start = torch.full((count,), policy.stages[0], dtype=torch.int32)
            return self._cascade(policy, images, self._at(images, start, channels_last), start, channels_last)
        if isinstance(policy, AssignedCascade):
            logits, stream, packing = self._assign(images, channels_last)
            start = policy.decide(logits).cpu()
            first = self._go_on(images, start, stream, packing, channels_last)
            return self._cascade(policy.cascade, images, first, start, channels_last)
        if isinstance(policy, Assign):
            logits, stream, packing = self._assign(images, channels_last)
            choice = policy.decide(logits)
            if not device_choice:
                choice = choice.cpu()
                return self._once(self._go_on(images, choice, stream, packing, channels_last), choice)
        elif isinstance(policy, Oracle):
            if labels is None:
                raise ValueError("the oracle needs the images' true labels: it is for evaluation only")
            labels = torch.as_tensor(labels, device=device)
            choice = torch.where(labels >= 0, labels, len(self.menu) - 1)
        elif isinstance(policy, Fixed):
            choice = torch.full((count,), policy.row, dtype=torch.int32, device=device)
        elif isinstance(policy, Random):
            choice = torch.from_numpy(policy.draw(count, self._turn)).to(device)
            self._turn += 1
        else:
            choice = torch.as_tensor(policy(images), device=device)
            if choice.shape != (count,) or choice.is_floating_point():
                raise ValueError(f"the policy must give ({count},) menu rows, got {tuple(choice.shape)} {choice.dtype}")
        if not device_choice:
            choice = choice.cpu()
            if not ((choice >= 0) & (choice < len(self.menu))).all():
                raise ValueError(f"rows must be 0 to {len(self.menu) - 1} of the menu, got {choice.unique().tolist()}")
            return self._once(self._at(images, choice, channels_last), choice)
        return self._on_device(images, choice, channels_last)

    # ------------------------------------------------------------------ one pass

    def _lengths(self, device) -> Tensor:
        prefix = self.model.num_prefix_tokens
        return torch.tensor([prefix + cells(grid) for grid in self.menu], device=device)

    def _once(self, logits: Tensor, choice: Tensor) -> Prediction:
        choice = choice.long()
        tokens = self._lengths(choice.device)[choice]
        return Prediction(logits, choice, tokens, torch.ones_like(choice, dtype=torch.bool))

    def _packing(self, rows: list[int]) -> Packing:
        device = next(self.model.parameters()).device
        grids = [self.menu[row] for row in rows]
        return Packing.from_grids(grids, self.model.num_prefix_tokens, menu=self.menu, device=device)

    def _at(self, images, choice: Tensor, channels_last: bool) -> Tensor:
        """(images, classes) at lengths that the host knows."""
        return self.engine(images, packing=self._packing(choice.tolist()), channels_last=channels_last)

    def _on_device(self, images, choice: Tensor, channels_last: bool) -> Prediction:
        """One pass over a packing made on the device: nothing waits, and the capacity is what it may take."""
        prefix = self.model.num_prefix_tokens
        capacity = self.capacity or len(images) * (prefix + cells(self.menu[0]))
        packing = Packing.from_choice(choice, self.menu, prefix, capacity=capacity)
        logits = self.engine(images, packing=packing, channels_last=channels_last)
        rows = packing.cu_seqlens
        row = packing.length_index.long()  # not `choice`: a row that is none was brought within the menu
        return Prediction(logits, row, (rows[1:] - rows[:-1]).long(), packing.fits)

    # ------------------------------------------------------------------ the assigner

    def _assign(self, images, channels_last: bool):
        """Logits, and the tokens that they were taken from (None, None where those cannot be gone on from)."""
        if self.assigner.kind == "features" and self.reuse:
            return self.assigner.with_tokens(images, self.engine, channels_last)
        return self.assigner(images, model=self.engine, channels_last=channels_last), None, None

    def _go_on(self, images, choice: Tensor, stream, packing: Packing | None, channels_last: bool) -> Tensor:
        """(images, classes) at lengths that the host knows; the shortest's from the assigner's tokens, if there are."""
        rows = choice.tolist()
        shortest = len(self.menu) - 1
        stay = [i for i, row in enumerate(rows) if row == shortest]
        if stream is None or not stay:
            return self._at(images, choice, channels_last)
        engine, depth = self.engine, self.assigner.depth
        parts = [
            stream[0].view(len(rows), packing.max_seqlen, -1)[torch.tensor(stay, device=stream[0].device)].flatten(0, 1)
        ]
        others = [i for i, row in enumerate(rows) if row != shortest]
        if others:
            first = self._packing([rows[i] for i in others])
            begun = [engine.embed(pick(images, others), first, channels_last), None, None]
            parts.append(add(*engine.run_blocks(begun, first, 0, depth)))
        joint = self._packing([shortest] * len(stay) + [rows[i] for i in others])
        logits = engine.finish(engine.run_blocks([torch.cat(parts), None, None], joint, depth), joint)
        order = torch.tensor(np.argsort(stay + others, kind="stable"), device=logits.device)
        return logits[order]

    # ------------------------------------------------------------------ the cascade

    def _cascade(self, policy: Cascade, images, logits: Tensor, start: Tensor, channels_last: bool) -> Prediction:
        """From the answers at the rows where the images began, on through the stages."""
        row = start.long()
        lengths = self._lengths("cpu")
        tokens, current = lengths[row], row.clone()
        following = {r: policy.stages[i + 1] for i, r in enumerate(policy.stages[:-1])}
        members = torch.arange(len(row))
        answers = logits
        while following and len(members):
            confidence = confidence_of(answers).cpu()
            going = torch.zeros(len(members), dtype=torch.bool)
            for stage, r in enumerate(policy.stages[:-1]):
                at = current == r
                going |= at & policy.goes_on(stage, confidence)
            members, current = members[going], current[going]
            if not len(members):
                break
            current = torch.tensor([following[r] for r in current.tolist()])
            answers = self._at(pick(images, members.tolist()), current, channels_last)
            logits = logits.index_copy(0, members.to(logits.device), answers)
            row[members] = current
            tokens[members] += lengths[current]
        return Prediction(logits, row, tokens, torch.ones_like(row, dtype=torch.bool))
