"""What `revit infer` says of arguments that are allowed but seldom meant."""

from __future__ import annotations

from revit_kernels.grids import Grid

MOST = 16  # times the model's own patches: attention grows with the square


def _text(grids) -> str:
    return ", ".join(f"{h}x{w}" for h, w in grids)


def check_tokens(grids: tuple[Grid, ...] | None, max_tokens: int | None, full: int) -> None:
    """Raise ValueError for more patches than any model of `full` patches is good for."""
    asked = max((h * w for h, w in grids or ()), default=max_tokens or 0)
    if asked > MOST * full:
        name = "--grids" if grids else "--max-tokens"
        raise ValueError(
            f"{name} asks for {asked:,} patches of an image, {asked / full:,.0f} times the {full:,} that the model was "
            f"made for: {MOST} times are the most"
        )


def lengths(
    grids: tuple[Grid, ...] | None, max_tokens: int | None, menu: tuple[Grid, ...] | None, full: int
) -> list[str]:
    """Warnings where images get lengths that the model was not trained at."""
    found = []
    known = _text(menu) if menu else f"{full} patches"
    if menu and grids and (others := [grid for grid in grids if grid not in menu]):
        found.append(f"the model was not trained at {_text(others)}, but at {known}: expect worse answers there")
    least = min((h * w for h, w in grids or ()), default=max_tokens or full)
    smallest = menu[-1][0] * menu[-1][1] if menu else max(1, full // 8)
    if least < smallest and not found:
        found.append(f"{least} patches an image are few for a model trained at {known}: expect worse answers")
    return found


def no_policy(menu: tuple[Grid, ...] | None, known: bool, otherwise: list[str]) -> str | None:
    """Why a ReViT answers without a policy, and what would give it one; None for another model.

    known:     whether an assigner or outcomes are at hand
    otherwise: the options that leave no room for a policy
    """
    if menu is None:
        return None
    if known and otherwise:
        return f"{' and '.join(otherwise)} leave out the policy: each image's size decides its length"
    if not known and not otherwise:
        return (
            "this is a ReViT, but no policy chooses lengths, so images run at up to full length: give --assigner FILE "
            "(of revit train-assigner), --outcomes FILE (of revit label), or --grids"
        )
    return None
