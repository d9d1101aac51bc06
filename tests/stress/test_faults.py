"""Each fault of faults.py is made, and its row compared with the table in faults.md."""

import re
import shutil

import faults
import pytest
import soak

PAGE = faults.TABLE.read_text(encoding="utf-8")
FAULTS = faults.all_faults()


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    for path in tiny.iterdir():
        (folder / path.name).symlink_to(path)
    with faults.hurried():
        yield faults.World(folder)


@pytest.fixture(autouse=True)
def in_its_own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def test_the_page_has_each_fault_and_counts_them():
    rows = re.findall(r"^\| (?!fault \|).* \|$", PAGE, re.MULTILINE)
    assert len(rows) == len(set(rows)) == len(FAULTS) >= 60
    assert f"\n{len(rows)} faults; exit status 0 in {sum(' | 0 | ' in r for r in rows)}" in PAGE


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_does_what_the_table_says(world, name):
    if name == "stopped: kill":  # fewer than for the table
        row = faults.killed(world, 4)
        assert row.resumed == "to the bit, 4 times of 4"
        row.resumed = "to the bit, 20 times of 20"
    else:
        row = FAULTS[name](world)
    assert faults.write_row(row) in PAGE.split("\n"), faults.write_row(row)
    if row.group == "the judge breaks":
        assert "paid twice" not in row.resumed
        is_verdict = "had no score" in row.resumed  # only that may change what is learned
        assert row.resumed.startswith("to other weights" if is_verdict else ("to the bit", "not"))


def test_faults_and_kills_change_no_bit(tiny, monkeypatch, capsys):
    """The soak test, shortly: 12 steps, three in ten calls fail, a kill each 4 steps."""
    copy = lambda folder, **_: shutil.copytree(tiny, folder, dirs_exist_ok=True)  # noqa: E731
    monkeypatch.setattr(faults.toy_world, "build", copy)
    settings = soak.SoakSettings(steps=12, kill_every=4, faults=30)
    assert soak.soak(settings)
    said = capsys.readouterr().out
    assert "more than once: 0" in said
    faults_and_kills = re.search(r"with (\d+) faults and (\d+) kills", said)
    assert int(faults_and_kills[1]) > 10 and int(faults_and_kills[2]) >= 1
