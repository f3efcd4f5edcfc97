"""One blend is fitted anew, and nothing else changes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import kermes
from kermes.config import Config, ProfileConfig
from kermes.errors import InputError
from kermes.simulation import simulate_scene

ORIGIN = np.array([50, -30])


@pytest.fixture(scope="module")
def coadd():
    """A field, in coordinates that do not begin at zero."""
    found = simulate_scene(n_sources=12, shape=(140, 150), bands=("g", "r", "i"), seed=4)
    return replace(found.coadd, origin=tuple(ORIGIN.tolist()), peaks=found.peaks + ORIGIN)


@pytest.fixture(scope="module")
def result(coadd):
    return kermes.deblend(coadd)


def a_blend(result, n_sources=2):
    """A blend with several sources, and its objects."""
    sizes = np.asarray(result.blends["n_sources"])
    blend_id = int(result.blends["blend_id"][np.flatnonzero(sizes >= n_sources)[0]])
    return blend_id, result.objects["object_id"][result.objects["blend_id"] == blend_id].tolist()


def assert_closes(result):
    """In every pixel that somebody claims, the shares add up to the image."""
    coadd = result.coadd
    total = np.zeros(coadd.images.shape)
    for handle in result:
        for b, band in enumerate(result.bands):
            stamp = handle.redistributed(band)
            total[(b, *stamp.box.within(coadd.box))] += stamp.array
    claimed = coadd.valid & (result.model_image(positive=True) > 0.1 * np.sqrt(coadd.variance))
    assert len(result.candidates) == 0  # which have a share and no stamp
    # Single precision, of pixels of up to thousands of sigma.
    np.testing.assert_allclose(total[claimed], coadd.images[claimed], rtol=1e-4, atol=1e-3)
    for band in result.bands:
        shared = sum(float(result[number].redistributed(band).array.sum()) for number in result.objects["object_id"])
        np.testing.assert_allclose(result.objects[f"{band}_redistributed_flux"].sum(), shared, rtol=1e-5)


def test_the_same_peaks_give_nearly_the_same_answer(result):
    blend_id, members = a_blend(result)
    again = kermes.refit(result, blend_id)
    assert again.objects["object_id"].tolist() != []
    assert sorted(again.objects["object_id"].tolist()) == sorted(result.objects["object_id"].tolist())
    for number in members:
        for band in result.bands:
            before, after = (each[number].row[f"{band}_flux"] for each in (result, again))
            assert abs(after - before) < 0.5 * result[number].row[f"{band}_flux_err"]


def test_other_blends_stay_what_they_were(result):
    blend_id, members = a_blend(result)
    again = kermes.refit(result, blend_id, remove=members[:1])
    for handle in result:
        if handle.blend_id == blend_id:
            continue
        other = again[handle.object_id]
        np.testing.assert_array_equal(other.model("r").array, handle.model("r").array)
        for name in ("r_flux", "r_flux_err", "y", "x", "peak_index", "parent_id", "blend_id"):
            assert other.row[name] == handle.row[name], name


def test_a_source_that_was_missed_is_added(coadd, result):
    _, members = a_blend(result)
    without = kermes.deblend(coadd, peaks=np.delete(coadd.peaks, members[-1] - 1, axis=0))
    peak = result[members[-1]].peak
    (near,) = {handle.blend_id for handle in without.near(y=peak[0], x=peak[1], radius=40)[:1]}
    again = kermes.refit(without, near, add=[peak])
    new = set(again.objects["object_id"].tolist()) - set(without.objects["object_id"].tolist())
    (number,) = new
    assert again[number].peak == peak
    assert again[number].row["peak_index"] == -1
    expected, got = result[members[-1]].row, again[number].row
    assert abs(got["r_flux"] - expected["r_flux"]) < expected["r_flux_err"]
    assert again.notes["history"] == [
        {"blend_id": near, "added": {str(number): list(peak)}, "removed": [], "moved": {}}
    ]
    assert len(again.objects) == len(without.objects) + 1 == again.n_peaks


def test_sources_that_the_fit_adds_are_noted_as_well(coadd):
    _, members = a_blend(kermes.deblend(coadd))
    result = kermes.deblend(coadd, peaks=np.delete(coadd.peaks, members[-1] - 1, axis=0))
    settings = replace(result.config, add_sources=True)
    near = result.near(y=coadd.peaks[members[-1] - 1][0], x=coadd.peaks[members[-1] - 1][1], radius=40)[0]
    again = kermes.refit(result, near.blend_id, config=settings)
    new = sorted(set(again.objects["object_id"].tolist()) - set(result.objects["object_id"].tolist()))
    assert len(new) >= 1
    assert again.notes["history"][0]["added"] == {str(number): list(again[number].peak) for number in new}


def test_sources_are_removed_and_moved(result):
    blend_id, members = a_blend(result)
    y, x = result[members[1]].peak
    again = kermes.refit(result, blend_id, remove=members[:1], move={members[1]: (y + 1, x)})
    assert members[0] not in again
    assert again[members[1]].peak == (y + 1, x)
    (blend,) = again.blends[again.blends["blend_id"] == blend_id]
    assert blend["n_sources"] == len(members) - 1
    assert again.parents["n_peaks"].sum() == result.parents["n_peaks"].sum() - 1


def test_only_the_edge_of_the_image_counts_as_one(result):
    for blend_id in result.blends["blend_id"].tolist():
        again = kermes.refit(result, blend_id)
        for number in again.objects["object_id"].tolist():
            box = again[number].box
            at_edge = (
                box.y0 == ORIGIN[0] or box.x0 == ORIGIN[1] or box.y1 == ORIGIN[0] + 140 or box.x1 == ORIGIN[1] + 150
            )
            assert at_edge or not again[number].row["flag_edge"]


def test_the_sum_of_all_models_is_that_of_each(result):
    blend_id, members = a_blend(result)
    again = kermes.refit(result, blend_id, remove=members[:1])
    anew = replace(again, total=None).model_image(positive=True)
    # Single precision of pixels of up to thousands of sigma.
    np.testing.assert_allclose(again.model_image(positive=True), anew, rtol=1e-4, atol=1e-2)


def test_shares_close_after_every_change(coadd):
    settings = Config(profiles=ProfileConfig(residual_rounds=0))
    result = kermes.deblend(coadd, config=settings)
    blend_id, members = a_blend(result)
    y, x = result[members[0]].peak
    edited = kermes.refit(result, blend_id, add=[(y + 6, x - 5)], config=settings)
    assert_closes(edited)
    assert_closes(kermes.refit(edited, blend_id, remove=members[:1], config=settings))


def test_a_blend_gets_another_model(result):
    blend_id, members = a_blend(result)
    settings = replace(Config(model="scarlet-lite"), model_psf_sigma=0.9)
    again = kermes.refit(result, blend_id, config=settings)
    assert {str(again[number].row["model"]) for number in members} == {"free-form"}
    assert "scarlet-lite" in again.notes["history"][0]["config"]
    # All models are in one frame.
    assert again.config == result.config


def test_a_refitted_result_is_written_and_read(result, tmp_path):
    blend_id, members = a_blend(result)
    again = kermes.refit(result, blend_id, remove=members[:1])
    again.write(tmp_path / "out", tolerance=None)
    opened = kermes.open(tmp_path / "out", coadd=result.coadd)
    assert opened.notes == again.notes
    np.testing.assert_array_equal(opened.objects["r_flux"], again.objects["r_flux"])
    # And one that was opened is fitted anew like one in memory.
    result.write(tmp_path / "first", tolerance=None)
    later = kermes.refit(kermes.open(tmp_path / "first", coadd=result.coadd), blend_id, remove=members[:1])
    np.testing.assert_allclose(later.objects["r_flux"], again.objects["r_flux"], rtol=1e-5)


def test_bad_requests_are_named(result):
    blend_id, members = a_blend(result)
    outsider = next(handle.object_id for handle in result if handle.blend_id != blend_id)
    with pytest.raises(kermes.InputError, match="blend_id must be that of a blend with objects, got 999"):
        kermes.refit(result, 999)
    with pytest.raises(kermes.InputError, match=f"remove must name objects of blend {blend_id}, got {outsider}"):
        kermes.refit(result, blend_id, remove=[outsider])
    with pytest.raises(kermes.InputError, match="remove must leave an object"):
        kermes.refit(result, blend_id, remove=members)
    with pytest.raises(kermes.InputError, match="peaks"):
        kermes.refit(result, blend_id, add=[(-1000, 0)])
    with pytest.raises(kermes.InputError, match="config must have a model like that of the result"):
        kermes.refit(result, blend_id, config=Config(model="templates"))
    with pytest.raises(kermes.InputError, match="refit needs the images"):
        kermes.refit(replace(result, coadd=None), blend_id)


def test_an_opened_result_is_refitted_like_the_one_in_memory(result, tmp_path):
    blend_id = int(result.blends["blend_id"][np.argmax(result.blends["n_sources"])])
    result.write(tmp_path / "out", tolerance=None)
    opened = kermes.open(tmp_path / "out", coadd=result.coadd)
    one, other = kermes.refit(result, blend_id), kermes.refit(opened, blend_id)
    assert "_sums" not in opened.__dict__  # not all models were drawn
    for name in one.objects.colnames:
        values = np.asarray(one.objects[name])
        if values.dtype.kind == "f":
            # The sum of all models is added up in another order.
            np.testing.assert_allclose(np.asarray(other.objects[name]), values, rtol=2e-4, atol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(np.asarray(other.objects[name]), values, err_msg=name)


def test_a_part_of_a_result_is_not_refitted(result):
    blend_id = int(result.blends["blend_id"][0])
    with pytest.raises(InputError, match="refit needs the models of all objects, and this result holds some of them"):
        kermes.refit(result.select(blend_ids=blend_id), blend_id)


def test_a_result_of_an_earlier_version_is_fitted_anew():
    # It lacks columns that came later: of objects that stay nothing is known there.
    old = kermes.open(Path(__file__).parent / "data" / "result_schema_2")
    images = old.model_image() + np.random.default_rng(0).normal(size=(2, *old.shape))
    psfs = next(iter(old.psfs.values()))
    coadd = kermes.Coadd(images=images, variance=1.0, psfs=psfs, bands=old.bands, origin=old.origin)
    refitted = kermes.refit(old.with_coadd(coadd), 1).objects
    assert set(old.objects.colnames) < set(refitted.colnames)
    stay, anew = refitted["blend_id"] != 1, refitted["blend_id"] == 1
    assert stay.any()
    assert anew.any()
    assert np.isnan(refitted["condition"][stay]).all()
    assert np.isfinite(refitted["condition"][anew]).all()
    assert set(refitted["correlated_id"]) <= {0, *refitted["object_id"]}
    assert (refitted["preferred_flux"][anew] != "").all()
