"""The update, the advantages of a batch, and whole runs on the toy world."""

import contextlib
import copy
import gc
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import fields

import program_judge
import pytest
import torch
import toy_world
from conftest import ROOT, SETTINGS, iterations_of, read, train_command, weights_of
from transformers import LlamaForCausalLM

import exprl

# ---- The update ----------------------------------------------------------------------------------


def make_completion(prompt_ids, length, seed):
    """A completion of random tokens in two steps."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 40, (length,), generator=draw).tolist()
    steps = [(0, length // 2), (length // 2, length)]
    return exprl.Completion({}, "", ["", ""], steps, None, False, prompt_ids, ids)


def make_batch():
    """Three completions of one prompt and two of another, with their advantages."""
    prompts = [[5, 6, 7]] * 3 + [[8, 9, 10, 11, 12]] * 2
    lengths = [9, 4, 12, 2, 7]
    completions = [make_completion(p, n, n) for p, n in zip(prompts, lengths, strict=True)]
    return completions, [[-1.0, 1.0], [0.5, -0.5], [0.25], [0.0, 0.75], [-1.0, 0.0]]


def make_training(**changes):
    return exprl.TrainingSettings(**{"model": "", "kl": 0.0} | changes)


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def update(model, completions, advantages, initial=None, lr=0.1, **changes):
    """Return the weights after one update by plain gradient descent, and the metrics."""
    model = copy.deepcopy(model)
    training = make_training(**changes)
    batches = exprl.make_micro_batches(completions, training.micro_batch, "cpu")
    if initial:
        exprl.add_initial_logprobs(initial, batches)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    metrics = exprl.update(model, optimizer, batches, advantages, training)
    return flat(model), metrics


def plain_logprobs(model, completion):
    """The log-probs of a completion's tokens, from one forward pass over one sequence."""
    sequence = torch.tensor([completion.prompt_ids + completion.ids])
    logits = model(sequence).logits[0, len(completion.prompt_ids) - 1 : -1]
    logp = (logits / model.generation_config.temperature).log_softmax(-1)
    return logp.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]


def plain_update(model, completions, advantages, initial, lr, **changes):
    """What `update` does, written for one completion at a time, without padding and masks."""
    model = copy.deepcopy(model)
    training = make_training(**changes)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    judged = [c for c, values in zip(completions, advantages, strict=True) if values is not None]
    n_tokens = sum(len(c.ids) for c in judged)
    with torch.no_grad():
        old = [plain_logprobs(model, c) for c in completions]
        first = [plain_logprobs(initial, c) for c in completions]
    for _ in range(training.optimizer_steps):
        total = 0.0
        for c, values, logp_old, logp_initial in zip(
            completions, advantages, old, first, strict=True
        ):
            if values is None:
                continue
            border = c.steps[0][1]
            A = torch.tensor([values[0]] * border + [values[-1]] * (len(c.ids) - border))
            logp = plain_logprobs(model, c)
            ratio = (logp - logp_old).exp()
            clipped = ratio.clamp(1 - training.clip_low, 1 + training.clip_high)
            log_r = logp_initial - logp
            loss = -torch.minimum(ratio * A, clipped * A)
            total += (loss + training.kl * (log_r.exp() - 1 - log_r)).sum()
        (total / n_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return flat(model)


@pytest.fixture
def initial(model):
    """Another random model, as the initial policy."""
    torch.manual_seed(1)
    initial = LlamaForCausalLM(model.config).eval().requires_grad_(False)
    initial.generation_config.temperature = model.generation_config.temperature
    return initial


@pytest.mark.parametrize("optimizer_steps", [1, 3])
@pytest.mark.parametrize("micro_batch", [1, 2, 8])
def test_the_update_is_that_of_a_plain_loop(model, initial, micro_batch, optimizer_steps):
    """This tests the masks, the one denominator, the old log-probs, the clipping and the KL."""
    completions, advantages = make_batch()
    advantages[1] = None  # the judge failed
    changes = {"optimizer_steps": optimizer_steps, "kl": 0.5, "clip_low": 0.02, "clip_high": 0.03}
    plain = plain_update(model, completions, advantages, initial, 1.0, **changes)
    ours, _ = update(
        model, completions, advantages, initial, 1.0, micro_batch=micro_batch, **changes
    )
    assert (plain - flat(model)).norm() > 0.1
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-4)
    if optimizer_steps > 1:  # otherwise no ratio differs from 1, and nothing can be clipped
        wide = changes | {"clip_low": 0.9, "clip_high": 9.0}
        assert not torch.allclose(
            update(model, completions, advantages, initial, 1.0, **wide)[0], plain, atol=1e-3
        )


