"""trl_example: TRL trains on the advantages that exprl.py computes, on one process and on two."""

import shutil
import subprocess
import sys
from pathlib import Path

import program_judge
import pytest
import torch
import toy_world
import trl_example
from conftest import TESTS, read, surroundings
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

import exprl

CLASSES = [trl_example.TrlSettings, exprl.SamplingSettings, exprl.JudgeSettings]
SMALL = ["--iterations", "2", "--prompts-per-iteration", "2", "--group-size", "4"]
SMALL += ["--micro-batch", "4", "--temperature", "1", "--max-new-tokens", "60"]


def flags(tiny, judge, out, *more):
    """Return the flags of a small run. `more` come last and therefore win."""
    files = ["--model", tiny / "base", "--data", tiny / "train.jsonl", "--out", out]
    server = ["--judge-url", judge.url, "--judge-model", "toy-judge"]
    return [str(part) for part in [*files, *server, *SMALL, *more]]


def settings_of(flags):
    """Return the three settings that these flags give."""
    return HfArgumentParser(CLASSES).parse_args_into_dataclasses(flags)


def sample_with_trl(trainer, group_size):
    """Return what TRL would train on, for two problems."""
    trainer.model.train()
    inputs = [trainer.train_dataset[i] for i in (0, 5) for _ in range(group_size)]
    return inputs, trainer._generate_and_score_completions(inputs)


def sampled(flags):
    """Return (what TRL would train on, its completions, their advantages), judged again."""
    training, sampling, judging = settings_of(flags)
    trainer = trl_example.make_trainer(training, sampling, judging)
    inputs, output = sample_with_trl(trainer, training.group_size)
    scaffold, completions = trainer.reward_funcs[0], []
    for i, given in enumerate(inputs):
        problem = scaffold.problems[given["problem_index"]]
        prompt_ids = output["prompt_ids"][i][output["prompt_mask"][i].bool()].tolist()
        assert prompt_ids == exprl.policy_prompt(scaffold.tokenizer, problem["question"])
        ids = output["completion_ids"][i][output["completion_mask"][i].bool()].tolist()
        completions.append(
            exprl.read_completion(problem, prompt_ids, ids, scaffold.tokenizer, scaffold.eos_ids)
        )
    out = Path(training.out) / "again" / "judge"
    out.mkdir(parents=True, exist_ok=True)
    rewards = [
        verdict.rewards for verdict in exprl.Judge(judging, training.method, out)(completions)
    ]
    return output, completions, exprl.compute_advantages(rewards, training)


@pytest.mark.parametrize("norm", ["delta", "group"])
def test_process_has_the_advantages_of_exprl(tiny, judge, no_key, tmp_path, norm):
    made = flags(tiny, judge, tmp_path, "--method", "process", "--process-norm", norm)
    output, completions, by_step = sampled(made)
    expected = torch.zeros(output["completion_ids"].shape)
    for row, completion, advantages in zip(expected, completions, by_step, strict=True):
        for (start, end), advantage in zip(completion.steps, advantages, strict=True):
            row[start:end] = advantage
    assert expected.abs().max() > 0.2
    assert torch.allclose(output["advantages"], expected, atol=1e-6)


def test_outcome_has_the_advantages_of_exprl(tiny, judge, no_key, tmp_path):
    """To 1e-6 without the standard deviation. With it, TRL adds 1e-4 and exprl.py adds 1e-6."""
    for more, tolerance in ((["--no-std"], 1e-6), ([], 2e-3)):
        made = flags(tiny, judge, tmp_path, "--method", "outcome", *more)
        output, _, advantages = sampled(made)
        expected = torch.tensor(advantages)[:, 0]
        assert expected.abs().max() > 0.1
        assert torch.allclose(output["advantages"], expected, atol=tolerance)


