"""ExpRL in TRL: the same advantages as exprl.py gives, and on two processes pass@1 rises."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl_example
from conftest import TESTS, read, surroundings

import exprl

SMALL = ["--steps", "2", "--prompts-per-step", "2", "--group-size", "4", "--micro-batch", "4"]
SAMPLING = ["--temperature", "1", "--max-new-tokens", "60"]


def flags(tiny, judge, out: Path, *more: str) -> list[str]:
    files = ["--model", tiny / "base", "--data", tiny / "train.jsonl", "--out", out]
    server = ["--judge-url", judge.url, "--judge-model", "toy-judge"]
    return list(map(str, [*files, *server, *SAMPLING, *SMALL, *more]))


def sampled(settings) -> tuple:
    """(what TRL would train on, the completions that it was made of, read and judged anew)."""
    trainer = trl_example.make_trainer(settings)
    trainer.model.train()
    inputs = [trainer.train_dataset[i] for i in (0, 5) for _ in range(settings.group_size)]
    output = trainer._generate_and_score_completions(inputs)
    scaffold, completions = trainer.reward_funcs[0], []
    for given, ids, mask in zip(
        inputs, output["completion_ids"], output["completion_mask"], strict=True
    ):
        row = scaffold.rows[given["row"]]
        ids = ids[mask.bool()].tolist()
        completions.append(exprl.read_completion(row, ids, scaffold.tokenizer, scaffold.eos_ids))
    judge = exprl.Judge(settings, Path(settings.out) / "again")
    verdicts = []
    for group in exprl.chunks(completions, settings.group_size):
        verdicts += judge.submit(group, scaffold.kind)
    judge.wait(completions, verdicts)
    exprl.fill_advantages(completions, settings)
    return output, completions


@pytest.mark.parametrize("norm", ["delta", "group"])
def test_process_has_the_advantages_of_exprl(tiny, judge, no_key, tmp_path, norm):
    made = flags(tiny, judge, tmp_path, "--method", "process", "--process-norm", norm)
    output, completions = sampled(exprl.read_flags(trl_example.TrlSettings, made, ""))
    expected = torch.zeros(output["completion_ids"].shape)
    for row, c in zip(expected, completions, strict=True):
        for (start, end), advantage in zip(c.steps, c.advantages, strict=True):
            row[start:end] = advantage
    assert expected.abs().max() > 0.2
    assert torch.allclose(output["advantages"], expected, atol=1e-6)


def test_outcome_has_the_advantages_of_exprl(tiny, judge, no_key, tmp_path):
    """To 1e-6 without the std; with it TRL adds 1e-4 to it, exprl.py 1e-6."""
    for more, tolerance in ((["--no-std"], 1e-6), ([], 2e-3)):
        made = flags(tiny, judge, tmp_path, "--method", "outcome", *more)
        output, completions = sampled(exprl.read_flags(trl_example.TrlSettings, made, ""))
        expected = torch.tensor([c.advantages[0] for c in completions])
        assert expected.abs().max() > 0.1
        assert torch.allclose(output["advantages"], expected, atol=tolerance)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts-per-step", "1", "--micro-batch", "3"], "each needs whole groups"),
        (["--method", "sparse"], "exprl.is_correct"),
    ],
)
def test_what_it_cannot_do_is_said_first(tiny, judge, no_key, tmp_path, more, message):
    made = flags(tiny, judge, tmp_path, *more)
    with pytest.raises(SystemExit, match=message):
        trl_example.make_trainer(exprl.read_flags(trl_example.TrlSettings, made, ""))


def test_pass_at_1_rises_on_two_processes(tiny, judge, tmp_path):
    """Stage 1 by ExpRL-Process, through accelerate."""
    accelerate = Path(sys.executable).parent / "accelerate"
    launch = [accelerate, "launch", "--multi_gpu", "--num_processes", "2"]  # of CPUs it starts one
    more = ["--method", "process", "--steps", "40", "--prompts-per-step", "8", "--group-size", "8"]
    more += ["--lr", "4e-4", "--kl", "0.02", "--updates-per-batch", "2", "--micro-batch", "32"]
    command = [*launch, TESTS / "trl_example.py", *flags(tiny, judge, tmp_path / "run", *more)]
    done = subprocess.run(
        list(map(str, command)), env=surroundings(), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-2000:]
    models = [str(tiny / "base"), str(tmp_path / "run" / "final")]
    held_out = ["--data", str(tiny / "heldout.jsonl"), "--problems", "0", "--out", str(tmp_path)]
    exprl.main(["eval", "--model", *models, *held_out, *SAMPLING, "--sample-batch", "256"])
    rates = [
        exprl.pass_rates(read(tmp_path / (m.strip("./").replace("/", "-") + ".jsonl")))["pass@1"]
        for m in models
    ]
    assert rates[1][1] > rates[0][2] + 0.02  # the intervals are apart
    log = [r["reward"] for r in read(tmp_path / "run" / "metrics.jsonl") if "reward" in r]
    assert len(log) == 40 and sum(log[:10]) < sum(log[-10:])
    for process in ("process-0", "process-1"):  # each has asked
        assert len(exprl.read_log(tmp_path / "run" / process / "judge_cache.jsonl")) > 20