def test_neither_weights_nor_metrics_depend_on_the_micro_batch(model, initial):
    whole, metrics = update(model, *make_batch(), initial, micro_batch=8, kl=0.5)
    singly, same = update(model, *make_batch(), initial, micro_batch=1, kl=0.5)
    torch.testing.assert_close(singly, whole, atol=1e-6, rtol=1e-4)
    assert same == pytest.approx(metrics, rel=1e-4)


@pytest.mark.parametrize("failed", [[0], [1, 4], [3, 4]])
@pytest.mark.parametrize("micro_batch", [1, 8])
def test_a_completion_that_the_judge_failed_on_is_in_no_loss(model, initial, failed, micro_batch):
    """The result is that without the completion, with a KL penalty too."""
    completions, advantages = make_batch()
    kept = [i for i in range(5) if i not in failed]
    without = [completions[i] for i in kept], [advantages[i] for i in kept]
    for i in failed:
        advantages[i] = None
    settings = {"kl": 0.5, "micro_batch": micro_batch, "optimizer_steps": 2}
    weights, metrics = update(model, completions, advantages, initial, **settings)
    expected, expected_metrics = update(model, *without, initial, **settings)
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=1e-4)
    assert metrics == pytest.approx(expected_metrics, rel=1e-4)


def test_a_good_step_becomes_likelier_and_a_bad_one_less_likely(model):
    completion = make_completion([5, 6, 7], 10, seed=1)
    after = copy.deepcopy(model)
    batches = exprl.make_micro_batches([completion], 4, "cpu")
    optimizer = torch.optim.SGD(after.parameters(), 0.1)
    exprl.update(after, optimizer, batches, [[-1.0, 1.0]], make_training())
    change = plain_logprobs(after, completion) - plain_logprobs(model, completion)
    assert change[:5].sum() < 0 < change[5:].sum()


def test_the_kl_pulls_towards_the_initial_policy(model, initial):
    completions, _ = make_batch()
    silent = [[0.0]] * 5
    before = update(model, completions, silent, initial, kl=1.0)[1]["kl"]
    after = update(model, completions, silent, initial, 0.3, kl=1.0, optimizer_steps=6)[1]["kl"]
    assert 0 < after < 0.95 * before


def test_the_kl_of_the_initial_policy_itself_is_0_and_is_logged(model):
    _, metrics = update(model, *make_batch(), model, kl=1.0)
    assert metrics["kl"] == pytest.approx(0, abs=1e-9)


def test_entropy_is_the_mean_over_the_sampled_tokens(model):
    completions, advantages = make_batch()
    _, metrics = update(model, completions, advantages, optimizer_steps=2)
    with torch.no_grad():
        logp = torch.cat([plain_logprobs(model, c) for c in completions])
    assert metrics["entropy"] == pytest.approx(-logp.mean().item(), rel=1e-4)


def test_the_gradient_is_finite_where_a_padded_token_is_next_to_impossible(model, initial):
    """exp(logp_initial - logp) overflows float32 where the padded token's log-prob is below -88.

    The second completion is padded with token 0. The policy's logits are so large that it almost
    never writes this token. The initial policy is uniform. The sampled tokens are the policy's
    favourites, so their own terms are small. `mask_late` shows that this case is a trap: code that
    exponentiates first and masks the padding afterwards gets inf * 0 = NaN in its gradient.
    """
    with torch.no_grad():
        model.lm_head.weight *= 30
        initial.lm_head.weight *= 0
    model.generation_config.temperature = initial.generation_config.temperature = 0.02
    completions = []
    for length in (12, 4):
        completion = make_completion([5, 6, 7], 0, seed=0)
        completion.steps = [(0, length)]
        for _ in range(length):
            sequence = torch.tensor([completion.prompt_ids + completion.ids])
            completion.ids.append(model(sequence).logits[0, -1].argmax().item())
        completions.append(completion)
    [batch] = exprl.make_micro_batches(completions, 4, "cpu")
    logp = exprl.token_logprobs(model, batch.prompt_ids, batch.completion_ids, 0.02)
    assert logp[~batch.mask].min() < -100 and logp[batch.mask].min() > -5

    def mask_late():
        kl = exprl.kl_to_initial(logp, torch.full_like(logp, -math.log(40)))  # (B, T)
        return torch.where(batch.mask, kl, 0.0).sum()

    [gradient] = torch.autograd.grad(mask_late(), model.lm_head.weight)
    assert gradient.isnan().any()
    weights, metrics = update(model, completions, [[0.5], [-0.5]], initial, kl=0.1)
    assert weights.isfinite().all() and 0 < metrics["kl"] < 10