def test_a_chat_template_is_filled_in_as_in_exprl(tiny, judge, no_key, tmp_path):
    """Also a template that has a switch for thoughts. `sampled` compares the prompts."""
    shutil.copytree(tiny / "base", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
        "{% if enable_thinking is not defined or enable_thinking %}b{% endif %}"
        "{% if add_generation_prompt %}a{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    more = ("--model", tmp_path / "chat", "--max-new-tokens", 20)
    _, completions, _ = sampled(flags(tiny, judge, tmp_path / "run", *more))
    assert completions[0].prompt_ids[-2:] == tokenizer("<eos>a").input_ids


def test_a_failed_judgement_changes_nothing(tiny, no_key, tmp_path):
    """The other completions of the group keep their advantages."""
    texts = []

    def answer(request):
        if len(request["messages"]) == 1:  # the test call at the start
            return "ready"
        text = request["messages"][1]["content"]
        if text not in texts:
            texts.append(text)
        is_refused = texts.index(text) % 4 == 1
        return (400, {"error": {"message": "no"}}) if is_refused else toy_world.answer(request)

    server = program_judge.ChatServer(answer)
    more = ["--method", "process", "--rubric", "none", "--judge-threads", "1"]
    trainer = trl_example.make_trainer(*settings_of(flags(tiny, server, tmp_path, *more)))
    _, output = sample_with_trl(trainer, 4)
    server.shutdown()
    failed = [advantages is None for advantages in trainer.reward_funcs[0].advantages]
    assert any(failed) and not all(failed)
    for row, has_failed in zip(output["advantages"], failed, strict=True):
        assert not (has_failed and row.any())
    assert output["advantages"].any()


def test_the_settings_are_translated_for_trl(tmp_path):
    training = trl_example.TrlSettings(
        model="", out=str(tmp_path), prompts_per_iteration=6, group_size=4, micro_batch=8,
        iterations=7, optimizer_steps=2, lr=0.5, kl=0.25, clip_low=0.125, clip_high=0.375,
        trl='{"logging_steps": 5}',
    )  # fmt: skip
    sampling = exprl.SamplingSettings(temperature=0.75, max_new_tokens=11, seed=3)
    config = trl_example.grpo_config(training, sampling)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (8, 3)
    assert (config.max_steps, config.num_iterations, config.warmup_steps) == (14, 2, 10)
    assert (config.learning_rate, config.beta, config.temperature) == (0.5, 0.25, 0.75)
    assert (config.epsilon, config.epsilon_high, config.top_k, config.top_p) == (0.125, 0.375, 0, 1)
    assert (config.num_generations, config.max_completion_length, config.seed) == (4, 11, 3)
    assert (config.loss_type, config.scale_rewards, config.logging_steps) == ("dapo", "group", 5)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--prompts-per-iteration", "1", "--micro-batch", "3"], "whole groups"),
        (["--resume"], "--resume is not supported"),
    ],
)
def test_an_unsupported_setting_gets_one_line(tiny, judge, no_key, tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        trl_example.make_trainer(*settings_of(flags(tiny, judge, tmp_path, *more)))


def test_training_on_two_processes(tiny, judge, tmp_path):
    """Through accelerate: each process has its own judge, and there is one trained model."""
    accelerate = Path(sys.executable).parent / "accelerate"
    launch = [accelerate, "launch", "--multi_gpu", "--num_processes", "2"]  # of CPUs it starts one
    out = tmp_path / "run"
    more = ["--lr", "1e-3", "--optimizer-steps", "2", "--kl", "0.02"]
    program = TESTS / "tools" / "trl_example.py"
    command = [str(part) for part in [*launch, program, *flags(tiny, judge, out, *more)]]
    done = subprocess.run(command, env=surroundings(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    log = [record for record in read(out / "metrics.jsonl") if "reward" in record]
    assert len(log) == 2 and all(0 <= record["reward"] <= 1 for record in log)
    for process in ("process-0", "process-1"):
        assert len(read(out / process / "judge_cache.jsonl")) >= 4
    before, after = (
        AutoModelForCausalLM.from_pretrained(path) for path in (tiny / "base", out / "final")
    )
    pairs = zip(before.parameters(), after.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) > 1e-5
