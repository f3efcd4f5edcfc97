"""What every test may use."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import settings

# The first call compiles, so no deadline; the same examples every time, so that a red run can be repeated.
settings.register_profile("kermes", deadline=None, derandomize=True)
settings.load_profile("kermes")

ROOT = Path(__file__).parents[1]


HAS_MIDDLEWARE = all(importlib.util.find_spec(name) for name in ("lsst", "starlink"))
collect_ignore = [] if HAS_MIDDLEWARE else ["pipelines"]


def pytest_terminal_summary(terminalreporter):
    """Say what was left out."""
    if not HAS_MIDDLEWARE:
        terminalreporter.write_line(
            "left out: tests/pipelines, because the packages of the extra test-lsst (Python >= 3.12) are not installed"
        )


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data beside the project; the test is skipped where it is missing."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}")
    return folder