def test_a_gradient_that_is_not_finite_changes_no_weight(model):
    completions, advantages = make_batch()
    before = flat(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = exprl.make_micro_batches(completions, 4, "cpu")
    advantages[0] = [math.inf]
    with pytest.raises(RuntimeError):
        exprl.update(model, optimizer, batches, advantages, make_training())
    assert torch.equal(flat(model), before)


def test_a_micro_batch_has_one_prompt_and_computes_it_once(model):
    completions, advantages = make_batch()
    batches = exprl.make_micro_batches(completions, 2, "cpu")
    assert [batch.completions for batch in batches] == [
        completions[:2],
        completions[2:3],
        completions[3:],
    ]
    for batch in batches:
        for completion, ids, mask in zip(
            batch.completions, batch.completion_ids, batch.mask, strict=True
        ):
            assert completion.prompt_ids == batch.prompt_ids.tolist()
            assert ids[mask].tolist() == completion.ids
    seen = []
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(args[0].shape)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    exprl.update(model, optimizer, batches, advantages, make_training())
    assert seen == [(1, 3), (2, 9), (1, 3), (1, 12), (1, 5), (2, 7)]


# ---- Advantages and the log of an iteration ------------------------------------------------------


@pytest.mark.parametrize("norm", ["delta", "end", "group"])
def test_process_advantages_are_those_of_each_group_without_its_failures(norm):
    rewards = [[0.0, 1.0], None, [0.5], [1.0, 0.0], None, None]
    training = make_training(process_norm=norm, group_size=2)
    expected = []
    for group in ([[0.0, 1.0]], [[0.5], [1.0, 0.0]]):
        expected += exprl.step_advantages(group, norm)
    expected = [expected[0], None, *expected[1:], None, None]
    assert exprl.compute_advantages(rewards, training) == expected


@pytest.mark.parametrize("method", ["outcome", "sparse"])
def test_outcome_advantages_are_those_of_each_group_without_its_failures(method):
    rewards = [[1.0], [0.0], [0.0], None, [0.25], None, [0.5], [0.5], [0.5]]
    training = make_training(method=method, group_size=3)
    advantages = exprl.compute_advantages(rewards, training)
    assert advantages[:3] == [[a] for a in exprl.group_advantages([1.0, 0.0, 0.0])]
    assert advantages[3:] == [None, [0.0], None, [0.0], [0.0], [0.0]]
    training = make_training(method=method, group_size=3, no_std=True)
    assert exprl.compute_advantages(rewards, training)[0] == [pytest.approx(2 / 3)]


def log(out, completions, rewards, advantages):
    verdicts = [exprl.Verdict(reward) for reward in rewards]
    return exprl.log(out, 1, {"kl": 0.5}, completions, verdicts, advantages, 2)


def test_the_log_counts_what_is_known(tmp_path):
    completions, _ = make_batch()
    for completion, correct in zip(completions, [True, None, False, None, None], strict=True):
        completion.correct = correct
    completions[2].truncated = True
    rewards = [[0.0, 1.0], None, [1.0], [0.25, 0.25]]
    advantages = [[-1.0, 1.0], None, [0.0], [0.0, 0.0]]
    metrics = log(tmp_path, completions[:4], rewards, advantages)
    assert metrics == {
        "iteration": 1,
        "reward": pytest.approx((0.5 + 1.0 + 0.25) / 3),
        "accuracy": 0.5,
        "groups_without_signal": 0.5,
        "truncated": 0.25,
        "judge_failed": 0.25,
        "length": pytest.approx((9 + 4 + 12 + 2) / 4),
        "kl": 0.5,
    }
    assert read(tmp_path / "metrics.jsonl") == [metrics]
    records = read(tmp_path / "rollouts.jsonl")
    assert [r["rewards"] for r in records] == rewards
    assert [r["advantages"] for r in records] == advantages
    assert [r["ids"] for r in records] == [c.ids for c in completions[:4]]
    assert math.isnan(log(tmp_path, completions[3:], rewards[2:], advantages[2:])["accuracy"])


# ---- Runs ----------------------------------------------------------------------------------------

SHORT = ["--rubric", "none", "--max-new-tokens", "20"]  # two steps of six, which takes no time
METRICS = {
    *("iteration", "reward", "accuracy", "groups_without_signal", "truncated", "judge_failed"),
    *("length", "entropy", "kl", "grad_norm", "judge_calls", "prompt_tokens", "completion_tokens"),
}
ROLLOUT = {
    *("iteration", "advantages", "rewards", "rubric", "replies", "problem", "text", "step_texts"),
    *("steps", "correct", "truncated", "prompt_ids", "ids"),
}


def test_a_run_writes_what_it_promises(train, tmp_path, tiny):
    run = train(tmp_path / "run")
    metrics, rollouts = read(run / "metrics.jsonl"), read(run / "rollouts.jsonl")
    assert [record["iteration"] for record in metrics] == [1, 2]
    assert all(record.keys() == METRICS for record in metrics)
    assert len(rollouts) == 2 * 2 * 4  # iterations, problems, completions of each
    for r in rollouts:
        assert r.keys() == ROLLOUT
        assert len(r["step_texts"]) == len(r["steps"]) == len(r["rewards"])
        assert r["advantages"] == exprl.step_advantages([r["rewards"]], "delta")[0]
        assert r["rubric"].startswith("- ") and len(r["replies"]) == 1
        assert r["problem"]["reference"]
    for group in exprl.chunks(rollouts, 4):
        assert len({r["problem"]["question"] for r in group}) == 1
    first = [sum(r["rewards"]) / len(r["rewards"]) for r in rollouts if r["iteration"] == 1]
    assert metrics[0]["reward"] == pytest.approx(sum(first) / len(first))
    settings = json.loads((run / "settings.json").read_text())
    names = {field.name for kind in SETTINGS for field in fields(kind)}
    assert settings.keys() == names
    sampling = exprl.SamplingSettings(max_new_tokens=60)
    problems = exprl.load_problems(str(tiny / "train.jsonl"), "train", "reference")
    model, tokenizer = exprl.load_policy(str(run / "final"), problems, sampling)
    assert len(exprl.sample(model, tokenizer, problems[:1], 2, 2)) == 2


def watch_policy(monkeypatch, hook):
    """Call hook(ids) with the token ids of every forward pass of a run's models."""
    load = exprl.load_policy

    def load_and_watch(*args):
        model, tokenizer = load(*args)
        embeddings = model.get_input_embeddings()
        embeddings.register_forward_hook(lambda module, args, out: hook(args[0]))
        return model, tokenizer

    monkeypatch.setattr(exprl, "load_policy", load_and_watch)


@pytest.mark.parametrize("method", ["process", "outcome"])
def test_the_reference_never_reaches_the_policy(train, tmp_path, tiny, monkeypatch, method):
    fed = []
    watch_policy(monkeypatch, lambda ids: fed.extend(ids.tolist()))
    run = train(tmp_path / "run", "--method", method)
    tokenizer = exprl.AutoTokenizer.from_pretrained(tiny / "base")
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in fed]
    for r in read(run / "rollouts.jsonl"):
        prompt = tokenizer.decode(r["prompt_ids"])
        assert prompt == r["problem"]["question"]  # the toy template keeps nothing else
        assert any(text.startswith(prompt) for text in texts)
        first_line = r["problem"]["reference"].split("\n")[0]
        assert not any(first_line in text for text in texts)


