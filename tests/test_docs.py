"""What the documentation shows works as shown."""

import doctest
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

import kermes
from kermes.catalog import BLEND_COLUMNS, PARENT_COLUMNS, candidate_columns, measurement_columns, object_columns
from kermes.cli import run
from kermes.component_rows import FIELDS
from results import fitted_result, make_result

ROOT = Path(__file__).parents[1]
MODULES = {
    f"kermes.{path.stem}"
    for path in (ROOT / "src" / "kermes").iterdir()
    if not path.name.startswith("_") and (path.suffix == ".py" or (path / "__init__.py").is_file())
}

PAGES = [page for page in sorted((ROOT / "docs").glob("*.rst")) if ">>> " in page.read_text()]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder, without a display."""
    monkeypatch.chdir(tmp_path)
    matplotlib.use("agg")
    yield tmp_path
    plt.close("all")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_give_what_they_show(page, elsewhere):
    outcome = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0


def test_python_example_of_the_readme_runs(elsewhere):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    exec(compile(code, "README.md", "exec"), {})
    assert (elsewhere / "out").exists()


def test_command_line_example_of_the_readme_runs(elsewhere):
    text = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"^```sh\n(kermes simulate .*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    assert [run(shlex.split(line)[1:]) for line in example.splitlines()] == [0] * 7


def test_links_of_the_readme_lead_to_files():
    links = re.findall(r"\]\(([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_reference_lists_every_public_name_and_module():
    names = re.findall(r"^   (kermes\.\w+)$", (ROOT / "docs" / "reference.rst").read_text(), flags=re.MULTILINE)
    modules = re.findall(r"automodule:: (kermes\.\w+)", (ROOT / "docs" / "modules.rst").read_text())
    assert set(names) == {f"kermes.{name}" for name in kermes.__all__ if not name.startswith("_")}
    assert set(modules) == MODULES - {"kermes.kernels", "kermes.cli"}


def test_page_of_files_lists_every_column():
    words = set(re.findall(r"``(\S+?)``", (ROOT / "docs" / "files.rst").read_text()))
    columns = [*object_columns(("{band}",)), *PARENT_COLUMNS, *BLEND_COLUMNS, *candidate_columns(("{band}",))]
    assert {column.name for column in columns} - words == set()


def test_page_of_files_lists_what_a_result_consists_of(elsewhere):
    text = (ROOT / "docs" / "files.rst").read_text()
    make_result().write(elsewhere / "out")
    assert [path.name for path in (elsewhere / "out").iterdir() if f"``{path.name}``" not in text] == []
    assert [name for name, _ in FIELDS if f"``{name}``" not in text] == []


def test_an_object_is_read_without_kermes(elsewhere):
    result = fitted_result()
    result.write(elsewhere / "out", tolerance=None)
    program = ROOT / "docs" / "read_without_kermes.py"
    assert len(program.read_text().splitlines()) <= 45
    # In a process of its own that cannot import kermes.
    code = (
        "import json, runpy, sys; sys.modules['kermes'] = None; "
        f"read = runpy.run_path({str(program)!r})['read_object']; row, components, bands, psfs = read('out', 4); "
        "print(json.dumps([row['object_id'], bands, [each['kind'] for each in components], "
        "components[-1]['pixels'].tolist(), [psfs[band].tolist() for band in bands]]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=elsewhere)
    object_id, bands, kinds, pixels, psfs = json.loads(found.stdout)
    assert (object_id, bands, kinds) == (4, ["g", "r"], ["profile", "profile", "factorized"])
    np.testing.assert_allclose(pixels, result.models[4].components[-1].evaluate(), rtol=1e-6)
    np.testing.assert_array_equal(psfs, result.psfs[1])
    assert subprocess.run([sys.executable, str(program), "out", "4"], cwd=elsewhere, check=False).returncode == 0


def test_page_of_templates_lists_the_columns_that_others_do_not_have():
    words = set(re.findall(r"``(\S+?)``", (ROOT / "docs" / "templates.rst").read_text()))
    more = {column.name for column in object_columns(("{band}",), "templates")}
    assert more - {column.name for column in object_columns(("{band}",))} - words == set()


def test_page_of_measurement_lists_every_column():
    words = set(re.findall(r"``(\S+?)``", (ROOT / "docs" / "measurement.rst").read_text()))
    names = {column.name.replace("aperture_3", "aperture_{radius}") for column in measurement_columns(["{band}"], [3])}
    assert names - words == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_examples_in_docstrings_give_what_they_show(name, elsewhere):
    outcome = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0
