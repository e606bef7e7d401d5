"""The mean outcome below every prefix: closed forms, invariances, and the definition word by word."""

import pytest
import torch

from llmac.core.prefix_tree import prefix_means

PAD = 0


def means(responses, outcomes, group=None, known=None, width=None):
    width = width or max(map(len, responses))
    ids = torch.tensor([[*r, *[PAD] * (width - len(r))] for r in responses])
    return prefix_means(
        torch.tensor(outcomes, dtype=torch.float64),
        torch.tensor(group or [0] * len(responses)),
        ids.reshape(len(responses), width),
        torch.tensor([len(r) for r in responses]),
        None if known is None else torch.tensor(known),
    )


def by_definition(responses, outcomes, group, known, width):
    """For each t, the mean over all known that have the same first t tokens; without one, as before."""
    rows = []
    for mine, number in zip(responses, group, strict=True):
        row = []
        for t in range(width + 1):
            beginning = mine[: min(t, len(mine))]
            alike = [
                r
                for other, r, g, counts in zip(responses, outcomes, group, known, strict=True)
                if g == number and counts and other[: len(beginning)] == beginning
            ]
            row.append(sum(alike) / len(alike) if alike else row[-1])
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


def random_siblings(seed):
    random = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, 7, (24,), generator=random).tolist()
    responses = [torch.randint(0, 2, (n,), generator=random).tolist() for n in lengths]
    outcomes = torch.rand(24, generator=random, dtype=torch.float64).tolist()
    group = torch.randint(3, 6, (24,), generator=random).tolist()
    return responses, outcomes, group


def test_a_value_is_the_mean_of_those_that_begin_alike():
    found = means([[1, 2, 3], [1, 2, 4], [1, 5, 6], [7, 8, 9]], [1, 0, 1, 0])
    # root: 2 of 4; after 1: 2 of 3; after 1 2: 1 of 2; after 1 5 and after 7: one response each
    assert found.tolist() == pytest.approx(
        torch.tensor(
            [
                [1 / 2, 2 / 3, 1 / 2, 1],
                [1 / 2, 2 / 3, 1 / 2, 0],
                [1 / 2, 2 / 3, 1, 1],
                [1 / 2, 0, 0, 0],
            ]
        )
    )


@pytest.mark.parametrize("seed", range(3))
def test_ragged_groups_in_any_order_are_as_the_definition_has_them(seed):
    responses, outcomes, group = random_siblings(seed)
    for known in ([True] * 24, [True, True, False] * 8):
        expected = by_definition(responses, outcomes, group, known, 6)
        torch.testing.assert_close(means(responses, outcomes, group, known), expected)


def test_groups_do_not_see_each_other():
    responses, outcomes, group = random_siblings(0)
    mine = [i for i, g in enumerate(group) if g == 4]
    alone = means([responses[i] for i in mine], [outcomes[i] for i in mine], width=6)
    torch.testing.assert_close(means(responses, outcomes, group)[mine], alone)


def test_permuted_rows_have_permuted_values():
    responses, outcomes, group = random_siblings(1)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = means(*([x[i] for i in order] for x in (responses, outcomes, group)))
    torch.testing.assert_close(shuffled, means(responses, outcomes, group)[order])


def test_padding_is_no_token_even_where_its_id_is_sampled():
    responses, outcomes = [[1], [1, PAD], [1, PAD, 2]], [1, 0, 0]
    found = means(responses, outcomes)
    assert found[0].tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1 / 3])
    assert found[1].tolist() == pytest.approx([1 / 3, 1 / 3, 0, 0])
    wider = means(responses, outcomes, width=6)
    torch.testing.assert_close(wider[:, :4], found)
    torch.testing.assert_close(wider[:, 4:], found[:, -1:].expand(3, 3))


def test_identical_responses_stay_together_to_the_end():
    assert means([[1, 2], [1, 2], [3, 4]], [1, 0, 0])[:, 2].tolist() == [0.5, 0.5, 0.0]


def test_who_has_no_outcome_yet_is_no_failure_and_gets_the_last_value_somebody_knows():
    found = means(
        [[1, 2], [1, 3], [4, 5], [4, 5], [6, 7]],
        [1, 0, 9, 9, 9],
        group=[0, 0, 0, 0, 1],
        known=[True, True, False, False, False],
    )
    assert found.tolist() == [
        [0.5, 0.5, 1.0],
        [0.5, 0.5, 0.0],
        [0.5, 0.5, 0.5],
        [0.5, 0.5, 0.5],
        [0.0, 0.0, 0.0],
    ]


def test_values_keep_the_precision_of_the_outcomes_and_equal_ones_are_exact():
    outcomes = torch.full((6,), 0.1)
    ids = torch.randint(0, 2, (6, 4), generator=torch.Generator().manual_seed(0))
    found = prefix_means(outcomes, torch.zeros(6, dtype=torch.long), ids, torch.full((6,), 4))
    assert found.dtype == torch.float32
    assert (found == outcomes[0]).all()


@pytest.mark.parametrize(("rows", "width"), [(0, 0), (0, 3), (2, 0)])
def test_nothing_sampled_is_no_error(rows, width):
    ids = torch.zeros(rows, width, dtype=torch.long)
    lengths = torch.zeros(rows, dtype=torch.long)
    assert (
        prefix_means(torch.ones(rows), lengths, ids, lengths).tolist()
        == [[1.0] * (width + 1)] * rows
    )