def test_every_forward_pass_is_in_one_region_of_mixed_precision(train, tmp_path, monkeypatch):
    """The sampler's check, the sampling, the initial policy and the policy all are."""
    local = threading.local()
    depths = []

    @contextlib.contextmanager
    def region(model):
        local.depth = getattr(local, "depth", 0) + 1
        yield
        local.depth -= 1

    monkeypatch.setattr(exprl, "mixed_precision", region)
    watch_policy(monkeypatch, lambda ids: depths.append(getattr(local, "depth", 0)))
    train(tmp_path / "run", "--iterations", "1", "--method", "sparse")
    assert {*depths} == {1}


def test_a_policy_is_freed_and_its_forward_method_is_its_own(tiny):
    """A wrapped forward method would keep the model in a cycle, with its memory on the device."""
    problem = {"question": "29a*3=", "answer": ""}
    sampling = exprl.SamplingSettings(max_new_tokens=8)
    model, tokenizer = exprl.load_policy(str(tiny / "base"), [problem], sampling)
    exprl.sample(model, tokenizer, [problem], 2, 2)
    assert "forward" not in vars(model)
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "process", "--process-norm", "delta", *SHORT],
        ["--method", "process", "--process-norm", "end", *SHORT],
        ["--method", "process", "--process-norm", "group", *SHORT],
        ["--method", "outcome"],
        ["--method", "sparse", "--no-std"],
        ["--method", "sft"],
        ["--method", "distill"],
    ],
    ids=lambda flags: "-".join(flags[1:4:2]),
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(train, tmp_path, flags):
    flags = [*flags, "--optimizer-steps", "2", "--save-every", "1"]
    whole = train(tmp_path / "a" / "run", *flags, "--iterations", "2")
    train(tmp_path / "b" / "run", *flags, "--iterations", "1")
    resumed = train(tmp_path / "b" / "run", *flags, "--iterations", "2", "--resume")
    assert weights_of(whole) == weights_of(resumed)
    assert str(iterations_of(whole)) == str(iterations_of(resumed))  # as texts, nan equals nan
    assert read(whole / "rollouts.jsonl") == read(resumed / "rollouts.jsonl")
    if flags[1] not in ("sft", "distill"):
        settings, _ = exprl.HfArgumentParser(SETTINGS[0]).parse_args_into_dataclasses(
            ["--model", "", "--group-size", "4", *flags], return_remaining_strings=True
        )
        for group in exprl.chunks(read(whole / "rollouts.jsonl"), 4):
            expected = exprl.compute_advantages([r["rewards"] for r in group], settings)
            assert [r["advantages"] for r in group] == expected


