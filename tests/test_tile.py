"""Deblending a whole coadd: flux closes, every peak has its row, nothing hidden decides about the answer."""

import gc
import traceback
from dataclasses import replace

import numpy as np
import pytest

import kermes
from kermes import modelling, tile
from kermes.catalog import Flag, Model, Outcome
from kermes.config import BudgetConfig, Config, FitConfig, FreeFormConfig, PartitionConfig, ProfileConfig
from kermes.errors import BlendError, ConfigError, DataWarning, InputError, ShapeError
from kermes.geometry import Box
from kermes.kernels.stamps import EXPONENTIAL, POINT
from kermes.planning import plan_tile
from kermes.psf import model_psf
from kermes.rendering import SourceModels
from kermes.scene import ProfileComponent
from kermes.simulation import simulate_patch, simulate_scene
from kermes.tile import PREFERRED_CHI2
from results import light_of_candidates
from tiles import (
    MODELS,
    changed,
    configuration,
    fit_the_first_last,
    for_scene_models,
    group_scene,
    same_pixels,
    scene,
    shares,
    small_scene,
    values,
)


@pytest.fixture(scope="module", params=MODELS)
def config(request):
    """Settings of each model in turn."""
    return configuration(request.param)


@pytest.fixture(scope="module")
def group(config):
    """Result of several blends that reach into each other, with a few pixels missing."""
    images = group_scene().coadd.images.copy()
    images[0, 48:52, 60:70] = images[:, 83, 36] = np.nan
    return kermes.deblend(changed(group_scene().coadd, images=images), group_scene().peaks, config=config)


@pytest.fixture(scope="module")
def small(config):
    return kermes.deblend(changed(small_scene().coadd), small_scene().peaks, config=config)


