"""AdaptiveViT: a resizable model and a policy that gives each image as few tokens as it needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from revit_kernels.adaptive.assigner import TokenLengthAssigner
from revit_kernels.adaptive.budgets import Budget, solve
from revit_kernels.adaptive.costs import COUNTED, Costs, check_resizable, counted, device_name, model_device, pick
from revit_kernels.adaptive.outcomes import Outcomes
from revit_kernels.adaptive.policies import ALONE, ASSIGNED, POLICIES, Oracle, Own, Policy, Seen
from revit_kernels.engines import Answers, Engine
from revit_kernels.models.embedding import Images, as_tensors
from revit_kernels.models.registry import load_resizable
from revit_kernels.models.video import ClipModel
from revit_kernels.models.vit import VarLenViT
from revit_kernels.modules.layer_norm import add
from revit_kernels.modules.lengths import Grid, cells, tokens_of
from revit_kernels.packing import PackedTokens, Packing


class AdaptiveViT(nn.Module):
    """Gives each image a length by a policy, and all of them to the model in packed batches.

    model:    a VarLenViT or a model of clips that was made resizable, or an engine of one; of a model an engine is made
              at the first prediction, which is refreshed where the model changes
    policy:   "fixed", "random", "assigner", "cascade", "assigner+cascade", "oracle" (needs the truth: evaluation only);
              "scout+cascade", whose answers are the assigner's own where it is sure (of an assigner of the trunk
              "scout"); a Policy whose numbers are known; or a function from the images to (images,) menu rows
    assigner: a TokenLengthAssigner of the model
    outcomes: of held-out images, to solve the policy's numbers from; the assigner's own, if not given
    budget:   see budgets.Budget: "2.0x", "80 tokens", "95%", "full-0.3", or "full": the cheapest that loses nothing
    costs:    to solve the budget with; the assigner's own for this device and dtype, if not given, or
              multiply-accumulates: never measured here, so that the same files give the same policy every time
    capacity: rows of a packing made on the device; the worst case if not given
    reuse:    let images that stay at the shortest length go on from the tokens of a "tokens" assigner

    A fixed, random or assigner policy makes one packed pass, and on a GPU, of a model with one patch kernel, never
    waits for the device. A cascade is two passes; between them it waits to know who goes on.
    Raises ValueError where policy, model, assigner, outcomes and costs do not belong together. A budget that cannot be
    met gives the nearest that can be, with a warning.
    """

    def __init__(
        self,
        model: VarLenViT | ClipModel | Engine,
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
        self._engine = None if isinstance(model, nn.Module) else model
        self.model = model if isinstance(model, nn.Module) else model.model
        self.assigner = None if assigner is None else assigner.require(self.model)
        self.capacity, self.reuse, self._turn, self.costs = capacity, reuse, 0, costs
        if outcomes is not None:
            outcomes.require(self.model)
        if isinstance(policy, str):
            policy = self._solved(policy, outcomes, budget)
        elif not isinstance(policy, Policy):
            if not callable(policy):
                raise ValueError(f"policy must be one of {POLICIES}, a Policy or a function, got {policy!r}")
            policy = Own(policy)
        if policy.uses_assigner and assigner is None:
            raise ValueError(f"policy {policy.name!r} needs an assigner")
        if policy.answers_alone and assigner.trunk != "scout":
            raise ValueError(
                f"policy {policy.name!r} needs an assigner of the trunk 'scout', this is {assigner.trunk!r}"
            )
        self.policy = policy.require(self.model.menu)

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
            return Oracle(len(self.menu))
        if name in ASSIGNED and self.assigner is None:
            raise ValueError(f"policy {name!r} needs an assigner")
        known = None
        if outcomes is None and self.assigner is not None:
            outcomes, known = self.assigner.outcomes, self.assigner.fitted
        if outcomes is None:
            raise ValueError(
                f"policy {name!r} needs held-out outcomes to solve its budget from: an assigner's or labels"
            )
        if self.costs is None:
            served = self._engine or self.model
            self.costs = counted(served) if self.assigner is None else self.assigner.costs_for(served)
        elif self.costs.device not in ("", COUNTED, device := device_name(model_device(self.model))):
            raise ValueError(f"the costs were measured on {self.costs.device}, this is {device}")
        # A pass over a packing made on the device begins with the images.
        if not self.reuse or (name == "assigner" and model_device(self.model).type != "cpu"):
            self.costs = replace(self.costs, reused=0.0)
        prefix = [tokens_of(self.model, grid) - cells(grid) for grid in self.menu]
        return solve(name, outcomes.apart()[1], self.costs, budget, known=known, prefix=prefix)

    @classmethod
    def from_files(
        cls,
        model: str | Path,
        assigner: str | Path | None = None,
        labels: str | Path | None = None,
        *,
        policy: str | Policy | Callable = "cascade",
        budget: str | Budget = "full",
        device: torch.device | str | None = None,
        dtype: str | None = None,
        **options: Any,
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

    def forward(self, images: Images, channels_last: bool = False) -> Tensor:
        """(images, classes) logits. images: as VarLenViT takes them."""
        return self.predict(images, channels_last=channels_last).logits

    @torch.inference_mode()
    def predict(
        self,
        images: Images,
        *,
        channels_last: bool = False,
        labels: Tensor | None = None,
        device_choice: bool | None = None,
    ) -> Answers:
        """The answers, and at which lengths they were found.

        images:        a tensor, or a list of images of any sizes, as VarLenViT takes them
        labels:        (images,) true menu rows, for the policy "oracle" alone
        device_choice: pack on the device, without waiting for it; by default where the model is on a GPU and the host
                       need not pack: it does clips, and images of a patch kernel per length
        """
        count, device = len(images), next(self.model.parameters()).device
        if device_choice is None:
            # Clips, and images of a patch kernel per length, are packed by the host.
            by_host = self.model.per_frame is not None or self.model.resizable["embedding"] != "resize"
            device_choice = device.type != "cpu" and not by_host
        if count == 0:
            empty = torch.zeros(0, dtype=torch.long, device=device)
            logits = torch.zeros(0, self.model.num_classes, device=device, dtype=next(self.model.parameters()).dtype)
            return Answers(logits, empty, empty, 0)
        images = as_tensors(images, self.model.in_chans, channels_last, device)
        policy, assigned, tokens = self.policy, None, None
        if policy.uses_assigner:
            assigned, tokens = self._assign(images, channels_last)
        row = policy.start(Seen(images, device, assigned, labels, self._turn))
        self._turn += 1
        if policy.passes == 1 and device_choice:
            return self._on_device(images, row, channels_last)
        row = row.cpu().long()
        least = ALONE if policy.answers_alone else 0
        if not ((row >= least) & (row < len(self.menu))).all():
            raise ValueError(f"rows must be 0 to {len(self.menu) - 1} of the menu, got {row.unique().tolist()}")
        if policy.run_length is not None:
            packed = self._kept(images, row, channels_last)
            spent = torch.tensor(packed.packing.lengths)
            return Answers(self.engine.forward_head(packed), row, spent, packed.packing.capacity)
        lengths, ran = self._lengths("cpu"), row >= 0
        spent = lengths[row] * ran
        if ran.all():
            logits = self._from_tokens(images, row, tokens, channels_last)
        else:
            logits = self._beside_the_assigner(images, row, assigned, channels_last)
        if policy.passes > 1:
            following = policy.next(policy.columns(logits, assigned)).cpu().long()
            going = ((following >= 0) & ran).nonzero()[:, 0]
            if len(going):
                row[going] = following[going]
                spent = spent.index_add(0, going, lengths[row[going]])
                answers = self._at(pick(images, going.tolist()), row[going], channels_last)
                logits = logits.index_copy(0, going.to(logits.device), answers)
        return Answers(logits, row, spent, int(spent.sum()))

    @torch.inference_mode()
    def features(self, images: Images, *, channels_last: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """What the model's head is given for each image, at the length that the policy chooses.

        images: a tensor, or a list of images of any sizes

        Returns (images, features), (images,) menu rows, and (images,) tokens of all passes. A cascade chooses by the
        answers: its images then take one more pass, which is counted; an image that the assigner answered takes its
        only one at the first length.
        """
        device = next(self.model.parameters()).device
        images = as_tensors(images, self.model.in_chans, channels_last, device)
        if len(images) and self.policy.passes == 1:
            assigned = self._assign(images, channels_last)[0] if self.policy.uses_assigner else None
            row = self.policy.start(Seen(images, device, assigned, None, self._turn)).cpu().long()
            self._turn += 1
            spent = torch.zeros_like(row)
        else:
            answers = self.predict(images, channels_last=channels_last, device_choice=False)
            row, spent = answers.choice.cpu(), answers.tokens.cpu()
            if self.policy.answers_alone:
                row = torch.where(row == ALONE, self.policy.first, row)
        if self.policy.run_length is not None:
            packed = self._kept(images, row, channels_last)
            return self.engine.forward_head(packed, pre_logits=True), row, torch.tensor(packed.packing.lengths)
        packed = self.engine.features(images, packing=self._packing(row.tolist()), channels_last=channels_last)
        return self.engine.forward_head(packed, pre_logits=True), row, spent + self._lengths("cpu")[row]

    # ------------------------------------------------------------------ one pass

    def _lengths(self, device) -> Tensor:
        return torch.tensor([tokens_of(self.model, grid) for grid in self.menu], device=device)

    def _packing(self, rows: list[int]) -> Packing:
        return self.model.packing([self.menu[row] for row in rows])

    def _at(self, images, choice: Tensor, channels_last: bool) -> Tensor:
        """(images, classes) at lengths that the host knows."""
        return self.engine(images, packing=self._packing(choice.tolist()), channels_last=channels_last)

    def _kept(self, clips, row: Tensor, channels_last: bool) -> PackedTokens:
        """The last tokens of clips at these rows of the menu, without those that the policy leaves out."""
        told = {"packing": self._packing(row.tolist()), "run_length": self.policy.run_length}
        return self.engine.features(clips, channels_last=channels_last, **told)

    def _on_device(self, images, choice: Tensor, channels_last: bool) -> Answers:
        """One pass over a packing made on the device: nothing waits, and the capacity is what it may take."""
        prefix = self.model.num_prefix_tokens
        capacity = self.capacity or len(images) * (prefix + cells(self.menu[0]))
        packing = Packing.from_choice(choice, self.menu, prefix, capacity=capacity)
        logits = self.engine(images, packing=packing, channels_last=channels_last)
        rows = packing.cu_seqlens
        row = packing.length_index.long()  # not `choice`: a row that is none was brought within the menu
        return Answers(logits, row, (rows[1:] - rows[:-1]).long(), capacity)

    # ------------------------------------------------------------------ the assigner

    def _assign(self, images, channels_last: bool) -> tuple[Tensor, tuple[Tensor, Packing] | None]:
        """Logits, and the tokens that they were taken from with their packing, where a pass can go on from those."""
        if self.assigner.trunk == "tokens" and self.reuse:
            logits, *tokens = self.assigner.with_tokens(images, self.engine, channels_last)
            return logits, tuple(tokens)
        return self.assigner(images, model=self.engine, channels_last=channels_last), None

    def _beside_the_assigner(self, images, row: Tensor, assigned: Tensor, channels_last: bool) -> Tensor:
        """(images, classes) at lengths that the host knows, the assigner's own where the row is ALONE."""
        logits = assigned[:, len(self.menu) :].to(next(self.model.parameters()).dtype)
        begun = (row >= 0).nonzero()[:, 0]
        if not len(begun):
            return logits
        answers = self._at(pick(images, begun.tolist()), row[begun], channels_last)
        return logits.index_copy(0, begun.to(logits.device), answers)

    def _from_tokens(self, images, row: Tensor, known, channels_last: bool) -> Tensor:
        """(images, classes) at lengths that the host knows; the shortest's from the assigner's tokens, if there are."""
        shortest, rows = len(self.menu) - 1, row.tolist()
        stay = [i for i, r in enumerate(rows) if r == shortest]
        if known is None or not stay:
            return self._at(images, row, channels_last)
        engine, depth, (tokens, packing) = self.engine, self.assigner.depth, known
        if len(stay) == len(rows):
            return engine.finish(engine.run_blocks([tokens, None, None], packing, depth), packing)
        kept = tokens.view(len(rows), packing.max_seqlen, -1)[torch.tensor(stay, device=tokens.device)].flatten(0, 1)
        others = [i for i, r in enumerate(rows) if r != shortest]
        first = self._packing([rows[i] for i in others])
        begun = [engine.embed(pick(images, others), first, channels_last), None, None]
        begun = add(*engine.run_blocks(begun, first, 0, depth)) if depth else begun[0]
        joint = self._packing([shortest] * len(stay) + [rows[i] for i in others])
        logits = engine.finish(engine.run_blocks([torch.cat([kept, begun]), None, None], joint, depth), joint)
        order = torch.tensor(np.argsort(stay + others, kind="stable"), device=logits.device)
        return logits[order]