def test_stages_can_be_swapped(tiny, tmp_path, no_key):
    """A run without a judge: each stage of the loop is a function of ours."""
    called = []

    def sample(model, tokenizer, problems, n, batch_size):
        called.append("sample")
        assert n == 2 and len(problems) == 3
        return exprl.sample(model, tokenizer, problems, n, batch_size)

    def reward(completions):
        called.append("reward")
        return [exprl.Verdict([len(c.ids) / 100], "rubric", ["reply"]) for c in completions]

    def advantage(rewards, training):
        called.append("advantage")
        return [[-r[0]] for r in rewards]

    def loss(model, batch, training):
        called.append("loss")
        logp = batch.logprobs(model)
        return -logp * batch.advantages, {"mine": torch.full_like(logp, 7.0)}

    training = exprl.TrainingSettings(
        model=str(tiny / "base"),
        out=str(tmp_path / "run"),
        iterations=1,
        prompts_per_iteration=3,
        group_size=2,
        kl=0.0,
    )
    sampling = exprl.SamplingSettings(max_new_tokens=60)
    problems = exprl.load_problems(str(tiny / "train.jsonl"), "train", "reference")[:3]
    exprl.train(
        training, sampling, exprl.JudgeSettings(), problems, sample, reward, advantage, loss
    )
    assert called == ["sample", "reward", "advantage", "loss", "loss", "loss"]
    [metrics] = read(tmp_path / "run" / "metrics.jsonl")
    assert metrics["mine"] == pytest.approx(7)
    for r in read(tmp_path / "run" / "rollouts.jsonl"):
        assert r["rewards"] == [len(r["ids"]) / 100] and r["advantages"] == [-r["rewards"][0]]
        assert r["rubric"] == "rubric" and r["replies"] == ["reply"]
        assert r["problem"] in problems


