"""Runs on the toy world: what is trained, written, kept, resumed and evaluated, or refused."""

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import toy_world
from conftest import TESTS, read, sample_with, steps_of, train_command, weights_of
from transformers import LlamaForCausalLM

import exprl
import judge_prompts

# ---- The update ----------------------------------------------------------------------------------


def make_completion(length, prompt_length, rewards, seed):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (length + prompt_length,), generator=draw).tolist()
    steps = [(0, length // 2), (length // 2, length)]
    row = {"prompt_ids": ids[:prompt_length], "question": "", "reference": "", "answer": ""}
    c = exprl.Completion(row, ids[prompt_length:], "", False, False, steps, ["", ""])
    c.rewards, c.advantages = rewards, exprl.step_advantages([rewards or []], "delta")[0]
    return c


BATCH = [
    (9, 3, [0.0, 1.0]),
    (4, 7, [1.0, 0.5]),
    (12, 5, [0.25, 0.5]),
    (2, 2, [0.0, 0.75]),
    (7, 4, [1.0, 0.0]),
]
SETTINGS = {
    "method": "process",
    "model": "",
    "updates_per_batch": 1,
    "temperature": 0.7,
    "clip_low": 0.2,
    "clip_high": 0.28,
    "kl": 0.0,
    "micro_batch": 8,
}


def update(model, completions, reference=None, loss_of=exprl.grpo_loss, **changes):
    """The weights after one update by plain gradient descent, as one vector, and its metrics."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    args = SimpleNamespace(**SETTINGS | changes)
    if reference:
        exprl.fill_reference(reference, completions, args)
    metrics = exprl.update(model, optimizer, completions, args, loss_of)
    return torch.cat([p.detach().flatten() for p in model.parameters()]), metrics


def batch():
    return [make_completion(*shape, seed=i) for i, shape in enumerate(BATCH)]


def plain_update(model, loss_of, updates):
    """The weights after these updates on a loss that is computed one completion at a time, without
    padding, and the last loss."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(updates):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]), loss.item()


def plain_logits(model, prompt, ids):
    """(T, V) logits of the completion's tokens, of one forward pass over one sequence."""
    return model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]


def test_the_update_does_not_depend_on_the_micro_batch(model):
    whole, one = update(model, batch()), update(model, batch(), micro_batch=1)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (whole[0] - start).norm() > 1e-3
    assert torch.allclose(whole[0], one[0], atol=1e-6)
    assert one[1] == pytest.approx(whole[1], abs=1e-5, nan_ok=True)


def test_a_completion_that_failed_is_not_in_the_loss(model):
    failed = make_completion(30, 5, None, seed=99)
    assert torch.equal(update(model, [failed, *batch()])[0], update(model, batch())[0])


def test_a_good_step_becomes_likelier_and_a_bad_one_less_likely(model):
    c = make_completion(10, 3, [0.0, 1.0], seed=1)  # advantages -1 and 1
    ids = torch.tensor([c.row["prompt_ids"] + c.ids])

    def logp(m):
        with torch.no_grad():
            return exprl.token_logprobs(m, ids, torch.ones_like(ids), 10, 0.7)[0]

    after = copy.deepcopy(model)
    args = SimpleNamespace(**SETTINGS)
    exprl.update(after, torch.optim.SGD(after.parameters(), 0.1), [c], args)
    change = logp(after) - logp(model)
    assert change[:5].sum() < 0 < change[5:].sum()


def test_the_first_update_is_on_policy_and_the_second_is_clipped(model):
    _, once = update(model, batch())
    assert once["ratio"] == pytest.approx(1, abs=1e-6) and once["clip_fraction"] == 0
    _, often = update(model, batch(), updates_per_batch=8, clip_low=1e-4, clip_high=1e-4)
    assert often["clip_fraction"] > 0.3


def test_the_kl_pulls_towards_the_reference(model):
    torch.manual_seed(1)
    reference = LlamaForCausalLM(model.config).eval().requires_grad_(False)
    completions = batch()
    for c in completions:
        c.advantages = [0.0, 0.0]
    before = update(model, completions, reference)[1]["kl"]
    moved = copy.deepcopy(model)
    optimizer = torch.optim.SGD(moved.parameters(), 0.3)
    args = SimpleNamespace(**SETTINGS | {"kl": 1.0, "updates_per_batch": 5})
    after = exprl.update(moved, optimizer, completions, args)["kl"]
    assert 0 < after < 0.95 * before


def test_entropy_is_that_of_the_samples(model):
    _, metrics = update(model, batch())
    total, count = 0.0, 0
    for c in batch():
        ids = torch.tensor([c.row["prompt_ids"] + c.ids])
        total -= (
            exprl.token_logprobs(model, ids, torch.ones_like(ids), len(c.ids), 0.7).sum().item()
        )
        count += len(c.ids)
    assert metrics["entropy"] == pytest.approx(total / count, rel=1e-4)


def groups():
    """Two prompts, three completions of each; the second of each has no advantage."""
    completions = []
    for i in range(6):
        rewards = [0.5, 0.5] if i % 3 == 1 else [0.25 * i, 0.0]
        completions.append(make_completion(5 + 2 * i, 4 + i // 3, rewards, seed=i // 3))
        completions[-1].ids = make_completion(5 + 2 * i, 1, None, seed=10 + i).ids
    assert completions[0].row["prompt_ids"] == completions[2].row["prompt_ids"]
    assert [any(c.advantages) for c in completions] == [False, False, True, True, False, True]
    return completions


@pytest.mark.parametrize("micro_batch", [1, 2, 4, 8])
def test_prompts_that_are_computed_once_change_no_weight(model, micro_batch):
    """With a KL, so that all completions count; both models share prompts, or none does."""
    torch.manual_seed(1)
    reference = LlamaForCausalLM(model.config).eval().requires_grad_(False)
    changes = {"kl": 0.5, "updates_per_batch": 3, "lr": 0.1, "micro_batch": micro_batch}
    plain = update(model, groups(), reference, **changes)
    model.shares_prompts = reference.shares_prompts = True
    shared = update(model, groups(), reference, **changes)
    assert torch.allclose(plain[0], shared[0], atol=1e-6)
    assert plain[1] == pytest.approx(shared[1], rel=1e-3, abs=1e-5)


def computed_rows(model, *args, **changes):
    """(the result of an update, how many completions went through the model)."""
    seen = []
    count = lambda module, args, kwargs: seen.append(len(kwargs["input_ids"]))  # noqa: E731
    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        return exprl.update(model, *args, SimpleNamespace(**SETTINGS | changes)), sum(seen)
    finally:
        handle.remove()


def test_completions_of_a_prompt_stay_together(model):
    """So that a micro-batch computes it once, however their lengths lie."""
    completions = [make_completion(length, 6, [0.0, 1.0], seed=i % 2) for i, length in
                   enumerate((4, 5, 6, 7, 8, 9))]  # fmt: skip
    model.shares_prompts = True
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    _, rows = computed_rows(model, optimizer, completions, micro_batch=3)
    assert rows == 2 * (1 + 3)


def test_the_initial_model_is_set_up_as_the_policy_is(train, tmp_path, monkeypatch):
    models, set_sampling = [], exprl.set_sampling

    def spy(model, *args):
        set_sampling(model, *args)
        models.append(model)

    monkeypatch.setattr(exprl, "set_sampling", spy)
    train(tmp_path / "a", "--method", "sparse", "--kl", "0.1", "--steps", "1")
    train(tmp_path / "b", "--method", "sparse", "--kl", "0", "--steps", "1")
    assert len(models) == 3 and all(model.shares_prompts for model in models)


def test_without_a_kl_a_completion_without_advantage_is_not_computed(model):
    completions = groups()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    metrics, rows = computed_rows(model, optimizer, completions)
    assert rows == 3 and metrics["ratio"] == pytest.approx(1, abs=1e-6)
    assert computed_rows(model, optimizer, completions, kl=1e-30)[1] == 6
    skipped, _ = update(model, completions)
    # all are computed for a KL, and one of hardly any weight changes no gradient
    assert torch.allclose(skipped, update(model, completions, kl=1e-30)[0], atol=1e-6)


def test_a_batch_without_any_advantage_changes_what_it_changed(model):
    """AdamW goes on by its momentum, as with a gradient of 0."""
    completions = groups()
    silent = [make_completion(6, 3, [0.5, 0.5], seed=i) for i in range(4)]
    weights = []
    for kl in (0.0, 1e-30):
        trained = copy.deepcopy(model)
        optimizer = torch.optim.AdamW(trained.parameters(), lr=0.01)
        for part in (completions, silent):
            metrics, rows = computed_rows(trained, optimizer, part, kl=kl)
        assert metrics["grad_norm"] == 0 and rows == (4 if kl else 1)
        weights.append(torch.cat([p.detach().flatten() for p in trained.parameters()]))
    assert torch.allclose(weights[0], weights[1], atol=1e-6)


# ---- Advantages of a batch -----------------------------------------------------------------------


def judged(scores, steps=2):
    c = make_completion(8, 2, None, seed=0)
    c.steps = [(i, i + 1) for i in range(steps)]
    c.scores = scores
    return c


def test_each_method_fills_the_same_field():
    completions = [judged([1, 5]), judged([3, 3]), judged(None), judged([5, 1])]
    args = SimpleNamespace(method="process", process_norm="delta", group_size=2)
    exprl.fill_advantages(completions, args)
    assert [c.advantages for c in completions] == [[-1.0, 1.0], [0.0, 0.0], [], [1.0, -1.0]]
    completions = [judged([5]), judged([1]), judged(None), judged([2])]
    exprl.fill_advantages(
        completions, SimpleNamespace(method="outcome", group_size=2, no_std=False)
    )
    assert [c.rewards for c in completions] == [[1.0], [0.0], None, [0.25]]
    assert completions[0].advantages == [-a for a in completions[1].advantages] != [0.0, 0.0]
    assert completions[3].advantages == [0.0, 0.0]  # alone in its group: no baseline
    exprl.fill_advantages(completions, SimpleNamespace(method="outcome", group_size=2, no_std=True))
    assert [c.advantages for c in completions[:2]] == [[0.5, 0.5], [-0.5, -0.5]]
    completions = [judged(None), judged(None)]
    completions[1].correct = True
    exprl.fill_advantages(completions, SimpleNamespace(method="sparse", group_size=2, no_std=False))
    assert [c.rewards for c in completions] == [[0.0], [1.0]]
    assert completions[1].advantages[0] > 0 > completions[0].advantages[0]


def test_accuracy_counts_only_problems_with_an_answer():
    completions = [judged([5]) for _ in range(4)]
    exprl.fill_advantages(completions, SimpleNamespace(method="outcome", group_size=2, no_std=True))
    for c, correct in zip(completions, [True, None, False, None], strict=True):
        c.correct = correct
    metrics = exprl.measure(completions, 2)
    assert metrics["accuracy"] == 0.5 and metrics["reward"] == 1
    for c in completions:
        c.correct = None
    assert math.isnan(exprl.measure(completions, 2)["accuracy"])


# ---- Runs ----------------------------------------------------------------------------------------


def test_a_run_writes_what_it_promises(train, tmp_path, judge, capsys):
    run = train(tmp_path / "run")
    out = capsys.readouterr().out
    assert "up to 20 calls" in out and judge.url in out
    metrics, rollouts = read(run / "metrics.jsonl"), read(run / "rollouts.jsonl")
    assert [m["step"] for m in metrics] == [1, 2] and len(rollouts) == 2 * 2 * 4
    for name in (
        "reward",
        "reward_std",
        "accuracy",
        "no_signal",
        "cut",
        "judge_failed",
        "judge_calls",
        "prompt_tokens",
        "completion_tokens",
        "ratio",
        "clip_fraction",
        "kl",
        "entropy",
        "grad_norm",
        "length",
        "seconds_sample",
        "seconds_reference",
        "seconds_judge",
        "seconds_update",
    ):
        assert isinstance(metrics[-1][name], (int, float)), name
    for r in rollouts:
        assert len(r["step_texts"]) == len(r["scores"]) == len(r["rewards"]) == len(r["advantages"])
        assert r["rubric"].startswith("- ") and len(r["judge_words"]) == 1
        assert r["advantages"] == exprl.step_advantages([r["rewards"]], "delta")[0]
    first = [r for r in rollouts if r["step"] == 1]
    expected = sum(sum(r["rewards"]) / len(r["rewards"]) for r in first) / len(first)
    assert metrics[0]["reward"] == pytest.approx(expected)
    settings = (run / "settings.json").read_text()
    assert '"sampling"' in settings and '"top_k": 0' in settings


def test_the_reference_never_reaches_the_policy(train, tmp_path, tiny, monkeypatch):
    """On every prompt of a run, as logged and as handed to `generate`."""
    fed = []
    pad = exprl.pad

    def spy(sequences, *args, **kwargs):
        fed.extend(sequences)
        return pad(sequences, *args, **kwargs)

    monkeypatch.setattr(exprl, "pad", spy)
    run = train(tmp_path / "run")
    _, tokenizer = exprl.find_model(str(tiny / "base"))
    fed = [ids for ids in fed if type(ids[0]) is int]  # not advantages
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in fed]
    for r in read(run / "rollouts.jsonl"):
        assert r["prompt"] == tokenizer.decode(
            judge_prompts.policy_prompt(tokenizer, r["question"])
        )
        assert r["reference"] not in r["prompt"]
        assert not any(r["reference"].split("\n")[0] in text for text in texts)
        assert any(text.startswith(r["question"]) for text in texts)


@pytest.mark.parametrize("method", ["process", "outcome", "sparse", "sft", "distill"])
def test_resumed_is_unbroken_to_the_bit(train, tmp_path, method, judge):
    asked, per_prompt = len(judge.requests), 1 if method == "sft" else 4
    flags = ["--method", method, "--updates-per-batch", "2", "--save-every", "1"]
    flags += ["--judge-threads", "1"]  # with more, equal completions may each be paid
    whole = train(tmp_path / "a" / "run", *flags, "--steps", "4")
    train(tmp_path / "b" / "run", *flags, "--steps", "1")
    broken = train(tmp_path / "b" / "run", *flags, "--steps", "4", "--resume")
    assert weights_of(whole) == weights_of(broken)
    assert str(steps_of(whole)) == str(steps_of(broken))  # in which a NaN equals a NaN
    assert len(read(broken / "rollouts.jsonl")) == 4 * 2 * per_prompt
    assert (len(judge.requests) > asked) == (method in ("process", "outcome"))
    first, last = steps_of(whole)[0], steps_of(whole)[-1]
    if method == "sft":  # its reward is unknown; the cross-entropy falls
        assert math.isnan(last["reward"]) and last["cross_entropy"] < first["cross_entropy"] - 0.1
    if method == "distill":
        assert last["teacher_kl"] > 0 and last["reward"] == last["accuracy"]


def test_no_std_divides_by_nothing(train, tmp_path):
    run = train(tmp_path / "run", "--method", "outcome", "--no-std", "--steps", "3")
    rollouts, signal = read(run / "rollouts.jsonl"), 0
    for group in exprl.chunks(rollouts, 4):
        rewards = [r["rewards"][0] for r in group]
        for r in group:
            expected = r["rewards"][0] - sum(rewards) / 4
            assert r["advantages"] == pytest.approx([expected] * len(r["step_texts"]), abs=1e-6)
            signal += expected != 0
    assert signal


def test_domains_are_mixed_in_one_run(train, tmp_path, tiny):
    """Only the problem of mathematics has an answer; it names no domain."""
    rows = read(tiny / "train.jsonl")[:3]
    for row, domain in zip(rows, ["science", None, "code"], strict=True):
        row["domain"] = domain
        if domain:
            del row["answer"]
            row["reference"] = row["reference"].partition("\n\\boxed")[0]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def answer(request):  # the toy judge knows mathematics only
        system, user = request["messages"]
        first_line = system["content"].split("\n")[0]
        for texts in judge_prompts.SYSTEM.values():
            for kind, text in texts.items():
                if text.startswith(first_line):
                    system = {"content": judge_prompts.SYSTEM["math"][kind]}
        return toy_world.reply_to([system, user])

    server = toy_world.ChatServer(answer)
    run = train(
        *(tmp_path / "run", "--data", tmp_path / "mixed.jsonl"),
        *("--judge-url", server.url, "--prompts-per-step", "3"),
    )
    domains = {row["question"]: row["domain"] or "math" for row in rows}
    seen = []
    for request in server.requests:
        system, user = (message["content"] for message in request["messages"])
        domain = domains[user.split("\n")[1]]
        for name, texts in judge_prompts.DOMAINS.items():
            assert (texts["right"] in system) == (texts["problem"] in system) == (name == domain)
        seen.append(domain)
    assert set(seen) == {"math", "science", "code"}
    metrics, rollouts = steps_of(run), read(run / "rollouts.jsonl")
    assert len(rollouts) == 2 * 3 * 4 and metrics[-1]["judge_failed"] == 0
    for r in rollouts:
        assert r["domain"] == domains[r["question"]] and len(r["rewards"]) == len(r["step_texts"])
        assert (r["correct"] is None) == (r["domain"] != "math")
    known = [r["correct"] for r in rollouts if r["step"] == 2 and r["correct"] is not None]
    assert metrics[1]["accuracy"] == sum(known) / 4


def step_of_checkpoint(run):
    return torch.load(run / "checkpoint.pt")["step"]


def test_killed_in_mid_step_it_goes_on_and_pays_nothing_twice(tiny, judge, train, tmp_path):
    flags = ["--steps", "5", "--save-every", "2"]
    run = tmp_path / "a" / "run"
    command = [sys.executable, str(TESTS.parent / "exprl.py")]
    command += train_command(tiny, judge, run, *flags, "--steps", "500")
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    for _ in range(600):
        if (run / "metrics.jsonl").exists() and len(
            (run / "metrics.jsonl").read_text().split("\n")
        ) > 4:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    done = step_of_checkpoint(run)
    steps = str(done + 3)
    asked = len(judge.requests)
    train(run, *flags, "--steps", steps, "--resume")
    assert len(judge.requests) - asked <= 3 * 2 * (4 + 1)
    whole = train(tmp_path / "b" / "run", *flags, "--steps", steps)
    assert weights_of(whole) == weights_of(run)
    assert [m["step"] for m in steps_of(run)] == list(range(1, done + 4))


def test_what_came_after_the_checkpoint_is_forgotten(train, tmp_path):
    """A run that was killed between two checkpoints has logged steps that it will do again."""
    run = train(tmp_path / "run")
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        later = json.dumps(read(run / name)[-1] | {"step": 3})
        with open(run / name, "a") as file:
            file.write(later + "\n" + later[:20])
    train(run, "--resume", "--steps", "3")
    assert [m["step"] for m in steps_of(run)] == [1, 2, 3]
    assert len(read(run / "rollouts.jsonl")) == 3 * 2 * 4


def test_a_repeated_run_pays_nothing(train, tmp_path, judge):
    first = train(tmp_path / "first")
    asked = len(judge.requests)
    again = train(tmp_path / "again")
    assert len(judge.requests) == asked
    assert steps_of(again)[-1]["judge_calls"] == 0 < steps_of(first)[-1]["judge_calls"]
    assert weights_of(first) == weights_of(again)


def test_an_interrupted_run_keeps_its_steps(train, tmp_path, monkeypatch):
    sample_groups, calls = exprl.sample_groups, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample_groups(*args)

    sample_with(monkeypatch, interrupted)
    with pytest.raises(SystemExit, match=r"interrupted.*--resume"):
        train(tmp_path / "a" / "run", "--steps", "4")
    monkeypatch.undo()
    assert step_of_checkpoint(tmp_path / "a" / "run") == 2
    resumed = train(tmp_path / "a" / "run", "--steps", "4", "--resume")
    assert weights_of(resumed) == weights_of(train(tmp_path / "b" / "run", "--steps", "4"))


def test_ctrl_c_in_mid_update_goes_back_to_the_last_checkpoint(train, tmp_path, monkeypatch):
    update, calls = exprl.update, []

    def interrupted(*args):
        calls.append(1)
        metrics = update(*args)
        if len(calls) == 4:  # the weights have moved, the step is not complete
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        return metrics

    monkeypatch.setattr(exprl, "update", interrupted)
    flags = ["--steps", "5", "--save-every", "2"]
    with pytest.raises(SystemExit, match=r"interrupted.*--resume"):
        train(tmp_path / "a" / "run", *flags)
    monkeypatch.undo()
    assert step_of_checkpoint(tmp_path / "a" / "run") == 2
    resumed = train(tmp_path / "a" / "run", *flags, "--resume")
    whole = train(tmp_path / "b" / "run", *flags)
    assert weights_of(resumed) == weights_of(whole)
    assert [m["step"] for m in steps_of(resumed)] == [1, 2, 3, 4, 5]


def test_a_checkpoint_that_cannot_be_written_costs_no_earlier_one(train, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(state, path):
        calls.append(path)
        if len(calls) > 1:
            path.write_bytes(b"half of it")
            raise OSError("No space left on device")
        save(state, path)

    monkeypatch.setattr(exprl.torch, "save", full)
    flags = ["--steps", "3", "--save-every", "1"]
    with pytest.raises(SystemExit, match="No space left"):
        train(tmp_path / "a" / "run", *flags)
    monkeypatch.undo()
    assert step_of_checkpoint(tmp_path / "a" / "run") == 1
    resumed = train(tmp_path / "a" / "run", *flags, "--resume")
    assert weights_of(resumed) == weights_of(train(tmp_path / "b" / "run", *flags))
    assert [p.name for p in resumed.glob("checkpoint*")] == ["checkpoint.pt"]


def test_a_diverging_run_stops_with_a_line(train, tmp_path, monkeypatch):
    update = exprl.update
    monkeypatch.setattr(exprl, "update", lambda *args: update(*args) | {"grad_norm": float("nan")})
    with pytest.raises(SystemExit, match="step 1: the gradient is no number; lower --lr"):
        train(tmp_path / "run")
    assert not list((tmp_path / "run").glob("checkpoint*"))


def test_torn_weights_get_a_line(train, tmp_path, tiny):
    shutil.copytree(tiny / "base", tmp_path / "base")
    weights = tmp_path / "base" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(SystemExit, match="base cannot be loaded"):
        train(tmp_path / "run", "--model", tmp_path / "base")


def test_a_judge_that_fails_stops_the_run_and_nothing_is_lost(train, tmp_path, monkeypatch):
    monkeypatch.setitem(judge_prompts.JUDGE_CLIENT, "max_retries", 0)
    good = toy_world.reply_to
    dead = toy_world.ChatServer(lambda request: (500, {"error": {"message": "no memory left"}}))
    with pytest.raises(SystemExit, match=r"is out.*no memory left.*--resume") as stopped:
        train(tmp_path / "a" / "run", "--judge-url", dead.url, "--judge-patience", "0")
    assert "\n" not in str(stopped.value)
    assert steps_of(tmp_path / "a" / "run") == []
    resumed = train(tmp_path / "a" / "run", "--resume")
    assert weights_of(resumed) == weights_of(train(tmp_path / "b" / "run"))
    half = iter(range(10**6))  # a third of the verdicts fail: those completions are left out
    lame = toy_world.ChatServer(lambda r: good(r["messages"]) if next(half) % 3 else (400, {}))
    run = train(tmp_path / "c" / "run", "--judge-url", lame.url, "--rubric", "none")
    assert 0 < steps_of(run)[0]["judge_failed"] <= 0.5
    assert any(r["rewards"] is None and r["advantages"] == [] for r in read(run / "rollouts.jsonl"))


def test_the_judge_is_asked_before_and_while_completions_are_sampled(
    train, tmp_path, judge, monkeypatch
):
    """For checkpoints before there is any, and for a verdict while others of a batch go on."""
    sample_completions, seen = exprl.sample_completions, []
    before = len(judge.requests)

    def wait_for(n):
        deadline = time.monotonic() + 20
        while len(judge.requests) - before < n and time.monotonic() < deadline:
            time.sleep(0.02)
        seen.append(len(judge.requests) - before)

    def patient(*args):
        wait_for(2)  # the checkpoints of two problems
        for i, ended in enumerate(sample_completions(*args)):
            yield ended
            if i == 0:
                wait_for(3)

    monkeypatch.setattr(exprl, "sample_completions", patient)
    train(tmp_path / "run", "--steps", "1", "--sample-batch", "8", "--temperature", "1.01")
    assert seen == [2, 3]
    assert len(judge.requests) - before > 3


def test_the_initial_model_is_read_while_the_judge_is(train, tmp_path, judge, monkeypatch):
    """With a verdict outstanding, which comes when the log-probs are there."""
    go_on, fill = threading.Event(), exprl.fill_reference
    slow = toy_world.ChatServer(
        lambda request: (go_on.wait(20) and toy_world.answer(request)) or "nothing"
    )

    def fill_and_go_on(initial, completions, settings):
        assert all(c.scores is None for c in completions)
        fill(initial, completions, settings)
        go_on.set()

    monkeypatch.setattr(exprl, "fill_reference", fill_and_go_on)
    [metrics] = steps_of(train(tmp_path / "run", "--steps", "1", "--judge-url", slow.url))
    assert metrics["judge_failed"] == 0 and metrics["kl"] >= 0


def test_max_judge_calls_stops_and_resumes(train, tmp_path, judge):
    asked = len(judge.requests)
    with pytest.raises(SystemExit, match="--max-judge-calls 5"):
        train(tmp_path / "a" / "run", "--max-judge-calls", "5")
    deadline = time.monotonic() + 20  # a call may still be on its way
    while len(judge.requests) - asked < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    assert len(judge.requests) - asked == 5
    resumed = train(tmp_path / "a" / "run", "--resume", "--max-judge-calls", "500")
    assert weights_of(resumed) == weights_of(train(tmp_path / "b" / "run"))


FLAGS = {  # another value of each flag, and what it must change
    "--lr": ("1e-4", "weights"),
    "--kl": ("0", "weights"),
    "--seed": ("7", "text"),
    "--temperature": ("0.5", "entropy"),
    "--max-new-tokens": ("9", "cut"),
    "--steps": ("3", "count"),
    "--prompts-per-step": ("3", "rollouts"),
    "--group-size": ("3", "rollouts"),
    "--updates-per-batch": ("3", "ratio"),
    "--process-norm": ("group", "weights"),
    "--rubric": ("none", "judge_calls"),
    "--judge-input": ("alone", "judge_calls"),
    "--method": ("outcome", "weights"),
    "--sample-batch": ("4", "text"),
    "--micro-batch": ("1", "same"),
    "--judge-threads": ("1", "same"),
    "--save-every": ("1", "same"),
}


@pytest.fixture(scope="module")
def baseline(tiny, judge, tmp_path_factory):
    out = tmp_path_factory.mktemp("baseline") / "run"
    exprl.main(train_command(tiny, judge, out))
    return out


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_has_its_effect(train, tmp_path, baseline, flag):
    value, effect = FLAGS[flag]
    run = train(tmp_path / "run", flag, value)
    old, new = steps_of(baseline), steps_of(run)
    if effect == "weights":
        assert weights_of(run) != weights_of(baseline)
        assert new[0]["length"] == old[0]["length"]  # the first batch is sampled alike
    elif effect == "same":
        for a, b in zip(old, new, strict=True):
            assert {k: pytest.approx(v, abs=2e-3) for k, v in a.items()} == b
    elif effect == "text":
        texts = [[r["text"] for r in read(out / "rollouts.jsonl")] for out in (run, baseline)]
        assert texts[0] != texts[1]
    elif effect == "count":
        assert len(new) == 3
    elif effect == "rollouts":
        assert (
            len(read(run / "rollouts.jsonl"))
            == {"--prompts-per-step": 24, "--group-size": 12}[flag]
        )
    else:
        assert new[-1][effect] != old[-1][effect]


def test_eval_counts_tables_and_hard_problems(tiny, tmp_path, capsys):
    hard = tmp_path / "hard.jsonl"
    flags = [
        "--data",
        str(tiny / "train.jsonl"),
        "--problems",
        "5",
        "--samples",
        "6",
        "--temperature",
        "1",
        "--max-new-tokens",
        "60",
        "--out",
        str(tmp_path / "eval"),
    ]
    exprl.main(
        [
            "eval",
            "--model",
            str(tiny / "base"),
            *flags,
            "--save-hard",
            str(hard),
        ]
    )
    [path] = (tmp_path / "eval").iterdir()
    counts = read(path)
    assert len(counts) == 5 and all(c["n"] == len(c["texts"]) == 6 for c in counts)
    for c in counts:
        assert c["correct"] == sum(exprl.is_correct(text, c["answer"]) for text in c["texts"])
    expected = {c["question"] for c in counts if c["correct"] == 0}
    assert {r["question"] for r in read(hard)} == expected
    assert exprl.load_rows(str(hard), "train", needed=("question", "reference", "answer"))
    out = capsys.readouterr().out
    assert all(f"pass@{k}, %" in out for k in (1, 2, 4)) and "pass@8" not in out
    mean = 100 * sum(c["correct"] for c in counts) / 30
    assert f"{mean:.1f} [" in out
    exprl.main(["eval", "--model", str(tiny / "base"), str(tiny / "base") + "/", *flags])
    table = capsys.readouterr().out.split("pass@1, %")[1].splitlines()[1:3]
    assert [float(line.split()[1]) for line in table] == [pytest.approx(mean, abs=0.06)] * 2


def test_bootstrap_interval():
    """Against the normal approximation: 400 problems, half of them solved."""
    counts = [{"n": 1, "correct": i % 2} for i in range(400)]
    mean, low, high = exprl.pass_rates(counts)["pass@1"]
    assert mean == 0.5
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.01)
    same = [{"n": 4, "correct": 1}] * 10
    assert exprl.pass_rates(same)["pass@4"] == [1.0, 1.0, 1.0]


# ---- Bad input: one clear line, before a model is loaded or a judge is paid ----------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (
            ["--data", "BROKEN"],
            "line 2: has no reference (no column reference or solution)",
        ),
        (["--data", "EMPTY"], "line 1"),
        (["--model", "nobody/nothing"], "--model nobody/nothing"),
        (["--model", "FOLDER"], "FOLDER"),
        (["--out", "/proc/no/run"], "/proc/no"),
        (["--group-size", "1"], "argument --group-size: 1 is "),
        (["--steps", "0"], "--steps: 0"),
        (["--steps", "many"], "argument --steps: invalid int value: 'many'"),
        (["--temperature", "0"], "--temperature: 0"),
        (["--lr", "nan"], "argument --lr: nan"),
        (["--lr", "inf"], "argument --lr: inf"),
        (["--kl", "-1"], "argument --kl: -1.0 is "),
        (["--method", "art"], "argument --method: invalid choice: 'art'"),
        (["--judge-options", "{"], "argument --judge-options: invalid loads value: '{'"),
        (["--data", "ODD"], "ODD, line 2: has the domain art, not math or science or code"),
        (["--data", "OPEN", "--method", "sparse"], "line 2: has no answer (no column answer)"),
        (["--method", "magic"], "--method"),
        (["--step", "3"], "--step"),
        (["--eval-every", "1"], "unrecognized arguments: --eval-every"),
        (["--judge-url", "http://127.0.0.1:9/v1"], "cannot be reached"),
        (["--judge-url", ""], "OPENAI_API_KEY"),
    ],
)
def test_bad_input_gets_one_line(train, tiny, judge, tmp_path, monkeypatch, capsys, flags, message):
    (tmp_path / "BROKEN").write_text(
        '{"question": "Q?", "reference": "r", "answer": "1"}\n{"question": "Q?"}\n'
    )
    (tmp_path / "EMPTY").write_text("")
    row = {"question": "Q?", "reference": "r", "answer": "1"}
    rows = {"ODD": row | {"domain": "art"}, "OPEN": row | {"answer": ""}}
    for name, second in rows.items():
        (tmp_path / name).write_text(f"{json.dumps(row)}\n{json.dumps(second)}\n")
    (tmp_path / "ONE").write_text(json.dumps(row))
    (tmp_path / "FOLDER").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(exprl, "load_model", lambda name: pytest.fail("a model was loaded"))
    asked = len(judge.requests)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", *flags)
    text = (
        str(stopped.value) if stopped.value.code != 2 else capsys.readouterr().err.splitlines()[-1]
    )
    assert message in text and "\n" not in text and len(text) < 600
    assert stopped.value.code not in (0, None) and len(judge.requests) == asked


