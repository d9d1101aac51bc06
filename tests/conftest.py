"""What the rooms share: the folders from which they import, and a small toy world."""

import fcntl
import hashlib
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOMS = [TESTS / room for room in ("toy", "tools", "course", "stress", "unit")]
sys.path[:0] = map(str, [TESTS.parent, *ROOMS])

import toy_world  # noqa: E402


@pytest.fixture(scope="session")
def tiny(request):
    """A toy world of 24 problems. Its base model knows the form and is sometimes correct.

    It takes half a minute to make, so it stays in .pytest_cache until toy_world.py changes.
    """
    version = hashlib.sha256(Path(toy_world.__file__).read_bytes()).hexdigest()[:12]
    folder = request.config.cache.mkdir(f"toy-world-{version}")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another pytest may be making it
        if not (folder / "finished").exists():
            toy_world.build_small(folder)
            (folder / "finished").touch()
    return folder