def test_some_verdicts_fail_and_the_run_continues(train, tmp_path):
    """The judge refuses a third of the completions, and no loss contains them."""

    def answer(request):
        shown = request["messages"][:2][-1]["content"]
        is_refused = "## Problem" in shown and sum(shown.encode()) % 3 == 0
        return (400, {}) if is_refused else toy_world.answer(request)

    server = program_judge.ChatServer(answer)
    run = train(tmp_path / "run", "--judge-url", server.url, "--rubric", "none")
    failed = [r for r in read(run / "rollouts.jsonl") if r["rewards"] is None]
    assert 0 < iterations_of(run)[0]["judge_failed"] <= 0.5
    assert failed and all(r["advantages"] is None for r in failed)


def test_the_initial_policy_reads_while_the_judge_does(train, tmp_path, monkeypatch):
    """The judge answers only after the initial policy has read the completions."""
    has_read, read_batches = threading.Event(), exprl.add_initial_logprobs

    def answer(request):
        if "ready" in request["messages"][-1]["content"] or has_read.wait(20):
            return toy_world.answer(request)
        return "too early"

    def read_and_tell(*args):
        read_batches(*args)
        has_read.set()

    monkeypatch.setattr(exprl, "add_initial_logprobs", read_and_tell)
    server = program_judge.ChatServer(answer)
    run = train(tmp_path / "run", "--iterations", "1", "--judge-url", server.url)
    assert iterations_of(run)[0]["judge_failed"] == 0


# ---- Stopped, killed and resumed -----------------------------------------------------------------

LONG = [*SHORT, "--iterations", "5", "--save-every", "2"]


@pytest.fixture(scope="module")
def uninterrupted(tiny, judge, tmp_path_factory):
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OPENAI_API_KEY", raising=False)
        exprl.run_command(exprl.train, SETTINGS, train_command(tiny, judge, out, *LONG))
    assert all(record["grad_norm"] > 0 for record in iterations_of(out))
    return out


def is_same_run(run, other):
    return weights_of(run) == weights_of(other) and iterations_of(run) == iterations_of(other)


def checkpoint_of(run):
    return torch.load(run / "checkpoint.pt")["iteration"]


class Killed(BaseException):
    """Stands for a kill: no handler of the program's own catches it."""


