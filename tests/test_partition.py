"""Every peak is in exactly one parent and one blend, whatever the footprints and the peaks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from kermes.coadd import Coadd
from kermes.config import PartitionConfig
from kermes.errors import ShapeError
from kermes.geometry import Box
from kermes.partition import (
    RADII,
    Lights,
    couple,
    divide,
    in_order,
    is_large,
    join_close,
    measure_lights,
    nearest_peaks,
    partition,
    peak_snr,
    psf_correlation,
)
from kermes.psf import model_psf


@given(
    labels=hnp.arrays(np.int64, hnp.array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.integers(0, 1)),
    distance=st.sampled_from([0.0, 1.0, 2.0, 4.4, 7.0, 12.0]),
)
def test_footprints_that_come_close_are_joined(labels, distance):
    joined = join_close(labels, distance)
    np.testing.assert_array_equal(joined > 0, labels > 0)
    if labels.any():
        # Slow twin: the distance of each pixel from the nearest footprint.
        near = ndimage.distance_transform_edt(labels == 0) <= 0.5 * distance
        expected = ndimage.label(near, structure=np.ones((3, 3)))[0]
        np.testing.assert_array_equal(joined, np.where(labels > 0, expected, 0))


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


# ---------------------------------------------------------------- couplings

SIGMA = 2.0
GAUSSIAN = np.stack([model_psf(SIGMA, side=31)] * 2)


def test_correlation_of_a_gaussian_psf_is_a_gaussian_wider_by_root_two():
    distance = np.arange(10)
    # Between the middles of rings a pixel wide the table is linear, where the Gaussian bends by 1 / (2 SIGMA)^2.
    np.testing.assert_allclose(psf_correlation(GAUSSIAN)[:10], np.exp(-((distance / (2 * SIGMA)) ** 2)), atol=0.02)


def test_correlation_never_rises_and_goes_on_beyond_the_stamp():
    correlation = psf_correlation(GAUSSIAN)
    assert (np.diff(correlation) <= 0).all()
    assert correlation[0] == 1
    assert (correlation > 0).all()


def test_bands_without_a_psf_do_not_count():
    np.testing.assert_array_equal(psf_correlation(GAUSSIAN), psf_correlation(GAUSSIAN * [[[1]], [[0]]]))


def points(snr):
    """Lights of points."""
    n = len(snr)
    return Lights(
        snr=snr,
        stretch=np.ones(n),
        correlation=psf_correlation(GAUSSIAN),
        bright=np.zeros(0, dtype=np.int64),
        profiles=np.zeros((0, len(RADII))),
    )


def point_coadd(flux, peaks=((20, 20),), variance=4.0):
    """Points on whole pixels, without noise; what does not fit on the image wraps around."""
    images = np.zeros((2, 41, 41))
    for y, x in peaks:
        images += np.roll(np.pad(flux * GAUSSIAN, ((0, 0), (5, 5), (5, 5))), (y - 20, x - 20), axis=(1, 2))
    return Coadd(images=images, variance=np.full(2, variance), psfs=GAUSSIAN, bands=("g", "r"))


def test_signal_to_noise_of_a_point_is_that_of_the_matched_filter():
    expected = 100 / 2.0 * np.sqrt(np.square(GAUSSIAN).sum())
    # The filter sees four pixels on each side, two sigma: 0.3 % of the power of the PSF lies beyond.
    np.testing.assert_allclose(peak_snr(point_coadd(100), np.array([[20, 20]]), GAUSSIAN), expected, rtol=5e-3)


def test_a_saturated_core_is_seen_by_its_wings():
    coadd = point_coadd(1e5)
    mask = np.zeros((41, 41), dtype=bool)
    mask[16:25, 16:25] = True
    masked = Coadd(images=coadd.images, variance=coadd.variance, psfs=GAUSSIAN, bands=("g", "r"), mask=mask)
    (seen,) = peak_snr(masked, np.array([[20, 20]]), GAUSSIAN)
    # The power of the PSF on the pixels that are left, in two bands.
    left = np.square(GAUSSIAN[0]).sum() - np.square(GAUSSIAN[0, 11:20, 11:20]).sum()
    np.testing.assert_allclose(seen, 1e5 / 2.0 * np.sqrt(2 * left), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*no pixel of any band is valid")
def test_a_peak_without_a_valid_pixel_has_no_signal():
    coadd = Coadd(images=np.ones((1, 41, 41)), variance=np.zeros((1, 41, 41)), psfs=GAUSSIAN[:1], bands=("g",))
    assert peak_snr(coadd, np.array([[20, 20], [0, 40]]), GAUSSIAN[:1]).tolist() == [0, 0]


@pytest.mark.parametrize("distance", [3, 6])
def test_coupling_is_the_error_of_a_flux_whose_neighbour_is_left_out(distance):
    peaks = np.array([[20, 20 - distance], [20, 20]])
    coadd = point_coadd(100, peaks[:1])
    psf, image = GAUSSIAN[0], coadd.images[0, 5:36, 5:36]
    # What a fit of a point at the second peak alone takes up of the first one, in units of its own error.
    bias = (psf * image).sum() / np.sqrt(np.square(psf).sum()) / 2.0
    snr = np.full(2, 100 / 2.0 * np.sqrt(np.square(psf).sum()))
    couplings = couple(peaks, points(snr), PartitionConfig(coupling=1e-6))
    assert couplings.pairs.tolist() == [[0, 1]]
    # As above, rings a pixel wide: 0.02 of the signal-to-noise.
    np.testing.assert_allclose(couplings.strength, bias, atol=0.02 * snr[0])


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 25)), min_size=1, max_size=8))
def test_nearest_peaks_are_those_of_the_slow_twin(points):
    peaks, box = np.array(points), Box(3, 5, 14, 12)
    nearest = nearest_peaks(peaks, box)
    y, x = np.mgrid[3:17, 5:17]
    square = np.square(y[..., None] - peaks[:, 0]) + np.square(x[..., None] - peaks[:, 1])
    chosen = np.take_along_axis(square, nearest[..., None], axis=2)[..., 0]
    np.testing.assert_array_equal(chosen, square.min(axis=2))


# ---------------------------------------------------------------- division

LIMITS = PartitionConfig(largest_side=40, most_sources=8)


@st.composite
def crowds(draw):
    """Draw peaks (N, 2) on one footprint of 120 x 150 pixels, and their signal-to-noise."""
    n = draw(st.integers(1, 40))
    pixel = st.tuples(st.integers(0, 119), st.integers(0, 149))
    peaks = np.array(draw(st.lists(pixel, min_size=n, max_size=n)))
    snr = 10 ** (0.25 * np.array(draw(st.lists(st.integers(3, 20), min_size=n, max_size=n))))
    return peaks, snr


def parts_of(peaks, snr, config=LIMITS):
    """Divide points on one footprint."""
    rows = in_order(np.arange(len(peaks)), peaks)
    return divide(rows, peaks, points(snr[rows]), config)


@given(crowds())
def test_every_source_is_a_member_of_exactly_one_part(crowd):
    members = np.concatenate([part.members for part in parts_of(*crowd)])
    assert sorted(members.tolist()) == list(range(len(crowd[0])))


@given(crowds())
def test_parts_keep_within_the_limits(crowd):
    peaks, _ = crowd
    for part in parts_of(*crowd):
        assert not is_large(peaks[part.members], LIMITS) or len(part.members) == 1


@given(crowds())
def test_neighbours_are_the_coupled_sources_across_a_cut_for_both_sides(crowd):
    peaks, snr = crowd
    parts = parts_of(peaks, snr)
    part_of = {row: number for number, part in enumerate(parts) for row in part.members.tolist()}
    along = {(row, number) for number, part in enumerate(parts) for row in part.neighbors.tolist()}
    assert all(part_of[row] != number for row, number in along)
    for one, other in couple(peaks, points(snr), LIMITS).pairs.tolist():
        if part_of[one] != part_of[other]:
            assert {(one, part_of[other]), (other, part_of[one])} <= along


@given(crowds(), st.randoms(use_true_random=False))
def test_order_of_the_peaks_does_not_matter(crowd, random):
    peaks, snr = crowd
    order = np.array(random.sample(range(len(peaks)), len(peaks)))

    def described(parts, peaks):
        return [(peaks[part.members].tolist(), sorted(peaks[part.neighbors].tolist())) for part in parts]

    # Of sources on one pixel with different brightness the order is that of the list, so they are left out.
    _, first = np.unique(peaks, axis=0, return_index=True)
    order = order[np.isin(order, first)]
    rows = np.sort(order)
    here, there = parts_of(peaks[rows], snr[rows]), parts_of(peaks[order], snr[order])
    assert described(here, peaks[rows]) == described(there, peaks[order])


def test_a_cut_goes_where_the_coupling_is_least():
    rng = np.random.default_rng(5)
    clumps = [rng.integers(-8, 9, (n, 2)) + [30, x] for n, x in ((9, 20), (5, 70), (9, 120))]
    peaks = np.concatenate(clumps)
    parts = parts_of(peaks, np.full(len(peaks), 50.0), PartitionConfig(largest_side=60, most_sources=20))
    sides = [{int(x > 45) + int(x > 95) for x in peaks[part.members][:, 1]} for part in parts]
    assert sorted(map(sorted, sides)) in ([[0], [1, 2]], [[0, 1], [2]], [[0], [1], [2]])
    assert not any(len(part.neighbors) for part in parts)


def test_nothing_is_too_large_when_the_limit_is_off():
    peaks = np.random.default_rng(0).integers(0, 120, (30, 2))
    assert is_large(peaks, LIMITS)
    assert not is_large(peaks, PartitionConfig(largest_side=0, most_sources=8))


def large_galaxy(scale=20.0, flux=2e6, side=401):
    """An exponential disc without noise, and faint points on it; all on one footprint."""
    offset = np.arange(side) - side // 2
    radius = np.hypot(offset[:, None], offset)
    image = flux * np.exp(-radius / scale) / (2 * np.pi * scale**2)
    peaks = np.array([[side // 2, side // 2], [side // 2, side // 2 + 60], [side // 2 + 150, side // 2]])
    coadd = Coadd(images=np.stack([image] * 2), variance=np.full(2, 4.0), psfs=GAUSSIAN, bands=("g", "r"))
    labels = np.ones(image.shape, dtype=np.int64)
    parent = partition(labels, peaks, image.shape).parents[0]
    return coadd, labels, parent, peaks, image


def test_light_of_a_large_galaxy_is_measured_as_far_as_it_reaches():
    coadd, labels, parent, peaks, image = large_galaxy()
    snr = peak_snr(coadd, peaks, GAUSSIAN)
    lights = measure_lights(coadd, labels, parent, peaks, snr, GAUSSIAN, level=5.0)
    assert 0 in lights.bright
    # What a point on the galaxy would take up of it: its light at that distance over an effective area of the PSF.
    centre = image.shape[0] // 2
    for distance in (30, 60, 90):
        expected = np.sqrt(2) * image[centre, centre + distance] / 2.0 / np.sqrt(np.square(GAUSSIAN[0]).sum())
        # Rings are wide: an exponential of scale 20 pixels is bent within one, and between two.
        np.testing.assert_allclose(lights.at(np.array([0]), np.array([distance])), expected, rtol=0.3)


def test_sources_on_a_large_galaxy_are_coupled_to_it_beyond_the_limit_for_others():
    coadd, labels, parent, peaks, _ = large_galaxy()
    lights = measure_lights(coadd, labels, parent, peaks, np.array([1e4, 20.0, 20.0]), GAUSSIAN, level=5.0)
    assert [0, 1] in couple(peaks, lights, PartitionConfig(farthest=30)).pairs.tolist()


def test_a_masked_core_does_not_end_the_light_around_it():
    coadd, labels, parent, peaks, image = large_galaxy()
    mask = np.zeros(image.shape, dtype=bool)
    mask[196:205, 196:205] = True
    masked = Coadd(images=coadd.images, variance=coadd.variance, psfs=GAUSSIAN, bands=("g", "r"), mask=mask)
    snr = np.array([1e4, 20.0, 20.0])
    bare, hidden = (measure_lights(c, labels, parent, peaks, snr, GAUSSIAN, level=5.0) for c in (coadd, masked))
    np.testing.assert_allclose(hidden.reach, bare.reach)


def test_what_lies_on_a_large_galaxy_is_not_bright_itself():
    coadd, labels, parent, peaks, _ = large_galaxy()
    snr = peak_snr(coadd, peaks, GAUSSIAN)
    # The light of the disc alone makes a bright point of any place on it.
    assert snr[1] > 100
    lights = measure_lights(coadd, labels, parent, peaks, snr, GAUSSIAN, level=5.0)
    assert lights.bright.tolist() == [0]
    assert lights.snr[1] < 0.3 * snr[1]
