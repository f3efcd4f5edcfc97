"""Files of models of the LSST pipelines: what is read is what was written, and what is drawn is what they draw."""

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

import kermes
from kermes import io
from kermes.catalog import Reason
from kermes.geometry import Box, Footprint
from kermes.io import scarlet, scarlet_results
from kermes.psf import model_psf
from kermes.scene import CubeComponent, FactorizedComponent, Source
from results import fitted_result, make_result

FILES = Path(__file__).parents[2] / "shared" / "data" / "lsst_models"
with_files = pytest.mark.skipif(not FILES.is_dir(), reason="needs files that the pipelines wrote")


def plain(value):
    """What two sets of models are compared by: every number and every bit of every array."""
    if dataclasses.is_dataclass(value):
        return {each.name: plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return value


def make_models(**changes):
    """A parent of two blends, one of them with a cube, a blend without parent, and an isolated source."""
    rng = np.random.default_rng(1)

    def pixels(*shape):
        return rng.uniform(0, 1, shape).astype(np.float32)

    def factorized(y, x, side=7):
        return scarlet.ScarletComponent(
            origin=(y, x), peak=(y + 3, x + 3), spectrum=pixels(3) * 10, morphology=pixels(side, side)
        )

    def source(number, *components, **metadata):
        return scarlet.ScarletSource(components=components, metadata={"id": number, "peak_id": number % 10, **metadata})

    cube = scarlet.ScarletComponent(origin=(1020, 2040), peak=(1022, 2043), cube=pixels(3, 6, 5))
    blends = {
        12: scarlet.ScarletBlend(
            origin=(1000, 2000),
            shape=(20, 30),
            sources={
                101: source(101, factorized(1003, 2004), factorized(1002, 2003, 9)),
                102: source(102, peak=[1011, 2022]),
            },
        ),
        13: scarlet.ScarletBlend(origin=(1015, 2035), shape=(15, 20), sources={103: source(103, cube, note="odd")}),
    }
    alone = scarlet.ScarletBlend(
        origin=(1100, 2000), shape=(12, 12), sources={104: source(104, factorized(1102, 2002))}
    )
    spans = np.ones((30, 60), dtype=bool)  # of a footprint the smallest box is kept
    spans[2:25, 3:50] = False
    settings = {
        "blends": {
            11: scarlet.ScarletParent(children=blends, metadata={"spans": spans, "origin": [1000, 2000]}),
            14: alone,
        },
        "isolated": {
            77: scarlet.ScarletIsolated(spans=np.eye(4, dtype=np.float32), origin=(1050, 2050), peak=(1052.0, 2052.0))
        },
        "metadata": {
            "model_psf": model_psf(0.8).astype(np.float32),
            "psf": np.stack([model_psf(sigma, 21) for sigma in (1.5, 1.7, 2.0)]).astype(np.float32),
            "bands": ["g", "r", "i"],
        },
    }
    return scarlet.ScarletModels(**(settings | changes))


# ---------------------------------------------------------------- files


def test_models_come_back_to_the_bit(tmp_path):
    models = make_models()
    scarlet.write_scarlet_models(models, tmp_path / "a.scarlet")
    assert plain(scarlet.read_scarlet_models(tmp_path / "a.scarlet")) == plain(models)


def test_the_same_models_are_the_same_bytes(tmp_path):
    for name in ("a.scarlet", "b.scarlet"):
        scarlet.write_scarlet_models(make_models(), tmp_path / name)
    assert (tmp_path / "a.scarlet").read_bytes() == (tmp_path / "b.scarlet").read_bytes()


def test_some_blends_are_read_without_the_others(tmp_path):
    scarlet.write_scarlet_models(make_models(), tmp_path / "a.scarlet")
    some = scarlet.read_scarlet_models(tmp_path / "a.scarlet", [14, 77])
    assert (list(some.blends), list(some.isolated)) == ([14], [77])
    with pytest.raises(kermes.InputError, match="numbers must be those of blends in the file, got 99"):
        scarlet.read_scarlet_models(tmp_path / "a.scarlet", [99])


def test_members_have_the_layout_of_the_pipelines(tmp_path):
    scarlet.write_scarlet_models(make_models(), tmp_path / "a.scarlet")
    with zipfile.ZipFile(tmp_path / "a.scarlet") as archive:
        assert archive.namelist() == ["11", "14", "77", "metadata", "version"]
        assert json.loads(archive.read("version")) == "1.0.1"
        parent, single, metadata = (json.loads(archive.read(name)) for name in ("11", "77", "metadata"))
    assert parent["blend_type"] == "hierarchical"
    assert parent["metadata"]["spans_dtype"] == "bool"
    component = parent["children"]["12"]["sources"]["101"]["components"][0]
    assert set(component) == {"origin", "shape", "peak", "spectrum", "morph", "component_type", "version"}
    assert single["source_type"] == "isolated"
    assert metadata["array_keys"] == ["model_psf", "psf"]


def as_v29(models):
    """What pipelines v29 wrote of the blends: one document, components in two lists, PSFs with the blends."""

    def component(each):
        place = {"origin": each.origin, "peak": each.peak, "shape": each.morphology.shape}
        return {**place, "spectrum": each.spectrum.tolist(), "morph": each.morphology.ravel().tolist()}

    def blend(each):
        psf = models.metadata["psf"]
        sources = {
            str(number): {"components": [], "factorized": list(map(component, source.components)), "peak_id": 5}
            for number, source in each.sources.items()
        }
        psfs = {"psf": psf.ravel().tolist(), "psf_shape": psf.shape, "psf_center": [1.5, 2.5], "bands": ["g", "r", "i"]}
        return {"origin": each.origin, "shape": each.shape, "sources": sources, **psfs}

    target = models.metadata["model_psf"]
    blends = {str(number): blend(each) for number, each in models.blends.items()}
    return {"psfShape": target.shape, "psf": target.ravel().tolist(), "blends": blends}


def old_models():
    models = make_models()
    return dataclasses.replace(models, blends={14: models.blends[14]}, isolated={})


def test_documents_of_v29_are_read(tmp_path):
    models = old_models()
    (tmp_path / "a.json").write_text(json.dumps(as_v29(models)))
    read = scarlet.read_scarlet_models(tmp_path / "a.json")
    assert read.version == "0.0.0"
    got, expected = (each.blends[14].sources[104].components[0] for each in (read, models))
    np.testing.assert_array_equal(got.morphology, expected.morphology)
    result = io.read_scarlet(tmp_path / "a.json")
    assert result.bands == ("g", "r", "i")
    expected = scarlet_results.result_of_scarlet(models)
    np.testing.assert_array_equal(result.model_image(), expected.model_image())
    io.write_scarlet(result, tmp_path / "b.scarlet")
    # The centre of the PSF is no number of ours; it is kept all the same.
    assert scarlet.read_scarlet_models(tmp_path / "b.scarlet").blends[14].metadata["psf_center"] == [1.5, 2.5]


def test_archives_without_metadata_are_read(tmp_path):
    content = as_v29(old_models())
    with zipfile.ZipFile(tmp_path / "a.scarlet", "w") as archive:
        archive.writestr("14", json.dumps(content["blends"]["14"]))
        archive.writestr("psf", json.dumps(content["psf"]))
        archive.writestr("psf_shape", json.dumps(content["psfShape"]))
    expected = scarlet_results.result_of_scarlet(old_models())
    np.testing.assert_array_equal(io.read_scarlet(tmp_path / "a.scarlet").model_image(), expected.model_image())


def test_cubes_are_read_with_either_shape(tmp_path):
    scarlet.write_scarlet_models(make_models(), tmp_path / "a.scarlet")
    with zipfile.ZipFile(tmp_path / "a.scarlet") as archive:
        content = {name: json.loads(archive.read(name)) for name in archive.namelist()}
    cube = content["11"]["children"]["13"]["sources"]["103"]["components"][0]
    assert cube["shape"] == [3, 6, 5]
    cube |= {"shape": [6, 5], "component_type": "component"}
    with zipfile.ZipFile(tmp_path / "b.scarlet", "w") as archive:
        for name, each in content.items():
            archive.writestr(name, json.dumps(each))
    assert plain(scarlet.read_scarlet_models(tmp_path / "b.scarlet")) == plain(make_models())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must be a file of scarlet models"),
        (b"{}", "KeyError"),
        (b"[1, 2]", "must be a file of scarlet models"),
        (b'{"metadata": null, "blends": {"x": 1}}', "ValueError"),
        (b'{"metadata": {}, "blends": {}, "version": "2.0.0"}', "versions up to 1.0.1 can be read"),
        (b"\xff\xfe", "must be a file of scarlet models"),
    ],
)
def test_what_is_no_file_of_models_is_an_error(tmp_path, content, message):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(kermes.FileError, match=message):
        scarlet.read_scarlet_models(tmp_path / "a.json")


