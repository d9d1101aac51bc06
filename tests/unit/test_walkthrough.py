"""What a newcomer does: the first command of the README, and a toy run that has to learn."""

import json
import os
import re
import signal
import subprocess
import threading
from functools import partial
from pathlib import Path
from statistics import fmean

import pytest
from conftest import ROOT, read, surroundings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import exprl

MODELS = ["base", "process/final", "process-then-sparse/final", "sparse-only/final"]


def test_the_hidden_references_raise_the_accuracy(train, tmp_path):
    """The point of the project: the judge's rewards help on problems that the base model fails.

    The answers are in no reward here. They are only compared, for the log.
    """
    run = train(
        *(tmp_path / "run", "--iterations", "30", "--prompts-per-iteration", "8"),
        *("--group-size", "8", "--lr", "4e-4", "--kl", "0.02", "--optimizer-steps", "2"),
        *("--micro-batch", "64", "--save-every", "100", "--sample-batch", "256"),
    )
    accuracies = [record["accuracy"] for record in read(run / "metrics.jsonl")]
    before, after = fmean(accuracies[:5]), fmean(accuracies[-5:])
    assert before < 0.08
    assert after > before + 0.1


def test_the_first_command_of_the_readme(walk):
    """bash train_small.sh ends with a table, a figure and a page, and stops its toy judge."""
    process, runs = walk
    status = process.wait(timeout=400)
    output = (runs.parent / "output").read_text()
    assert status == 0, output[-2000:]
    table = output.split("pass@1")[-1]
    for model in MODELS:
        assert re.search(rf"toy/{model} +8 x 8 +\d+\.\d \[\d+\.\d, \d+\.\d\]", table), model
    named = re.findall(rf"{re.escape(str(runs))}\S*\w", output.split("What to look at")[1])
    assert {Path(name).suffix for name in named} == {".jsonl", ".png", ".html"}
    for name in named:
        assert Path(name).stat().st_size > 0, name
    iterations = [record["iteration"] for record in read(runs / "sparse-only" / "metrics.jsonl")]
    assert iterations == [1, 2, 3]  # as many as both stages
    settings = exprl.JudgeSettings(judge_url=(runs / "judge.url").read_text())
    with pytest.raises(SystemExit):
        exprl.Judge(settings, "process", runs)


def test_the_stages_of_the_walk_follow_each_other(walk):
    """Stage 2 starts from the model of stage 1, and the control from the base model."""
    process, runs = walk
    assert process.wait(timeout=400) == 0
    starts = {}
    for name in ("process", "process-then-sparse", "sparse-only"):
        settings = json.loads((runs / name / "settings.json").read_text())
        starts[name] = (settings["method"], settings["model"])
    assert starts == {
        "process": ("process", str(runs / "base")),
        "process-then-sparse": ("sparse", str(runs / "process" / "final")),
        "sparse-only": ("sparse", str(runs / "base")),
    }


@pytest.mark.stress
def test_the_recipe_on_a_model_of_ones_own(tiny, judge, tmp_path):
    """bash train_small.sh MODEL finds the hard problems first, and the judge is the user's."""
    few = surroundings(
        RUNS=str(tmp_path / "runs"), STAGE1="1", STAGE2="1", MAX_NEW_TOKENS="60",
        TRAIN=str(tiny / "train.jsonl"), HELD_OUT=str(tiny / "heldout.jsonl"), PROBLEMS="4",
        JUDGE_URL=judge.url, JUDGE_MODEL="toy-judge",
    )  # fmt: skip
    command = ["bash", str(ROOT / "train_small.sh"), str(tiny / "base")]
    done = subprocess.run(
        command, env=few, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    hard = {record["question"] for record in read(tmp_path / "runs" / "hard.jsonl")}
    rollouts = read(tmp_path / "runs" / "process" / "rollouts.jsonl")
    trained = {record["problem"]["question"] for record in rollouts}
    assert trained <= hard and len(trained) == 8
    assert "sparse-only/final" in done.stdout.split("pass@1")[-1]
    stage2 = json.loads((tmp_path / "runs" / "process-then-sparse" / "settings.json").read_text())
    assert stage2["no_std"] and stage2["kl"] == 0  # the paper's stage 2


def write_random_model(folder):
    """Write a tiny random language model whose tokens are bytes."""
    words = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, eos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def start_and_kill(what, environment, heading):
    """Start train_small.sh and kill it, with its children, when it prints a heading."""
    process = subprocess.Popen(
        ["bash", str(ROOT / "train_small.sh"), what], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    kill = partial(os.killpg, process.pid, signal.SIGKILL)
    timer = threading.Timer(400, kill)
    timer.start()
    output = ""
    try:
        for line in process.stdout:
            output += line
            if line.startswith(f"== {heading}"):
                return kill()
        pytest.fail(output[-2000:])
    finally:
        timer.cancel()
        process.wait(timeout=60)


@pytest.mark.stress
def test_the_problems_in_words(tmp_path):
    """bash train_small.sh words continues after a kill, and ends with its table."""
    write_random_model(tmp_path / "model")
    runs = tmp_path / "runs"
    few = surroundings(
        RUNS=str(runs), MODEL=str(tmp_path / "model"), WARM_UP="1", STAGE1="1", STAGE2="1",
        PROBLEMS="2",
    )  # fmt: skip
    start_and_kill("words", few, "2/4")
    done = subprocess.run(
        ["bash", str(ROOT / "train_small.sh"), "words"],
        env=few, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    table = done.stdout.split("pass@1")[-1]
    for model in ["warm-up/final", *MODELS[1:]]:
        assert re.search(rf"runs/{model} +2 x 8 +\d+\.\d \[\d+\.\d, \d+\.\d\]", table), model
    iterations = {
        name: [record["iteration"] for record in read(runs / name / "metrics.jsonl")]
        for name in ("warm-up", "process", "process-then-sparse", "sparse-only")
    }
    control = iterations.pop("sparse-only")
    assert set(control) == {1, 2}  # the kill may have come before its first checkpoint
    assert list(iterations.values()) == [[1], [1], [1]]  # the others were done once
    assert (runs / "report.html").stat().st_size > 0
    judged = read(runs / "process" / "rollouts.jsonl")
    assert all(record["rewards"] for record in judged)
