"""Every test of this folder is a stress test: it has the marker `stress`."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), *(str(HERE.parent / room) for room in ("toy", "tools"))]

import faults  # noqa: E402


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """A folder with a toy world."""
    folder = tmp_path_factory.mktemp("base")
    faults.build_world(folder)
    return folder


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.stress)
