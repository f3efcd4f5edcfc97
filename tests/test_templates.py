"""The single-band deblender: each step on small images, flux that closes, twins, and what it is known to do wrong."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

import kermes
import reference
from kermes.catalog import Model, Outcome, Reason
from kermes.config import BudgetConfig, Config, TemplatesConfig
from kermes.errors import ConfigError, InputError, ShapeError
from kermes.geometry import Box
from kermes.kernels import templates as kernels
from kermes.planning import plan_tile
from kermes.psf import gaussian_fwhm
from kermes.templates import deblend_footprint, make_templates, template_weights
from kermes.tile import deblend
from tiles import scene

RULES = ("trim", "r-to-peak", "r-to-footprint", "nearest-footprint")


def gaussian(shape, y, x, sigma, flux=1.0):
    """Round Gaussian of a total flux."""
    rows, columns = np.indices(shape)
    return flux * np.exp(-0.5 * ((rows - y) ** 2 + (columns - x) ** 2) / sigma**2) / (2 * np.pi * sigma**2)


PSF = gaussian((25, 25), 12, 12, 1.7)
PLAIN = TemplatesConfig(find_points=False, unbiased=False, edges="clip", median_half=0, monotonic=False)


def templates_of(image, peaks, config=PLAIN, footprint=None, variance=1e-6, valid=None, edge=None):
    """Templates of an image (H, W) with the same noise everywhere."""
    image = np.asarray(image, dtype=np.float32)
    return make_templates(
        image,
        np.broadcast_to(np.float32(variance), image.shape),
        np.ones(image.shape, dtype=bool) if valid is None else valid,
        np.ones(image.shape, dtype=bool) if footprint is None else footprint,
        np.reshape(peaks, (-1, 2)),
        PSF,
        config,
        edge,
    )


def filled(found, k, shape):
    """One template on the whole image."""
    out = np.zeros(shape, dtype=np.float32)
    template, box = found.template(k)
    out[box.y, box.x] = template
    return out


def children_on(children, shape):
    """All children (K, H, W) on the whole image."""
    out = np.zeros((len(children.templates), *shape), dtype=np.float64)
    for k in range(len(out)):
        child, box = children.child(k)
        out[k][box.y, box.x] = child
    return out


def crowd(seed, shape=(60, 56), n_sources=8, sigma=1.0):
    """Image with noise of Gaussians of several widths, with their peaks, and the footprint."""
    rng = np.random.default_rng(seed)
    peaks = np.unique(rng.integers(6, np.array(shape) - 6, (n_sources, 2)), axis=0)
    image = rng.normal(0, sigma, shape)
    for y, x in peaks:
        image += gaussian(shape, y, x, rng.uniform(1.7, 4.0), rng.uniform(100, 2000))
    footprint = ndimage.binary_dilation(ndimage.gaussian_filter(image, 1.7) > 1.0, iterations=2)
    return image.astype(np.float32), peaks, footprint


# ---------------------------------------------------------------- symmetric templates


@pytest.mark.nojit
def test_the_smaller_one_of_two_mirrored_pixels_counts():
    image = [
        [1, 2, 3, 4, 0],
        [5, 9, 20, 6, 7],
        [8, -1, 2, 3, 4],
    ]
    found = templates_of(image, [(1, 2)])
    # The corner of 1 has 4 for its mirror, the 4 has -1, and the corner of 0 has 8.
    expected = [
        [1, 2, 2, 0, 0],
        [5, 6, 20, 6, 5],
        [0, 0, 2, 2, 1],
    ]
    np.testing.assert_array_equal(filled(found, 0, (3, 5)), expected)


@pytest.mark.nojit
def test_the_symmetric_footprint_is_that_and_its_mirror():
    footprint = np.ones((7, 9), dtype=bool)
    footprint[2, 1] = False  # and so the mirror of it about (3, 4), which is (4, 7)
    found = templates_of(np.ones((7, 9)), [(3, 4)], footprint=footprint)
    expected = np.ones((7, 9))
    expected[2, 1] = expected[4, 7] = 0
    np.testing.assert_array_equal(filled(found, 0, (7, 9)), expected)


@pytest.mark.nojit
def test_a_pixel_without_a_mirror_in_the_footprint_has_no_light():
    found = templates_of(np.ones((7, 9)), [(3, 2)])  # two columns on the left, six on the right
    assert Box(*found.boxes[0].tolist()) == Box(0, 0, 7, 5)


@pytest.mark.nojit
def test_of_an_invalid_pixel_the_mirror_counts():
    image = np.full((5, 5), 3.0)
    image[1, 1], image[0, 0] = 0.0, 0.0
    valid = np.ones((5, 5), dtype=bool)
    valid[1, 1] = valid[0, 0] = valid[4, 4] = False
    found = filled(templates_of(image, [(2, 2)], valid=valid), 0, (5, 5))
    assert found[1, 1] == found[3, 3] == 3.0
    assert found[0, 0] == found[4, 4] == 0.0


@given(st.integers(0, 1000))
def test_the_symmetric_template_agrees_with_its_twin(seed):
    rng = np.random.default_rng(seed)
    image = rng.normal(1, 2, (11, 12)).astype(np.float32)
    inside = rng.uniform(size=image.shape) < 0.9
    y, x = rng.integers(2, 9, 2)
    inside[y, x] = True
    found = filled(templates_of(image, [(y, x)], footprint=inside), 0, image.shape)
    twin = reference.symmetric_values(image, inside, y, x, 12)
    expected = np.zeros(image.shape)
    for v, u in np.ndindex(image.shape):
        expected[v, u] = twin[v - y + 12, u - x + 12]
    np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_the_minimum_of_noise_is_low_and_the_corrected_one_is_not():
    image = np.random.default_rng(3).normal(10, 1, (301, 301)).astype(np.float32)
    everywhere = np.ones(image.shape, dtype=bool)
    bounds = np.array([0, 301, 0, 301])
    means = []
    for unbiased in (False, True):
        out = np.empty((301, 301), dtype=np.float32)
        noise = np.ones_like(image)
        kernels.symmetric_values(image, noise, everywhere, everywhere, bounds, 150, 150, unbiased, False, out)
        means.append(float(out.mean(dtype=float)) - 10)
    # The mean of the smaller one of two unit normals is -1 / sqrt(pi); 45,000 pairs leave an error of 0.004.
    assert means[0] == pytest.approx(-1 / np.sqrt(np.pi), abs=0.015)
    assert means[1] == pytest.approx(0, abs=0.015)


def test_the_correction_leaves_pairs_alone_that_see_different_light():
    image = np.where(np.arange(41) > 20, np.float32(100), np.float32(10)) * np.ones((41, 1), dtype=np.float32)
    everywhere = np.ones(image.shape, dtype=bool)
    out = np.empty((41, 41), dtype=np.float32)
    bounds = np.array([0, 41, 0, 41])
    kernels.symmetric_values(image, np.ones_like(image), everywhere, everywhere, bounds, 20, 20, True, False, out)
    np.testing.assert_allclose(np.delete(out, 20, axis=1), 10, rtol=1e-6)


# ---------------------------------------------------------------- median, monotonic


def test_the_median_filter_is_that_of_scipy_with_edges_left_alone():
    rng = np.random.default_rng(0)
    values = rng.uniform(-1, 3, (15, 17)).astype(np.float32)
    out = np.empty_like(values)
    kernels.median_filter(values, 2, 7, 8, 0.0, out)
    expected = np.maximum(values, 0)
    expected[2:-2, 2:-2] = ndimage.median_filter(np.maximum(values, 0), 5)[2:-2, 2:-2]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.nojit
@pytest.mark.parametrize("shape", [(3, 9), (9, 3)])
def test_templates_smaller_than_the_median_filter_are_left_alone(shape):
    values = np.random.default_rng(0).uniform(0, 1, shape).astype(np.float32)
    out = np.empty_like(values)
    kernels.median_filter(values, 2, shape[0] // 2, shape[1] // 2, 0.0, out)
    np.testing.assert_array_equal(out, values)


@pytest.mark.nojit
def test_a_shadow_is_a_wedge_of_five_pixels():
    template = np.full((21, 21), 10, dtype=np.float32)
    template[10, 12] = 1.0  # second ring, straight to the right
    kernels.cast_shadows(template)
    shadow = {(v - 10, u - 12) for v, u in np.argwhere(template == 1.0)}
    # round(0.3 s) rows to each side at distance s: 0, 1, 1, 1, 2. What the first group of rings has capped casts on
    # with the second one, from ring 5 on: that begins at distance 3, and reaches the edge.
    within = {(v, u) for v, u in shadow if u <= 5}
    expected = {
        (0, 0),
        *((v, s) for s, half in zip(range(1, 6), (0, 1, 1, 1, 2), strict=True) for v in range(-half, half + 1)),
    }
    assert expected <= within
    assert all(u >= 0 for _, u in shadow)
    assert (0, 8) in shadow


@pytest.mark.nojit
def test_nothing_is_brighter_than_the_centre_near_it_or_than_what_lies_before_it():
    template = np.full((15, 15), 5, dtype=np.float32)
    template[7, 7] = 3.0
    kernels.cast_shadows(template)
    np.testing.assert_array_equal(template, 3.0)


@given(st.integers(0, 1000), st.integers(0, 8), st.integers(0, 8))
def test_shadows_agree_with_their_twin(seed, half_y, half_x):
    template = np.random.default_rng(seed).uniform(0, 1, (2 * half_y + 1, 2 * half_x + 1)).astype(np.float32)
    expected = reference.cast_shadows(template)
    kernels.cast_shadows(template)
    np.testing.assert_array_equal(template, expected)


@given(st.integers(0, 1000))
def test_shadows_know_no_direction(seed):
    template = np.random.default_rng(seed).uniform(0, 1, (17, 17)).astype(np.float32)
    whole = template.copy()
    kernels.cast_shadows(whole)
    for turn in (np.flipud, np.fliplr, np.transpose):
        turned = np.ascontiguousarray(turn(template))
        kernels.cast_shadows(turned)
        np.testing.assert_array_equal(turned, turn(whole))


def test_monotonic_templates_do_not_know_the_box_they_were_made_on():
    # Boxes grow until the template ends in them: a wide and a narrow source in one footprint.
    image = gaussian((161, 161), 80, 80, 14.0, 1e5) + gaussian((161, 161), 40, 120, 2.0, 3e3)
    config = TemplatesConfig(find_points=False, edges="clip")
    found = templates_of(image, [(80, 80), (40, 120)], config, footprint=image > 0.5)
    assert found.boxes[0, 2] > 2 * kernels.FIRST_RADIUS + 1
    limits = 80, 80
    everywhere = np.ones(image.shape, dtype=bool)
    data = image.astype(np.float32)
    settings = kernels.Settings(False, 1.5, 1.5, 1.5, 3, 2, True, 0.0, 0, 2, True)
    noise = np.full_like(data, 1e-6)
    values = np.empty((161, 161), dtype=np.float32)
    bounds = np.array([0, 161, 0, 161])
    kernels.symmetric_values(data, noise, everywhere, image > 0.5, bounds, 80, 80, True, False, values)
    whole = np.empty_like(values)
    kernels.median_filter(values, 2, *limits, 0.0, whole)
    kernels.cast_shadows(whole)
    grown = kernels.make_template(data, noise, everywhere, image > 0.5, bounds, 80, 80, *limits, settings, False)
    half = grown.shape[0] // 2
    np.testing.assert_array_equal(grown, whole[80 - half : 81 + half, 80 - half : 81 + half])


# ---------------------------------------------------------------- edges


def test_a_source_at_the_edge_of_the_image_is_continued_by_a_ramp():
    image = gaussian((41, 41), 3, 20, 3.0, 1000)
    footprint = image > 0.01
    modes = {}
    for edges in ("clip", "ramp", "patch"):
        config = TemplatesConfig(find_points=False, unbiased=False, edges=edges, median_half=0)
        found = templates_of(image, [(3, 20)], config, footprint=footprint)
        modes[edges] = filled(found, 0, image.shape)
        assert found.decided("ramped_template")[0] == (edges == "ramp")
        assert found.decided("patched_template")[0] == (edges == "patch")
    # Below the image there is no mirror: row 7 has one at -1.
    assert not modes["clip"][7:].any()
    assert modes["ramp"][7, 20] > 0
    assert modes["patch"][12, 20] > 0
    lost = {edges: 1 - found.sum() / image.sum() for edges, found in modes.items()}
    assert max(lost["patch"], lost["ramp"]) < 0.01 < 0.1 < lost["clip"]


def test_a_faint_edge_is_not_continued():
    image = gaussian((41, 41), 20, 20, 2.0, 1000)
    found = templates_of(image, [(20, 20)], TemplatesConfig(find_points=False), footprint=image > 1.0, variance=1.0)
    assert not found.decided("ramped_template")[0]


def test_beyond_the_footprint_the_image_continues_a_template():
    image = gaussian((41, 41), 20, 20, 3.0, 1000)
    footprint = image > 0.3 * image.max()
    config = TemplatesConfig(find_points=False, unbiased=False, median_half=0)
    found = templates_of(image, [(20, 20)], config, footprint=footprint, variance=1e-2)
    template = filled(found, 0, image.shape)
    assert found.decided("ramped_template")[0]
    outside = (template > 0) & ~footprint
    assert outside.any()
    np.testing.assert_allclose(template[outside], image[outside], rtol=1e-5)


def test_the_edge_of_the_data_may_be_given():
    edge = np.zeros((41, 41), dtype=bool)
    edge[:, 14] = True
    image = gaussian((41, 41), 20, 20, 2.0, 1000)
    config = TemplatesConfig(find_points=False, edges="patch")
    for given_edge, patched in ((edge, True), (np.zeros_like(edge), False)):
        found = templates_of(image, [(20, 20)], config, footprint=image > 0.1, edge=given_edge)
        assert found.decided("patched_template")[0] == patched


# ---------------------------------------------------------------- point sources


def star_image(positions, fluxes, seed=0, shape=(51, 51), noise=1.0):
    """Stars on noise."""
    image = np.random.default_rng(seed).normal(0, noise, shape)
    for (y, x), flux in zip(positions, fluxes, strict=True):
        image += gaussian(shape, y, x, 1.7, flux)
    return image


def test_a_star_is_a_point_of_its_flux():
    found = templates_of(star_image([(25, 25)], [3000]), [(25, 25)], TemplatesConfig(), variance=1.0)
    assert found.decided("deblended_as_psf")[0]
    assert found.fits[0, 3] == 0
    error = 1 / np.sqrt((PSF**2).sum())
    # The ramp and the background cost a third more than the PSF alone would have as its error.
    assert abs(found.fits[0, 0] - 3000) < 5 * error


def test_two_stars_are_points_each_fitted_with_the_other():
    positions, fluxes = [(25, 22), (25, 28)], [3000, 2000]
    found = templates_of(star_image(positions, fluxes), positions, TemplatesConfig(), variance=1.0)
    assert found.decided("deblended_as_psf").all()
    np.testing.assert_array_equal(found.fits[:, 3], 1)
    np.testing.assert_allclose(found.fits[:, 0], fluxes, atol=60)


def test_a_galaxy_is_not_a_point():
    image = np.random.default_rng(0).normal(size=(51, 51)) + gaussian((51, 51), 25, 25, 4.0, 6000)
    found = templates_of(image, [(25, 25)], TemplatesConfig(), variance=1.0)
    assert not found.decided("deblended_as_psf")[0]
    assert found.fits[0, 6] / found.fits[0, 7] > 1.5


@pytest.mark.parametrize("offset", [0.0, 0.4, 0.7])
def test_a_star_beside_its_peak_is_moved_to_where_it_is(offset):
    image = star_image([(25 + offset, 25 - offset / 2)], [3000])
    found = templates_of(image, [(25, 25)], TemplatesConfig(), variance=1.0)
    assert found.decided("psf_moved")[0]
    # One move is a tenth too long, as the derivatives are differences over a pixel to each side.
    np.testing.assert_allclose(found.fits[0, 1:3], [offset, -offset / 2], atol=0.03 + 0.1 * offset)
    assert found.fits[0, 0] == pytest.approx(3000, rel=0.02)


def test_a_bright_star_two_pixels_from_its_peak_is_no_point():
    found = templates_of(star_image([(27, 25)], [20_000]), [(25, 25)], TemplatesConfig(), variance=1.0)
    assert not found.decided("deblended_as_psf")[0]


def test_a_star_that_seems_far_from_its_peak_is_said_to_be():
    # Faint enough that the derivatives explain it, far enough that they ask for more than a pixel.
    image = star_image([(26.3, 25)], [150])
    found = templates_of(image, [(25, 25)], TemplatesConfig(), variance=1.0)
    assert found.decided("psf_big_decenter")[0]
    assert not found.decided("deblended_as_psf")[0]


def test_a_bright_star_beside_its_peak_has_to_be_moved_more_than_once():
    image = star_image([(25.4, 24.8)], [10_000])
    for moves, is_point in ((1, False), (3, True)):
        found = templates_of(image, [(25, 25)], TemplatesConfig(point_moves=moves), variance=1.0)
        assert found.decided("deblended_as_psf")[0] == is_point
    np.testing.assert_allclose(found.fits[0, 1:3], [0.4, -0.2], atol=0.02)


@pytest.mark.parametrize(
    ("peak", "footprint", "valid", "name"),
    [
        ((25, 45), np.s_[10:40, 10:40], np.s_[:, :], "out_of_bounds"),
        ((25, 25), np.s_[24:26, 20:30], np.s_[:, :], "tiny_footprint"),
        ((25, 25), np.s_[10:40, 10:40], np.s_[:5, :], "no_valid_pixels"),
    ],
)
def test_where_no_point_can_be_fitted_there_is_no_template(peak, footprint, valid, name):
    inside, usable = np.zeros((2, 51, 51), dtype=bool)
    inside[footprint] = usable[valid] = True
    usable[12, 12] = True  # far from the peak, so that the footprint is not all invalid
    image = star_image([(25, 25)], [3000])
    found = templates_of(image, [peak], TemplatesConfig(), footprint=inside, valid=usable, variance=1.0)
    assert found.decided(name)[0]
    assert found.decided("no_template")[0]
    assert not found.has_light[0]


def test_a_peak_beside_the_footprint_has_no_symmetric_template():
    inside = np.zeros((51, 51), dtype=bool)
    inside[10:40, 10:40] = True
    inside[25, 25] = False
    found = templates_of(np.ones((51, 51)), [(25, 25)], footprint=inside)
    assert found.decided("failed_symmetric_template")[0]


def test_with_more_neighbours_than_pixels_there_is_no_point():
    near = [(25 + dy, 25 + dx) for dy, dx in itertools.product(range(-5, 6), repeat=2)]
    image = star_image([(25, 25)], [3000])
    found = templates_of(image, near, TemplatesConfig(), variance=1.0)
    assert found.decided("psf_bad_dof").all()
    assert not found.decided("deblended_as_psf").any()


def test_a_peak_twice_is_a_point_all_the_same():
    found = templates_of(star_image([(25, 25)], [3000]), [(25, 25), (25, 25)], TemplatesConfig(), variance=1.0)
    assert found.decided("deblended_as_psf").all()


def test_a_hole_is_no_point():
    found = templates_of(star_image([(25, 25)], [-3000]), [(25, 25)], TemplatesConfig(), variance=1.0)
    assert not found.decided("deblended_as_psf")[0]


@given(st.integers(0, 1000))
def test_the_point_fits_agree_with_their_twin(seed):
    rng = np.random.default_rng(seed)
    peaks = np.concatenate([[(20, 21)], rng.integers(8, 33, (4, 2))])
    image = star_image(peaks, rng.uniform(100, 5000, 5), seed, (41, 41)).astype(np.float32)
    variance = rng.uniform(0.5, 2, image.shape).astype(np.float32)
    valid = rng.uniform(size=image.shape) < 0.95
    found = make_templates(image, variance, valid, np.ones_like(valid), peaks, PSF, TemplatesConfig(point_chi2=1e9))
    twin = reference.point_chi2(image.astype(float), variance.astype(float), valid, peaks, 0, PSF, gaussian_fwhm(PSF))
    for n, (chi2, dof, _) in zip((6, 8), twin, strict=True):
        assert found.fits[0, n] == pytest.approx(chi2, rel=1e-6)
        assert found.fits[0, n + 1] == pytest.approx(dof, rel=1e-9)
    if not found.decided("psf_moved")[0] and found.decided("deblended_as_psf")[0]:
        assert found.fits[0, 0] == pytest.approx(twin[0][2][0], rel=1e-6)


@pytest.mark.parametrize("shift", [(0.3, -0.45), (-0.7, 0.2), (0.0, 0.5)])
def test_a_shifted_stamp_is_where_it_was_shifted_to(shift):
    shifted = kernels.shift_stamp(PSF, *shift)
    # Five pixels of Lanczos weights take this Gaussian to two thousandths of its peak.
    np.testing.assert_allclose(shifted, gaussian(PSF.shape, 12 + shift[0], 12 + shift[1], 1.7), atol=2e-3 * PSF.max())


# ---------------------------------------------------------------- weights, similar templates


def test_weights_find_what_the_templates_were_divided_by():
    image = gaussian((51, 51), 25, 20, 3.0, 1000) + gaussian((51, 51), 25, 32, 3.0, 700)
    found = templates_of(image, [(25, 20), (25, 32)], TemplatesConfig(find_points=False, median_half=0))
    factors = np.array([0.5, 3.0])
    footprint = np.ones(image.shape, dtype=bool)
    weights = template_weights(found, image.astype(np.float32), footprint)
    scaled = template_weights(found.scaled(factors), image.astype(np.float32), footprint)
    np.testing.assert_allclose(scaled * factors, weights, rtol=1e-5)
    np.testing.assert_allclose(weights, 1, atol=0.05)


def test_a_peak_on_the_shoulder_of_another_is_left_out():
    image = gaussian((51, 51), 25, 25, 4.0, 5000)
    peaks = [(25, 25), (25, 27), (8, 8)]
    image += gaussian((51, 51), 8, 8, 2.0, 300)
    for weight in (False, True):
        config = TemplatesConfig(find_points=False, drop_similar=True, weight=weight)
        children = deblend_footprint(image, np.full(image.shape, 1e-6), image > 1e-3, peaks, PSF, config)
        np.testing.assert_array_equal(children.templates.decided("degenerate"), [False, True, False])
        assert children.flux[1] == 0
        assert children.flux[0] == pytest.approx(5000, rel=0.01)


def test_of_a_point_and_another_that_are_alike_the_other_one_stays():
    image = star_image([(25, 25)], [5000], noise=0.1) + gaussian((51, 51), 25, 26, 2.5, 3000)
    config = TemplatesConfig(drop_similar=True, point_chi2=1e9, point_chi2_derivatives=1e-9)
    found = deblend_footprint(
        image, np.full(image.shape, 0.01), np.ones(image.shape), [(25, 25), (25, 26)], PSF, config
    )
    # Both are points here, and the brighter one stays; of which one is a point, that is the one to go.
    assert found.templates.decided("degenerate").sum() == 1
    brightest = int(np.argmax([np.max(found.templates.template(k)[0], initial=0) for k in range(2)]))
    assert not found.templates.decided("degenerate")[brightest]


def test_similar_pairs_agree_with_their_twin():
    image, peaks, footprint = crowd(4)
    found = templates_of(image, peaks, TemplatesConfig(find_points=False), footprint=footprint, variance=1.0)
    pairs, ratios = kernels.similar_pairs(found.boxes, found.offsets, found.pixels, 0.3)
    on_image = [filled(found, k, image.shape).astype(float) for k in range(len(peaks))]
    expected = {}
    for i, j in itertools.combinations(range(len(peaks)), 2):
        both = (on_image[i] > 0) & (on_image[j] > 0)
        one, other = on_image[i][both], on_image[j][both]
        if both.any() and one @ other > 0.3 * np.sqrt((one @ one) * (other @ other)):
            expected[j, i] = one @ other / np.sqrt((one @ one) * (other @ other))
    assert dict(zip(map(tuple, pairs.tolist()), ratios, strict=True)) == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- sharing


@pytest.mark.parametrize("points", ["never", "necessary", "always"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("seed", [0, 1])
def test_children_and_what_is_unassigned_are_the_image(rule, points, seed):
    image, peaks, footprint = crowd(seed)
    image[20, 20] = np.nan
    variance = np.ones(image.shape)
    variance[30:33, 10:20] = 0
    config = TemplatesConfig(stray=rule, stray_to_points=points)
    children = deblend_footprint(image, variance, footprint, peaks, PSF, config)
    valid = np.isfinite(image) & (variance > 0)
    total = children_on(children, image.shape).sum(axis=0) + children.unassigned()
    np.testing.assert_allclose(total[valid], image[valid], rtol=1e-5, atol=1e-5)
    assert not total[~valid].any()
    np.testing.assert_allclose(children_on(children, image.shape).sum(axis=(1, 2)), children.flux, rtol=1e-4, atol=1e-2)
    if rule == "trim":
        assert not children.has_stray_flux.any()
    elif points != "never":
        assert children.has_stray_flux.any()
        assert not (children.unassigned()[footprint & valid] > 0).any()


@pytest.mark.parametrize("rule", RULES[1:])
@pytest.mark.parametrize("clip", [0.0, 0.001, 0.1])
def test_stray_flux_agrees_with_its_twin(rule, clip):
    image, peaks, footprint = crowd(2, shape=(36, 34), n_sources=5)
    config = TemplatesConfig(stray=rule, stray_clip=clip, find_points=False)
    children = deblend_footprint(image, np.ones(image.shape), footprint, peaks, PSF, config)
    assert len(children.stray_places) > 20
    on_image = [filled(children.templates, k, image.shape) for k in range(len(peaks))]
    takes = children.templates.has_light
    expected = reference.share_stray(image, children.stray_places, peaks, on_image, takes, rule, clip)
    got = np.zeros_like(expected)
    rows = np.repeat(np.arange(len(expected)), np.diff(children.stray_starts))
    got[rows, children.stray_owners] = children.stray_parts
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("points", "owners"), [("never", {1}), ("necessary", {1}), ("always", {0, 1})])
def test_point_sources_get_stray_flux_as_set(points, owners):
    image = star_image([(25, 15)], [3000], noise=0.3) + gaussian((51, 51), 25, 36, 4.0, 4000)
    config = TemplatesConfig(stray="r-to-peak", stray_to_points=points, stray_clip=0.0)
    footprint = np.ones(image.shape, dtype=bool)
    children = deblend_footprint(image, np.full(image.shape, 0.09), footprint, [(25, 15), (25, 36)], PSF, config)
    np.testing.assert_array_equal(children.templates.decided("deblended_as_psf"), [True, False])
    assert set(children.stray_owners.tolist()) == owners


@pytest.mark.parametrize(("points", "stray"), [("never", False), ("necessary", True), ("always", True)])
def test_where_all_are_points_they_get_it_if_necessary(points, stray):
    image = star_image([(15, 15), (15, 30)], [3000, 3000], shape=(61, 51))
    config = TemplatesConfig(stray="nearest-footprint", stray_to_points=points)
    footprint = np.ones(image.shape, dtype=bool)
    children = deblend_footprint(image, np.ones(image.shape), footprint, [(15, 15), (15, 30)], PSF, config)
    assert children.templates.decided("deblended_as_psf").all()
    assert children.has_stray_flux.any() == stray


def test_negative_pixels_are_never_stray():
    image, peaks, footprint = crowd(5)
    children = deblend_footprint(
        image, np.ones(image.shape), footprint, peaks, PSF, TemplatesConfig(stray="nearest-footprint")
    )
    assert (image[tuple(children.stray_places.T)] > 0).all()
    assert (children.unassigned()[footprint & (children.total == 0)] <= 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_peaks_does_not_matter(rule):
    image, peaks, footprint = crowd(6)
    # Ties between two nearest footprints go to the earlier one: that is left to one of the rules alone.
    order = np.random.default_rng(0).permutation(len(peaks)) if rule != "nearest-footprint" else np.arange(len(peaks))
    config = TemplatesConfig(stray=rule)
    first, second = (
        deblend_footprint(image, np.ones(image.shape), footprint, rows, PSF, config) for rows in (peaks, peaks[order])
    )
    np.testing.assert_allclose(second.flux, first.flux[order], rtol=1e-6)
    np.testing.assert_array_equal(second.templates.flags, first.templates.flags[order])


def test_an_image_that_is_shifted_or_flipped_gives_the_same_children():
    image, peaks, footprint = crowd(7)
    image, footprint = np.pad(image, 12), np.pad(footprint, 12)  # what reaches the edge of the image ends there
    peaks, variance = peaks + 12, np.ones(image.shape)
    flux = deblend_footprint(image, variance, footprint, peaks, PSF).flux
    wider = [np.pad(array, ((3, 8), (9, 2))) for array in (image, variance, footprint)]
    np.testing.assert_array_equal(deblend_footprint(*wider, peaks + [3, 9], PSF).flux, flux)
    flipped = [array[::-1] for array in (image, variance, footprint)]
    again = deblend_footprint(*flipped, np.stack([len(image) - 1 - peaks[:, 0], peaks[:, 1]], axis=1), PSF).flux
    np.testing.assert_allclose(again, flux, rtol=1e-4)


def test_the_variance_of_a_child_is_that_of_its_share_or_of_the_pixels():
    image = gaussian((51, 51), 25, 20, 3.0, 1000) + gaussian((51, 51), 25, 30, 3.0, 1000)
    peaks, variance = [(25, 20), (25, 30)], np.full(image.shape, 4.0)
    shared, whole = (
        deblend_footprint(
            image, variance, image > 0.01, peaks, PSF, TemplatesConfig(find_points=False, scale_variance=scaled)
        )
        for scaled in (True, False)
    )
    for children in (shared, whole):
        pixels = [children.child_variance(k)[0] for k in range(2)]
        np.testing.assert_allclose(children.flux_err, np.sqrt([p.sum(dtype=float) for p in pixels]), rtol=1e-5)
    middle = [shared.child_variance(k) for k in range(2)]
    values = [pixels[25 - box.y0, 25 - box.x0] for pixels, box in middle]
    np.testing.assert_allclose(values, 1.0, rtol=1e-3)  # half of the light each, a quarter of the variance
    assert set(np.unique(whole.child_variance(0)[0])) == {0.0, 4.0}


def test_an_isolated_source_keeps_its_image():
    image = gaussian((51, 51), 25, 25, 3.0, 1000)
    children = deblend_footprint(image, np.full(image.shape, 1e-4), image > 1e-3, [(25, 25)], PSF)
    child, box = children.child(0)
    np.testing.assert_allclose(child[child > 0], image[box.y, box.x][child > 0], rtol=1e-5)
    assert children.flux[0] == pytest.approx(1000, rel=0.01)


def faint_flux_bias(unbiased, snr, n_images=400):
    """Mean relative error of the flux of isolated galaxies, and its error."""
    rng = np.random.default_rng(1)
    truth = gaussian((45, 45), 22, 22, 2.4, 1.0)
    flux = snr / np.sqrt((truth**2).sum())
    footprint = np.hypot(*(np.indices((45, 45)) - 22)) < 11
    config = TemplatesConfig(find_points=False, unbiased=unbiased)
    found = []
    for _ in range(n_images):
        image = flux * truth + rng.normal(size=truth.shape)
        found.append(deblend_footprint(image, np.ones(truth.shape), footprint, [(22, 22)], PSF, config).flux[0])
    relative = np.array(found) / flux - 1
    return relative.mean(), relative.std() / np.sqrt(n_images)


@pytest.mark.parametrize(("snr", "low"), [(6, 0.35), (12, 0.12), (30, 0.04)])
def test_faint_sources_are_not_too_faint_with_the_unbiased_minimum_and_are_without(snr, low):
    bias, error = faint_flux_bias(True, snr)
    assert abs(bias) < 0.02 + 3 * error
    bias, error = faint_flux_bias(False, snr)
    assert bias < -low - 3 * error


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": np.ones(5)}, "image must have shape"),
        ({"variance": np.ones((4, 5))}, "variance must have the shape of the image"),
        ({"footprint": np.ones((4, 5))}, "footprint must have the shape of the image"),
        ({"edge": np.ones((4, 5))}, "edge must have the shape of the image"),
        ({"peaks": [1, 2, 3]}, "peaks must have shape"),
        ({"psf": np.ones(3)}, "psf must have shape"),
        ({"psf": np.ones((4, 5))}, "psf must have odd sides"),
        ({"psf": np.zeros((5, 5))}, "psf must have a positive sum"),
    ],
)
def test_bad_input_gets_a_message(change, message):
    arrays = {name: np.ones((5, 5)) for name in ("image", "variance", "footprint", "psf")}
    with pytest.raises((ShapeError, InputError), match=message):
        deblend_footprint(**{**arrays, "peaks": [(2, 2)], **change})


def test_no_peaks_are_no_children():
    children = deblend_footprint(np.ones((9, 9)), np.ones((9, 9)), np.ones((9, 9)), [], np.ones((3, 3)))
    assert len(children.templates) == 0
    np.testing.assert_array_equal(children.unassigned(), 1)


@pytest.mark.parametrize("change", [{"edges": "soft"}, {"stray": "all"}, {"stray_clip": 1.0}, {"median_half": -1}])
def test_bad_settings_get_a_message(change):
    with pytest.raises(ConfigError, match=f"templates.{next(iter(change))} must be"):
        TemplatesConfig(**change)


# ---------------------------------------------------------------- whole coadds


def simulated():
    """Twelve sources in three bands."""
    return scene(n_sources=12, shape=(110, 100), seed=4)


def with_templates(**options):
    """Settings of the single-band deblender."""
    return Config(model="templates", templates=TemplatesConfig(**options))


@pytest.mark.parametrize("image", ["each", "all", "r"])
def test_every_peak_has_a_row_whatever_the_templates_are_made_of(image):
    truth = simulated()
    result = deblend(truth.coadd, truth.peaks, config=with_templates(image=image))
    assert len(result) == len(truth.peaks)
    assert set(result.objects["outcome"]) == {Outcome.FULL}
    assert set(result.objects["model"]) <= {Model.POINT, Model.TEMPLATE}
    same = [np.array_equal(*(result.objects[f"{band}_deblended_as_psf"] for band in pair)) for pair in ("gr", "ri")]
    assert all(same) or image == "each"


def test_a_band_that_is_not_there_gets_a_message():
    truth = simulated()
    with pytest.raises(InputError, match=r"templates.image must be .* one of g, r, i, got 'z'"):
        deblend(truth.coadd, truth.peaks, config=with_templates(image="z"))


def test_templates_of_all_bands_share_neighbours_of_any_colour():
    # A red source beside a blue one, equally bright in the sum.
    one, other = (gaussian((41, 41), 20, x, 3.0, 1.0) for x in (15, 26))
    flux = np.array([[4000.0, 400.0], [400.0, 4000.0]])
    images = np.array([a * one + b * other for a, b in flux])
    coadd = kermes.Coadd(images=images, variance=1.0, psfs=[PSF, PSF], bands=["g", "r"])
    config = with_templates(image="all", find_points=False)
    result = deblend(coadd, [(20, 15), (20, 26)], np.ones((41, 41), dtype=int), config)
    got = np.array([result.objects["g_flux"], result.objects["r_flux"]])
    np.testing.assert_allclose(got, flux, rtol=0.1)


def test_flux_and_columns_are_those_of_the_footprint():
    truth = simulated()
    config = replace(with_templates(stray="nearest-footprint"), correlated_noise=False)
    result = deblend(truth.coadd, truth.peaks, config=config)
    plan = plan_tile(truth.coadd, truth.peaks, config=config)
    task = next(task for task in plan.tasks if len(task.members) > 2)
    window = (0, task.outer.y, task.outer.x)
    labels = plan.labels[task.outer.y, task.outer.x]
    footprint = labels == task.parent.label
    # What other footprints have is not there for this one.
    variance = np.where(footprint | (labels == 0), truth.coadd.variance[window], 0)
    peaks = plan.peaks[task.members] - task.outer.origin
    children = deblend_footprint(truth.coadd.images[window], variance, footprint, peaks, task.psfs[0], config.templates)
    rows = result.objects[task.members]
    np.testing.assert_allclose(rows["g_flux"], children.flux, rtol=1e-3, atol=1e-2 * children.flux_err.max())
    np.testing.assert_allclose(rows["g_flux_err"], children.flux_err, rtol=1e-3)
    np.testing.assert_allclose(rows["g_stray_flux"], children.stray_flux, rtol=1e-3, atol=1e-2)
    np.testing.assert_array_equal(rows["g_deblended_as_psf"], children.templates.decided("deblended_as_psf"))


@pytest.mark.parametrize(
    ("limits", "flag"),
    [
        ({"largest_area": 50}, "parent_too_big"),
        ({"largest_side": 10}, "parent_too_big"),
        ({"least_axis_ratio": 0.999}, "parent_too_big"),
        ({"most_masked": 0.0}, "parent_masked"),
    ],
)
def test_footprints_beyond_a_limit_are_points_at_their_peaks(limits, flag):
    truth = simulated()
    mask = np.zeros(truth.coadd.shape, dtype=int)
    mask[::5, ::5] = 1
    coadd = replace(truth.coadd, mask=mask, mask_planes={"BAD": 0}) if flag == "parent_masked" else truth.coadd
    objects = deblend(coadd, truth.peaks, config=with_templates(**limits)).objects
    beyond = np.asarray(objects[flag])
    assert beyond.any()
    assert set(objects["outcome"][beyond]) == {Outcome.PEAK}
    assert set(objects["reason"][beyond]) == {Reason.LIMITS}
    assert np.isfinite(objects["r_flux"]).all()


def test_of_more_peaks_than_are_wanted_the_brightest_have_templates():
    truth = simulated()
    objects = deblend(truth.coadd, truth.peaks, config=with_templates(most_peaks=1)).objects
    parents = objects.group_by("parent_id").groups
    assert any(len(parent) > 1 for parent in parents)
    for parent in parents:
        assert (parent["outcome"] == Outcome.FULL).sum() == 1
        assert set(parent["reason"][parent["outcome"] == Outcome.PEAK]) <= {Reason.LIMITS}
        assert (parent["too_many_peaks"] == (len(parent) > 1)).all()


def test_a_blend_that_the_scene_model_cannot_afford_gets_templates():
    truth = simulated()
    plan = plan_tile(truth.coadd, truth.peaks)
    operations = 0.1 * max(task.cost.operations for task in plan.tasks)
    budget = BudgetConfig(operations=operations)
    result = deblend(truth.coadd, truth.peaks, config=Config(budget=budget))
    rows = result.objects[result.objects["outcome"] == Outcome.TEMPLATE]
    assert len(rows)
    assert set(rows["reason"]) == {Reason.BUDGET}
    assert np.isfinite(rows["r_flux"]).all()
    assert not [name for name in result.objects.colnames if "psf_chi2" in name]


def test_templates_survive_being_written(tmp_path):
    truth = simulated()
    result = deblend(truth.coadd, truth.peaks, config=with_templates())
    result.write(tmp_path / "out", tolerance=None)
    again = kermes.open(tmp_path / "out", coadd=truth.coadd)
    np.testing.assert_array_equal(again.model_image(), result.model_image())
    for name in ("g_ramped_template", "i_psf_center_y", "too_many_peaks"):
        np.testing.assert_array_equal(again.objects[name], result.objects[name])
    obj, other = result[3], again[3]
    np.testing.assert_array_equal(other.model("r").array, obj.model("r").array)
    # The models of all objects are added up in another order.
    np.testing.assert_allclose(other.redistributed("r").array, obj.redistributed("r").array, rtol=1e-5, atol=1e-6)


def test_a_band_without_pixels_is_missing_and_the_others_are_not():
    truth = simulated()
    valid = truth.coadd.valid.copy()
    valid[1] = False
    coadd = replace(truth.coadd, variance=np.where(valid, truth.coadd.variance, 0))
    result = deblend(coadd, truth.peaks, config=with_templates())
    expected = deblend(truth.coadd, truth.peaks, config=with_templates()).objects
    assert np.isnan(result.objects["r_flux"]).all()
    assert result.objects["flag_missing_band"].all()
    np.testing.assert_array_equal(np.isfinite(result.objects["g_flux"]), np.isfinite(expected["g_flux"]))
