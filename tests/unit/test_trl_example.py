"""ExpRL in TRL: the same advantages as exprl.py gives, and on two processes pass@1 rises."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_world
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
    prompts = zip(output["prompt_ids"], output["prompt_mask"], completions, strict=True)
    for ids, mask, c in prompts:
        assert ids[mask.bool()].tolist() == c.row["prompt_ids"]  # what exprl.py would ask
    judge = exprl.Judge(settings, Path(settings.out) / "again")
    for c in completions:
        judge.submit(c, scaffold.kind)
    judge.wait(completions)
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


def test_a_chat_template_is_filled_in_as_in_exprl(tiny, judge, no_key, tmp_path):
    shutil.copytree(tiny / "base", tmp_path / "chat")
    _, tokenizer = exprl.find_model(str(tmp_path / "chat"))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    made = flags(tiny, judge, tmp_path / "run", "--model", str(tmp_path / "chat"))
    _, completions = sampled(exprl.read_flags(trl_example.TrlSettings, made, ""))
    assert tokenizer.eos_token_id in completions[0].row["prompt_ids"]


def test_a_judgement_that_failed_moves_nothing(tiny, no_key, tmp_path):
    """The other completions of the group keep their advantages."""
    asked = []

    def answer(request):
        asked.append(request)
        is_broken = len(asked) % 4 == 2
        return (400, {"error": {"message": "broken"}}) if is_broken else toy_world.answer(request)

    server = toy_world.ChatServer(answer)
    more = ["--method", "process", "--rubric", "none", "--judge-threads", "1"]
    made = flags(tiny, server, tmp_path, *more)
    trainer = trl_example.make_trainer(exprl.read_flags(trl_example.TrlSettings, made, ""))
    trainer.model.train()
    inputs = [trainer.train_dataset[i] for i in (0, 5) for _ in range(4)]
    output = trainer._generate_and_score_completions(inputs)
    server.shutdown()
    failed = [c.scores is None for c in trainer.reward_funcs[0].completions]
    assert any(failed) and not all(failed)
    for row, has_failed in zip(output["advantages"], failed, strict=True):
        assert not (has_failed and row.any())
    assert output["advantages"].any()


def test_the_settings_in_trl_s_words(tmp_path):
    settings = trl_example.TrlSettings(
        model="", out=str(tmp_path), prompts_per_step=6, group_size=4, micro_batch=8, steps=7,
        updates_per_batch=2, lr=0.5, kl=0.25, clip_low=0.125, clip_high=0.375, temperature=0.75,
        max_new_tokens=11, seed=3, trl={"logging_steps": 5},
    )  # fmt: skip
    config = trl_example.grpo_config(settings)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (8, 3)
    assert (config.max_steps, config.num_iterations, config.warmup_steps) == (14, 2, 10)
    assert (config.learning_rate, config.beta, config.temperature) == (0.5, 0.25, 0.75)
    assert (config.epsilon, config.epsilon_high, config.top_k, config.top_p) == (0.125, 0.375, 0, 1)
    assert (config.num_generations, config.max_completion_length, config.seed) == (4, 11, 3)
    assert (config.loss_type, config.scale_rewards, config.logging_steps) == ("dapo", "group", 5)


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
        (["--method", "sparse"], r"exprl\.is_correct"),
        (["--resume"], "another --out"),
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