def test_damaged_archives_are_errors(tmp_path):
    scarlet.write_scarlet_models(make_models(), tmp_path / "a.scarlet")
    content = (tmp_path / "a.scarlet").read_bytes()
    rng = np.random.default_rng(2)
    for _ in range(60):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= int(rng.integers(1, 256))
        cut = damaged[: rng.integers(len(content))] if rng.uniform() < 0.3 else damaged
        (tmp_path / "b.scarlet").write_bytes(bytes(cut))
        try:  # some bytes of an archive say nothing: dates, permissions
            models = scarlet.read_scarlet_models(tmp_path / "b.scarlet")
        except kermes.KermesError:
            continue
        assert plain(models) == plain(make_models())


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(kermes.FileError, match="cannot be read: No such file"):
        io.read_scarlet(tmp_path / "nowhere.scarlet")


def test_an_existing_file_is_kept(tmp_path):
    scarlet.write_scarlet_models(make_models(), tmp_path / "a.scarlet")
    with pytest.raises(kermes.FileError, match="output must be new"):
        scarlet.write_scarlet_models(make_models(), tmp_path / "a.scarlet")


# ---------------------------------------------------------------- models and results


def test_numbers_places_and_footprints_of_a_file_become_those_of_the_result():
    result = scarlet_results.result_of_scarlet(make_models())
    assert result.objects["object_id"].tolist() == [101, 102, 103, 104, 77]
    assert result.objects["parent_id"].tolist() == [11, 11, 11, 14, 77]
    assert result.objects["blend_id"].tolist() == [12, 12, 13, 14, 0]
    assert result.objects["reason"].tolist() == ["", "", "", "", Reason.ISOLATED]
    assert result[101].peak == (1006, 2007)
    assert result.config.model_psf_sigma == 0.8
    assert result.footprints[11].area == 30 * 60 - 23 * 47
    assert result.footprints[77].shift(*result.origin).box == Box(1050, 2050, 4, 4)


