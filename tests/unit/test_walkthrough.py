"""What a newcomer does: the README's commands, and a toy run that has to learn."""

import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT, read, surroundings

import exprl


def test_exprl_raises_pass_at_1(tiny, train, tmp_path):
    """The project's point: on problems that the base model fails, the hidden references help."""
    run = train(
        *(tmp_path / "run", "--steps", "50", "--prompts-per-step", "8", "--group-size", "8"),
        *("--lr", "4e-4", "--kl", "0.02", "--updates-per-batch", "2", "--micro-batch", "64"),
        *("--save-every", "100", "--sample-batch", "256"),
    )
    models = [str(tiny / "base"), str(run / "final")]
    flags = [
        "--data",
        str(tiny / "heldout.jsonl"),
        "--problems",
        "0",
        "--out",
        str(tmp_path / "eval"),
    ]
    sampling = ["--temperature", "1", "--max-new-tokens", "60", "--sample-batch", "256"]
    exprl.main(["eval", "--model", *models, *flags, *sampling])
    rates = {}
    for path in (tmp_path / "eval").iterdir():
        records = read(path)
        rates[records[0]["model"]] = exprl.pass_rates(records)["pass@1"]
    before, after = (rates[model] for model in models)
    assert before[0] < 0.05
    assert after[1] > before[2] + 0.02  # the intervals are apart


def test_the_readme_s_first_command(walk, tmp_path):
    """bash train_small.sh ends with table, figure and report, and leaves no judge behind."""
    process, runs = walk
    assert process.wait(timeout=200) == 0, (runs.parent / "output").read_text()[-2000:]
    output = (runs.parent / "output").read_text()
    table = output.split("pass@1, %")[-1]
    for model in ("base", "process/final", "process-then-sparse/final", "sparse-only/final"):
        assert re.search(rf"toy/{model} +\d+\.\d \[\d+\.\d, \d+\.\d\]", table), model
    figure, page = re.search(r"Learning curves: (.*); .* to read: (.*)", output).groups()
    assert Path(figure).read_bytes()[:4] == b"\x89PNG"
    assert "<svg" in Path(page).read_text(encoding="utf-8")
    sparse_only = read(runs / "sparse-only" / "metrics.jsonl")
    assert [r["step"] for r in sparse_only] == [1, 2, 3]  # as many steps as both stages
    settings = exprl.JudgeSettings(judge_url=(runs / "judge.url").read_text())
    with pytest.raises(SystemExit, match="cannot be reached"):
        exprl.Judge(settings, tmp_path)


def test_the_recipe_on_a_model_of_one_s_own(tiny, judge, tmp_path):
    """bash train_small.sh MODEL: the hard problems are found first, the judge is the user's."""
    few = surroundings(
        RUNS=str(tmp_path / "runs"), STAGE1="1", STAGE2="1", MAX_NEW_TOKENS="60",
        TRAIN=str(tiny / "train.jsonl"), HELD_OUT=str(tiny / "heldout.jsonl"), PROBLEMS="4",
        JUDGE_URL=judge.url, JUDGE_MODEL="toy-judge",
    )  # fmt: skip
    command = ["bash", str(ROOT / "train_small.sh"), str(tiny / "base")]
    done = subprocess.run(
        command, env=few, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    hard = {r["question"] for r in read(tmp_path / "runs" / "hard.jsonl")}
    trained = {r["question"] for r in read(tmp_path / "runs" / "process" / "rollouts.jsonl")}
    assert trained <= hard and len(trained) == 8
    assert "sparse-only/final" in done.stdout.split("pass@1, %")[-1]
