"""Edits are kept in a file, and do the same to the result again."""

import json

import numpy as np
import pytest

import kermes
from kermes import cli
from kermes.edits import Edit, apply_edits, read_edits, write_edits
from kermes.errors import FileError, InputError
from kermes.io import write_npz
from kermes.simulation import simulate_scene


@pytest.fixture(scope="module")
def result():
    scene = simulate_scene(n_sources=12, shape=(140, 150), bands=("g", "r", "i"), seed=4)
    return kermes.deblend(scene.coadd, peaks=scene.peaks)


@pytest.fixture(scope="module")
def edits(result):
    first, second = result[1], result[5]
    y, x = first.peak
    return [
        Edit(blend_id=first.blend_id, add=((y + 6.0, x - 6.0),)),
        Edit(
            blend_id=second.blend_id,
            move={5: (second.peak[0] + 1.0, second.peak[1])},
            settings=("profiles.residual_rounds=0",),
        ),
        Edit(blend_id=first.blend_id, remove=(len(result) + 1,)),
    ]


def test_edits_come_back_from_their_file(result, edits, tmp_path):
    path = tmp_path / "edits.json"
    write_edits(path, edits, result)
    assert read_edits(path, result) == edits
    write_edits(path, edits[:1], result)
    assert read_edits(path, result) == edits[:1]
    assert [each.name for each in tmp_path.iterdir()] == ["edits.json"]


def test_the_same_edits_give_the_same_result(result, edits, tmp_path):
    write_edits(tmp_path / "edits.json", edits, result)
    one, other = (apply_edits(result, each) for each in (edits, read_edits(tmp_path / "edits.json", result)))
    assert len(one) == len(result)  # one peak came, and went
    for name in one.objects.colnames:
        np.testing.assert_array_equal(np.asarray(one.objects[name]), np.asarray(other.objects[name]))
    assert [entry["blend_id"] for entry in one.notes["history"]] == [edit.blend_id for edit in edits]


def test_an_edit_is_a_refit(result, edits):
    y, x = edits[0].add[0]
    by_hand = kermes.refit(result, edits[0].blend_id, add=[[y, x]])
    np.testing.assert_array_equal(edits[0].apply(result).objects["r_flux"], by_hand.objects["r_flux"])


def test_edits_of_another_result_are_refused(result, edits, tmp_path):
    write_edits(tmp_path / "edits.json", edits, result)
    with pytest.raises(InputError, match=r"edits must be those of this result.*edits\.json was made on another"):
        read_edits(tmp_path / "edits.json", edits[0].apply(result))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ("[]", "must be a file of the format 'kermes edits', version 1"),
        (json.dumps({"format": "kermes edits", "version": 2}), "version 1"),
    ],
)
def test_files_that_hold_something_else_are_refused(result, tmp_path, content, message):
    path = tmp_path / "edits.json"
    path.write_text(content)
    with pytest.raises(FileError, match=message):
        read_edits(path, result)


def test_a_damaged_entry_is_refused(result, edits, tmp_path):
    path = tmp_path / "edits.json"
    write_edits(path, edits, result)
    content = json.loads(path.read_text())
    del content["edits"][1]["blend_id"]
    path.write_text(json.dumps(content))
    with pytest.raises(FileError, match="is damaged: an edit must have blend_id"):
        read_edits(path, result)


def test_a_missing_file_is_named(result, tmp_path):
    with pytest.raises(FileError, match=r"edits must be a readable file, got .*none\.json"):
        read_edits(tmp_path / "none.json", result)


@pytest.mark.parametrize(
    "content",
    [
        None,
        {"add": []},
        {"blend_id": 1.5},
        {"blend_id": True},
        {"blend_id": 1, "colour": 3},
        {"blend_id": 1, "add": [[1]]},
        {"blend_id": 1, "add": [[1, float("nan")]]},
        {"blend_id": 1, "move": [1, 2]},
        {"blend_id": 1, "remove": ["x"]},
        {"blend_id": 1, "settings": [3]},
    ],
)
def test_what_is_no_edit_is_refused(content):
    with pytest.raises(InputError, match="an edit must have"):
        Edit.of_json(content)


def test_the_command_line_applies_them(result, edits, tmp_path, capsys):
    write_npz(tmp_path / "scene.npz", result.coadd)
    result.write(tmp_path / "out")
    stored = kermes.open(tmp_path / "out", coadd=result.coadd)
    write_edits(tmp_path / "out_edits.json", edits[:1], stored)
    words = [str(tmp_path / "out"), str(tmp_path / "scene.npz"), "-o", str(tmp_path / "new")]
    assert cli.run(["refit", *words, "--edits", str(tmp_path / "out_edits.json")]) == 0
    assert "1 edit; 13 objects" in capsys.readouterr().err
    assert len(kermes.open(tmp_path / "new")) == len(result) + 1
    assert cli.run(["refit", *words, "--edits", str(tmp_path / "out_edits.json"), "--blend", "1"]) == 2
    assert cli.run(["refit", *words]) == 2
    assert "--blend and what to do to it, or --edits alone" in capsys.readouterr().err
