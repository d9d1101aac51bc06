"""compare.py: its jobs, its numbers recomputed from made-up results, and a kill in the middle."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import compare
import pytest
import toy_world
from conftest import ROOT, read, surroundings
from test_readme import check_flags

import exprl
import judge_prompts

ROWS = {  # row of the table: the runs of stage 1 and of stage 2
    "base model": ("base", None),
    "sparse reward (GRPO), in one run": (None, "sparse-only"),
    "SFT on references": ("sft", "sft-then-sparse"),
    "ExpRL-Process, delta": ("process-delta", "process-delta-then-sparse"),
}
JOBS = ["base", "sparse-only", "sft", "process-delta", "sft-then-sparse"]
JOBS += ["process-delta-then-sparse", "eval-stage-1", "eval-stage-2"]
QUESTION = toy_world.make_row(29, ["*3", "+7", "+7", "*3", "*3", "+7"])["question"]


def arguments(runs, **changes):
    """Return the arguments of compare.py as its parser would."""
    few = {"runs": runs, "seeds": [1, 2], "stage1": 2, "stage2": 1, "base_steps": 20}
    few |= {"problems": 3, "length": 6, "systems": ["sft", "process-delta"]}
    few |= {"train": ["--lr", "4e-4"], "sampling": ["--temperature", "1"]}
    return argparse.Namespace(**few | changes)


# ---- The jobs ------------------------------------------------------------------------------------
def test_the_jobs_of_a_seed(tmp_path):
    """Each job comes after what it needs, and stage 2 starts from the model of stage 1."""
    jobs = compare.plan(arguments(tmp_path), 1)
    assert sorted(job.name for job in jobs) == sorted(f"seed-1/{name}" for name in JOBS)
    before = set()
    for job in jobs:
        assert before.issuperset(job.needs), job.name
        before.add(job.name)
    commands = {job.name: job.command for job in jobs}
    second = commands["seed-1/sft-then-sparse"]
    model = second[second.index("--model") + 1]
    assert Path(model).parts[-2:] == ("sft", "final")
    assert second[second.index("--method") + 1] == "sparse"
    control = commands["seed-1/sparse-only"]
    assert control[control.index("--iterations") + 1] == "3"  # as many as both stages


@pytest.mark.parametrize("name", compare.SYSTEMS)
def test_the_commands_of_the_jobs_parse(name, tmp_path, monkeypatch):
    jobs = compare.plan(arguments(tmp_path, systems=[name]), 1)
    [job] = [job for job in jobs if job.name == f"seed-1/{name}"]
    check_flags(monkeypatch, job.command[0], job.command[1:])


def test_the_commands_around_the_methods_parse(tmp_path, monkeypatch):
    for job in compare.plan(arguments(tmp_path), 1):
        if job.name in ("seed-1/base", "seed-1/sparse-only", "seed-1/eval-stage-2"):
            check_flags(monkeypatch, job.command[0], job.command[1:])


def test_a_finished_job_with_another_setting_is_refused(tmp_path):
    def base(**changes):
        return compare.plan(arguments(tmp_path, **changes), 1)[0]

    job = base()
    assert not job.is_done()
    job.result.mkdir(parents=True)
    job.marker.parent.mkdir(parents=True)
    assert not job.is_done()
    job.marker.write_text(json.dumps({"command": job.command}) + "\n")
    assert base().is_done()
    with pytest.raises(SystemExit, match=r"--steps 20.* --steps 30"):
        base(base_steps=30).is_done()


def test_an_unknown_system_is_refused(tmp_path, monkeypatch):
    numbers = ["--seeds", "--stage1", "--stage2", "--base-steps", "--problems", "--length"]
    flags = [*(f"{flag}=1" for flag in numbers), "--train=", "--sampling=", "--systems=sft sdf"]
    monkeypatch.setattr(sys, "argv", ["compare.py", "--runs", str(tmp_path / "toy"), *flags])
    with pytest.raises(SystemExit, match="sdf"):
        compare.main()
    assert not (tmp_path / "toy").exists()


# ---- The numbers ---------------------------------------------------------------------------------
def write_results(args):
    """Write made-up logs and evaluations -> {(run, seed): means of pass@1, pass@8, steps in %}."""
    found, n = {}, 0
    for seed in args.seeds:
        world = args.runs / "compare" / f"seed-{seed}"
        for run in [name for names in ROWS.values() for name in names if name]:
            n += 1
            (world / run).mkdir(parents=True)
            settings = {"method": "sft" if run == "sft" else "sparse", "optimizer_steps": 2}
            settings |= {"prompts_per_iteration": 4, "group_size": 8}
            (world / run / "settings.json").write_text(json.dumps(settings))
            iterations = [1, 2, 1, 2]  # killed after iteration 2: both were logged again
            lines = [json.dumps({"iteration": i}) for i in iterations]
            (world / run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
            correct = [0, n % 5, 3 + n % 6]  # out of 8, for three problems
            path = compare.eval_path(world, run)
            path.parent.mkdir(exist_ok=True)
            whole = toy_world.write_trace(QUESTION, toy_world.apply)
            for c in correct:
                texts = [whole] * (c // 2) + ["### a"] * (8 - c // 2)
                record = {"n": 8, "correct": c, "question": QUESTION, "texts": texts}
                exprl.append_jsonl(path, [record])
            columns = (
                [c / 8 for c in correct],
                [c > 0 for c in correct],
                [c // 2 / 8 for c in correct],
            )
            found[run, seed] = [100 * fmean(column) for column in columns]
    return found


def table(text, head):
    """Return {first cell: other cells} of the table whose head begins with these cells."""
    lines = text[text.index(f"| {' | '.join(head)}") :].split("\n\n")[0].split("\n")
    cells = [line.strip("| ").split(" | ") for line in lines]
    return {row[0]: row[1:] for row in cells[2:]}


def test_the_tables_have_the_means_intervals_and_costs_of_the_results(tmp_path):
    args = arguments(tmp_path)
    found = write_results(args)
    job = compare.plan(args, 1)[0]
    job.marker.parent.mkdir(parents=True)
    job.marker.write_text(json.dumps({"command": [], "seconds": 60.0, "code": "a"}) + "\n")
    (tmp_path / "compare" / "starts.jsonl").write_text('{"seconds": 60.0}\n')
    compare.report(args, [job])
    text = (tmp_path / "comparison.md").read_text()
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
    # two iterations of 4 x 8 completions (references in SFT), each with two optimizer steps
    assert rows["base model"][-2:] == ["0", "0"]
    assert rows["SFT on references"][-2:] == ["8 + 64", "4 + 4"]
    assert rows["ExpRL-Process, delta"][-2:] == ["64 + 64", "4 + 4"]
    assert (tmp_path / "comparison.png").read_bytes()[:4] == b"\x89PNG"


# ---- The toy judge that lies ---------------------------------------------------------------------
def scores_of(kind, row, n, texts, model):
    """Return the scores that a toy judge gives, in a call that differs from others in n."""
    messages = judge_prompts.judge_messages(kind, row, f"- a\n- {n}", judge_prompts.fence(texts))
    reply = toy_world.answer({"messages": messages, "model": model})
    return re.findall(r": ([1-5])$", reply, re.MULTILINE)


@pytest.mark.parametrize("kind", ["together", "outcome"])
def test_the_toy_judge_lies_as_often_as_its_name_says(kind):
    row = toy_world.make_row(29, ["*3", "+7", "+7", "*3", "*3", "+7"]) | {"domain": "math"}
    right = toy_world.write_trace(QUESTION, toy_world.apply)
    steps = re.split(r"^(?=### )", right, flags=re.MULTILINE)[1:]
    texts = steps if kind == "together" else [right]
    lies = []
    for n in range(400):
        honest = scores_of(kind, row, n, texts, "toy-judge")
        assert honest == scores_of(kind, row, n, texts, "toy-judge-lies-0") == ["5"] * len(texts)
        assert {*scores_of(kind, row, n, texts, "toy-judge-lies-100")} == {"1"}
        scores = scores_of(kind, row, n, texts, "toy-judge-lies-20")
        assert scores == scores_of(kind, row, n, texts, "toy-judge-lies-20")  # the same each time
        lies += [score == "1" for score in scores]
    assert fmean(lies) == pytest.approx(0.2, abs=0.06)


# ---- All of it -----------------------------------------------------------------------------------
def start(runs):
    """Start `train_small.sh compare` with one iteration per stage, in its own process group."""
    few = {"SEEDS": "1", "SYSTEMS": "process-delta", "STAGE1": "1", "STAGE2": "1"}
    few |= {"RUNS": str(runs), "BASE_STEPS": "20", "PROBLEMS": "4"}
    few |= {"JUDGE_MODEL": "toy-judge-lies-20"}
    return subprocess.Popen(
        ["bash", str(ROOT / "train_small.sh"), "compare"], env=surroundings(**few),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.stress
def test_killed_and_started_again_it_does_only_the_rest(tmp_path):
    process, base = start(tmp_path), tmp_path / "compare" / "jobs" / "seed-1-base.json"
    deadline = time.monotonic() + 200
    while not (tmp_path / "compare" / "logs" / "seed-1-process-delta.log").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    before = base.stat().st_mtime_ns
    process = start(tmp_path)
    try:
        output, errors = process.communicate(timeout=400)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    assert base.stat().st_mtime_ns == before
    rest = [name for name in JOBS[1:] if "sft" not in name]
    assert sorted(re.findall(r"seed-1/(\S+) took", output)) == sorted(rest)
    text = (tmp_path / "comparison.md").read_text()
    rows = table(text, ["system", "pass@1"])
    assert list(rows) == [name for name in ROWS if name != "SFT on references"]
    assert rows["ExpRL-Process, delta"][-2:] == ["64 + 64", "2 + 2"]
    assert (tmp_path / "comparison.png").exists()
    [record] = read(tmp_path / "compare" / "jobs" / "seed-1-process-delta.json")
    judge = record["command"].index("--judge-model") + 1
    assert record["command"][judge] == "toy-judge-lies-20"  # JUDGE_MODEL reached the job