def test_a_cube_is_drawn_as_its_bands_are():
    models = make_models()
    result = scarlet_results.result_of_scarlet(models)
    image, box = result[103]._observed
    kernels = result.kernels(result.psfs[13])
    cube = models.blends[11].children[13].sources[103].components[0].cube
    from kermes.rendering import convolve

    reach = max(kernels.stamps.shape[1:]) // 2
    padded = np.pad(cube, ((0, 0), (reach, reach), (reach, reach)))
    start = np.array(result[103].source.box.origin) - reach
    expected = convolve(padded, kernels.stamps)
    shift = np.array(box.origin) - start
    window = (slice(None), slice(shift[0], shift[0] + box.height), slice(shift[1], shift[1] + box.width))
    # Single precision, and what is below a millionth of the peak is not drawn.
    np.testing.assert_allclose(image, expected[window], rtol=0, atol=2e-6 * expected.max())


def test_a_file_comes_back_from_a_stored_result_to_the_bit(tmp_path):
    models = make_models()
    scarlet_results.result_of_scarlet(models).write(tmp_path / "out")
    back = scarlet_results.scarlet_of_result(kermes.open(tmp_path / "out"))
    assert plain(back.models) == plain(models)
    assert (back.n_profiles, back.largest_error) == (0, 0.0)


