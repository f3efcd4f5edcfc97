"""What users hold after deblending keeps its promises, whatever fitted the models."""

from dataclasses import replace

import numpy as np
import pytest
from astropy import units

import kermes
from kermes import metrics
from kermes.errors import InputError
from kermes.flux import claimed
from kermes.geometry import Box
from kermes.psf import continued, difference_kernels, model_psf
from kermes.rendering import KernelSet, convolve, render_scene
from kermes.result import StampKind
from kermes.scene import ProfileComponent, Scene
from kermes.simulation import simulate_scene
from results import BANDS, ORIGIN, fitted_result, light_of_candidates, make_coadd, make_result, psfs, sources
from tiles import group_scene


@pytest.fixture(scope="module")
def result():
    return make_result()


@pytest.fixture(scope="module")
def fitted():
    return fitted_result()


def test_one_handle_per_row_in_the_order_of_the_table(result):
    assert [handle.object_id for handle in result] == list(result.objects["object_id"])
    assert len(result) == len(result.objects)


def test_an_object_is_found_by_its_id_not_by_its_row(result):
    assert result[7].row["object_id"] == 7


def test_an_unknown_object_is_named(result):
    with pytest.raises(kermes.InputError, match=r"object_id must be one of the 4 .*got 1000"):
        result[1000]


def test_membership_asks_for_the_id(result):
    assert 7 in result
    assert 1000 not in result


@pytest.mark.parametrize("method", list(StampKind))
def test_an_unknown_band_is_refused_with_the_known_ones(result, method):
    with pytest.raises(kermes.InputError, match="band must be one of g, r, got 'z'"):
        getattr(result[7], method)("z")


def test_the_peak_is_in_the_coordinates_of_the_coadd(result):
    source = result.models[7]
    assert result[7].peak == (source.peak[0] + 100, source.peak[1] - 20)


def test_all_stamps_of_an_object_share_one_box(result):
    handle = result[7]
    stamps = [handle.model("g"), handle.model("r", convolved=False), handle.redistributed("g")]
    boxes = {stamp.box for stamp in [*stamps, handle.neighbor_subtracted("r")]}
    assert len(boxes) == 1
    assert {stamp.array.shape for stamp in stamps} == {boxes.pop().shape}


def test_stamps_lie_inside_the_image(result):
    for handle in result:
        box = handle.model("g").box
        assert box & result.coadd.box == box


def test_the_unconvolved_model_has_the_flux_of_the_source(result):
    # Object 7 lies away from the edge, so that no light is cut off; float32 rounding.
    stamp = result[7].model("r", convolved=False)
    np.testing.assert_allclose(stamp.array.sum(), result.models[7].flux(2)[1], rtol=1e-5)


def test_the_unconvolved_model_lies_where_the_source_does(result):
    stamp = result[7].model("g", convolved=False)
    y, x = np.unravel_index(stamp.array.argmax(), stamp.array.shape)
    assert (y + stamp.box.y0, x + stamp.box.x0) == result[7].peak


def test_models_add_up_to_the_model_image(result):
    total = np.zeros(result.shape, dtype=np.float32)
    for handle in result:
        stamp = handle.model("r")
        total[stamp.box.within(result.coadd.box)] += stamp.array
    np.testing.assert_allclose(total, result.model_image()[1], atol=1e-5 * total.max())


def test_the_model_image_is_the_convolved_scene(result):
    scene = np.zeros((2, *result.shape), dtype=np.float32)
    image_box = Box.of_shape(result.shape)
    for source in result.models.values():
        scene[(slice(None), *source.box.within(image_box))] += source.model(2)[
            (slice(None), *image_box.within(source.box))
        ]
    kernels = difference_kernels(result.psfs[1], model_psf(result.config.model_psf_sigma))
    # Light of the scene outside the image is convolved into it in one case only: look away from the edge.
    inner = (slice(None), slice(12, -12), slice(12, -12))
    np.testing.assert_allclose(
        result.model_image()[inner], convolve(scene, kernels)[inner], atol=1e-5 * float(scene.max())
    )


