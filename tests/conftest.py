"""What every test may use."""

from pathlib import Path

import pytest
from hypothesis import settings

# The first call compiles, so no deadline; the same examples every time, so that a red run can be repeated.
settings.register_profile("kermes", deadline=None, derandomize=True)
settings.load_profile("kermes")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real data beside the project; the test is skipped where it is missing."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"needs the data folder {folder}")
    return folder
