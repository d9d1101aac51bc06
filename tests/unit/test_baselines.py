"""The baselines: SFT on references, self-distillation, and a judge with another reference."""

import copy
import math
import re
from types import SimpleNamespace

import baselines
import pytest
import torch
import toy_world
from conftest import read
from test_training import (
    BATCH,
    judged,
    make_completion,
    plain_logits,
    plain_update,
    update,
)
from transformers import LlamaForCausalLM

import exprl
import judge_prompts


def baseline_batch(teacher_prompts=()):
    """The batch of a method whose completions have neither scores nor answers."""
    completions = [make_completion(*shape[:2], None, seed=i) for i, shape in enumerate(BATCH)]
    for c, prompt in zip(completions, teacher_prompts, strict=False):
        c.row["teacher_prompt_ids"] = prompt
        c.correct = None
    baselines.fill_weights(completions, SimpleNamespace())
    return completions


@pytest.mark.parametrize("micro_batch, updates", [(8, 1), (2, 2)])
def test_sft_is_cross_entropy_on_the_reference(model, micro_batch, updates):
    completions = baseline_batch()

    def loss_of(model):
        losses = [
            torch.nn.functional.cross_entropy(
                plain_logits(model, c.row["prompt_ids"], c.ids),
                torch.tensor(c.ids),
                reduction="sum",
            )
            for c in completions
        ]
        return sum(losses) / sum(len(c.ids) for c in completions)

    expected, loss = plain_update(model, loss_of, updates)
    changes = {"micro_batch": micro_batch, "updates_per_batch": updates}
    changes |= {"loss_of": baselines.sft_loss}
    weights, metrics = update(model, completions, kl=1.0, **changes)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (expected - start).norm() > 0.05
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
    assert metrics["cross_entropy"] == pytest.approx(loss, abs=1e-5)
    plain = update(model, completions, temperature=1.0, **changes)[0]
    assert weights.equal(plain)  # whatever the temperature of sampling


TEACHER_PROMPTS = [[7] * 9, [4, 5], [9, 8, 7, 6, 5, 4, 3], [3], [11, 12, 13, 14]]


@pytest.mark.parametrize("micro_batch, updates", [(8, 1), (2, 2)])
def test_distill_is_the_reverse_kl_to_a_teacher_with_another_prompt(
    model, micro_batch, updates, monkeypatch
):
    torch.manual_seed(1)
    teacher = LlamaForCausalLM(model.config).eval()  # one that could be trained, by mistake
    monkeypatch.setattr(baselines, "load_teacher", lambda name: teacher)
    model.shares_prompts = updates == 2  # and then the teacher does too
    completions = baseline_batch(TEACHER_PROMPTS)

    def loss_of(model):
        total = 0
        for c in completions:
            log_s = (plain_logits(model, c.row["prompt_ids"], c.ids) / 0.7).log_softmax(-1)
            with torch.no_grad():
                logits = plain_logits(teacher, c.row["teacher_prompt_ids"], c.ids)
            log_t = (logits / 0.7).log_softmax(-1)
            total += (log_s.exp() * (log_s - log_t)).sum()
        return total / sum(len(c.ids) for c in completions)

    expected, loss = plain_update(model, loss_of, updates)
    changes = {"micro_batch": micro_batch, "updates_per_batch": updates}
    changes |= {"loss_of": baselines.distill_loss}
    weights, metrics = update(model, completions, kl=1.0, **changes)
    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert (expected - start).norm() > 1e-3
    torch.testing.assert_close(weights, expected, atol=1e-6, rtol=0)
    assert metrics["teacher_kl"] == pytest.approx(loss, abs=1e-6) and loss > 1e-3
    assert teacher.shares_prompts == model.shares_prompts
    assert all(p.grad is None for p in teacher.parameters())