def test_shares_close_in_every_claimed_pixel(result):
    shares = np.zeros(result.shape, dtype=np.float64)
    for handle in result:
        stamp = handle.redistributed("g")
        shares[stamp.box.within(result.coadd.box)] += stamp.array
    coadd = result.coadd
    shared = claimed(coadd.variance, coadd.valid, result.model_image(positive=True))[0]
    expected = np.where(shared, coadd.images[0], 0)
    # A few float32 roundings per pixel.
    np.testing.assert_allclose(shares, expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_shared_in_an_invalid_pixel(result):
    stamp = result[7].redistributed("g")
    window = stamp.box.within(result.coadd.box)
    invalid = ~result.coadd.valid[0][window]
    assert invalid.any()
    assert not stamp.array[invalid].any()


def test_an_object_alone_is_what_remains_without_its_neighbours(result):
    stamp = result[7].neighbor_subtracted("r")
    window = stamp.box.within(result.coadd.box)
    residual = result.residual()[1][window]
    np.testing.assert_allclose(stamp.array - result[7].model("r").array, residual, atol=1e-3)


def test_models_of_profiles_add_up_to_the_model_image(fitted):
    total = light_of_candidates(fitted)[:, 1].sum(axis=0)
    for handle in fitted:
        stamp = handle.model("r")
        total[stamp.box.within(fitted.coadd.box)] += stamp.array
    np.testing.assert_allclose(total, fitted.model_image()[1], atol=1e-5 * total.max())


def test_an_object_has_the_same_bits_as_in_its_blend(fitted):
    # The box of the first blend, grown by half a PSF of 21 pixels.
    outer = Box(10, 10, 45, 50)
    psfs = fitted.psfs[1]
    kernels = KernelSet(difference_kernels(psfs, model_psf(fitted.config.model_psf_sigma)), continued(psfs))
    models = render_scene(Scene(sources=(fitted.models[4], fitted.models[7]), box=outer), kernels)
    for s, object_id in enumerate((4, 7)):
        stamp = fitted[object_id].model("g")
        assert (*stamp.box.shift(-100, 20).shift(-10, -10).origin, *stamp.box.shape) == tuple(models.boxes[s].tolist())
        pixels = models.pixels[0, models.offsets[s] : models.offsets[s + 1]]
        np.testing.assert_array_equal(stamp.array.ravel(), pixels)


def test_a_profile_is_cut_where_its_blend_ends(fitted):
    # Its stamp would reach from column 20 to 51, its blend from 10 to 59; a narrower blend cuts it.
    blends = fitted.blends.copy()
    blends["width"][0] = 15
    narrow = fitted_result(blends=blends)
    whole, cut = fitted[7].model("g"), narrow[7].model("g")
    assert (whole.box.x1, cut.box.x1) == (32, 25)
    np.testing.assert_array_equal(cut.array, whole.array[:, :-7])


def test_shares_of_profiles_close_in_every_claimed_pixel(fitted):
    coadd, total = fitted.coadd, fitted.model_image(positive=True)
    shared = claimed(coadd.variance, coadd.valid, total)[1]
    others = np.maximum(light_of_candidates(fitted)[:, 1], 0).sum(axis=0, dtype=np.float64)
    shares = np.where(shared, coadd.images[1] * others / np.where(shared, total[1], 1), 0)
    assert shares.any()
    for handle in fitted:
        stamp = handle.redistributed("r")
        shares[stamp.box.within(coadd.box)] += stamp.array
    np.testing.assert_allclose(shares, np.where(shared, coadd.images[1], 0), rtol=1e-5, atol=1e-6)


def test_the_unconvolved_model_of_a_profile_has_its_flux(fitted):
    (point,) = fitted.models[7].components
    assert isinstance(point, ProfileComponent)
    stamp = fitted[7].model("r", convolved=False)
    np.testing.assert_allclose(stamp.array.sum(dtype=float), 300, rtol=1e-5)


def test_without_candidates_their_table_is_empty_and_has_all_columns(result, fitted):
    assert len(result.candidates) == 0
    assert result.candidates.colnames == fitted.candidates.colnames
    assert result.candidates["g_flux"].unit == units.nJy


def test_an_object_without_light_has_empty_stamps(result):
    handle = result[9]
    stamps = handle.model("g"), handle.model("g", convolved=False), handle.redistributed("g")
    assert [stamp.array.shape for stamp in stamps] == [(0, 0)] * 3


def test_the_total_given_by_the_tile_is_used_as_it_is(result):
    given = make_result(total=result.model_image(positive=True).copy())
    np.testing.assert_array_equal(given[7].redistributed("g").array, result[7].redistributed("g").array)


@pytest.mark.parametrize("what", ["redistributed", "neighbor_subtracted", "noise_replaced"])
def test_observed_stamps_need_the_coadd(what):
    result = make_result(with_coadd=False)
    with pytest.raises(kermes.InputError, match=f"{what} needs the images: open the result with coadd="):
        getattr(result[7], what)("g")


def test_the_residual_needs_the_coadd():
    with pytest.raises(kermes.InputError, match="residual needs the images"):
        make_result(with_coadd=False).residual()


def test_models_need_no_coadd(result):
    np.testing.assert_array_equal(make_result(with_coadd=False)[7].model("g").array, result[7].model("g").array)


def test_a_coadd_of_another_shape_is_refused(result):
    coadd = kermes.Coadd(images=np.zeros((2, 5, 6)), variance=1, psfs=result.psfs[1], bands=["g", "r"])
    with pytest.raises(kermes.InputError, match=r"coadd must be the one of the result, with shape .*got \(5, 6\)"):
        make_result(coadd=coadd)


def test_changing_a_stamp_does_not_change_the_result(result):
    result[7].model("g").array[:] = -1
    assert result[7].model("g").array.max() > 0


def test_a_result_says_what_it_is(result):
    assert repr(result) == "<Result: 4 objects in 2 blends, bands g r, 60 x 70 pixels>"


def test_fluxes_carry_the_unit_of_the_coadd(result):
    assert result.objects["g_flux"].unit == units.nJy


def test_magnitudes_need_a_zero_point(result):
    without = replace(result, zero_point=None, total=None)
    with pytest.raises(kermes.InputError, match="need the zero point"):
        without.catalog(magnitudes=True)
    assert without.catalog().colnames == result.objects.colnames


# ---------------------------------------------------------------- kinds of stamps


@pytest.mark.parametrize("kind", StampKind)
def test_the_two_ways_to_a_stamp_lead_to_the_same(result, kind):
    short, long = getattr(result[7], kind)("r"), result[7].stamp(kind, "r")
    assert short.box == long.box
    np.testing.assert_array_equal(short.array, long.array)


@pytest.mark.parametrize("kind", StampKind)
def test_a_margin_adds_pixels_and_changes_none(fitted, kind):
    small, large = fitted[7].stamp(kind, "g"), fitted[7].stamp(kind, "g", margin=5)
    assert large.box == small.box.grow(5) & fitted.coadd.box
    inner = small.box.within(large.box)
    for name in ("array", "variance", "valid"):
        if kind is not StampKind.MODEL or name == "array":
            np.testing.assert_array_equal(getattr(large, name)[inner], getattr(small, name))


def test_a_margin_stops_at_the_edge_of_the_image(fitted):
    assert fitted[8].stamp("neighbor_subtracted", "g", margin=200).box == fitted.coadd.box


def test_what_is_shared_and_what_is_not_make_up_the_image(fitted):
    coadd = fitted.coadd
    whole = np.zeros(fitted.shape)
    for _, stamps in fitted.stamps("redistributed", ["r"]):
        whole[stamps["r"].box.within(coadd.box)] += stamps["r"].array
    total = fitted.model_image(positive=True)
    shared = claimed(coadd.variance, coadd.valid, total)[1]
    # Two candidates have a share, but no row.
    others = np.maximum(light_of_candidates(fitted)[:, 1], 0).sum(axis=0, dtype=np.float64)
    whole += np.where(shared, coadd.images[1] * others / np.where(shared, total[1], 1), 0)
    unassigned = np.where(shared, 0, coadd.images[1])
    np.testing.assert_allclose(whole + unassigned, coadd.images[1], rtol=1e-5, atol=1e-6)


def test_noise_does_not_depend_on_what_was_cut_before(fitted):
    backwards = {handle.object_id: handle.stamps("noise_replaced", ["r", "g"]) for handle in list(fitted)[::-1]}
    for object_id, stamps in fitted_result().stamps("noise_replaced"):
        for band, stamp in stamps.items():
            np.testing.assert_array_equal(stamp.array, backwards[object_id][band].array)


def test_noise_differs_between_objects_and_bands(result):
    noises = np.concatenate([result[object_id]._noise("gr", Box(28, 28, 8, 8)) for object_id in (4, 7)])
    correlation = np.corrcoef(noises.reshape(4, -1))
    # Off the diagonal the scatter is 1 / sqrt(64) = 0.125; six pairs stay within four times that.
    assert np.abs(correlation - np.eye(4)).max() < 0.5


def test_images_stay_as_they_are():
    result = make_result()
    images, variance = result.coadd.images.copy(), result.coadd.variance.copy()
    for kind in StampKind:
        for _, stamps in result.stamps(kind, margin=3):
            for stamp in stamps.values():
                stamp.array[:] = 1e6
                if stamp.variance is not None:
                    stamp.variance[:] = -1
    np.testing.assert_array_equal(result.coadd.images, images)
    np.testing.assert_array_equal(result.coadd.variance, variance)


def test_noise_in_the_place_of_a_neighbour_has_the_variance_of_the_image():
    coadd = make_coadd()
    rng = np.random.default_rng(8)
    variance = rng.uniform(0.5, 8, coadd.images.shape).astype(np.float32)
    bright = kermes.Coadd(images=coadd.images + 1e4, variance=variance, psfs=psfs(), bands=BANDS, origin=ORIGIN)
    result = make_result(coadd=bright)
    stamp = result[7].stamp("noise_replaced", "r", margin=20)
    model = result[7].stamp("model", "r", margin=20).array
    taken = claimed(variance, bright.valid, result.model_image(positive=True))[1][stamp.box.within(bright.box)]
    far = taken & (model <= 0)
    scaled = stamp.array[far] / np.sqrt(stamp.variance[far])
    assert far.sum() > 100
    # Errors of a standard deviation and a mean of n numbers, four times.
    assert np.std(scaled) == pytest.approx(1, abs=4 / np.sqrt(2 * far.sum()))
    assert abs(np.mean(scaled)) < 4 / np.sqrt(far.sum())


@pytest.mark.parametrize("kind", ["redistributed", "neighbor_subtracted", "noise_replaced"])
def test_the_variance_of_a_stamp_is_the_scatter_of_its_pixels(kind):
    n, stamps = 200, []
    models = {object_id: source for object_id, source in sources().items() if object_id != 9}
    objects = make_result().objects[:3]
    for seed in range(n):
        result = make_result(coadd=make_coadd(seed), models=models, objects=objects)
        stamps.append(result[4].stamp(kind, "r"))
    scatter2 = np.var([stamp.array for stamp in stamps], axis=0)
    if kind == "noise_replaced":
        # The noise that is put in is the same every time: what scatters is the share.
        expected = result[4].redistribution_covariance(4, "r").array
        shared = claimed(result.coadd.variance, result.coadd.valid, result.model_image(positive=True))[1]
        expected = np.where(shared[stamps[0].box.within(result.coadd.box)], expected, stamps[0].variance)
    else:
        expected = stamps[0].variance
    # Mean over all pixels of a ratio whose scatter is sqrt(2 / n) = 0.1 each; single pixels within five times.
    ratio = scatter2[expected > 0] / expected[expected > 0]
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    assert np.abs(ratio - 1).max() < 0.5


def test_covariance_with_itself_is_the_variance_and_with_others_symmetric(result):
    own = result[4].redistribution_covariance(4, "r")
    np.testing.assert_array_equal(own.array, result[4].redistributed("r").variance)
    there, back = result[4].redistribution_covariance(7, "r"), result[7].redistribution_covariance(4, "r")
    assert there.box == back.box
    np.testing.assert_array_equal(there.array, back.array)
    assert there.array.max() > 0


def test_stamps_come_in_the_order_of_the_table_one_at_a_time(result):
    stamps = result.stamps("model", ["r"])
    assert next(stamps)[0] == result.objects["object_id"][0]
    assert [object_id for object_id, _ in stamps] == list(result.objects["object_id"][1:])


def test_an_object_without_light_has_pixels_within_the_margin(result):
    stamp = result[9].stamp("neighbor_subtracted", "r", margin=2)
    assert stamp.box.origin == (result[9].peak[0] - 2, result[9].peak[1] - 2)
    assert stamp.array.shape == (4, 4)


def test_objects_that_are_drawn_together_have_the_same_stamps_as_alone(fitted):
    handles = list(fitted.by_blend())
    assert sorted(handle.object_id for handle in handles) == sorted(fitted.objects["object_id"])
    for handle in handles:
        alone = fitted[handle.object_id]
        assert (handle.box, handle.center, handle.blend_id) == (alone.box, alone.center, alone.blend_id)
        np.testing.assert_array_equal(handle.psf_cube(margin=3).array, alone.psf_cube(margin=3).array)
        for kind in StampKind:
            np.testing.assert_array_equal(handle.cube(kind, margin=3).array, alone.cube(kind, margin=3).array)


@pytest.mark.parametrize("convolved", [True, False])
def test_a_blend_without_light_needs_no_psf_to_be_drawn(convolved):
    result = make_result()
    dark = {number: replace(source, components=()) for number, source in result.models.items()}
    nothing = replace(result, models=dark, psfs={}, total=None)
    assert not nothing.model_image(convolved=convolved).any()


def test_objects_come_blend_by_blend(result):
    blends = [handle.blend_id for handle in result.by_blend()]
    assert len(set(blends)) > 1
    assert blends == sorted(blends)


@pytest.mark.parametrize("kind", list(StampKind))
def test_a_cube_holds_the_stamps_of_the_bands_that_are_asked_for(result, kind):
    cube, stamps = result[7].cube(kind, ["r", "g"], margin=2), result[7].stamps(kind, margin=2)
    for k, band in enumerate("rg"):
        assert cube.box == stamps[band].box
        for name in ("array", "variance", "valid"):
            part = getattr(cube, name)
            np.testing.assert_array_equal(None if part is None else part[k], getattr(stamps[band], name))


def test_wrong_stamps_are_refused_before_the_first_is_cut(result):
    with pytest.raises(kermes.InputError, match="kind must be one of model, redistributed, .*got 'heavy'"):
        result.stamps("heavy")
    with pytest.raises(kermes.InputError, match="band must be one of g, r, got 'z'"):
        result.stamps("model", ["z"])
    with pytest.raises(kermes.InputError, match="margin must be >= 0, got -1"):
        result.stamps("model", margin=-1)
    with pytest.raises(kermes.InputError, match="noise_replaced needs the images"):
        make_result(with_coadd=False).stamps("noise_replaced")


def test_a_point_source_is_drawn_where_the_model_is(fitted):
    y, x = fitted.models[7].components[0].center
    fitted.objects["center_y"][1], fitted.objects["center_x"][1] = y + ORIGIN[0], x + ORIGIN[1]
    point, model = fitted[7].psf_stamps(["r"])["r"], fitted[7].model("r")
    assert point.box == model.box
    # Drawn on stamps of different size, whose edges are joined at different places.
    np.testing.assert_allclose(300 * point.array, model.array, atol=1e-4 * model.array.max())
    assert fitted[7].psf_stamps(["r"], margin=20)["r"].array.sum() == pytest.approx(1, abs=1e-3)


# ---------------------------------------------------------------- metrics of others


def test_a_registered_metric_is_measured_on_every_object(monkeypatch):
    monkeypatch.setattr(metrics, "_REGISTERED", {})

    def light(model, others, variance, valid):
        """Light of the model and of all others on its pixels."""
        assert model.shape == others.shape == variance.shape == valid.shape
        return model.sum(axis=(1, 2)) + others.sum(axis=(1, 2))

    metrics.register_metric("light", light)
    result = kermes.deblend(group_scene().coadd, group_scene().peaks)
    table = result.registered_metrics()
    assert table.colnames == ["object_id", "g_light", "r_light", "i_light"]
    assert table["g_light"].description == "Light of the model and of all others on its pixels."
    assert np.isfinite(table["r_light"]).all()
    assert (table["r_light"] > 0.9 * result.objects["r_flux"]).all()


# ---------------------------------------------------------------- parts, and other numbers


@pytest.fixture(scope="module")
def crowded():
    scene = simulate_scene(n_sources=30, shape=(160, 160), bands=("g", "r"), seed=3)
    return kermes.deblend(scene.coadd)


def test_part_has_the_objects_of_a_blend_and_their_models(crowded, tmp_path):
    blend_id = int(crowded.blends["blend_id"][np.argmax(crowded.blends["n_sources"])])
    part = crowded.select(blend_ids=blend_id)
    members = crowded.objects["object_id"][crowded.objects["blend_id"] == blend_id].tolist()
    assert 1 < len(members) < len(crowded)
    assert part.objects["object_id"].tolist() == members
    assert part.blends["blend_id"].tolist() == [blend_id]
    assert set(part.footprints) == set(part.parents["parent_id"].tolist())
    expected = np.zeros_like(crowded.model_image())
    for number in members:
        stamp = {band: crowded[number].model(band) for band in part.bands}
        for b, each in enumerate(stamp.values()):
            assert np.array_equal(part[number].model(part.bands[b]).array, each.array)
            expected[(b, *each.box.within(crowded.coadd.box))] += each.array
    for several in (set(members), (number for number in members), np.array(members)):
        assert crowded.select(object_ids=several).objects["object_id"].tolist() == members
    of_candidates = part.select(object_ids=members)
    np.testing.assert_allclose(of_candidates.model_image(), expected, atol=1e-5 * expected.max())

    part.write(tmp_path / "part")
    for again in (part, kermes.open(tmp_path / "part", coadd=crowded.coadd)):
        assert again.is_part
        again[members[0]].neighbor_subtracted("g")
        with pytest.raises(InputError, match="sharing pixels out needs the models of all objects"):
            again[members[0]].redistributed("g")


def test_part_of_an_opened_result_does_not_need_its_file(crowded, tmp_path):
    crowded.write(tmp_path / "all.kermes")
    number = int(crowded.objects["object_id"][4])
    part = kermes.open(tmp_path / "all.kermes").select(object_ids=number)
    (tmp_path / "all.kermes").unlink()
    assert len(part) == 1
    assert part[number].model("r").array.shape == crowded[number].model("r").array.shape


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "select needs object_ids or blend_ids, got neither"),
        ({"object_ids": [1, 999]}, "object_ids must be those of the result, got 999"),
        ({"blend_ids": 0}, "blend_ids must be those of the result, got 0"),
        ({"blend_ids": 1.5}, "blend_ids must be a whole number, or several, got 1.5"),
        ({"object_ids": ["a"]}, "object_ids must be a whole number, or several"),
    ],
)
def test_part_that_is_none_is_refused(crowded, given, message):
    with pytest.raises(InputError, match=message):
        crowded.select(**given)


