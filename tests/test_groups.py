"""Which neighbours are fitted together, against slow twins."""

from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kermes.kernels.groups import join_neighbors, join_pairs, regroup, sort_by
from kermes.profile_fitting import FEW, possible_pairs

fields = st.integers(1, 25).flatmap(
    lambda n: st.tuples(
        st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=n, max_size=n),
        st.lists(st.floats(1, 100), min_size=n, max_size=n),
    )
)


def listed(members, offsets):
    return [members[a:b].tolist() for a, b in pairwise(offsets)]


def grouped(positions, brightness, link, most, ratio):
    positions = np.array(positions, dtype=float)
    brightness = np.ones(len(positions)) if brightness is None else np.array(brightness)
    return listed(*join_neighbors(positions, brightness, possible_pairs(positions, link), link, most, ratio))


def slow_groups(positions, brightness, link, most, ratio):
    """Join pairs in the order of their distance, all lists of indices."""
    positions = np.array(positions, dtype=float)
    groups = [{i} for i in range(len(positions))]
    pairs = sorted(
        (float(np.hypot(*(positions[i] - positions[j]))), i, j)
        for i in range(len(positions))
        for j in range(i + 1, len(positions))
    )
    for d, i, j in pairs:
        a, b = (next(g for g in groups if k in g) for k in (i, j))
        similar = max(brightness[i], brightness[j]) <= ratio * min(brightness[i], brightness[j])
        if d < link and similar and a is not b and len(a | b) <= most:
            groups = [g for g in groups if g is not a and g is not b] + [a | b]
    return sorted(sorted(g) for g in groups)


@pytest.mark.nojit
@given(st.lists(st.integers(-5, 5)))
def test_numbers_are_sorted_by_their_keys_and_equal_keys_by_number(values):
    keys = np.array(values, dtype=float)
    numbers = np.random.default_rng(len(values)).permutation(len(values))
    sort_by(numbers, keys)
    np.testing.assert_array_equal(numbers, np.argsort(keys, kind="stable"))


@pytest.mark.nojit
@given(fields, st.floats(0.5, 20), st.integers(1, 6), st.floats(2, 50))
def test_groups_agree_with_the_slow_twin(field, link, most, ratio):
    found = grouped(*field, link, most, ratio)
    assert [sorted(group) for group in found] == slow_groups(*field, link, most, ratio)


def test_groups_of_many_sources_agree_with_the_slow_twin():
    # On a grid, so that many pairs are equally close; the pairs of many sources come from a tree.
    rng = np.random.default_rng(7)
    positions, brightness = rng.integers(0, 40, (FEW + 30, 2)), rng.uniform(1, 100, FEW + 30)
    found = grouped(positions, brightness, 6.0, 4, 10.0)
    assert [sorted(group) for group in found] == slow_groups(positions, brightness, 6.0, 4, 10.0)


@given(fields, st.integers(1, 6))
def test_every_source_is_in_one_group_of_at_most_the_largest_size(field, most):
    groups = grouped(field[0], None, 13.0, most, 40.0)
    assert sorted(chain(*groups)) == list(range(len(field[0])))
    assert max(map(len, groups)) <= most


@pytest.mark.nojit
def test_pairs_in_any_order_hold_every_source_once_and_groups_are_never_too_large():
    pairs = np.array([(s, t) for s in range(9) for t in range(s + 1, 9) if t - s < 3])
    members, starts = join_pairs(pairs, np.arange(len(pairs)), 9, 4)
    assert sorted(members) == list(range(9))
    assert np.diff(starts).max() <= 4


def test_the_closest_pairs_are_joined_first():
    assert grouped([[0.0, 0], [0, 5], [0, 8], [0, 30]], None, 13.0, 2, 40.0) == [[0], [1, 2], [3]]


def test_far_fainter_neighbours_are_not_joined():
    assert grouped([[0.0, 0], [0, 5]], [1000.0, 5], 13.0, 5, 40.0) == [[0], [1]]


def regrouped(positions, snr, before, settled, *, link=13.0):
    """Group sources anew that were in some groups: those now, and whether they are settled."""
    positions = np.array(positions, dtype=float)
    members = np.array([*chain(*before)], dtype=np.int64)
    offsets = np.cumsum([0, *map(len, before)])
    *groups, settled = regroup(
        positions, np.ones(len(positions)), possible_pairs(positions, link), link, 5, 40.0, np.array(snr), members,
        offsets, np.array(settled, dtype=bool),
    )  # fmt: skip
    return listed(*groups), settled.tolist()


def test_members_are_sorted_by_their_signal_to_noise():
    groups, _ = regrouped([[0, 0], [0, 5], [0, 9], [0, 60]], [30.0, 10, 20, 1], [], [])
    assert groups == [[1, 2, 0], [3]]


def test_groups_with_the_members_that_they_had_are_as_settled_as_they_were():
    positions, snr = [[0, 0], [0, 5], [0, 60], [0, 65], [90, 0]], [1.0] * 5
    assert regrouped(positions, snr, [[1, 0], [3, 2], [4]], [True, False, True]) == (
        [[0, 1], [2, 3], [4]],
        [True, False, True],
    )
    # One that has lost a member, or got one, is a group of its own; so is what is new.
    assert regrouped(positions[:4], snr[:4], [[0, 1, 2], [3]], [True, True])[1] == [False, False]
    assert regrouped(positions, snr, [[0, 1], [2, 3]], [True, True])[1] == [True, True, False]