def two_stars(distance):
    """Two stars of flux 4000 and 2000 in noise of one, their peaks, and footprints of their own."""
    psf = model_psf(1.7, 31)
    images = np.random.default_rng(5).normal(size=(2, 80, 90))
    peaks = np.array([[40, 40], [40, 40 + distance]])
    for (y, x), flux in zip(peaks, (4000, 2000), strict=True):
        images[:, y - 15 : y + 16, x - 15 : x + 16] += flux * psf
    labels = np.ones((80, 90), dtype=int)
    labels[:, 40 + distance // 2 :] = 2
    return kermes.Coadd(images=images, variance=1, psfs=[psf] * 2, bands=["g", "r"]), peaks, labels


# ---------------------------------------------------------------- flux closes


def test_several_blends_reach_into_each_other(config):
    plan = plan_tile(group_scene().coadd, group_scene().peaks, config=config)
    assert plan.n_blends >= 4
    assert sum(task.last_neighbor > place for place, task in enumerate(plan.tasks)) >= 3


def test_shares_and_what_is_not_assigned_add_up_to_the_image(group):
    coadd, shared = group.coadd, shares(group)
    assigned = shared != 0
    expected = np.where(assigned & coadd.valid, coadd.images, 0)
    # One division and one product in float32 for each of up to 12 sources.
    np.testing.assert_allclose(shared, expected, rtol=1e-5, atol=1e-6 * np.nanmax(np.abs(coadd.images)))


def test_nothing_is_unassigned_where_the_models_exceed_a_tenth_of_the_noise(group):
    coadd = group.coadd
    bright = coadd.valid & (group.model_image() > 0.1 * np.sqrt(coadd.variance))
    assert bright.sum() > 1000
    assert (shares(group)[bright] != 0).all()


def test_an_invalid_pixel_belongs_to_nobody(group):
    assert not shares(group)[~group.coadd.valid].any()


def test_redistributed_flux_of_the_table_is_the_sum_of_the_stamp(group):
    sums = [[handle.redistributed(band).array.sum(dtype=float) for band in group.bands] for handle in group]
    # Rows of pixels are added in float32, and noise cancels in the sum: rounding of the errors, not of the sum.
    errors = values(group, "redistributed_flux_err")
    assert (np.abs(values(group, "redistributed_flux") - sums) < 1e-3 * errors).all()


def test_flux_closes_for_a_source_alone(config):
    single = scene(n_sources=1, shape=(60, 60), seed=2, magnitudes=(20, 23))
    shared = shares(kermes.deblend(single.coadd, single.peaks, config=config))
    assigned = shared != 0
    assert assigned.sum() > 1000
    # The share of a source alone is 1, to rounding.
    np.testing.assert_allclose(shared[assigned], single.coadd.images[assigned], rtol=1e-6)


@for_scene_models
def test_flux_of_the_table_is_that_of_the_model(group):
    expected = []
    for handle in group:
        # Free shapes on top of profiles are for residuals and shares; the total flux is that of the profiles.
        profiles = [part for part in handle.source.components if isinstance(part, ProfileComponent)]
        expected.append(replace(handle.source, components=tuple(profiles or handle.source.components)).flux(3))
    np.testing.assert_allclose(values(group), expected, rtol=1e-5)  # spectra are float32


# ---------------------------------------------------------------- rows and numbers


def test_every_peak_has_one_row_in_the_order_of_the_peaks(group):
    peaks = group_scene().peaks
    np.testing.assert_array_equal(group.objects["peak_index"], np.arange(len(peaks)))
    np.testing.assert_array_equal(np.stack([group.objects["y"], group.objects["x"]], axis=1), peaks)


def test_every_blend_and_parent_is_referred_to(group):
    for name in ("blend", "parent"):
        table = getattr(group, f"{name}s")
        assert set(group.objects[f"{name}_id"]) == set(table[f"{name}_id"])
    counts = [np.sum(group.objects["blend_id"] == blend_id) for blend_id in group.blends["blend_id"]]
    np.testing.assert_array_equal(group.blends["n_sources"], counts)
    np.testing.assert_array_equal(sum(group.blends[f"n_{rung}"] for rung in Outcome), counts)


def test_order_of_the_peaks_does_not_matter(group):
    order = np.random.default_rng(3).permutation(len(group))
    again = kermes.deblend(group.coadd, group_scene().peaks[order], config=group.config)
    np.testing.assert_array_equal(again.objects["peak_index"], np.arange(len(group)))
    numbers = {"object_id", "peak_index", "parent_id", "blend_id", "correlated_id"}
    for name in set(group.objects.colnames) - numbers:
        np.testing.assert_array_equal(again.objects[name], group.objects[name][order], err_msg=name)
    place = np.append(-1, order)  # of each object_id of the new result among the old ones
    correlated = np.where(again.objects["correlated_id"] > 0, place[again.objects["correlated_id"]] + 1, 0)
    np.testing.assert_array_equal(correlated, group.objects["correlated_id"][order])
    np.testing.assert_array_equal(again.model_image(positive=True), group.model_image(positive=True))


def test_number_of_workers_does_not_matter(group):
    for workers in (2, 4):
        again = kermes.deblend(group.coadd, group_scene().peaks, config=group.config, workers=workers)
        assert same_pixels(again, group)


def centers(result, axis):
    """Columns of fitted centres along "y" or "x"."""
    return {name for name in result.objects.colnames if name.endswith(f"center_{axis}")}


def assert_centers_are_shifted(moved, result, shift):
    """Check the fitted centres, which are NaN for free shapes."""
    for axis, pixels in zip("yx", shift, strict=True):
        for name in centers(result, axis):
            # Integers are added in another order: one rounding of numbers up to 1000.
            np.testing.assert_allclose(moved.objects[name], result.objects[name] + pixels, rtol=0, atol=1e-12)


def test_origin_shifts_positions_and_nothing_else(small):
    origin = (1000, -300)
    coadd, peaks = changed(small.coadd, origin=origin), small_scene().peaks
    moved = kermes.deblend(coadd, peaks + np.array(origin), config=small.config)
    np.testing.assert_array_equal(moved.objects["y"], small.objects["y"] + origin[0])
    np.testing.assert_array_equal(moved.objects["x"], small.objects["x"] + origin[1])
    assert_centers_are_shifted(moved, small, origin)
    fitted = centers(small, "y") | centers(small, "x")
    positions = {"objects": {"y", "x", "ra", "dec"} | fitted, "blends": {"y0", "x0"}, "parents": {"y0", "x0"}}
    for table, fixed in positions.items():
        for name in set(getattr(small, table).colnames) - fixed:
            np.testing.assert_array_equal(getattr(moved, table)[name], getattr(small, table)[name], err_msg=name)
    stamp, twin = moved[1].redistributed("r"), small[1].redistributed("r")
    assert stamp.box == twin.box.shift(*origin)
    np.testing.assert_array_equal(stamp.array, twin.array)


def test_shifting_the_image_by_whole_pixels_shifts_the_answer(config):
    content, peaks = small_scene().coadd, small_scene().peaks
    results = []
    # Framed by pixels that are not valid, so that no blend is cut by the edge of the image.
    for top, left in ((45, 48), (52, 61)):
        images = np.full((3, 180, 180), np.nan, dtype=np.float32)
        images[:, top : top + 70, left : left + 66] = content.images
        variance = content.variance[:, :1, :1]
        # Noise is measured at other places.
        coadd = changed(content, images=images, variance=variance, noise_factors=1.0)
        results.append(kermes.deblend(coadd, peaks + [top, left], config=config))
    here, there = results
    assert_centers_are_shifted(there, here, (7, 13))
    for name in set(here.objects.colnames) - {"y", "x"} - centers(here, "y") - centers(here, "x"):
        np.testing.assert_array_equal(there.objects[name], here.objects[name], err_msg=name)
    np.testing.assert_array_equal(there.model_image()[:, 7:, 13:], here.model_image()[:, :-7, :-13])


FLIPS = {
    "y": (lambda pixels: np.flip(pixels, -2), lambda peaks, h, w: np.stack([h - 1 - peaks[:, 0], peaks[:, 1]], 1)),
    "x": (lambda pixels: np.flip(pixels, -1), lambda peaks, h, w: np.stack([peaks[:, 0], w - 1 - peaks[:, 1]], 1)),
    "transposed": (lambda pixels: np.swapaxes(pixels, -1, -2), lambda peaks, h, w: peaks[:, ::-1]),
}


@pytest.mark.parametrize("axis", FLIPS)
def test_flipping_the_image_flips_the_answer(axis, small):
    flip, move = FLIPS[axis]
    coadd = small.coadd
    flipped = changed(
        coadd, images=flip(coadd.images), variance=flip(coadd.variance), psfs=flip(np.asarray(coadd.psfs))
    )
    result = kermes.deblend(flipped, move(small_scene().peaks, *coadd.shape), config=small.config)
    # Sums in another order differ by 1e-7; thresholds on the way let single pixels of a model come and go, and the fit
    # follows. Profiles end at the edges of stamps of even sides, which have no middle: faint wings gain or lose a row,
    # a tenth of the error in a flux that is shared.
    error = values(small, "flux_err")
    for name in ("flux", "redistributed_flux"):
        assert (np.abs(values(result, name) - values(small, name)) < 0.3 * error).all()


@pytest.mark.parametrize("factor", [2.0**-30, 2.0**20])
def test_unit_of_the_fluxes_does_not_matter(factor, small):
    coadd = small.coadd
    # A power of two, so that no bit is lost.
    scaled = kermes.deblend(
        changed(coadd, images=coadd.images * factor, variance=coadd.variance * factor**2),
        small_scene().peaks,
        config=small.config,
    )
    for name in ("flux", "flux_err", "redistributed_flux", "redistributed_flux_err"):
        np.testing.assert_array_equal(values(scaled, name), factor * values(small, name))
    np.testing.assert_array_equal(scaled.objects["chi2"], small.objects["chi2"])


def test_peaks_are_detected_when_none_are_given(config):
    result = kermes.deblend(small_scene().coadd, config=config)
    assert len(result) >= 3
    assert not result.objects[Flag.OUTSIDE_FOOTPRINT].any()


def test_peaks_that_came_with_the_coadd_are_used_unless_detection_is_asked_for(small):
    coadd = changed(small.coadd, peaks=small_scene().peaks)
    assert same_pixels(kermes.deblend(coadd, config=small.config), small)
    assert len(kermes.deblend(changed(coadd, peaks=np.zeros((0, 2))), "detect", config=small.config)) >= 3


def test_all_sources_of_a_footprint_are_one_blend(config):
    labels = np.full(small_scene().coadd.shape, 7)
    result = kermes.deblend(small_scene().coadd, small_scene().peaks, footprints=labels, config=config)
    assert len(result.blends) == len(result.parents) == 1
    assert result.parents["area"][0] == labels.size


@pytest.mark.parametrize(("model", "n_blends"), [("kermes", 1), ("scarlet-lite", 2)])
def test_footprints_whose_profiles_meet_are_one_blend(model, n_blends):
    coadd, peaks, _ = two_stars(22)
    assert plan_tile(coadd, peaks, config=configuration(model)).n_blends == n_blends


def test_footprints_that_are_given_stay_apart(config):
    coadd, peaks, labels = two_stars(22)
    assert plan_tile(coadd, peaks, labels, config).n_blends == 2


def test_pixels_outside_of_given_footprints_are_not_used(config):
    coadd, peaks = small_scene().coadd, small_scene().peaks
    labels = np.zeros(coadd.shape, dtype=int)
    y, x = peaks[0]
    box = Box(int(y), int(x), 1, 1).grow(9) & Box.of_shape(coadd.shape)
    labels[box.y, box.x] = 1
    junk = np.where(labels > 0, coadd.images, 1e3)
    clean, dirty = (
        kermes.deblend(changed(coadd, images=images), peaks[:1], footprints=labels, config=config)
        for images in (coadd.images, junk)
    )
    np.testing.assert_array_equal(values(dirty), values(clean))


# ---------------------------------------------------------------- sources that nobody listed


@pytest.fixture(scope="module")
def unlisted():
    """Result of two stars 12 pixels apart, of which one was not listed."""
    coadd, peaks, _ = two_stars(12)
    return kermes.deblend(coadd, peaks[:1])


def test_a_star_that_nobody_listed_is_a_candidate_and_no_row(unlisted):
    assert len(unlisted) == 1
    assert len(unlisted.candidates) == 1
    row = unlisted.candidates[0]
    np.testing.assert_allclose([row["y"], row["x"]], [40, 52], atol=0.1)
    assert row["significance"] > 6
    for band in unlisted.bands:
        assert abs(row[f"{band}_flux"] - 2000) < 5 * row[f"{band}_flux_err"]


def test_a_star_that_nobody_listed_does_not_disturb_its_neighbour(unlisted):
    coadd, peaks, _ = two_stars(12)
    together = values(kermes.deblend(coadd, peaks))[0]
    # The same two points were fitted to the same pixels; the last sweep ends where the loss falls by less than 1e-3.
    np.testing.assert_array_less(np.abs(values(unlisted)[0] - together), 0.1 * values(unlisted, "flux_err")[0])


def test_a_star_stays_a_point_beside_one_that_nobody_listed():
    coadd, peaks, _ = two_stars(7)
    result = kermes.deblend(coadd, peaks[:1])
    assert result.objects["model"][0] == Model.POINT
    assert len(result.candidates) == 1


def test_candidates_count_in_the_image_of_all_models(unlisted):
    expected = light_of_candidates(unlisted)[0]
    for b, band in enumerate(unlisted.bands):
        stamp = unlisted[1].model(band)
        expected[(b, *stamp.box.within(unlisted.coadd.box))] += stamp.array
    # Two numbers in float32 are added.
    np.testing.assert_allclose(unlisted.model_image(), expected, rtol=0, atol=1e-6 * expected.max())


def test_candidates_take_their_share_of_the_pixels(unlisted):
    images, total = unlisted.coadd.images, unlisted.model_image(positive=True)
    shared = shares(unlisted)
    assigned = shared != 0
    rest = 1 - np.maximum(light_of_candidates(unlisted)[0], 0)[assigned] / total[assigned]
    # One division and one product in float32.
    np.testing.assert_allclose(shared[assigned], images[assigned] * rest, rtol=1e-5, atol=1e-6 * images.max())


def test_candidates_come_back_with_the_same_bits(unlisted, tmp_path):
    unlisted.write(tmp_path / "out")
    assert same_pixels(kermes.open(tmp_path / "out"), unlisted)


def test_candidates_do_not_depend_on_the_workers():
    coadd, peaks = group_scene().coadd, group_scene().peaks[::2]
    results = [kermes.deblend(coadd, peaks, workers=workers) for workers in (1, 3)]
    assert len(results[0].candidates) > 1
    assert same_pixels(*results)


def test_candidates_are_the_same_for_peaks_in_any_order():
    coadd, peaks = group_scene().coadd, group_scene().peaks[::2]
    here, there = (kermes.deblend(coadd, given).candidates for given in (peaks, peaks[::-1]))
    assert len(here) > 1
    for table in (here, there):
        table.sort(["y", "x"])
    for name in set(here.colnames) - {"candidate_id", "blend_id"}:
        np.testing.assert_array_equal(here[name], there[name], err_msg=name)


def test_free_shapes_have_no_candidates():
    coadd, peaks, _ = two_stars(12)
    assert len(kermes.deblend(coadd, peaks[:1], config=configuration("scarlet-lite")).candidates) == 0


# ---------------------------------------------------------------- the truth


# Pixels that fall monotonically cut the faint wings of galaxies and follow the noise of stars: some per cent, which for
# the brightest is more than the error of the flux. Profiles are what was drawn.
TRUE = {
    "stars": (1.0, {"kermes": 0.0, "scarlet-lite": 0.02}),
    "galaxies": (0.0, {"kermes": 0.0, "scarlet-lite": 0.04}),
}


@for_scene_models
@pytest.mark.parametrize(("star_fraction", "tolerances"), TRUE.values(), ids=TRUE)
def test_fluxes_of_bright_isolated_sources_are_true(star_fraction, tolerances, config):
    for seed in (0, 1, 2, 3, 7):
        one = scene(n_sources=1, shape=(80, 80), seed=seed, star_fraction=star_fraction, magnitudes=(20.5, 22.5))
        result = kermes.deblend(one.coadd, one.peaks, config=config)
        true = np.array([one.truth[f"{band}_flux"][0] for band in result.bands])
        allowed = np.maximum(tolerances[config.model] * true, 5 * values(result, "flux_err")[0])
        assert (np.abs(values(result)[0] - true) < allowed).all(), seed
        # Mean of n squares scatters by sqrt(2 / n) = 0.02; the freedom of the model takes as much away.
        assert result.blends["chi2"][0] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("star_fraction", [1.0, 0.0], ids=["stars", "galaxies"])
def test_centers_of_bright_isolated_sources_are_true(star_fraction):
    for seed in (0, 1, 2, 3, 7):
        one = scene(n_sources=1, shape=(80, 80), seed=seed, star_fraction=star_fraction, magnitudes=(20.5, 22.5))
        row = kermes.deblend(one.coadd, one.peaks).objects[0]
        for axis in ("y", "x"):
            assert abs(row[f"center_{axis}"] - one.truth[axis][0]) < 5 * row[f"center_{axis}_err"], seed


@pytest.fixture(scope="module")
def hsc(shared, config):
    return kermes.deblend(kermes.read(shared / "data" / "hsc_cosmos" / "hsc_cosmos_35.npz"), config=config)


@for_scene_models
def test_real_blend_is_modelled_down_to_the_noise(hsc):
    assert len(hsc) == 7
    assert (hsc.objects["outcome"] == Outcome.FULL).all()
    # lsst.scarlet.lite reaches 1.214 on the same pixels.
    assert (hsc.residual() ** 2 / hsc.coadd.variance).mean() <= 1.22


@pytest.mark.parametrize("config", [configuration("scarlet-lite")], scope="module", ids=["scarlet-lite"])
def test_fluxes_of_a_real_blend_are_those_of_scarlet_lite(hsc, shared):
    stored = np.load(shared / "data" / "conformance" / "fit.npz")
    fluxes = [
        stored[f"fit100_spectrum_{k}"] * stored[f"fit100_morphology_{k}"].sum()
        for k in range(stored["n_components"].sum())
    ]
    source = np.repeat(np.arange(7), stored["n_components"])
    expected = np.zeros((7, 5))
    np.add.at(expected, source, fluxes)
    ratio = values(hsc) / expected
    # Bright and isolated: the two fits stop at different places, a few per cent apart.
    np.testing.assert_allclose(ratio[:2], 1, atol=0.02)
    np.testing.assert_allclose(ratio[[0, 1, 3]].mean(axis=1), 1, atol=0.03)


# ---------------------------------------------------------------- one blend may fail, the tile may not


def failing(function, *, when, error):
    """Make a function that raises `error` where `when(*arguments)` holds."""

    def wrapped(*arguments, **options):
        if when(*arguments):
            raise error
        return function(*arguments, **options)

    return wrapped


def beyond_points(images, weights, bank, peaks, settings, most):
    """Whether more than point sources is asked of a fit of profiles."""
    return most > POINT


@for_scene_models
def test_a_blend_that_fails_is_modelled_more_simply(monkeypatch, group):
    unlucky = group.blends["blend_id"][np.argmax(group.blends["n_sources"])]
    tasks = plan_tile(group.coadd, group_scene().peaks, config=group.config).tasks
    task = next(task for task in tasks if task.index + 1 == unlucky)
    if group.config.model == "kermes":
        name, when = "fit_profiles", lambda *given: beyond_points(*given) and given[0].shape[1:] == task.box.shape
    else:
        name, when = "fit_packed", lambda packed, blend, *_: blend.box == task.box
    error = BlendError("does not converge")
    monkeypatch.setattr(modelling, name, failing(getattr(modelling, name), when=when, error=error))
    result = kermes.deblend(group.coadd, group_scene().peaks, config=group.config)
    hit = result.objects["blend_id"] == unlucky
    assert (result.objects["outcome"][hit] == Outcome.POINT).all()
    assert (result.objects["reason"][hit] == "not_finite").all()
    assert np.isfinite(values(result)).all()
    np.testing.assert_array_equal(values(result)[~hit], values(group)[~hit])


def test_a_blend_that_fails_with_two_components_gets_one(monkeypatch):
    bright = scene(n_sources=1, shape=(60, 60), seed=0, magnitudes=(20, 21))
    config = configuration("scarlet-lite")
    assert kermes.deblend(bright.coadd, bright.peaks, config=config).objects["n_components"][0] == 2
    error = BlendError("too many components")
    monkeypatch.setattr(
        modelling, "fit_packed", failing(modelling.fit_packed, when=lambda packed, *_: len(packed) > 1, error=error)
    )
    result = kermes.deblend(bright.coadd, bright.peaks, config=config)
    assert list(result.objects["outcome"]) == [Outcome.SINGLE]
    assert list(result.objects["n_components"]) == [1]


def test_a_blend_that_fails_with_free_indices_gets_exponential_profiles(monkeypatch):
    bright = scene(n_sources=1, shape=(60, 60), seed=0, magnitudes=(20, 21), star_fraction=0.0)
    assert kermes.deblend(bright.coadd, bright.peaks).objects["model"][0] in (Model.SERSIC, Model.DOUBLE)
    monkeypatch.setattr(
        modelling,
        "fit_profiles",
        failing(
            modelling.fit_profiles, when=lambda *given: given[-1] > EXPONENTIAL, error=BlendError("too many shapes")
        ),
    )
    result = kermes.deblend(bright.coadd, bright.peaks)
    assert list(result.objects["outcome"]) == [Outcome.SINGLE]
    assert list(result.objects["model"]) == [Model.EXPONENTIAL]


def test_profiles_that_are_not_finite_are_not_taken(monkeypatch):
    fit_profiles = modelling.fit_profiles

    def nowhere(*given):
        fit = fit_profiles(*given)
        if beyond_points(*given):
            fit.sources.fluxes[0, 0, 0] = np.nan
        return fit

    monkeypatch.setattr(modelling, "fit_profiles", nowhere)
    result = kermes.deblend(small_scene().coadd, small_scene().peaks)
    assert (result.objects["outcome"] == Outcome.POINT).all()
    assert np.isfinite(values(result)).all()


def test_a_blend_that_nothing_else_can_model_is_psfs_at_the_peaks(monkeypatch, group):
    for name in ("fit_profiles", "measure_fluxes", "share_blend"):
        monkeypatch.setattr(
            modelling, name, failing(getattr(modelling, name), when=lambda *_: True, error=BlendError("no fluxes"))
        )
    result = kermes.deblend(group.coadd, group_scene().peaks, config=group.config)
    assert len(result) == len(group)
    assert (result.objects["outcome"] == Outcome.PEAK).all()
    assert (result.objects["reason"] == "not_finite").all()
    for place in "yx":
        np.testing.assert_array_equal(result.objects[f"center_{place}"], result.objects[place])
    # A matched filter on noise and one point: the flux is that of the PSF that fits best.
    assert np.isfinite(values(result)).all()
    assert (values(result).max(axis=1) > 0).all()


@for_scene_models
@pytest.mark.parametrize("workers", [1, 2])
def test_a_bug_stops_the_run_and_shows_where_it_is(monkeypatch, workers, config):
    def buggy(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(modelling, {"kermes": "fit_profiles", "scarlet-lite": "fit_packed"}[config.model], buggy)
    with pytest.raises(RuntimeError, match="a bug") as caught:
        kermes.deblend(group_scene().coadd, group_scene().peaks, config=config, workers=workers)
    assert "in buggy" in "".join(traceback.format_exception(caught.value))


# ---------------------------------------------------------------- large parents, bright neighbours, budgets


@pytest.fixture(scope="module")
def divided(config):
    """Deblend one parent whole, and divided into blends, without candidates; returns both results."""
    config = replace(config, profiles=replace(config.profiles, residual_rounds=0))
    crowd = scene(n_sources=30, shape=(150, 150), seed=4, min_separation_pix=4)
    labels = np.ones(crowd.coadd.shape, dtype=np.int64)
    sides = (0, 64)
    return [
        kermes.deblend(crowd.coadd, crowd.peaks, labels, replace(config, partition=PartitionConfig(largest_side=side)))
        for side in sides
    ]


@for_scene_models
def test_a_large_parent_is_divided_and_its_tables_stay_linked(divided):
    whole, parts = divided
    assert len(whole.blends) == 1
    assert len(parts.blends) > 1
    assert len(parts.parents) == 1
    assert parts.parents["n_blends"][0] == len(parts.blends)
    assert parts.blends["n_sources"].sum() == len(parts) == len(whole)
    assert (parts.blends["n_neighbors"] > 0).any()
    blend_ids, n_sources = np.unique(parts.objects["blend_id"], return_counts=True)
    np.testing.assert_array_equal(blend_ids, parts.blends["blend_id"])
    np.testing.assert_array_equal(n_sources, parts.blends["n_sources"])
    assert parts.objects[Flag.DIVIDED_PARENT].all()
    assert not whole.objects[Flag.DIVIDED_PARENT].any()


@for_scene_models
def test_fluxes_of_a_divided_parent_are_those_of_the_whole(divided, config):
    whole, parts = divided
    difference = np.abs(values(parts) - values(whole)) / values(whole, "flux_err")
    # What is left out across a cut shifts a flux by less than 0.3 sigma each, most by far less. Free shapes have many
    # minima of nearly equal chi2, and fall into another one.
    middle, share = {"kermes": (0.02, 0.95), "scarlet-lite": (0.5, 0.8)}[config.model]
    assert np.median(difference) < middle
    assert (difference < 1).mean() > share


def test_flux_closes_where_a_parent_was_divided(divided):
    _, parts = divided
    total = shares(parts)
    owned = total != 0
    assert owned.mean() > 0.1
    # Rounding of shares in single precision, relative to the pixel.
    np.testing.assert_allclose(total[owned], parts.coadd.images[owned], rtol=1e-5, atol=1e-5)


def test_blends_that_are_divided_do_not_depend_on_the_number_of_workers(config):
    settings = replace(config, partition=PartitionConfig(largest_side=48, bright_snr=30))
    here, there = (kermes.deblend(group_scene().coadd, group_scene().peaks, config=settings, workers=n) for n in (1, 3))
    assert same_pixels(here, there)


def test_the_light_of_a_bright_star_is_taken_off_its_neighbours_in_other_footprints():
    offset = np.arange(-40, 41)
    psf = (1 + (offset[:, None] ** 2 + offset**2) / 6.0) ** -1.8
    psf /= psf.sum()
    star, faint = np.array([40, 30]), np.array([40, 48])
    images = np.zeros((81, 81))
    for flux, (y, x) in ((5e5, star), (300, faint)):
        images += flux * np.roll(psf, (y - 40, x - 40), axis=(0, 1))
    labels = np.zeros(images.shape, dtype=np.int64)
    labels[10:71, 1:41], labels[30:51, 42:60] = 1, 2
    coadd = kermes.Coadd(images=images[None], variance=np.ones(1), psfs=psf[None, 10:71, 10:71], bands=("i",))
    off, on = (
        values(kermes.deblend(coadd, [star, faint], labels, Config(partition=PartitionConfig(bright_snr=snr))))[1, 0]
        for snr in (0, 3000)
    )
    assert abs(on - 300) < 0.1 * abs(off - 300)


@pytest.mark.parametrize(
    ("share", "outcome"),
    [
        (0.5, Outcome.SINGLE),
        (0.2, Outcome.POINT),
        (0.1, Outcome.TEMPLATE),
        (0.02, Outcome.PEAK),
        (1e-9, Outcome.PEAK),
    ],
)
def test_a_blend_beyond_the_budget_gets_a_simpler_model(group, share, outcome):
    plan = plan_tile(group.coadd, group_scene().peaks, config=group.config)
    most = max(task.cost.operations for task in plan.tasks)
    config = replace(group.config, budget=BudgetConfig(operations=share * most))
    result = kermes.deblend(group.coadd, group_scene().peaks, config=config)
    hit = result.objects["blend_id"] == max(plan.tasks, key=lambda task: task.cost.operations).index + 1
    if group.config.model == "templates":
        outcome = Outcome.PEAK  # the only one below
    assert (result.objects["outcome"][hit] == outcome).all()
    assert (result.objects["reason"][hit] == "budget").all()
    assert np.isfinite(values(result)).all()


def test_the_ledger_accounts_for_every_peak(group):
    ledger = group.ledger()
    assert ledger["peaks"] == ledger["rows"] == len(group_scene().peaks)
    assert sum(ledger["outcomes"].values()) == sum(ledger["reasons"].values()) == ledger["rows"]


def test_no_more_blends_are_begun_than_memory_holds(config):
    plan = plan_tile(
        group_scene().coadd, group_scene().peaks, config=replace(config, budget=BudgetConfig(total_memory=1e-6))
    )
    result = tile.collect(plan, tile.fit_blends(plan, workers=2))
    assert result.is_complete
    free = kermes.deblend(group_scene().coadd, group_scene().peaks, config=config)
    np.testing.assert_array_equal(values(result), values(free))


# ---------------------------------------------------------------- schedule


def test_a_slow_blend_holds_up_no_other(monkeypatch):
    scene = simulate_scene(n_sources=40, shape=(400, 400), bands=("g", "r"), seed=3)
    plan = plan_tile(scene.coadd, scene.peaks)
    # More than are begun at a time.
    assert plan.n_blends > 2 * tile.QUEUE + 2
    expected = kermes.deblend(scene.coadd, scene.peaks)
    monkeypatch.setattr(tile, "fit_blend", fit_the_first_last())
    np.testing.assert_array_equal(values(kermes.deblend(scene.coadd, scene.peaks, workers=2)), values(expected))


def test_order_of_the_work_does_not_depend_on_the_order_of_the_peaks(config):
    coadd, peaks = group_scene().coadd, group_scene().peaks
    here, there = (plan_tile(coadd, given, config=config) for given in (peaks, peaks[::-1]))
    assert [task.box for task in here.tasks] == [task.box for task in there.tasks]


def test_models_are_let_go_when_the_neighbours_are_done(config):
    star = scene(n_sources=1, kind="pair", shape=(60, 60), seed=2, star_fraction=1.0)
    coadd = changed(star.coadd, images=np.tile(star.coadd.images, (1, 12, 1)), variance=star.coadd.variance[:, :1, :1])
    peaks = np.concatenate([star.peaks[:1] + [60 * k, 0] for k in range(12)])
    plan = plan_tile(coadd, peaks, config=config)
    assert plan.n_blends == 12
    held = []

    def count():
        return sum(isinstance(thing, SourceModels) for thing in gc.get_objects())

    def counted():
        for outcome in tile.fit_blends(plan):
            yield outcome
            del outcome
            held.append(count() - before)

    gc.collect()
    before = count()
    tile.collect(plan, counted())
    assert max(held) <= 3


def test_timings_are_told_apart(small):
    assert set(small.timings) == {"plan", "blends", "collect", "total"}
    blends = sum(small.timings["blends"])
    assert len(small.timings["blends"]) == len(small.blends)
    assert small.timings["plan"] + blends + small.timings["collect"] <= small.timings["total"]


# ---------------------------------------------------------------- bad input

BAD = {
    "workers is zero": ({"workers": 0}, InputError, "workers must be a whole number, at least 1, got 0"),
    "workers is a word": ({"workers": "all"}, InputError, "workers must be a whole number, at least 1, got 'all'"),
    "peaks is a word": ({"peaks": "foo"}, InputError, "peaks must be positions, None or 'detect', got 'foo'"),
    "peaks outside": ({"peaks": [[3, 3], [70, 3]]}, InputError, "peaks must lie inside the image.*peak 1 is at y = 70"),
    "peaks not finite": ({"peaks": [[np.nan, 3]]}, InputError, "peaks must"),
    "peaks of three": ({"peaks": [[1, 2, 3]]}, ShapeError, r"peaks must have shape \(N, 2\)"),
    "footprints too small": ({"footprints": np.ones((3, 3), int)}, ShapeError, "footprints must have the shape"),
    "footprints not labels": ({"footprints": np.full((70, 66), 0.5)}, InputError, "footprints must be labels"),
    "config is a mapping": ({"config": {"model": "x"}}, InputError, "config must be a kermes.Config, got dict"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_bad_input_gets_one_error_that_names_the_argument(arguments, error, message):
    options = {"peaks": small_scene().peaks} | arguments
    with pytest.raises(error, match=message):
        kermes.deblend(small_scene().coadd, **options)


def test_unknown_settings_are_refused():
    with pytest.raises(ConfigError, match="model must be"):
        Config(model="foo")
    with pytest.raises(TypeError, match="unexpected keyword"):
        FitConfig(max_iters=3)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_saturated_star_in_a_crowd_is_fitted_by_its_wings(seed):
    crowd = simulate_patch(
        kind="stars",
        shape=(130, 130),
        bands=("g", "r", "i"),
        seed=seed,
        n_bright_stars=1,
        magnitudes=(19, 25),
        density_arcmin2=1200,
    )
    truth = crowd.truth[np.argmax(crowd.truth["snr"])]
    assert not crowd.coadd.valid[:, round(truth["y"]), round(truth["x"])].all()
    row = kermes.deblend(crowd.coadd, crowd.peaks).objects[truth["peak_index"]]
    # Its errors are far smaller; how well the wings of a PSF stamp can be continued is known to a per cent.
    for band in crowd.coadd.bands:
        np.testing.assert_allclose(row[f"{band}_flux"], truth[f"{band}_flux"], rtol=0.01)
    assert np.hypot(row["center_y"] - truth["y"], row["center_x"] - truth["x"]) < 0.02


def test_mask_planes_under_a_peak_become_flags():
    small = small_scene()
    mask = np.zeros(small.coadd.shape, dtype=int)
    (y, x), *_ = small.peaks
    mask[y, x + 1], mask[y - 1, x] = 1 << 3, 1 << 5
    coadd = changed(small.coadd, mask=mask, mask_planes={"INTRP": 3, "SAT": 5})
    objects = kermes.deblend(coadd, small.peaks).objects
    for flag in (Flag.INTERPOLATED, Flag.SATURATED):
        assert np.flatnonzero(objects[flag]).tolist() == [0]
    assert not objects[Flag.COSMIC_RAY].any()


def test_a_blend_that_is_fitted_badly_gets_the_simpler_model_that_fits_better(monkeypatch):
    fit_profiles = modelling.fit_profiles

    def astray(*given):
        fit = fit_profiles(*given)
        if beyond_points(*given):
            fit.sources.fluxes[:] *= -100
        return fit

    monkeypatch.setattr(modelling, "fit_profiles", astray)
    result = kermes.deblend(small_scene().coadd, small_scene().peaks)
    poor = result.objects["outcome"] != Outcome.FULL
    assert poor.any()
    assert (result.objects["outcome"][poor] == Outcome.POINT).all()
    assert (result.objects["reason"][poor] == "poor_fit").all()
    assert (result.blends["chi2"] < modelling.POOR_CHI2).all()


# ---------------------------------------------------------------- flags that help


def gaussians(*sources, shape=(80, 80), seed=0):
    """Coadd of one band with unit noise of round Gaussians (y, x, sigma, flux), seen through a PSF of 1.7 pixels."""
    rows, columns = np.indices(shape)
    image = np.random.default_rng(seed).normal(size=shape)
    for y, x, sigma, flux in sources:
        light = np.exp(-0.5 * ((rows - y) ** 2 + (columns - x) ** 2) / (sigma**2 + 1.7**2))
        image += flux * light / light.sum()
    return kermes.Coadd(images=image[None], variance=1.0, psfs=model_psf(1.7, 31)[None], bands=["r"])


def test_a_faint_source_on_a_bright_one_is_dominated_by_it():
    coadd = gaussians((40, 40, 5, 60_000), (40, 47, 0, 1500), (15, 15, 0, 1500))
    objects = kermes.deblend(coadd, [(40, 40), (40, 47), (15, 15)]).objects
    np.testing.assert_array_equal(objects[Flag.NEIGHBOR_DOMINATED], [False, True, False])


@pytest.mark.parametrize("seed", range(4))
def test_a_child_that_its_neighbour_explains_may_be_a_part_of_it(seed):
    # A galaxy with a second peak on it, and a pair of the same distance.
    coadd = gaussians((25, 25, 3, 2500), (60, 60, 3, 2500), (60, 65, 0, 1500), (15, 65, 0, 300), seed=seed)
    objects = kermes.deblend(coadd, [(25, 25), (25, 30), (60, 60), (60, 65), (15, 65)]).objects
    np.testing.assert_array_equal(objects[Flag.SHREDDED], [False, True, False, False, False])
    assert objects["r_flux_correlation"][1] < -0.1
    np.testing.assert_array_equal(objects["correlated_id"], [2, 1, 4, 3, 0])


def test_the_share_of_the_pixels_is_preferred_where_the_model_lacks_light():
    coadd = gaussians((20, 20, 0, 3000), (20, 60, 0, 3000), (60, 20, 0, 3000))
    rows, columns = np.indices(coadd.shape)
    halo = 8 * (np.abs(np.hypot(rows - 20, columns - 60) - 6) < 1)
    images = (coadd.images + halo).astype(np.float32)
    images[:, 60, 20] = np.nan
    # Nothing found in the ring, and no free form: the model of the second lacks it. The core of the third is masked.
    config = Config(free_form=FreeFormConfig(strength=0), profiles=ProfileConfig(residual_rounds=0, sersic_snr=1e9))
    objects = kermes.deblend(replace(coadd, images=images), [(20, 20), (20, 60), (60, 20)], config=config).objects
    assert objects["chi2"][1] > PREFERRED_CHI2 > objects["chi2"][0]
    assert list(objects["preferred_flux"]) == ["flux", "redistributed_flux", "flux"]
    with pytest.warns(DataWarning, match="no pixel of any band is valid"):
        nothing = replace(coadd, images=np.full_like(images, np.nan))
    assert list(kermes.deblend(nothing, [(20, 20)]).objects["preferred_flux"]) == [""]


def test_a_source_with_an_unlisted_companion_may_be_two():
    coadd = gaussians((40, 40, 0, 3000), (40, 46, 0, 1500), (15, 15, 0, 3000))
    result = kermes.deblend(coadd, [(40, 40), (15, 15)])
    assert len(result.candidates) == 1
    np.testing.assert_array_equal(result.objects[Flag.UNRESOLVED_BLEND], [True, False])


def test_clumps_are_part_of_their_galaxy(tmp_path):
    scene = simulate_scene(n_sources=25, shape=(140, 140), bands=("g", "r", "i"), seed=3, kind="knots")
    config = Config(free_form=FreeFormConfig(strength=0))
    result = kermes.deblend(scene.coadd, scene.peaks, config=config)
    n_clumps = [sum(part.is_point for part in handle.source.components[1:]) for handle in result]
    assert sum(n_clumps) > 3
    objects = result.objects
    np.testing.assert_array_equal(objects["n_components"], [len(handle.source.components) for handle in result])
    for band, name in enumerate(result.bands):
        total = [sum(part.spectrum[band] for part in handle.source.components) for handle in result]
        np.testing.assert_allclose(objects[f"{name}_flux"], total, rtol=1e-5)
    # They lie where the galaxy is, and not in the table of what nobody listed.
    for handle, n in zip(result, n_clumps, strict=True):
        for part in handle.source.components[1:] if n else ():
            assert np.hypot(*(part.center - handle.source.components[0].center)) < 30
    clumps = [part.center for handle in result for part in handle.source.components[1:] if part.is_point]
    found = np.stack([result.candidates["y"], result.candidates["x"]], axis=1) - np.array(result.origin)
    apart = np.array(clumps)[:, None] - found
    assert (np.hypot(*apart.transpose(2, 0, 1)) > 1).all()
    result.write(tmp_path / "out", tolerance=None)
    assert same_pixels(kermes.open(tmp_path / "out", coadd=scene.coadd), result)


def test_a_shape_that_no_model_has_is_said_to_be_modelled_poorly():
    coadd = gaussians((20, 20, 2, 3000))
    rows, columns = np.indices(coadd.shape)
    checks = 40 * ((rows // 2 + columns // 2) % 2) * (np.hypot(rows - 55, columns - 55) < 8)
    coadd = replace(coadd, images=(coadd.images + checks).astype(np.float32))
    config = Config(free_form=FreeFormConfig(min_snr=1e9, point_snr=1e9), profiles=ProfileConfig(residual_rounds=0))
    objects = kermes.deblend(coadd, [(20, 20), (55, 55)], config=config).objects
    np.testing.assert_array_equal(objects[Flag.POOR_MODEL], [False, True])