def test_other_numbers_are_the_same_objects(crowded, tmp_path):
    first = 5 << 40
    moved = crowded.renumbered(first)
    for name in ("objects", "parents", "blends", "candidates"):
        old, new = getattr(crowded, name), getattr(moved, name)
        for column in old.colnames:
            values = np.asarray(old[column])
            if column in ("object_id", "parent_id", "blend_id", "candidate_id"):
                values = values + first
            elif column == "correlated_id":
                assert (values > 0).any()
                values = np.where(values > 0, values + first, 0)
            np.testing.assert_array_equal(np.asarray(new[column]), values)
            assert new[column].unit == old[column].unit
    assert [*moved.footprints] == [number + first for number in crowded.footprints]
    moved.write(tmp_path / "moved", tolerance=None)
    opened = kermes.open(tmp_path / "moved", coadd=crowded.coadd)
    np.testing.assert_array_equal(opened.model_image(), crowded.model_image())
    for kind in ("model", "redistributed", "neighbor_subtracted"):
        old, new, again = (each.stamp(kind, "r") for each in (crowded[2], moved[first + 2], opened[first + 2]))
        assert old.box == new.box == again.box
        np.testing.assert_array_equal(old.array, new.array)
        # The sum of all models is not stored, and is added up in another order than when they were fitted.
        np.testing.assert_allclose(again.array, old.array, atol=1e-6 * old.array.max())
    refitted = kermes.refit(crowded, 1)
    with pytest.raises(InputError, match="a result with notes cannot be renumbered"):
        refitted.renumbered(1)
    with pytest.raises(InputError, match="first must be >= 0, got -1"):
        crowded.renumbered(-1)


