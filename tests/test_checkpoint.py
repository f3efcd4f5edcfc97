"""A run that was stopped goes on where it was, to the same bits; what it has left says that it is not complete."""

import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

import kermes
from kermes import checkpoint, tile
from kermes.config import PartitionConfig
from kermes.errors import FileError
from kermes.planning import plan_tile
from kermes.simulation import simulate_scene
from tiles import MODELS, changed, configuration, fit_the_first_last, group_scene, same_pixels, values


@pytest.fixture(scope="module", params=MODELS)
def config(request):
    """Settings of each model in turn; parents are divided, so that blends have neighbours."""
    return replace(configuration(request.param), partition=PartitionConfig(largest_side=32))


def deblend(config, **options):
    """Deblend a scene of a dozen sources."""
    return kermes.deblend(group_scene().coadd, group_scene().peaks, config=config, **options)


@pytest.fixture(scope="module")
def whole(config):
    """Deblend without a stop."""
    return deblend(config)


def first(n_blends):
    """Make something to look on that stops the run after some blends."""
    return lambda _, outcomes: islice(outcomes, n_blends)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(config, whole, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(checkpoint, "MOST_BLENDS", 2)
    folder = tmp_path / "kept"
    for n_blends in (1, 3):
        part = deblend(config, checkpoint=folder, watch=first(n_blends), workers=workers)
        assert not part.is_complete
    fitted = []

    def count(plan, outcomes):
        for outcome in outcomes:
            fitted.append(np.isfinite(outcome.seconds))
            yield outcome

    result = deblend(config, checkpoint=folder, watch=count, workers=workers)
    assert sum(fitted) <= len(whole.blends) - 3
    assert same_pixels(result, whole)
    assert not folder.exists()


def test_what_is_done_while_a_slow_blend_is_in_work_is_kept(tmp_path, monkeypatch):
    scene, folder = simulate_scene(n_sources=30, shape=(300, 300), bands=("g", "r"), seed=3), tmp_path / "kept"
    plan = plan_tile(scene.coadd, scene.peaks)
    with monkeypatch.context() as patch:
        patch.setattr(tile, "fit_blend", fit_the_first_last())
        part = kermes.deblend(scene.coadd, scene.peaks, checkpoint=folder, watch=first(1), workers=2)
    assert np.count_nonzero(part.objects["reason"] == "interrupted") == len(part) - len(plan.tasks[0].members)

    def fail(plan, task, earlier):
        raise AssertionError("a blend that was finished is fitted again")

    monkeypatch.setattr(tile, "fit_blend", fail)
    result = kermes.deblend(scene.coadd, scene.peaks, checkpoint=folder)
    monkeypatch.undo()
    assert same_pixels(result, kermes.deblend(scene.coadd, scene.peaks))


def test_a_run_that_dies_leaves_what_is_finished(config, whole, tmp_path):
    folder = tmp_path / "kept"

    def die(_, outcomes):
        yield from islice(outcomes, 2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deblend(config, checkpoint=folder, watch=die)
    assert len(list(folder.glob("blends-*"))) == 1
    assert same_pixels(deblend(config, checkpoint=folder), whole)


def test_a_partial_result_has_all_rows_and_says_what_is_missing(config, whole, tmp_path):
    part = deblend(config, watch=first(2))
    assert len(part) == len(whole)
    missing = part.objects["reason"] == "interrupted"
    assert 0 < missing.sum() < len(part)
    assert np.isnan(values(part)[missing]).all()
    np.testing.assert_array_equal(values(part)[~missing], values(whole)[~missing])
    part.write(tmp_path / "out")
    again = kermes.open(tmp_path / "out")
    assert not again.is_complete
    assert again.ledger() == part.ledger()
    assert part.ledger()["reasons"]["interrupted"] == missing.sum()


def test_a_partial_result_may_be_replaced(config, tmp_path):
    deblend(config, watch=first(1)).write(tmp_path / "out")
    deblend(config).write(tmp_path / "out")
    assert kermes.open(tmp_path / "out").is_complete
    with pytest.raises(FileError, match="overwrite replaces it"):
        deblend(config).write(tmp_path / "out")


def test_a_run_that_ends_leaves_nothing(config, tmp_path):
    deblend(config, checkpoint=tmp_path / "kept")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_run_is_refused(config, tmp_path):
    folder = tmp_path / "kept"
    deblend(config, checkpoint=folder, watch=first(1))
    coadd = group_scene().coadd
    images = coadd.images.copy()
    images[0, 0, 0] += 1
    with pytest.raises(FileError, match="of another run"):
        kermes.deblend(changed(coadd, images=images), group_scene().peaks, config=config, checkpoint=folder)
    with pytest.raises(FileError, match="of another run"):
        deblend(replace(config, model_psf_sigma=0.7), checkpoint=folder)


def test_a_directory_of_something_else_is_refused(config, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(["nothing"]))
    with pytest.raises(FileError, match="which is none"):
        deblend(config, checkpoint=tmp_path)


def test_candidates_survive_a_stop(tmp_path):
    # Half of the peaks are not listed, so that they are found in the residuals.
    coadd, peaks = group_scene().coadd, group_scene().peaks[::2]
    whole = kermes.deblend(coadd, peaks)
    assert len(whole.candidates) > 0
    folder = tmp_path / "kept"
    n_blends = len(whole.blends) - 1
    kermes.deblend(coadd, peaks, checkpoint=folder, watch=first(n_blends))
    assert same_pixels(kermes.deblend(coadd, peaks, checkpoint=folder), whole)
