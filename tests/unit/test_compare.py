r"""bash train_small.sh compare, on a minute budget: killed, started again, its table recomputed."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import compare
import pytest
from conftest import ROOT, read, surroundings

ROWS = {  # row of the table: the runs of stage 1 and of stage 2
    "base model": ("base", None),
    "sparse reward (GRPO), in one run": (None, "sparse-only"),
    "SFT on references": ("sft", "sft-then-sparse"),
    "ExpRL-Process, delta": ("process-delta", "process-delta-then-sparse"),
}
JOBS = ["base", "sparse-only", "sft", "process-delta", "sft-then-sparse"]
JOBS += ["process-delta-then-sparse", "eval-stage-1", "eval-stage-2"]


def start(runs, **changes):
    """The command with one step a stage, in its own process group."""
    few = {"SEEDS": "1", "SYSTEMS": "sft process-delta", "STAGE1": "1", "STAGE2": "1"}
    few |= {"RUNS": str(runs), "BASE_STEPS": "20", "PROBLEMS": "4"}
    few |= {"JUDGE_MODEL": "toy-judge-lies-20"}
    return subprocess.Popen(
        ["bash", str(ROOT / "train_small.sh"), "compare"], env=surroundings(**(few | changes)),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def finish(process):
    """(status, stdout, stderr); the process group is gone afterwards, come what may."""
    try:
        output, errors = process.communicate(timeout=200)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output, errors


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """(folder, what the second start printed): the first was killed when its base was made."""
    runs = tmp_path_factory.mktemp("compare")
    process, base = start(runs), runs / "compare" / "jobs" / "seed-1-base.json"
    deadline = time.monotonic() + 150
    while not (runs / "compare" / "logs" / "seed-1-sft.log").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = base.stat().st_mtime_ns
    status, output, errors = finish(start(runs))
    assert status == 0, errors
    assert base.stat().st_mtime_ns == before
    return runs, output


def table(text, head):
    """{first cell: other cells} of the table whose head begins with these cells."""
    lines = text[text.index(f"| {' | '.join(head)}") :].split("\n\n")[0].split("\n")
    cells = [line.strip("| ").split(" | ") for line in lines]
    return {row[0]: row[1:] for row in cells[2:]}


def right_trace(question):
    """Six lines and a box, computed here."""
    value, lines = int(question[:2]), []
    for label, operation in re.findall(r"([a-h])(\+7|\*3)", question):
        result = (value + 7 if operation == "+7" else 3 * value) % 97
        lines.append(f"### {label}{value:02}{operation}={result:02}")
        value = result
    return "\n".join([*lines, rf"\boxed{{{value:02}}}"])


def test_killed_and_started_again_it_does_only_the_rest(resumed):
    runs, output = resumed
    assert re.findall(r"seed-1/(\S+) starts", output).count("base") == 0
    assert sorted(re.findall(r"seed-1/(\S+) took", output)) == sorted(JOBS[1:])
    assert "8 of 8 done" in output and (runs / "comparison.md").exists()
    assert (runs / "comparison.png").read_bytes()[:4] == b"\x89PNG"


def test_the_judge_is_the_one_asked_for(resumed):
    """JUDGE_MODEL is what train_small.sh hands on; here it is the toy judge that lies."""
    [command] = read(resumed[0] / "compare" / "jobs" / "seed-1-process-delta.json")
    judge = command["command"].index("--judge-model") + 1
    assert command["command"][judge] == "toy-judge-lies-20"


def test_the_costs_are_those_of_the_logs(resumed):
    """Every row has the same number of completions and of optimizer steps."""
    runs, _ = resumed
    rows = table((runs / "comparison.md").read_text(encoding="utf-8"), ["system", "pass@1"])
    assert list(rows) == list(ROWS)
    for label, names in ROWS.items():
        counts = []
        for run in [runs / "compare" / "seed-1" / name for name in names if name]:
            logs = [run / "rollouts.jsonl", run / "metrics.jsonl"]
            counts.append([len(read(log)) if log.exists() else 0 for log in logs])
        completions, steps = zip(*counts, strict=True)
        steps = [2 * n for n in steps]  # --updates-per-batch 2
        assert rows[label][-2:] == [" + ".join(map(str, costs)) for costs in (completions, steps)]
        assert (sum(completions), sum(steps)) == ((0, 0) if label == "base model" else (128, 4))


def test_the_table_and_a_changed_setting(resumed):
    """What 20 steps make of a base solves nothing. So the answers are replaced by such as are
    right now and then, and the seed is copied as another one; all jobs are done by then."""
    runs, folder = resumed[0], resumed[0] / "compare"
    shutil.copytree(folder / "seed-1", folder / "seed-2")
    for file in (folder / "seed-2" / "eval").iterdir():
        file.rename(file.with_name(file.name.replace("seed-1", "seed-2")))
    for marker in (folder / "jobs").glob("seed-1-*"):
        text = marker.read_text().replace("seed-1", "seed-2")
        text = text.replace('"--seed", "1"', '"--seed", "2"')
        marker.with_name(marker.name.replace("seed-1", "seed-2")).write_text(text)
    found = {}  # (run, seed): means over the problems, in percent
    for run in filter(None, sum(ROWS.values(), ())):
        for seed in (1, 2):
            end = "base" if run == "base" else f"{run}-final"
            path = next((folder / f"seed-{seed}" / "eval").glob(f"*-seed-{seed}-{end}.jsonl"))
            records, rng, rates = read(path), random.Random(f"{run} {seed}"), []
            assert len(records) == 4 and {len(r["texts"]) for r in records} == {8}
            for i, r in enumerate(records):  # the first has none, so that no mean is 100
                lucky, whole = i and rng.choice([0, 1, 3]), i and rng.choice([1, 2, 5])
                r["texts"] = [right_trace(r["question"])] * whole + ["### a"] * (8 - whole)
                r["correct"] = lucky + whole
                rates.append([(lucky + whole) / 8, float(lucky + whole > 0), whole / 8])
            path.write_text("".join(json.dumps(r) + "\n" for r in records))
            found[run, seed] = [100 * sum(column) / 4 for column in zip(*rates, strict=True)]

    status, output, errors = finish(start(runs, SEEDS="1 2"))
    assert status == 0, errors
    assert "done: seed-" not in output  # nothing was done again
    text = (runs / "comparison.md").read_text(encoding="utf-8")
    rows, by_seed = table(text, ["system", "pass@1"]), table(text, ["system", "seed 1"])
    assert list(rows) == list(by_seed) == list(ROWS)
    for label, names in ROWS.items():
        for stage, run in enumerate(names):
            cells = rows[label][3 * stage : 3 * stage + 3]
            firsts = [cell.split(" → ")[stage] for cell in by_seed[label]]
            if run is None:
                assert cells == ["–"] * 3 and firsts == ["–"] * 2
                continue
            one, two = found[run, 1], found[run, 2]
            assert firsts == [f"{one[0]:.1f}", f"{two[0]:.1f}"]
            for cell, a, b in zip(cells, one, two, strict=True):
                value, low, high = map(float, re.findall(r"[\d.]+", cell))
                assert value == pytest.approx((a + b) / 2, abs=0.051) and low < value < high

    status, _, errors = finish(start(runs, STAGE1="2"))
    assert status == 1 and errors.count("\n") == 1, errors
    assert re.search(r"^exprl: seed-1/\S+ was made with --steps \d, not --steps \d", errors)


def test_a_system_that_there_is_not(tmp_path, monkeypatch):
    numbers = ["--seeds", "--stage1", "--stage2", "--base-steps", "--problems", "--length"]
    flags = [*(f"{flag}=1" for flag in numbers), "--train=", "--sampling=", "--systems=sft sdf"]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--runs", str(tmp_path / "toy"), *flags])
    with pytest.raises(SystemExit, match="no system is called sdf"):
        compare.main()
    assert not (tmp_path / "toy").exists()