def test_a_box_of_the_model_is_the_cut_of_the_whole_to_the_bit(crowded, tmp_path):
    crowded.write(tmp_path / "out", tolerance=None)
    box = Box(40, 30, 50, 70)
    for positive in (False, True):
        whole = kermes.open(tmp_path / "out").model_image(positive)
        opened = kermes.open(tmp_path / "out")
        part = opened.model_image(positive, box=box)
        assert "_sums" not in opened.__dict__
        np.testing.assert_array_equal(part, whole[(slice(None), *box.within(crowded.coadd.box))])
        outside = opened.model_image(positive, box=Box(150, 150, 30, 30))
        np.testing.assert_array_equal(outside, whole[:, 150:, 150:])


def test_models_add_up_in_the_model_frame(crowded):
    drawn = crowded.model_image(convolved=False)
    total = np.zeros_like(drawn)
    for handle in crowded:
        for b, band in enumerate(crowded.bands):
            stamp = handle.model(band, convolved=False)
            total[(b, *stamp.box.within(crowded.coadd.box))] += stamp.array
    for candidate in crowded.candidates["candidate_id"].tolist():
        source = crowded.models[-candidate]
        box = source.box & Box.of_shape(crowded.shape)
        total[:, box.y, box.x] += source.model(len(crowded.bands))[(slice(None), *box.within(source.box))]
    # A stamp ends with the light as observed, to which its sharp light is cut; single precision.
    np.testing.assert_allclose(drawn, total, rtol=1e-4, atol=1e-4 * drawn.max())
    box = Box(40, 30, 50, 70)
    np.testing.assert_array_equal(
        crowded.model_image(box=box, convolved=False), drawn[(slice(None), *box.within(crowded.coadd.box))]
    )


