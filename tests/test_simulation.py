"""Simulated scenes: the drawing is exact, the noise is what it claims, the same seed gives the same scene."""

import dataclasses

import numpy as np
import pytest
from astropy.table import Table
from scipy.signal import fftconvolve
from scipy.special import gamma, gammaincinv

import kermes
from kermes.coadd import Coadd
from kermes.errors import InputError
from kermes.psf import CellPsf
from kermes.simulation import (
    DEPTH,
    MoffatPsf,
    SimulatedPatch,
    SimulatedScene,
    compute_oracle_sigma,
    render_truth,
    simulate_patch,
    simulate_scene,
)

KINDS = ("field", "knots", "pair", "crowded", "bright")


@pytest.fixture(scope="module")
def scene() -> SimulatedScene:
    return simulate_scene(seed=3)


@pytest.fixture(scope="module")
def irregulars() -> SimulatedScene:
    return simulate_scene(kind="knots", seed=3, magnitudes=(20.0, 25.0))


def one_source(scene: SimulatedScene, **changes: float) -> SimulatedScene:
    """Make a scene whose truth is the first row of `scene` with some columns changed."""
    truth = Table(scene.truth[:1])
    for name, value in changes.items():
        truth[name] = value
    return dataclasses.replace(scene, peaks=scene.peaks[:1], truth=truth)


