import pytest

from revit_kernels.serving.batching import token_batches


def batches(lengths, budget, **kwargs):
    return list(token_batches(lengths, budget, lambda n: n, **kwargs))


@pytest.mark.parametrize(
    "lengths, budget, expected",
    [
        ([], 10, []),
        ([3], 10, [[3]]),
        ([5, 5, 1], 10, [[5, 5], [1]]),
        ([4, 4, 4], 10, [[4, 4], [4]]),
        ([11, 1, 12, 13], 10, [[11], [1], [12], [13]]),  # an item above the budget runs alone
        ([1, 11, 1], 10, [[1], [11], [1]]),
        ([0, 0, 10, 0], 10, [[0, 0, 10, 0]]),
        ([1, 1], 1, [[1], [1]]),
    ],
)
def test_first_in_first_out_within_the_budget(lengths, budget, expected):
    assert batches(lengths, budget) == expected


def test_bytes_are_a_second_limit():
    sized = [(1, 60), (1, 60), (1, 10), (1, 500), (9, 1)]
    made = list(token_batches(sized, 10, lambda i: i[0], max_bytes=100, bytes_of=lambda i: i[1]))
    assert made == [[(1, 60)], [(1, 60), (1, 10)], [(1, 500)], [(9, 1)]]


def test_takes_no_more_than_it_needs():
    taken = []

    def items():
        for n in (6, 6, 6):
            taken.append(n)
            yield n

    made = token_batches(items(), 10, lambda n: n)
    assert taken == []
    assert next(made) == [6] and taken == [6, 6]


def test_wrong_budget():
    with pytest.raises(ValueError, match="budget must be at least 1 token, got 0"):
        token_batches([], 0, len)
