"""Simulated scenes: the drawing is exact, the noise is what it claims, the same seed gives the same scene."""

import numpy as np
import pytest
from astropy.table import Table
from scipy.signal import fftconvolve
from scipy.special import gamma, gammaincinv

from kermes.errors import InputError
from kermes.simulation import DEPTH, MoffatPsf, SimulatedScene, render_truth, simulate_scene

KINDS = ("field", "pair", "crowded", "bright")


@pytest.fixture(scope="module")
def scene() -> SimulatedScene:
    return simulate_scene(seed=3)


def one_source(scene: SimulatedScene, **changes: float) -> SimulatedScene:
    """Make a scene whose truth is the first row of `scene` with some columns changed."""
    truth = Table(scene.truth[:1])
    for name, value in changes.items():
        truth[name] = value
    return SimulatedScene(
        coadd=scene.coadd, peaks=scene.peaks[:1], truth=truth, psfs=scene.psfs, seed=scene.seed, kind=scene.kind
    )


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


def test_flux_of_every_source_is_the_stated_one(scene):
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


def test_images_without_their_sources_are_noise_of_the_stated_variance(scene):
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


def test_pair_is_half_to_four_psf_widths_apart():
    for seed in range(20):
        scene = simulate_scene(kind="pair", seed=seed)
        distance = np.hypot(*np.ptp([scene.truth["y"], scene.truth["x"]], axis=1))
        fwhm = np.mean([psf.fwhm_pix for psf in scene.psfs])
        assert 0.5 * fwhm <= distance <= 4.0 * fwhm


def test_crowded_scene_is_a_cluster_of_stars():
    truth = simulate_scene(kind="crowded", seed=1).truth
    assert truth["is_star"].all()
    assert np.median(np.hypot(truth["y"] - 79.5, truth["x"] - 79.5)) < 45  # spread evenly: 61


def test_bright_scene_has_one_source_far_above_the_rest():
    flux = np.sort(simulate_scene(kind="bright", seed=1).truth["i_flux"])
    assert flux[-1] > 2 * flux[-2]


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
    ],
)
def test_bad_argument_is_refused_by_name(argument, value):
    with pytest.raises(InputError, match=f"^{argument} must"):
        simulate_scene(**{argument: value})