def test_images_of_models_are_let_go(crowded, tmp_path):
    crowded.write(tmp_path / "out", tolerance=None)
    opened = kermes.open(tmp_path / "out")
    box = Box(40, 30, 50, 70)
    whole = opened.model_image()
    before = opened.model_image(box=box)
    assert "_sums" in opened.__dict__
    opened.forget()
    assert "_sums" not in opened.__dict__
    # Boxes are counted anew, so that however many are drawn, the whole image is not, if it is let go between them.
    for _ in range(40):
        np.testing.assert_array_equal(opened.model_image(box=box), before)
        opened.forget()
    np.testing.assert_array_equal(opened.model_image(), whole)


def test_few_objects_are_drawn_alone_and_many_with_the_whole(crowded, tmp_path):
    crowded.write(tmp_path / "out", tolerance=None)
    whole = kermes.open(tmp_path / "out", coadd=crowded.coadd)
    whole.model_image()
    opened = kermes.open(tmp_path / "out", coadd=crowded.coadd)
    for handle in [*opened, *opened]:
        for kind in ("redistributed", "neighbor_subtracted"):
            one, other = handle.stamp(kind, "r"), whole[handle.object_id].stamp(kind, "r")
            np.testing.assert_array_equal(one.array, other.array)
    assert "_sums" in opened.__dict__


