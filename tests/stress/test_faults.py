"""Makes each fault of faults.md again and compares it with its row. Kills and a short soak, too."""

import re
import shutil
from functools import partial

import faults
import pytest
import soak

PAGE = faults.TABLE.read_text(encoding="utf-8")
FAULTS = {
    f"{group}: {name}": (group, name, make)
    for group, rows in faults.all_faults().items()
    for name, make in rows.items()
}


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "world"
    shutil.copytree(tiny, folder)
    return faults.World(folder)


@pytest.fixture(autouse=True)
def without_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def test_the_page_has_a_row_for_each_fault_and_counts_them():
    rows = re.findall(r"^\| (?!fault \|).* \|$", PAGE, re.MULTILINE)
    assert len(rows) == len(set(rows)) == len(FAULTS)
    assert f"\nThere are {len(rows)} faults." in PAGE


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_does_what_the_page_says(world, name):
    row = faults.make_row(world, *FAULTS[name])
    assert row in PAGE.split("\n"), row


def test_resumed_runs_end_with_the_weights_of_the_twin_unless_a_verdict_failed():
    """The page itself must not describe a program that loses weights or pays twice."""
    assert "paid twice" not in PAGE
    others = [line for line in PAGE.split("\n") if "other weights" in line]
    unscored = [f"| {name}, after 9 calls |" for name in faults.UNSCORED]
    assert all(line.startswith(tuple(unscored)) for line in others)
    assert "| 20 of 20 bit for bit |" in PAGE


def test_failures_and_kills_change_no_bit(tiny, monkeypatch, capsys):
    """A short soak test: 6 iterations, 30% of the calls fail, a kill every 2 iterations."""
    copy = partial(shutil.copytree, tiny, dirs_exist_ok=True)
    monkeypatch.setattr(faults.toy_world, "build_small", copy)
    soak.soak(soak.SoakSettings(iterations=6, kill_every=2, percent=30))
    output = capsys.readouterr().out
    failures, kills = re.search(r"(\d+) failed calls and (\d+) kills", output).groups()
    assert int(failures) > 10 and int(kills) >= 2
