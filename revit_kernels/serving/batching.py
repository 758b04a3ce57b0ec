"""Batches by a budget of tokens."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


def token_batches(
    items: Iterable[Item],
    budget: int,
    tokens_of: Callable[[Item], int],
    *,
    max_bytes: int | None = None,
    bytes_of: Callable[[Item], int] | None = None,
) -> Iterator[list[Item]]:
    """The items in batches of at most `budget` tokens, first in, first out.

    budget:    most tokens of a batch; a larger item is a batch of its own
    tokens_of: the tokens of an item
    max_bytes: a second limit of the same kind, on the sum of `bytes_of`

    Lazy: an item is taken only when it is needed. Raises ValueError for a budget below 1.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1 token, got {budget}")
    return _token_batches(items, budget, tokens_of, max_bytes, bytes_of)


def _token_batches(items, budget, tokens_of, max_bytes, bytes_of):
    batch, tokens, size = [], 0, 0
    for item in items:
        more, larger = tokens_of(item), bytes_of(item) if bytes_of else 0
        if batch and (tokens + more > budget or (max_bytes is not None and size + larger > max_bytes)):
            yield batch
            batch, tokens, size = [], 0, 0
        batch.append(item)
        tokens, size = tokens + more, size + larger
    if batch:
        yield batch
