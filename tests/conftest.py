"""What every test may use."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import settings

# The first call compiles, so no deadline; the same examples every time, so that a red run can be repeated.
settings.register_profile("kermes", deadline=None, derandomize=True)
settings.load_profile("kermes")

ROOT = Path(__file__).parents[1]


# What these tests need is large, and not there on every machine.
NEEDED = {
    "pipelines": (("lsst", "starlink"), "the packages of the extra test-lsst (Python >= 3.12)"),
    "browser": (("playwright",), "the packages of the extra test-view"),
}
LEFT_OUT = [name for name, (modules, _) in NEEDED.items() if not all(map(importlib.util.find_spec, modules))]
collect_ignore = LEFT_OUT


def pytest_addoption(parser):
    """Say how pictures are stored anew."""
    parser.addoption("--new-pictures", action="store_true", help="draw the stored pictures anew, to be looked at")


def pytest_terminal_summary(terminalreporter):
    """Say what was left out."""
    for name in LEFT_OUT:
        terminalreporter.write_line(f"left out: tests/{name}, because {NEEDED[name][1]} are not installed")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data beside the project; the test is skipped where it is missing."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}")
    return folder