def killing(function, at, first=lambda *args: None, counts=lambda *args: True):
    """Return the function, except that call number `at` does `first` and then dies."""
    calls = []

    def call(*args, **kwargs):
        if counts(*args):
            calls.append(1)
            if len(calls) == at:
                first(*args)
                raise Killed
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("moment", ["sample", "update", "metrics", "rollouts", "save", "replace"])
def test_killed_at_any_moment_and_resumed(train, tmp_path, monkeypatch, uninterrupted, moment):
    """The run is killed in iteration 3, or while it saves the checkpoint of iteration 4."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        if moment == "sample":
            patch.setattr(exprl, "completion_mask", killing(exprl.completion_mask, 5))
        elif moment == "update":
            patch.setattr(exprl, "update", killing(exprl.update, 3, exprl.update))
        elif moment in ("metrics", "rollouts"):  # this file is written, and nothing after it
            append, is_this = exprl.append_jsonl, lambda path, _: path.stem == moment
            patch.setattr(exprl, "append_jsonl", killing(append, 3, append, is_this))
        elif moment == "save":
            save = killing(torch.save, 2, lambda state, path: path.write_bytes(b"half of it"))
            patch.setattr(torch, "save", save)
        else:
            is_checkpoint = lambda path, target: target.stem == "checkpoint"  # noqa: E731
            replace = killing(type(run).replace, 2, counts=is_checkpoint)
            patch.setattr(type(run), "replace", replace)
        with pytest.raises(Killed):
            train(run, *LONG)
    assert checkpoint_of(run) == 2
    train(run, *LONG, "--resume")
    assert [record["iteration"] for record in iterations_of(run)] == [1, 2, 3, 4, 5]
    assert is_same_run(run, uninterrupted)
    assert [path.name for path in run.glob("checkpoint*")] == ["checkpoint.pt"]
    records = [exprl.read_jsonl(out / "rollouts.jsonl") for out in (run, uninterrupted)]
    for iteration in (3, 4):
        ours, theirs = ([r for r in rs if r["iteration"] == iteration] for rs in records)
        assert ours[-8:] == theirs


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_finishes_the_iteration_and_saves(
    train, tmp_path, monkeypatch, uninterrupted, number
):
    update, calls = exprl.update, []

    def interrupted(*args):
        calls.append(1)
        metrics = update(*args)
        if len(calls) == 3:  # in the middle of an iteration that has no checkpoint of its own
            os.kill(os.getpid(), number)
        return metrics

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(exprl, "update", interrupted)
        with pytest.raises(SystemExit, match="--resume") as stopped:
            train(run, *LONG)
    assert stopped.value.code not in (0, None)
    assert checkpoint_of(run) == 3 and len(read(run / "metrics.jsonl")) == 3
    train(run, *LONG, "--resume")
    assert is_same_run(run, uninterrupted)
    assert len(read(run / "metrics.jsonl")) == 5


def test_a_second_ctrl_c_ends_the_program_at_once(tiny, train, tmp_path):
    """A real process waits for a judge that has stopped to answer. It dies without any clean-up."""
    go_on, waiting = threading.Event(), threading.Event()

    def answer(request):  # an iteration makes up to 5 calls
        if len(server.requests) > 8:
            waiting.set()
            go_on.wait(100)
        return toy_world.answer(request)

    server = program_judge.ChatServer(answer)
    run = tmp_path / "run"
    flags = ["--iterations", "3", "--save-every", "1", "--prompts-per-iteration", "1"]
    command = [sys.executable, str(ROOT / "exprl.py"), *train_command(tiny, server, run, *flags)]
    output = tmp_path / "output"
    with output.open("w") as file:
        unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, stderr=file, stdout=file, env=unbuffered)
    try:
        assert waiting.wait(100)
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 20
        while "a second Ctrl-C" not in output.read_text() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "a second Ctrl-C" in output.read_text()
        time.sleep(0.5)
        assert process.poll() is None  # the first one waits for the end of the iteration
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == -signal.SIGINT
    finally:
        process.kill()
    go_on.set()
    assert checkpoint_of(run) == 1
    train(run, *flags, "--judge-url", server.url, "--resume")
    assert is_same_run(run, train(tmp_path / "whole" / "run", *flags))


def test_a_damaged_checkpoint_is_named(train, tmp_path, uninterrupted):
    run = train(tmp_path / "run", *LONG, "--iterations", "2")
    data = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(SystemExit, match=r"checkpoint\.pt.*--resume") as stopped:
        train(run, *LONG, "--resume")
    assert "\n" not in str(stopped.value)
    (run / "checkpoint.pt").unlink()
    train(run, *LONG, "--resume")  # as the message says
    assert is_same_run(run, uninterrupted)


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(train, tmp_path):
    same = ["--method", "sparse", "--iterations", "1", "--max-new-tokens", "20"]
    run = train(tmp_path / "run", *same)
    before = weights_of(run)
    with pytest.raises(SystemExit, match="--resume"):
        train(run, *same)
    for flag, value in (("--lr", "0.01"), ("--seed", "5"), ("--method", "process")):
        with pytest.raises(SystemExit, match=flag.removeprefix("--")):
            train(run, *same, "--resume", flag, value)
    free = ["--save-every", "3", "--micro-batch", "2", "--judge-url", "http://127.0.0.1:9/v1"]
    train(run, *same, "--resume", *free)  # there is nothing left to do
    assert weights_of(run) == before
    assert len(read(run / "metrics.jsonl")) == 1


def test_a_gradient_that_is_not_finite_stops_the_run(train, tmp_path, monkeypatch):
    policy_loss = exprl.policy_loss
    monkeypatch.setattr(exprl, "policy_loss", lambda *args: policy_loss(*args) * math.nan)
    with pytest.raises((RuntimeError, SystemExit)):
        train(tmp_path / "run", *ONE)
    assert not list((tmp_path / "run").glob("checkpoint*"))


# ---- Flags ---------------------------------------------------------------------------------------

FLAGS = {  # another value of a flag, and what it must change in one iteration
    "--lr": ("1e-4", "weights"),
    "--kl": ("0", "metrics"),
    "--seed": ("7", "text"),
    "--temperature": ("0.5", "text"),
    "--max-new-tokens": ("9", "text"),
    "--prompts-per-iteration": ("3", "text"),
    "--group-size": ("3", "text"),
    "--optimizer-steps": ("3", "weights"),
    "--sample-batch": ("4", "text"),
    "--micro-batch": ("1", "nothing"),
    "--save-every": ("1", "nothing"),
}
ONE = ["--iterations", "1", *SHORT]


@pytest.fixture(scope="module")
def baseline(tiny, judge, tmp_path_factory):
    out = tmp_path_factory.mktemp("baseline") / "run"
    exprl.run_command(exprl.train, SETTINGS, train_command(tiny, judge, out, *ONE))
    return out


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_has_its_effect(train, tmp_path, baseline, flag):
    value, effect = FLAGS[flag]
    run = train(tmp_path / "run", *ONE, flag, value)
    texts = [[r["text"] for r in read(out / "rollouts.jsonl")] for out in (run, baseline)]
    assert (texts[0] != texts[1]) == (effect == "text")
    [ours], [theirs] = iterations_of(run), iterations_of(baseline)
    if effect == "weights":
        assert weights_of(run) != weights_of(baseline)
    if effect == "metrics":
        assert "kl" not in ours and "kl" in theirs
    if effect == "nothing":
        assert ours == pytest.approx(theirs, abs=1e-4)


def test_every_flag_is_read():
    """No flag is dead: the code reads each of them as an attribute of the settings."""
    source = (ROOT / "exprl.py").read_text()
    for kind in SETTINGS:
        for field in fields(kind):
            reads = (f"{name}.{field.name}" for name in ("settings", "training", "sampling"))
            assert any(text in source for text in reads) or field.name == "resume", field.name


def run(*argv):
    """The settings that these flags give."""
    found = []
    exprl.run_command(lambda *settings: found.extend(settings), SETTINGS, list(argv))
    return found


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    text = "".join(capsys.readouterr().out.split())
    for kind in SETTINGS:
        for field in fields(kind):
            assert f"--{field.name.replace('_', '-')}" in text
            assert "".join(field.metadata["help"].split()) in text


@pytest.mark.parametrize(
    "flags",
    [
        ["--group-size", "0"],
        ["--iterations", "many"],
        ["--temperature", "0"],
        ["--lr", "nan"],
        ["--lr", "inf"],
        ["--kl", "-1"],
        ["--method", "art"],
        ["--iteration", "3"],  # an abbreviation
        ["--eval-every", "1"],
    ],
)
def test_a_wrong_flag_ends_the_program_and_is_named(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--model", "m", *flags)
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err.splitlines()[-1]


def test_flags_with_dashes_and_underscores_and_zeros():
    training, sampling, judging = run(
        *["--model", "m", "--group_size", "3", "--max-new-tokens", "5", "--judge_threads", "2"],
        *["--kl", "0", "--lr", "0", "--max-judge-calls", "0", "--no-std"],
    )
    assert (training.group_size, sampling.max_new_tokens, judging.judge_threads) == (3, 5, 2)
    assert training.no_std and not training.resume and training.kl == 0


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "BAD.jsonl"], "BAD.jsonl, record 2"),
        (["--model", "nobody/nothing"], "nobody/nothing"),
        (["--model", "."], "--model"),
        (["--judge-options", "{"], "--judge-options"),
        (["--judge-url", "http://127.0.0.1:9/v1"], "127.0.0.1:9"),
    ],
)
def test_bad_input_stops_with_one_line(train, tmp_path, monkeypatch, flags, words):
    (tmp_path / "BAD.jsonl").write_text('{"question": "Q?", "reference": "r"}\n{}\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(exprl, "PAUSE", 0)
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "run", *flags)
    text = str(stopped.value)
    assert words in text and "\n" not in text and stopped.value.code not in (0, None)


def test_a_start_that_failed_does_not_block_the_next_one(train, tmp_path):
    with pytest.raises(SystemExit):
        train(tmp_path / "run", "--model", "nobody/nothing", *ONE)
    train(tmp_path / "run", *ONE)


def test_the_key_is_written_nowhere(train, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    run = train(tmp_path / "run", *ONE)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert run / "settings.json" in files
    assert not any(b"sk-very-secret" in path.read_bytes() for path in files)
