"""Warnings of `revit infer` about arguments that are allowed but rarely intended."""

from __future__ import annotations

from revit_kernels.grids import Grid, grid_text
from revit_kernels.modules.lengths import cells
from revit_kernels.serving.prepare import Prepared


def _text(grids) -> str:
    return ", ".join(map(grid_text, grids))


def hints(args, prepared: Prepared) -> list[str]:
    """The warnings, a sentence each. args: those of `revit infer`"""
    menu = getattr(prepared.model, "menu", None)
    frames = getattr(prepared.model, "per_frame", None) is not None
    of_frames = tuple(dict.fromkeys(grid[-2:] for grid in menu)) if menu else None
    full = cells(prepared.model.patch_embed.grid_size)
    found = lengths(args.grids, args.max_tokens, of_frames if frames else menu, full)
    if menu is not None and prepared.answerer is prepared.model:
        given = {"--grids": args.grids, "--max-tokens": args.max_tokens, "--compare": args.compare}
        otherwise = [name for name, value in given.items() if value]
        otherwise += ["--method patch"] if args.method == "patch" else []
        otherwise += ["--run-length"] if args.run_length is not None else []
        found += no_policy(bool(args.assigner or args.outcomes or not args.model), otherwise)
    return found


def lengths(
    grids: tuple[Grid, ...] | None, max_tokens: int | None, menu: tuple[Grid, ...] | None, full: int
) -> list[str]:
    """Warnings about lengths that the model was not trained at. full: patches of its own grid"""
    known = _text(menu) if menu else f"{full} patches"
    if menu and grids and (others := [grid for grid in grids if grid not in menu]):
        return [f"the model was not trained at {_text(others)}, but at {known}: expect worse answers there"]
    least = min(map(cells, grids or ()), default=max_tokens or full)
    if least < (min(map(cells, menu)) if menu else full // 8):
        return [f"{least} patches an image are few for a model trained at {known}: expect worse answers"]
    return []


def no_policy(known: bool, otherwise: list[str]) -> list[str]:
    """Warnings that a ReViT answers without a policy.

    known:     whether an assigner or outcomes are given
    otherwise: the options given that exclude a policy
    """
    if known and otherwise:
        return [f"with {' and '.join(otherwise)} no policy is used: each image's size decides its length"]
    if not known and not otherwise:
        return [
            "this is a ReViT, but no policy chooses lengths, so images run at up to full length: give --assigner FILE "
            "(of revit train-assigner), --outcomes FILE (of revit label), or --grids"
        ]
    return []