# ---------------------------------------------------------------- stray light


def stray_pixels(result, b):
    """Slow twin: the positive pixels of each parent that no model claims, with their places, by `parent_id`."""
    coadd, total = result.coadd, result.model_image(positive=True)
    free = ~claimed(coadd.variance, coadd.valid, total)[b] & coadd.valid[b] & (coadd.images[b] > 0)
    whole = Box.of_shape(result.shape)
    return {number: np.argwhere(footprint.mask(whole) & free) for number, footprint in result.footprints.items()}


def stray_of(result, **options):
    """Stray fluxes (S, B)."""
    table = result.stray_fluxes(**options)
    return np.array([table[f"{band}_stray_flux"] for band in result.bands]).T


@pytest.mark.parametrize("rule", ["r-to-peak", "r-to-footprint", "nearest-footprint"])
def test_all_stray_light_of_a_parent_goes_to_its_objects(crowded, rule):
    found = stray_of(crowded, rule=rule, to_points="always")
    parents = np.asarray(crowded.objects["parent_id"])
    n_stray = 0
    for b in range(2):
        for number, places in stray_pixels(crowded, b).items():
            expected = crowded.coadd.images[b][tuple(places.T)].sum(dtype=float)
            np.testing.assert_allclose(found[parents == number, b].sum(), expected, rtol=1e-5, atol=1e-6)
            n_stray += len(places)
    assert n_stray > 20