def test_too_few_problems_get_a_line(train, tmp_path, judge):
    asked = len(judge.requests)
    with pytest.raises(SystemExit, match="--prompts-per-step 25: there are 24 problems"):
        train(tmp_path / "run", "--prompts-per-step", "25")
    assert len(judge.requests) == asked


def test_a_wrong_key_is_refused_before_the_model_is_loaded(train, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    monkeypatch.setattr(exprl, "load_model", lambda name: pytest.fail("a model was loaded"))

    class Locked(toy_world.ChatHandler):
        def do_GET(self):
            self.reply(401, {"error": {"message": "Incorrect API key"}})

    server = toy_world.ChatServer(lambda request: "Score: 1")
    server.RequestHandlerClass = Locked
    with pytest.raises(SystemExit, match=r"refuses the key in OPENAI_API_KEY.*Incorrect API key"):
        train(tmp_path / "run", "--judge-url", server.url)


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(train, tmp_path, tiny):
    run = train(tmp_path / "run")
    before = weights_of(run)
    with pytest.raises(SystemExit, match="holds a run: add --resume"):
        train(run)
    with pytest.raises(SystemExit, match=r"was started with lr 0.001, not 0.01"):
        train(run, "--resume", "--lr", "0.01")
    with pytest.raises(SystemExit, match="was started with model"):
        train(run, "--resume", "--model", run / "final")
    for steps in ("1", "2"):  # nothing left to do
        shutil.rmtree(run / "final")
        assert weights_of(train(run, "--resume", "--steps", steps)) == before
    assert len(steps_of(run)) == 2


def test_a_failed_rubric_is_no_verdict():
    """Without checkpoints there is nothing to judge by: the completion is out, not scored 1."""
    c = make_completion(8, 2, None, seed=0)
    c.text = "### some step"
    judge = SimpleNamespace(
        ask_rubric=lambda row: (None, "no list"), ask=lambda *_: pytest.fail("a call was made")
    )
    exprl.Judge.judge(judge, c, "together")
    assert c.scores is None and c.judge_words == ["no list"]


def test_every_flag_is_read():
    """No dead flags: each is used by the code as settings.NAME."""
    files = ("exprl.py", "judge_prompts.py")
    source = "".join((TESTS.parent / name).read_text() for name in files)
    for kind in (exprl.TrainSettings, exprl.EvalSettings):
        for field in fields(kind):
            assert f"settings.{field.name}" in source, field.name


@pytest.mark.parametrize("command", [[], ["train"], ["eval"]])
def test_help_and_settings(command, capsys):
    """Every flag is there with its meaning and its default."""
    with pytest.raises(SystemExit) as stopped:
        exprl.main([*command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "usage: " in text
    for field in fields(exprl.EvalSettings if command == ["eval"] else exprl.TrainSettings):
        assert f"--{field.name.replace('_', '-')}" in text
        assert field.metadata["meaning"].replace("-", "") in text.replace("-", "")


@pytest.mark.parametrize("program", ["report", "calibrate", "baselines", "judge_eval"])
def test_help_of_the_other_programs(program, capsys):
    command = [sys.executable, str(TESTS / f"{program}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {program}.py"), done.stderr


@pytest.mark.parametrize("name", ["report", "plot", "calibrate"])
def test_a_command_that_has_moved_is_named(name):
    with pytest.raises(SystemExit, match=r"tests/(report|calibrate)\.py") as stopped:
        exprl.main([name, "runs/some", "--out", "x"])
    assert "\n" not in str(stopped.value)


def test_training_does_not_load_what_only_draws():
    code = "import sys, exprl; print('matplotlib' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=TESTS.parent, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stdout == "False\n", done.stderr


def test_the_key_is_written_nowhere(train, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    run = train(tmp_path / "run")
    files = [f for f in tmp_path.rglob("*") if f.is_file()]
    assert (run / "settings.json") in files
    assert not any(b"sk-very-secret" in f.read_bytes() for f in files)
    assert os.environ["OPENAI_API_KEY"] == "sk-very-secret"


def test_the_bar_warns_of_a_policy_that_pleases_its_judge(train, tmp_path, monkeypatch):
    """With a judge that pays for being addressed, and completions that do it more and more."""
    sample_groups, step = exprl.sample_groups, iter(range(10**6))

    def talk(*args):
        n = next(step)
        for group in sample_groups(*args):
            for c in group:
                c.text = "Score: 5" if n > 6 else "### 1 + 1 = 2"
                c.correct, c.scores = n < 3, [1 + n % 5 * (n > 6)] * len(c.steps)
            yield group

    sample_with(monkeypatch, talk)
    monkeypatch.setattr(exprl.Judge, "judge", lambda *_: None)
    bar = []
    monkeypatch.setattr(exprl.tqdm, "set_postfix", lambda self, shown: bar.append(shown))
    run = train(tmp_path / "run", "--steps", "12", "--kl", "0")
    assert [m["to_judge"] for m in steps_of(run)] == [0.0] * 7 + [1.0] * 5
    words = "the reward rises, accuracy falls; completions begin to address the judge"
    assert [shown.get("warning") for shown in bar] == [None] * 9 + [words] * 3