def integrated(psf: MoffatPsf, dy: float, dx: float, side: int) -> np.ndarray:
    """Integrate a PSF over pixels by brute force; its centre lies (dy, dx) from the middle pixel of the stamp."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    offsets = (np.arange(side) - side // 2)[:, None] + 0.5 * nodes
    light = psf.intensity(offsets.ravel()[:, None] - dy, offsets.ravel() - dx)
    light = np.einsum("iajb,a,b->ij", light.reshape(side, 8, side, 8), weights, weights)
    return light / light.sum()


def sersic_image(n_index: float, radius: float, axis_ratio: float, angle: float, side: int, n: int) -> np.ndarray:
    """Flux of a Sersic profile on a grid with `n` samples per pixel; the core is sampled 20 times finer."""
    b = gammaincinv(2 * n_index, 0.5)

    def intensity(y, x):
        along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
        r = np.sqrt(along**2 * axis_ratio + across**2 / axis_ratio) / radius
        return b ** (2 * n_index) / (2 * np.pi * n_index * gamma(2 * n_index)) * np.exp(-b * r ** (1 / n_index))

    offsets = (np.arange(side * n) - (side * n) // 2) / n
    image = intensity(offsets[:, None], offsets)
    core, fine = (side * n) // 2 + np.arange(-8, 9), (np.arange(17 * 20) - 169.5) / (20 * n)
    image[np.ix_(core, core)] = intensity(fine[:, None], fine).reshape(17, 20, 17, 20).mean(axis=(1, 3))
    return image / (radius**2 * n**2)


@pytest.mark.parametrize("axis_ratio", [1.0, 0.9])
def test_psf_stamp_is_the_integral_over_pixels(axis_ratio):
    psf = MoffatPsf(fwhm_pix=3.3, beta=3.0, axis_ratio=axis_ratio, angle=0.4)
    # Two samples per pixel leave an aliasing of 1e-7 of the peak.
    np.testing.assert_allclose(psf.stamp(), integrated(psf, 0.0, 0.0, 41), rtol=0, atol=1e-6 * psf.stamp().max())


def test_psf_is_a_moffat_profile_out_to_fifteen_pixels():
    psf = MoffatPsf(fwhm_pix=4.0, beta=3.5)
    radius = np.linspace(0.0, 15.0, 50)
    scale = 2.0 / np.sqrt(2 ** (1 / 3.5) - 1)
    np.testing.assert_allclose(psf.intensity(0.0 * radius, radius), (1 + (radius / scale) ** 2) ** -3.5, rtol=1e-12)


@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.31, -0.47), (0.5, 0.25)])
def test_star_is_the_psf_integrated_over_pixels_at_its_centre(scene, offset):
    dy, dx = offset
    star = one_source(
        scene, is_star=True, disc_radius=0.0, bulge_radius=0.0, y=80.0 + dy, x=70.0 + dx, i_bulge_flux=0.0
    )
    image, box = render_truth(star, 0)
    band = scene.coadd.bands.index("i")
    got = image[band][81 - 20 - box.y0 - 1 : 81 + 20 - box.y0, 71 - 20 - box.x0 - 1 : 71 + 20 - box.x0]
    expected = integrated(scene.psfs[band], dy, dx, 41) * star.truth["i_flux"][0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 * expected.max())


@pytest.mark.parametrize("n_index", [1, 4])
def test_galaxy_is_the_convolution_of_its_profile_with_the_psf(scene, n_index):
    radius, axis_ratio, angle, side, n = 2.5, 0.5, 0.6, 241, 5
    galaxy = one_source(
        scene, is_star=False, disc_radius=radius, bulge_radius=radius, axis_ratio=axis_ratio, y=60.0, x=70.0,
        angle=np.rad2deg(angle), r_flux=1e6, r_bulge_flux=0.0 if n_index == 1 else 1e6,
    )  # fmt: skip
    image, box = render_truth(galaxy, 0)
    band = scene.coadd.bands.index("r")

    profile = 1e6 * sersic_image(n_index, radius, axis_ratio, angle, side, n)
    offsets = np.arange(-25 * n, 25 * n + 1) / n
    psf = scene.psfs[band].intensity(offsets[:, None], offsets)
    fine = fftconvolve(profile, psf / psf.sum(), mode="same")
    expected = fine.reshape(side, n, side, n).sum(axis=(1, 3))[100:141, 100:141]

    got = image[band][60 - 20 - box.y0 : 60 + 21 - box.y0, 70 - 20 - box.x0 : 70 + 21 - box.x0]
    # The brute force is exact to a few 1e-4 in a cusp.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3 * expected.max())


@pytest.mark.parametrize("name", ["scene", "irregulars"])
def test_flux_of_every_source_is_the_stated_one(name, request):
    scene = request.getfixturevalue(name)
    for k in range(len(scene.truth)):
        got = render_truth(scene, k)[0].sum(axis=(1, 2), dtype=float)
        expected = [scene.truth[f"{band}_flux"][k] for band in scene.coadd.bands]
        np.testing.assert_allclose(got, expected, rtol=1e-5)  # float32 pixels


def test_every_source_is_centred_where_the_truth_says(scene):
    for k in range(len(scene.truth)):
        image, box = render_truth(scene, k)
        core = image[2].astype(float)
        y, x = np.indices(core.shape)
        row = scene.truth[k]
        near = np.hypot(y + box.y0 - row["y"], x + box.x0 - row["x"])
        # A smooth window around the true centre leaves a symmetric image centred there.
        core *= np.exp(-0.5 * (near / 5.0) ** 2)
        center = (core * y).sum() / core.sum() + box.y0, (core * x).sum() / core.sum() + box.x0
        np.testing.assert_allclose(center, (row["y"], row["x"]), atol=0.002)


@pytest.mark.parametrize("name", ["scene", "irregulars"])
def test_images_without_their_sources_are_noise_of_the_stated_variance(name, request):
    scene = request.getfixturevalue(name)
    residual = scene.coadd.images.astype(float)
    for k in range(len(scene.truth)):
        image, box = render_truth(scene, k)
        residual[(slice(None), *box.within(scene.coadd.box))] += -image[(slice(None), *scene.coadd.box.within(box))]
    chi2 = (residual**2 / scene.coadd.variance).mean(axis=(1, 2))
    # 25600 pixels: the mean scatters by sqrt(2 / 25600) = 0.009; five times that in one of a million scenes.
    np.testing.assert_allclose(chi2, 1.0, atol=0.045)


def test_noise_gives_the_stated_depth(scene):
    for band, psf, variance in zip(scene.coadd.bands, scene.coadd.psfs, scene.coadd.variance, strict=True):
        five_sigma = 5 * np.sqrt(variance[0, 0] / (psf**2).sum())
        assert 31.4 - 2.5 * np.log10(five_sigma) == pytest.approx(DEPTH[band], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_same_seed_gives_the_same_scene(kind):
    first, second = simulate_scene(kind=kind, seed=5), simulate_scene(kind=kind, seed=5)
    np.testing.assert_array_equal(first.coadd.images, second.coadd.images)
    assert (first.truth["snr"] == second.truth["snr"]).all()


def test_another_seed_gives_another_scene(scene):
    assert (simulate_scene(seed=4).coadd.images != scene.coadd.images).all()


@pytest.mark.parametrize("kind", KINDS)
def test_peaks_are_distinct_pixels_of_the_image(kind):
    scene = simulate_scene(kind=kind, seed=1)
    assert len(np.unique(scene.peaks, axis=0)) == len(scene.peaks)
    assert all(tuple(peak) in scene.coadd.box for peak in scene.peaks)


def test_each_peak_belongs_to_one_source_bright_enough():
    scene = simulate_scene(kind="crowded", n_sources=600, shape=(80, 80), seed=2)
    has_peak = scene.truth["peak_index"] >= 0
    rows = scene.truth[has_peak]
    np.testing.assert_array_equal(rows["peak_index"], np.arange(len(scene.peaks)))
    np.testing.assert_array_equal(scene.peaks, np.rint(np.stack([rows["y"], rows["x"]], axis=1)))
    assert (rows["snr"] > 5).all()


def test_of_two_sources_on_one_pixel_the_brighter_has_the_peak():
    scene = simulate_scene(kind="crowded", n_sources=600, shape=(80, 80), seed=2)
    bright = scene.truth[scene.truth["snr"] > 5]
    pixel = np.rint(np.stack([bright["y"], bright["x"]], axis=1)) @ [1000, 1]
    lost = np.flatnonzero(bright["peak_index"] < 0)
    assert len(lost)
    for k in lost:
        rivals = bright[(pixel == pixel[k]) & (bright["peak_index"] >= 0)]
        assert len(rivals) == 1
        assert rivals["snr"][0] >= bright["snr"][k]


def test_pair_is_less_than_one_to_three_psf_widths_apart():
    for seed in range(20):
        scene = simulate_scene(kind="pair", seed=seed)
        distance = np.hypot(*np.ptp([scene.truth["y"], scene.truth["x"]], axis=1))
        fwhm = np.mean([psf.fwhm_pix for psf in scene.psfs])
        assert 0.7 * fwhm <= distance <= 3.0 * fwhm


def test_crowded_scene_is_a_cluster_of_stars():
    truth = simulate_scene(kind="crowded", seed=1).truth
    assert truth["is_star"].all()
    assert np.median(np.hypot(truth["y"] - 79.5, truth["x"] - 79.5)) < 45  # spread evenly: 61


def test_bright_scene_has_one_source_far_above_the_rest():
    flux = np.sort(simulate_scene(kind="bright", seed=1).truth["i_flux"])
    assert flux[-1] > 2 * flux[-2]


@pytest.mark.parametrize("is_star", [True, False])
def test_bright_object_is_a_star_in_some_scenes_and_a_galaxy_in_others(is_star):
    scenes = (simulate_scene(kind="bright", n_sources=1, seed=seed) for seed in range(9))
    assert any(scene.truth["is_star"][0] == is_star for scene in scenes)


def test_third_of_the_light_of_irregular_galaxies_lies_in_knots(irregulars):
    knots, truth = irregulars.knots, irregulars.truth
    share = np.bincount(knots["source"], knots["i_flux"], minlength=len(truth)) / truth["i_flux"]
    galaxies = ~truth["is_star"]
    # Evenly between 0.2 and 0.5, so that the mean of 30 scatters by 0.016; three times that around 0.35.
    assert share[galaxies].mean() == pytest.approx(0.35, abs=0.05)
    assert share[galaxies].min() >= 0.2
    assert share[galaxies].max() <= 0.5


def test_every_galaxy_and_no_star_of_a_scene_of_knots_has_several(irregulars):
    n_knots = np.bincount(irregulars.knots["source"], minlength=len(irregulars.truth))
    assert set(n_knots[irregulars.truth["is_star"]]) == {0}
    assert n_knots[~irregulars.truth["is_star"]].min() >= 3


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "knots"])
def test_other_kinds_have_no_knots(kind):
    assert len(simulate_scene(kind=kind, seed=1).knots) == 0


def test_knots_are_bluer_than_the_rest_of_their_galaxy(irregulars):
    knots, truth = irregulars.knots, irregulars.truth
    g, i = (np.bincount(knots["source"], knots[f"{band}_flux"], minlength=len(truth)) for band in "gi")
    galaxies = ~truth["is_star"]
    rest = ((truth["g_flux"] - g) / (truth["i_flux"] - i))[galaxies]
    assert ((g / np.where(galaxies, i, 1.0))[galaxies] > rest).all()


def test_knots_of_one_galaxy_differ_in_colour(irregulars):
    knots = irregulars.knots[irregulars.knots["source"] == irregulars.knots["source"][0]]
    assert np.ptp(knots["g_flux"] / knots["i_flux"]) > 0.01


def test_knots_lie_on_the_ellipse_of_their_disc(irregulars):
    knots, truth = irregulars.knots, irregulars.truth
    rows = truth[knots["source"]]
    y, x, angle = knots["y"] - rows["y"], knots["x"] - rows["x"], np.deg2rad(rows["angle"])
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    radius = np.sqrt(along**2 * rows["axis_ratio"] + across**2 / rows["axis_ratio"]) / rows["disc_radius"]
    assert radius.max() < gammaincinv(2, 0.9) / gammaincinv(2, 0.5)
    # Half of the knots inside the radius of 45 % of the light; the share of 190 scatters by 0.036, three times that.
    inside = np.mean(radius < gammaincinv(2, 0.45) / gammaincinv(2, 0.5))
    assert inside == pytest.approx(0.5, abs=0.11)


def test_knot_is_drawn_where_the_table_says(irregulars):
    knot = irregulars.knots[0]
    k = knot["source"]
    with_knot, box = render_truth(irregulars, k)
    dimmed = irregulars.knots.copy()
    dimmed["i_flux"][0] = 0.0
    truth = irregulars.truth.copy()
    truth["i_flux"][k] -= knot["i_flux"]
    without, same_box = render_truth(dataclasses.replace(irregulars, knots=dimmed, truth=truth), k)
    assert same_box == box
    band = irregulars.coadd.bands.index("i")
    light = (with_knot[band] - without[band]).astype(float)
    y, x = np.indices(light.shape)
    center = (light * y).sum() / light.sum() + box.y0, (light * x).sum() / light.sum() + box.x0
    np.testing.assert_allclose(center, (knot["y"], knot["x"]), atol=0.01)  # float32 pixels of the bright galaxy


def test_faint_sources_get_no_peak_below_the_signal_to_noise_asked_for():
    all_peaks, bright = simulate_scene(seed=2), simulate_scene(seed=2, min_snr=20.0)
    np.testing.assert_array_equal(bright.truth["peak_index"] >= 0, all_peaks.truth["snr"] > 20.0)


def test_peaks_keep_the_separation_asked_for():
    scene = simulate_scene(kind="crowded", seed=2, min_separation_pix=3.0)
    listed = scene.truth[scene.truth["peak_index"] >= 0]
    distance = np.hypot(listed["y"][:, None] - listed["y"], listed["x"][:, None] - listed["x"])
    assert distance[~np.eye(len(listed), dtype=bool)].min() >= 3.0


def test_source_without_a_peak_is_close_to_a_brighter_one():
    scene = simulate_scene(kind="crowded", seed=2, min_separation_pix=3.0)
    listed = scene.truth[scene.truth["peak_index"] >= 0]
    lost = scene.truth[(scene.truth["peak_index"] < 0) & (scene.truth["snr"] > 5.0)]
    assert len(lost)
    for source in lost:
        near = np.hypot(listed["y"] - source["y"], listed["x"] - source["x"]) < 3.0
        assert listed["snr"][near].max() > source["snr"]


def test_oracle_error_of_a_lone_star_is_that_of_its_psf():
    scene = simulate_scene(kind="bright", n_sources=1, seed=0, star_fraction=1.0)
    lone = one_source(scene, is_star=True, disc_radius=0.0, bulge_radius=0.0, y=100.3, x=99.6)
    shape = np.array([integrated(psf, 0.3, -0.4, 43) for psf in lone.psfs])
    expected = np.sqrt(lone.coadd.variance[:, 0, 0] / (shape**2).sum(axis=(1, 2)))
    # Sampling twice per pixel leaves 1e-6 in the stamps.
    np.testing.assert_allclose(compute_oracle_sigma(lone)[0], expected, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_oracle_error_is_that_of_a_fit_of_all_shapes(kind):
    scene = simulate_scene(kind=kind, n_sources=12, shape=(60, 50), bands=("g", "z"), seed=4, min_separation_pix=1.0)
    rows = np.flatnonzero(scene.truth["peak_index"] >= 0)
    shapes = np.zeros((2, len(rows), *scene.coadd.box.shape))
    for n, k in enumerate(rows):
        image, box = render_truth(scene, k)
        image = image.astype(float) / image.sum(axis=(1, 2), dtype=float)[:, None, None]
        shapes[(slice(None), n, *box.within(scene.coadd.box))] = image[(slice(None), *scene.coadd.box.within(box))]
    shapes = shapes.reshape(2, len(rows), -1)
    expected = []
    for band_shapes, variance in zip(shapes, scene.coadd.variance[:, 0, 0], strict=True):
        inverse = np.linalg.pinv(band_shapes)  # flux = image @ inverse
        expected.append(np.sqrt(np.diag(inverse.T @ inverse) * variance))
    # float32 pixels here, and close sources that are told apart by small differences.
    np.testing.assert_allclose(compute_oracle_sigma(scene), np.array(expected).T, rtol=1e-3)


def test_oracle_fit_scatters_by_the_oracle_error(scene):
    shapes, truth = [], []
    for k in np.flatnonzero(scene.truth["peak_index"] >= 0):
        image, box = render_truth(scene, k)
        full = np.zeros(scene.coadd.box.shape)
        full[box.within(scene.coadd.box)] = image[2][scene.coadd.box.within(box)] / image[2].sum(dtype=float)
        shapes.append(full.ravel())
        truth.append(scene.truth["r_flux"][k])
    flux = np.linalg.lstsq(np.array(shapes).T, scene.coadd.images[2].ravel().astype(float), rcond=None)[0]
    pull = (flux - truth) / compute_oracle_sigma(scene)[:, 2]
    # About 40 pulls: their scatter is known to 0.11; three times that.
    assert np.sqrt(np.mean(pull**2)) == pytest.approx(1.0, abs=0.35)


def test_neighbour_never_makes_the_oracle_error_smaller(scene):
    sigma = compute_oracle_sigma(scene)
    for n, k in enumerate(np.flatnonzero(scene.truth["peak_index"] >= 0)):
        truth = Table(scene.truth[k : k + 1])
        truth["peak_index"] = 0
        alone = dataclasses.replace(scene, truth=truth, peaks=scene.peaks[n : n + 1])
        assert (sigma[n] >= compute_oracle_sigma(alone)[0] * (1 - 1e-12)).all()


def test_wcs_points_the_middle_at_its_position_with_north_up(scene):
    ra, dec = scene.coadd.sky(y=[79.5, 84.5, 79.5], x=[79.5, 79.5, 84.5])
    np.testing.assert_allclose((ra[0], dec[0]), (150.1, 2.2), atol=1e-9)
    assert dec[1] - dec[0] == pytest.approx(1.0 / 3600, rel=1e-6)
    assert ra[2] < ra[0]


def test_isolated_source_is_not_blended():
    assert simulate_scene(n_sources=1, seed=0).truth["blendedness"][0] == pytest.approx(0.0, abs=1e-6)


def test_half_light_radius_holds_half_the_light():
    truth = simulate_scene(n_sources=200, shape=(20, 20), bands=("i",), star_fraction=0.0, seed=0).truth
    lies_between = (truth["half_light_radius"] >= truth["bulge_radius"] - 1e-3) & (
        truth["half_light_radius"] <= truth["disc_radius"] + 1e-3
    )
    assert lies_between.all()


def test_scene_without_sources_is_noise_without_peaks():
    scene = simulate_scene(n_sources=0, shape=(20, 30), bands=("g",))
    assert scene.peaks.shape == (0, 2)
    assert len(scene.truth) == 0
    assert scene.coadd.images.shape == (1, 20, 30)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("kind", "galaxy"),
        ("n_sources", -1),
        ("shape", (0, 10)),
        ("bands", ("g", "K")),
        ("depth", {"g": 25.0}),
        ("star_fraction", 1.5),
        ("magnitudes", (25.0, 20.0)),
        ("pixel_scale_arcsec", 0.5),
        ("min_snr", -1.0),
        ("min_separation_pix", float("nan")),
    ],
)
def test_bad_argument_is_refused_by_name(argument, value):
    with pytest.raises(InputError, match=f"^{argument} must"):
        simulate_scene(**{argument: value})


# ---------------------------------------------------------------- patches of a survey


@pytest.fixture(scope="module")
def patch() -> SimulatedPatch:
    return simulate_patch(shape=(420, 400), bands=("u", "r", "i"), seed=1)


def band_flux(patch: SimulatedPatch) -> np.ndarray:
    return np.array([patch.truth[f"{band}_flux"] for band in patch.coadd.bands], dtype=float).T


def plane(patch: SimulatedPatch, name: str) -> np.ndarray:
    return (patch.coadd.mask >> patch.coadd.mask_planes[name]) & 1 == 1


def test_same_seed_gives_the_same_patch():
    one, two, other = (simulate_patch(shape=(90, 80), bands=("g", "i"), seed=seed) for seed in (5, 5, 6))
    assert one.coadd.images.tobytes() == two.coadd.images.tobytes()
    assert one.truth.as_array().tobytes() == two.truth.as_array().tobytes()
    assert one.coadd.images.tobytes() != other.coadd.images.tobytes()


def test_patch_has_the_density_asked_for():
    patch = simulate_patch(shape=(900, 900), bands=("r", "i"), seed=0, n_bright_stars=0, large_galaxy=False)
    area_arcmin2 = (900 * 0.2 / 60) ** 2
    inside = (patch.truth["y"] > 0) & (patch.truth["y"] < 899) & (patch.truth["x"] > 0) & (patch.truth["x"] < 899)
    density = ((patch.truth["snr"] > 5) & inside).sum() / area_arcmin2
    # 630 sources scatter by 4 %, and S/N is predicted for Gaussians: 5 % of sources are misjudged.
    assert density == pytest.approx(70.0, rel=0.15)


def test_faint_sources_are_drawn_on_request_and_not_detected():
    few, many = (
        simulate_patch(shape=(200, 200), bands=("r",), seed=3, n_bright_stars=0, large_galaxy=False, faint=faint)
        for faint in (False, True)
    )
    assert len(many.truth) > 1.5 * len(few.truth)
    assert (many.truth["snr"] > 5).sum() == pytest.approx((few.truth["snr"] > 5).sum(), abs=10)
    assert (many.truth["peak_index"][many.truth["snr"] <= 5] == -1).all()


def test_bright_stars_saturate_and_are_flagged(patch):
    saturated = plane(patch, "SAT")
    valid = patch.coadd.valid
    for b in range(3):
        assert patch.coadd.images[b][saturated[b]] == pytest.approx(patch.saturation[b])
        assert np.nanmax(patch.coadd.images[b]) <= np.float32(patch.saturation[b])
    assert saturated.any()
    assert not (valid & saturated).any()
    star = patch.truth[1]
    assert star["is_star"]
    assert saturated[2, round(star["y"]), round(star["x"])]


def test_stars_fainter_than_the_saturation_magnitude_do_not_saturate():
    patch = simulate_patch(
        shape=(200, 200), bands=("r", "i"), seed=3, large_galaxy=False, n_bright_stars=0, magnitudes=(17.5, 25.0)
    )
    assert not plane(patch, "SAT").any()


def test_wings_of_a_bright_star_reach_far_beyond_its_stamp():
    patch = simulate_patch(
        shape=(300, 300), bands=("i",), seed=2, density_arcmin2=0, large_galaxy=False, masked_strip=False
    )
    star = patch.truth[0]
    y, x = np.indices(patch.coadd.shape)
    radius = np.hypot(y - star["y"], x - star["x"])
    rings = [(25.0, 30.0), (35.0, 45.0), (50.0, 65.0)]
    mean = [patch.coadd.images[0][(radius > low) & (radius < high)].mean(dtype=float) for low, high in rings]
    error = [patch.sigma[0] / np.sqrt(((radius > low) & (radius < high)).sum()) for low, high in rings]
    assert mean[0] > mean[1] > mean[2] > 0
    assert mean[1] > 5 * error[1]


def test_wings_continue_the_psf_without_a_step():
    psf = MoffatPsf(fwhm_pix=4.0, beta=3.0)
    radius = np.linspace(10.0, 60.0, 500)
    light = psf.intensity(0 * radius, radius) + psf.wings(0 * radius, radius, 100.0)
    assert (np.diff(light) < 0).all()
    scale = 2.0 / np.sqrt(2 ** (1 / 3) - 1)
    moffat = (1 + (radius / scale) ** 2) ** -3.0
    np.testing.assert_allclose(light[radius < 15], moffat[radius < 15], rtol=1e-12)
    assert (light >= moffat * (1 - 1e-12)).all()


def test_variance_is_that_of_sky_and_photons():
    options = {"shape": (100, 100), "bands": ("r",), "density_arcmin2": 0, "masked_strip": False}
    options |= {"n_bright_stars": 1, "large_galaxy": False, "saturation_magnitude": 5.0}
    drawn = [simulate_patch(**options, seed=seed) for seed in range(2)]
    for patch in drawn:
        images, variance = patch.coadd.images[0].astype(float), patch.coadd.variance[0].astype(float)
        sky = 10 ** (-0.4 * (21.20 - 31.4)) * 0.04
        light = (variance / patch.sigma[0] ** 2 - 1) * sky
        chi = (images - light) / np.sqrt(variance)
        # 10,000 pixels: the standard deviation scatters by 0.007, the mean by 0.01; four times that.
        assert chi.std() == pytest.approx(1.0, abs=0.03)
        assert chi.mean() == pytest.approx(0.0, abs=0.04)
        assert light.max() > sky


def test_strip_without_data_is_wider_in_the_first_band(patch):
    missing = plane(patch, "NO_DATA")
    assert np.isnan(patch.coadd.images[missing]).all()
    assert np.isinf(patch.coadd.variance[missing]).all()
    assert not patch.coadd.valid[missing].any()
    n_pixels = missing.sum(axis=(1, 2))
    assert n_pixels[1] == n_pixels[2] > 0
    assert n_pixels[0] == 3 * n_pixels[1]


def test_every_source_with_data_and_signal_has_a_peak_and_no_other(patch):
    rows, columns = np.rint(patch.truth["y"]).astype(int), np.rint(patch.truth["x"]).astype(int)
    inside = (rows >= 0) & (rows < 420) & (columns >= 0) & (columns < 400)
    seen = inside.copy()
    seen[inside] = ~plane(patch, "NO_DATA").all(axis=0)[rows[inside], columns[inside]]
    assert not seen.all()
    listed = np.asarray(patch.truth["peak_index"]) >= 0
    assert not (listed & ~seen).any()
    expected = np.unique(np.stack([rows, columns], 1)[seen & (patch.truth["snr"] > 5)], axis=0)
    np.testing.assert_array_equal(np.unique(patch.peaks, axis=0), expected)
    np.testing.assert_array_equal(patch.peaks, np.stack([rows, columns], 1)[listed])


def test_large_galaxy_comes_first_and_carries_the_knots(patch):
    galaxy = patch.truth[0]
    assert galaxy["half_light_radius"] > 3 * np.median(patch.truth["half_light_radius"][1:])
    assert set(patch.knots["source"]) == {0}
    share = patch.knots["i_flux"].sum() / galaxy["i_flux"]
    assert 0.05 < share < 0.15


def test_dense_field_has_nothing_but_stars():
    patch = simulate_patch(kind="stars", shape=(150, 150), bands=("r",), seed=0)
    assert patch.truth["is_star"].all()
    assert len(patch.knots) == 0
    # 1800 per square arcminute, those outside that shine in not counted.
    inside = (patch.truth["y"] > 0) & (patch.truth["y"] < 149) & (patch.truth["x"] > 0) & (patch.truth["x"] < 149)
    assert inside.sum() == pytest.approx(1800 * 0.25, rel=0.15)


def test_varying_psf_is_what_stars_are_drawn_with():
    options = {"shape": (200, 200), "bands": ("r", "i"), "density_arcmin2": 0, "large_galaxy": False}
    patch = simulate_patch(**options, masked_strip=False, seed=4, n_bright_stars=6, saturation_magnitude=5.0,
                           psf_variation=0.1)  # fmt: skip
    field = patch.coadd.psfs
    widths = [field.at(y=y, x=x)[1].fwhm_pix for y in (0, 100, 200) for x in (0, 100, 200)]
    assert 1.02 < max(widths) / min(widths) < 1.25
    alone = [
        star for k, star in enumerate(patch.truth)
        if 25 < star["y"] < 175 and 25 < star["x"] < 175
        and np.sort(np.hypot(patch.truth["y"] - star["y"], patch.truth["x"] - star["x"]))[1] > 40
    ]  # fmt: skip
    assert alone
    for star in alone:
        y, x = round(star["y"]), round(star["x"])
        psf = field.at(y=star["y"], x=star["x"])[1]
        expected = integrated(psf, star["y"] - y, star["x"] - x, 21)
        stamp = patch.coadd.images[1][y - 10 : y + 11, x - 10 : x + 11]
        noise = np.sqrt(patch.coadd.variance[1][y - 10 : y + 11, x - 10 : x + 11])
        whole = integrated(psf, star["y"] - y, star["x"] - x, 41)
        expected *= star["i_flux"] * whole[10:31, 10:31].sum()
        # 441 pixels: chi2 scatters by 0.07; four times that. The PSF without variation gives 8000 and more.
        assert np.mean(((stamp - expected) / noise) ** 2) == pytest.approx(1.0, abs=0.3)


@pytest.fixture(scope="module")
def stars_under_a_varying_psf():
    """Forty stars whose PSF is 5 % wider or narrower, and as much rounder or flatter, towards the corners."""
    patch = simulate_patch(
        shape=(400, 400), bands=("g", "r", "i"), seed=1, density_arcmin2=25, star_fraction=1.0, n_bright_stars=0,
        large_galaxy=False, masked_strip=False, psf_variation=0.05, magnitudes=(18.0, 24.0),
    )  # fmt: skip
    truth = patch.truth[patch.truth["peak_index"] >= 0]
    return patch, truth[np.argsort(truth["peak_index"])]


def wrong_by(stars, psfs):
    """Errors of the fluxes of bright stars deblended with these PSFs, relative and in units of the error claimed."""
    patch, truth = stars
    coadd = patch.coadd
    given = Coadd(images=coadd.images, variance=coadd.variance, psfs=psfs, bands=coadd.bands, unit=coadd.unit)
    objects = kermes.deblend(given, patch.peaks).objects
    bright = truth["snr"] > 100
    assert bright.sum() > 30
    flux, error, true = (
        np.array([table[f"{band}_{name}"] for band in coadd.bands], dtype=float)[:, bright]
        for table, name in ((objects, "flux"), (objects, "flux_err"), (truth, "flux"))
    )
    return np.abs(flux / true - 1), np.abs(flux - true) / error


def test_fluxes_are_better_with_the_psf_that_is_there_than_with_that_of_the_middle(stars_under_a_varying_psf):
    field = stars_under_a_varying_psf[0].coadd.psfs
    middle = [psf.stamp() for psf in field.at(y=199.5, x=199.5)]
    box = stars_under_a_varying_psf[0].coadd.box
    sampled = {
        "field": field,
        "nearest": CellPsf.sample(field, box=box, cell_shape=(50, 50), bands=field.bands),
        "bilinear": CellPsf.sample(
            field, box=box, cell_shape=(100, 100), bands=field.bands, interpolation="bilinear"
        ),
    }  # fmt: skip
    relative, pull = wrong_by(stars_under_a_varying_psf, middle)
    # What a wrong PSF leaves counts as structure that models do not hold, so that errors are fair even then.
    assert np.median(pull) < 1.3
    for name, psfs in sampled.items():
        better, fair = wrong_by(stars_under_a_varying_psf, psfs)
        # A third in this scene and others; half leaves room for the noise of forty stars.
        assert np.median(better) < 0.5 * np.median(relative), name
        # 0.67 for errors that are what is claimed; one PSF serves a whole blend, so that a little is left.
        assert np.median(fair) < 1.0, name


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("kind", "field"),
        ("shape", (0, 10)),
        ("bands", ("g", "K")),
        ("density_arcmin2", -1.0),
        ("n_bright_stars", -1),
        ("star_fraction", 1.5),
        ("magnitudes", (25.0, 20.0)),
        ("psf_variation", 0.5),
        ("min_snr", -1.0),
        ("min_separation_pix", float("nan")),
    ],
)
def test_bad_argument_of_a_patch_is_refused_by_name(argument, value):
    with pytest.raises(InputError, match=f"^{argument} must"):
        simulate_patch(**{argument: value})