def test_stray_light_goes_by_the_distance_from_the_peaks(crowded):
    found = stray_of(crowded, rule="r-to-peak", to_points="always", clip=0.0)
    objects, b = crowded.objects, 1
    expected = np.zeros(len(crowded))
    for number, places in stray_pixels(crowded, b).items():
        rows = np.flatnonzero(objects["parent_id"] == number)
        peaks = np.array([crowded.models[n].peak for n in objects["object_id"][rows].tolist()])
        share = 1 / (1 + np.square(places[:, None] - peaks).sum(axis=2))
        flux = crowded.coadd.images[b][tuple(places.T)]
        expected[rows] += (flux[:, None] * share / share.sum(axis=1, keepdims=True)).sum(axis=0)
    np.testing.assert_allclose(found[:, b], expected, rtol=1e-4, atol=1e-5)


def test_errors_of_stray_light_are_those_of_its_pixels(crowded):
    table, b = crowded.stray_fluxes("nearest-footprint", to_points="always"), 0
    noise2 = np.square(table["g_stray_flux_err"])
    for number, places in stray_pixels(crowded, b).items():
        # Each pixel belongs to one object.
        expected = crowded.coadd.variance[b][tuple(places.T)].sum(dtype=float)
        np.testing.assert_allclose(noise2[crowded.objects["parent_id"] == number].sum(), expected, rtol=1e-5)


def test_points_get_stray_light_only_where_they_are_alone(crowded):
    objects = crowded.objects
    point = np.asarray(objects["model"] == "point")
    with_galaxies = np.isin(objects["parent_id"], objects["parent_id"][~point])
    necessary, never = stray_of(crowded), stray_of(crowded, to_points="never")
    assert (necessary[point & with_galaxies] == 0).all()
    assert (never[point] == 0).all()
    assert necessary[~point].any()


def test_trimmed_stray_light_is_nobodys(crowded):
    assert not stray_of(crowded, rule="trim").any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "nearest"}, "rule must be one of trim, .*got 'nearest'"),
        ({"to_points": "sometimes"}, "to_points must be one of never, .*got 'sometimes'"),
        ({"clip": 1.0}, "clip must be from 0 to below 1, got 1.0"),
    ],
)
def test_unknown_rules_of_stray_light_are_refused(crowded, options, message):
    with pytest.raises(InputError, match=message):
        crowded.stray_fluxes(**options)


def test_stray_light_needs_the_images(crowded):
    with pytest.raises(InputError, match="stray_fluxes"):
        replace(crowded, coadd=None).stray_fluxes()