def test_distill_from_oneself_with_one_s_own_prompt_changes_nothing(model, monkeypatch):
    teacher = copy.deepcopy(model)
    monkeypatch.setattr(baselines, "load_teacher", lambda name: teacher)
    prompts = [c.row["prompt_ids"] for c in baseline_batch()]
    changes = {"loss_of": baselines.distill_loss}
    _, metrics = update(model, baseline_batch(prompts), **changes)
    assert metrics["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(0, abs=1e-5)


def test_the_targets_of_sft_are_references_that_end():
    tokenizer, references = toy_world.make_tokenizer(), ["### a29*3+7=94\n", "", r"\boxed{59}"]
    rows = [{"reference": r, "question": "29a*3=", "answer": "94"} for r in references]
    for row in rows:
        row["prompt_ids"] = judge_prompts.policy_prompt(tokenizer, row["question"])
    settings = SimpleNamespace(eos_token_id=[tokenizer.eos_token_id], max_new_tokens=5)
    model = SimpleNamespace(generation_config=settings)
    groups = list(baselines.read_references(model, tokenizer, rows, 8, 8))
    assert [len(group) for group in groups] == [1, 1, 1]
    for row, [c] in zip(rows, groups, strict=True):
        whole = [*tokenizer(row["reference"]).input_ids, tokenizer.eos_token_id]
        assert c.ids == whole[:5] and c.cut == (len(whole) > 5)
        assert c.correct is None and c.steps == [(0, len(c.ids))]
        assert c.row["prompt_ids"] == judge_prompts.policy_prompt(tokenizer, row["question"])
    assert [c.cut for [c] in groups] == [True, False, False]
    tokenizer.eos_token = None  # one of those that end a sample
    groups = list(baselines.read_references(model, tokenizer, rows, 8, 8))
    assert groups[1][0].ids == settings.eos_token_id


def test_all_tokens_count_alike_where_nothing_is_judged():
    completions = [judged(None), judged(None, steps=3)]
    completions[0].correct = None
    baselines.fill_weights(completions, SimpleNamespace(group_size=2))
    assert [c.advantages for c in completions] == [[1.0] * 2, [1.0] * 3]
    assert math.isnan(completions[0].rewards[0]) and completions[1].rewards == [0.0]


@pytest.mark.parametrize("method", ["process", "sft", "distill"])
def test_only_the_teacher_s_prompt_holds_the_reference(train, tmp_path, tiny, method, monkeypatch):
    """On every row that is sampled from or trained on."""
    seen, update = [], exprl.update

    def update_spy(model, optimizer, completions, *rest):
        seen.extend(c.row for c in completions)
        return update(model, optimizer, completions, *rest)

    monkeypatch.setattr(exprl, "update", update_spy)
    train(tmp_path / "run", "--method", method)
    references = {r["question"]: r["reference"] for r in read(tiny / "train.jsonl")}
    _, tokenizer = exprl.find_model(str(tiny / "base"))
    assert len(seen) >= 4
    for row in seen:  # the toy template leaves out the instruction
        assert tokenizer.decode(row["prompt_ids"]) == row["question"]
        assert ("teacher_prompt_ids" in row) == (method == "distill")
        if method == "distill":
            expected = f"{references[row['question']]}\n\n{row['question']}"
            assert tokenizer.decode(row["teacher_prompt_ids"]) == expected


@pytest.mark.parametrize("which", ["right", "none", "wrong"])
def test_which_reference_the_judge_is_shown(train, tmp_path, tiny, judge, which):
    rows, asked = read(tiny / "train.jsonl"), len(judge.requests)
    run = train(tmp_path / "run", "--method", "process", "--reference", which, "--seed", "3")
    places = {row["question"]: i for i, row in enumerate(rows)}
    basis = judge_prompts.BASIS["math"]["none" if which == "none" else "reference"]
    kinds, shifts = set(), set()
    for request in judge.requests[asked:]:
        system, user = (message["content"] for message in request["messages"])
        kinds.add(system.split("\n")[0])
        assert basis in system
        question, _, shown = user.removeprefix("## Problem\n").partition("\n\n## ")
        shown = re.match(r"Reference solution\n(.*?\\boxed\{..\})\n", shown, re.DOTALL)
        assert (shown is None) == (which == "none") == ("## Reference" not in user)
        if shown:
            holds = [i for i, row in enumerate(rows) if row["reference"] == shown[1]]
            shifts |= {(places[question] - i) % len(rows) for i in holds}
    assert len(kinds) == 2  # the checkpoints are made of it, too
    assert len(shifts) == (which != "none") and (0 in shifts) == (which == "right")
    expected = baselines.show_reference(rows, which, 3)
    for r in read(run / "rollouts.jsonl"):
        assert r["reference"] == expected[places[r["question"]]]["reference"]


def test_a_wrong_reference_is_that_of_a_row_a_fixed_number_of_places_before():
    rows = [{"question": f"{i}?", "reference": f"r{i}"} for i in range(7)]
    shifts = []
    for seed in (*range(9), 0):
        shown = baselines.show_reference(rows, "wrong", seed)
        assert [row["question"] for row in shown] == [row["question"] for row in rows]
        all_shifts = {(i - int(row["reference"][1:])) % 7 for i, row in enumerate(shown)}
        assert len(all_shifts) == 1 and 0 not in all_shifts
        shifts += all_shifts
    assert shifts[0] == shifts[-1] and len(set(shifts)) > 2
    assert baselines.show_reference(rows, "right", 0) == rows
    assert {row["reference"] for row in baselines.show_reference(rows, "none", 0)} == {""}
    assert rows[3] == {"question": "3?", "reference": "r3"}


def test_there_is_nothing_to_quote_without_reference_and_checkpoints(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text('{"question": "What is 4 + 4?", "reference": "It is 8.", "answer": "8"}')
    flags = {"reference": "none", "rubric": "none", "judge_input": "quotes", "method": "process"}
    settings = baselines.BaselineSettings(model="none", data=str(data), **flags)
    with pytest.raises(SystemExit, match="--judge-input quotes needs --rubric checkpoints"):
        baselines.train(settings)
