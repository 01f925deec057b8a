"""The sparse table against a dictionary."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from captionfix.errors import PolicyError
from captionfix.unravel import Evidence, Policy, join

ROWS = st.lists(
    st.tuples(
        st.integers(0, 3),
        st.integers(0, 9),
        st.sampled_from([-1.0, 1.0]),
        st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 3.0]),
    )
)
ENGINE = settings(settings.get_profile("engine"), max_examples=50)


def evidence(rows) -> Evidence:
    columns = list(zip(*rows, strict=True)) or [[], [], [], []]
    return Evidence(
        torch.tensor(columns[0], dtype=torch.long),
        torch.tensor(columns[1], dtype=torch.long),
        torch.tensor(columns[2], dtype=torch.float64),
        torch.tensor(columns[3], dtype=torch.float64),
    )


def rows_of(table: Evidence):
    return list(
        zip(table.word.tolist(), table.element.tolist(), table.direction.tolist(), table.mass.tolist(), strict=True)
    )


def added(rows) -> dict:
    total = defaultdict(float)
    for word, element, direction, mass in rows:
        total[word, element, direction] += mass
    return {k: m for k, m in total.items() if m > 0}


@ENGINE
@given(ROWS)
def test_merged(rows):
    merged = rows_of(evidence(rows).merged())
    if rows:
        assert {r[:3]: r[3] for r in merged} == added(rows)  # the masses are binary fractions: sums are exact
        assert len({r[:3] for r in merged}) == len(merged)
        assert [r[0] for r in merged] == sorted(r[0] for r in merged)


@ENGINE
@given(ROWS, st.integers(1, 6))
def test_pruned(rows, budget):
    whole = added(rows)
    pruned = rows_of(evidence(rows).merged().pruned(budget, 4))
    for word in range(4):
        before = sorted((m for k, m in whole.items() if k[0] == word), reverse=True)
        after = {r[:3]: r[3] for r in pruned if r[0] == word}
        assert len(after) == min(budget, len(before))
        assert sum(after.values()) == pytest.approx(sum(before))
        if after:  # the heaviest, all scaled alike
            scale = sum(before) / sum(before[:budget])
            assert sorted(after.values(), reverse=True) == pytest.approx([m * scale for m in before[:budget]])
            assert all(m == pytest.approx(whole[k] * scale) for k, m in after.items())


@ENGINE
@given(ROWS, ROWS)
def test_joined_dense_and_per_word(first, second):
    table = join([evidence(first), evidence(second)])
    dense, total = torch.zeros(4, 10, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for word, element, _, mass in first + second:
        dense[word, element] += mass
        total[word] += mass
    assert torch.equal(table.dense(4, 10), dense)
    assert torch.equal(table.per_word(4), total)
    torch.testing.assert_close(table.merged().dense(4, 10), dense)


@ENGINE
@given(ROWS, st.integers(1, 3))
def test_tables_stay_right_after_joins_selections_and_moves(rows, budget):
    """A table that is known to be merged must not be believed to be so after a step that undoes it."""
    merged = evidence(rows).merged()
    for table in (join([merged, merged]), merged.where(torch.arange(len(merged)).repeat(2)), join([merged])):
        again = rows_of(table.merged())
        assert len({r[:3] for r in again}) == len(again)
        assert sum(r[3] for r in again) == pytest.approx(float(table.mass.sum()))
        assert rows_of(table.merged().pruned(budget, 4)) == rows_of(table.merged().pruned(budget, 4).merged())


@pytest.mark.parametrize(
    "fields",
    [
        {"sums": 0},
        {"convolutions": -1},
        {"neurons": 2.5},
        {"sums": True},
        {"location": "middle"},
        {"mass": "all"},
        {"opposed": "nobody"},
        {"winner": True},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused(fields):
    with pytest.raises(PolicyError):
        Policy(**fields)


@pytest.mark.parametrize("name", ["defualt", {"sum": 3}, {"sums": 0}])
def test_an_unknown_policy_is_refused(name):
    with pytest.raises(PolicyError):
        Policy.named(name)