def test_profiles_become_pixels_and_the_loss_is_stated(tmp_path):
    result = fitted_result()
    conversion = io.write_scarlet(result, tmp_path / "a.scarlet")
    assert conversion.n_profiles == 3
    # The fluxes are kept but for the light that falls outside of the image; of a point source in a PSF of 1.5 pixels
    # the model frame leaves a few thousandths of the peak.
    assert 0 < conversion.largest_error < 0.01
    assert conversion.largest_flux_error < 1e-5
    back = io.read_scarlet(tmp_path / "a.scarlet")
    assert back.objects["object_id"].tolist() == [4, 7, 8, 9]
    for name in ("origin", "shape", "unit", "zero_point", "bands"):
        assert getattr(back, name) == getattr(result, name), name
    assert back.noise_factors.tolist() == result.noise_factors.tolist()
    assert back.wcs.pixel_to_world(3, 5).separation(result.wcs.pixel_to_world(3, 5)).arcsec < 1e-6
    for handle in result:
        got = back[handle.object_id]
        assert got.peak == handle.peak
        expected, drawn = handle.model("r"), got.model("r")
        common = expected.box & drawn.box
        difference = drawn.array[common.within(drawn.box)] - expected.array[common.within(expected.box)]
        assert np.abs(difference).max(initial=0) <= 1.01 * conversion.largest_error * max(
            handle.model(band).array.max(initial=0) for band in result.bands
        )


def test_blends_with_psfs_of_their_own_keep_them(tmp_path):
    result = make_result()
    psfs = {1: result.psfs[1], 2: result.psfs[1][:, 2:-2, 2:-2]}
    io.write_scarlet(make_result(psfs=psfs), tmp_path / "a.scarlet")
    back = io.read_scarlet(tmp_path / "a.scarlet")
    for blend_id, psf in psfs.items():
        np.testing.assert_array_equal(back.psfs[blend_id], psf.astype(np.float32))


def test_templates_have_no_place_in_the_model_frame():
    template = CubeComponent(cube=np.ones((2, 3, 3), dtype=np.float32), box=Box(30, 30, 3, 3), observed=True)
    models = make_result().models | {7: Source(peak=(31, 31), components=(template,))}
    with pytest.raises(kermes.InputError, match="templates are light as observed"):
        scarlet_results.scarlet_of_result(make_result(models=models))


def test_a_psf_that_is_no_gaussian_is_refused():
    metadata = make_models().metadata | {"model_psf": np.full((15, 15), 1 / 225, dtype=np.float32)}
    with pytest.raises(kermes.FileError, match="must have a Gaussian as its model_psf"):
        scarlet_results.result_of_scarlet(make_models(metadata=metadata))


def test_numbers_may_not_be_used_twice():
    models = make_models()
    twice = {**models.blends, 15: models.blends[14]}
    with pytest.raises(kermes.FileError, match="two sources have the number 104"):
        scarlet_results.result_of_scarlet(dataclasses.replace(models, blends=twice))


def test_a_file_without_psfs_can_be_drawn_in_the_model_frame():
    result = scarlet_results.result_of_scarlet(
        make_models(metadata={"model_psf": model_psf(0.8), "bands": ["g", "r", "i"]})
    )
    assert result[101].model("g", convolved=False).array.any()
    assert not result[101].model("g").array.any()


