"""Every peak is in exactly one parent, whatever the footprints and the peaks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kermes.errors import ShapeError
from kermes.geometry import Box
from kermes.partition import partition


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
    rows = [row for parent in partition(labels, peaks, labels.shape).parents for row in parent.peaks]
    assert sorted(rows) == list(range(len(peaks)))


@given(footprints_and_peaks())
def test_peaks_share_a_parent_exactly_when_they_share_a_footprint(case):
    labels, peaks = case
    parent_of = {
        row: parent.parent_id for parent in partition(labels, peaks, labels.shape).parents for row in parent.peaks
    }
    at = labels[tuple(peaks.T)]
    for i in range(len(peaks)):
        for j in range(i):
            assert (parent_of[i] == parent_of[j]) == (at[i] == at[j] > 0)


@given(footprints_and_peaks())
def test_parents_come_in_the_order_of_their_first_peaks(case):
    parents = partition(*case, case[0].shape).parents
    assert [parent.parent_id for parent in parents] == list(range(len(parents)))
    firsts = [parent.peaks[0] for parent in parents]
    assert firsts == sorted(firsts)
    assert all((np.diff(parent.peaks) > 0).all() for parent in parents)


@given(footprints_and_peaks())
def test_box_of_a_parent_is_the_smallest_around_its_footprint(case):
    labels, peaks = case
    for parent in partition(labels, peaks, labels.shape).parents:
        if parent.is_outside:
            assert parent.box == Box(*peaks[parent.peaks[0]], 1, 1)
        else:
            assert parent.box == Box.where(labels == parent.label)


@given(footprints_and_peaks(), st.randoms(use_true_random=False))
def test_reordering_the_peaks_reorders_the_parents(case, random):
    labels, peaks = case
    order = random.sample(range(len(peaks)), len(peaks))
    plain = {frozenset(parent.peaks) for parent in partition(labels, peaks, labels.shape).parents}
    mixed = {
        frozenset(order[row] for row in parent.peaks)
        for parent in partition(labels, peaks[order], labels.shape).parents
    }
    assert mixed == plain


@given(footprints_and_peaks())
def test_peak_is_outside_exactly_where_no_pixel_may_be_used(case):
    labels, peaks = case
    for parent in partition(labels, peaks, labels.shape).parents:
        assert parent.is_outside == (labels[tuple(peaks[parent.peaks[0]])] == 0)
        assert len(parent.peaks) == 1 or not parent.is_outside


def test_no_peaks_make_no_parents():
    assert partition(np.ones((5, 5), dtype=np.int64), np.zeros((0, 2), dtype=np.int64), (5, 5)).parents == ()


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match="labels must have the shape of the image"):
        partition(np.ones((5, 5), dtype=np.int64), np.array([(2, 2)]), (5, 6))
