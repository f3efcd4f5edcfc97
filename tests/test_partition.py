"""Every peak is in exactly one parent, whatever the footprints and the peaks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kermes.geometry import Box
from kermes.partition import cover_peaks, partition


@st.composite
def footprints_and_peaks(draw):
    """Draw labels (H, W), not necessarily connected or consecutive, and peaks (N, 2), some of them equal."""
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=12))
    labels = draw(hnp.arrays(np.int64, shape, elements=st.sampled_from([0, 0, 1, 2, 5, 10**12])))
    pixel = st.tuples(st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1))
    peaks = draw(st.lists(pixel, max_size=12))
    return labels, np.array(peaks, dtype=np.int64).reshape(-1, 2)


@given(footprints_and_peaks())
def test_every_peak_is_in_exactly_one_parent(case):
    labels, peaks = case
    rows = [row for parent in partition(labels, peaks).parents for row in parent.peaks]
    assert sorted(rows) == list(range(len(peaks)))


@given(footprints_and_peaks())
def test_peaks_share_a_parent_exactly_when_they_share_a_footprint(case):
    labels, peaks = case
    parent_of = {row: parent.parent_id for parent in partition(labels, peaks).parents for row in parent.peaks}
    at = labels[tuple(peaks.T)]
    for i in range(len(peaks)):
        for j in range(i):
            assert (parent_of[i] == parent_of[j]) == (at[i] == at[j] > 0)


@given(footprints_and_peaks())
def test_parents_come_in_the_order_of_their_first_peaks(case):
    parents = partition(*case).parents
    assert [parent.parent_id for parent in parents] == list(range(len(parents)))
    firsts = [parent.peaks[0] for parent in parents]
    assert firsts == sorted(firsts)
    assert all((np.diff(parent.peaks) > 0).all() for parent in parents)


@given(footprints_and_peaks())
def test_box_of_a_parent_is_the_smallest_around_its_footprint(case):
    labels, peaks = case
    for parent in partition(labels, peaks).parents:
        if parent.is_outside:
            assert parent.box == Box(*peaks[parent.peaks[0]], 1, 1)
        else:
            assert parent.box == Box.where(labels == parent.label)


@given(footprints_and_peaks(), st.randoms(use_true_random=False))
def test_reordering_the_peaks_reorders_the_parents(case, random):
    labels, peaks = case
    order = random.sample(range(len(peaks)), len(peaks))
    plain = {frozenset(parent.peaks) for parent in partition(labels, peaks).parents}
    mixed = {frozenset(order[row] for row in parent.peaks) for parent in partition(labels, peaks[order]).parents}
    assert mixed == plain


@given(footprints_and_peaks())
def test_peak_is_outside_exactly_where_no_pixel_may_be_used(case):
    labels, peaks = case
    for parent in partition(labels, peaks).parents:
        assert parent.is_outside == (labels[tuple(peaks[parent.peaks[0]])] == 0)
        assert len(parent.peaks) == 1 or not parent.is_outside


@given(footprints_and_peaks(), st.integers(0, 5))
def test_covered_peaks_all_have_a_footprint(case, radius):
    labels, peaks = case
    assert (cover_peaks(labels, peaks, radius)[tuple(peaks.T)] > 0).all()


@given(footprints_and_peaks(), st.integers(0, 5))
def test_covering_keeps_every_pixel_of_the_footprints(case, radius):
    labels, peaks = case
    covered = cover_peaks(labels, peaks, radius)
    assert (covered[labels > 0] > 0).all()


def test_lonely_peak_gets_a_square_cut_at_the_edge():
    covered = cover_peaks(np.zeros((10, 10), dtype=np.int64), np.array([(1, 5)]), 2)
    expected = np.zeros((10, 10), dtype=np.int64)
    expected[:4, 3:8] = 1
    np.testing.assert_array_equal(covered, expected)


@pytest.mark.parametrize(("gap", "n_footprints"), [(0, 1), (1, 2)])
def test_square_that_touches_a_footprint_joins_it(gap, n_footprints):
    labels = np.zeros((12, 20), dtype=np.int64)
    labels[:4, : 5 - gap] = 3
    covered = cover_peaks(labels, np.array([(6, 7)]), 2)
    assert len(np.unique(covered[covered > 0])) == n_footprints


def test_two_lonely_peaks_whose_squares_touch_are_one_parent():
    peaks = np.array([(5, 5), (15, 15), (5, 9)])
    covered = cover_peaks(np.zeros((20, 20), dtype=np.int64), peaks, 2)
    assert [list(parent.peaks) for parent in partition(covered, peaks).parents] == [[0, 2], [1]]


def test_footprints_that_hold_all_peaks_stay_as_they_are():
    labels = np.zeros((10, 10), dtype=np.int64)
    labels[2:5, 2:5] = 7
    assert cover_peaks(labels, np.array([(3, 3)]), 2) is labels


def test_no_peaks_make_no_parents():
    assert partition(np.ones((5, 5), dtype=np.int64), np.zeros((0, 2), dtype=np.int64)).parents == ()