def test_a_footprint_lists_the_pixels_of_a_model():
    result = make_result()
    coadd = result.coadd
    heavy = result[7].footprint("redistributed", ["r"])
    y, x = heavy.footprint.pixels().T
    stamp = result[7].redistributed("r")
    np.testing.assert_array_equal(heavy.values[0], stamp.array[y - stamp.box.y0, x - stamp.box.x0])
    models = {band: result[7].model(band) for band in result.bands}
    significant = np.zeros(stamp.box.shape, dtype=bool)
    for b, band in enumerate(result.bands):
        window = (b, *stamp.box.within(coadd.box))
        significant |= coadd.valid[window] & (models[band].array > 0.05 * np.sqrt(coadd.variance[window]))
    np.testing.assert_array_equal(heavy.footprint.mask(stamp.box), significant)


def test_a_footprint_without_images_is_where_the_model_is():
    result = make_result(with_coadd=False)
    heavy = result[7].footprint()
    stamp = result[7].model("g")
    both = (stamp.array != 0) | (result[7].model("r").array != 0)
    assert heavy.footprint.area == both.sum()
    assert heavy.values.shape == (2, heavy.footprint.area)
    assert result[9].footprint().footprint.area == 0


# ---------------------------------------------------------------- files that the pipelines wrote


@pytest.fixture(scope="module")
def upstream():
    return scarlet.read_scarlet_models(FILES / "upstream_1.0.1.scarlet")


@with_files
def test_models_of_the_pipelines_are_drawn_as_they_draw_them(upstream):
    result = scarlet_results.result_of_scarlet(upstream)
    with np.load(FILES / "upstream_1.0.1_rendered.npz") as expected:
        origin, ids, flux = expected["origin"], expected["ids"], expected["flux"]
        model, convolved = expected["model"], expected["convolved"]
    box = Box.of_shape(model.shape, *origin).shift(-result.origin[0], -result.origin[1])
    total = np.zeros((5, *result.shape), dtype=np.float32)
    for number, own in zip(ids.tolist(), flux, strict=True):
        source = result.models[number]
        total[:, source.box.y, source.box.x] += source.model(5)
        np.testing.assert_allclose(source.flux(5), own, rtol=1e-5)
    window = (slice(None), box.y, box.x)
    for got, wanted in ((total[window], model), (result.model_image()[window], convolved)):
        for b in range(5):
            assert np.abs(got[b] - wanted[b]).max() < 1e-5 * wanted[b].max()  # the bar is 1e-4


@with_files
def test_models_of_the_pipelines_are_written_to_the_bit(upstream, tmp_path):
    scarlet.write_scarlet_models(upstream, tmp_path / "again.scarlet")
    assert plain(scarlet.read_scarlet_models(tmp_path / "again.scarlet")) == plain(upstream)
    assert (tmp_path / "again.scarlet").stat().st_size < (FILES / "upstream_1.0.1.scarlet").stat().st_size / 3


@with_files
def test_models_of_the_pipelines_come_back_from_a_stored_result(upstream, tmp_path):
    scarlet_results.result_of_scarlet(upstream).write(tmp_path / "out")
    back = scarlet_results.scarlet_of_result(kermes.open(tmp_path / "out")).models
    # The PSF of the model frame is drawn anew from its width; its stamp was in single precision.
    np.testing.assert_allclose(back.metadata["model_psf"], upstream.metadata["model_psf"], rtol=0, atol=1e-7)
    metadata = {**back.metadata, "model_psf": upstream.metadata["model_psf"]}
    assert plain(dataclasses.replace(back, metadata=metadata)) == plain(upstream)


@with_files
def test_models_of_v29_are_read():
    models = scarlet.read_scarlet_models(FILES / "v29_models.json")
    assert [len(blend.sources) for blend in models.blends.values()] == [1, 1]
    result = scarlet_results.result_of_scarlet(models)
    assert result.model_image().max() > 0
    assert isinstance(next(iter(result.models.values())).components[0], FactorizedComponent)
    assert Footprint.of_mask(result.model_image()[0] > 0).area > 100
