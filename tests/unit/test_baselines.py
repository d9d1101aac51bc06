"""The baselines: SFT on references, self-distillation, and a judge with another reference."""

import copy
import re
from types import SimpleNamespace

import baselines
import pytest
import torch
import toy_world
from conftest import read
from transformers import LlamaForCausalLM

import exprl
import judge_prompts

LENGTHS = [(9, 3), (4, 3), (12, 5), (2, 2), (7, 4)]  # tokens of each completion and of its prompt
TEACHER_PROMPTS = [[7] * 9, [7] * 9, [9, 8, 7, 6, 5, 4, 3], [3], [11, 12, 13, 14]]
TEMPERATURE = 0.7  # that of the fixture `model`


@pytest.fixture
def completions():
    """Completions of random tokens. The first two are of the same problem."""
    draw = torch.Generator().manual_seed(0)
    made, prompt = [], []
    for i, (length, prompt_length) in enumerate(LENGTHS):
        ids = torch.randint(3, 40, (length,), generator=draw).tolist()
        if i != 1:
            prompt = torch.randint(3, 40, (prompt_length,), generator=draw).tolist()
        problem = {"question": str(prompt), "teacher": TEACHER_PROMPTS[i]}
        made.append(exprl.Completion(problem, "", [""], [(0, length)], None, False, prompt, ids))
    return made


def weights(model):
    """All weights as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def update(model, completions, loss, micro_batch, optimizer_steps):
    """Return the weights after one update by plain gradient descent, and what is logged."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = exprl.make_micro_batches(completions, micro_batch, "cpu")
    training = SimpleNamespace(model="", optimizer_steps=optimizer_steps)
    equal = baselines.weigh_equally([[0.0] for _ in completions], training)
    logged = exprl.update(model, optimizer, batches, equal, training, loss)
    return weights(model), logged


def plain_update(model, loss_of, optimizer_steps):
    """Return the weights after the same steps on `loss_of(model)`, and the last loss."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(optimizer_steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return weights(model), loss.item()


def plain_logits(model, prompt, ids):
    """The (T, V) logits of a completion, from one forward pass over one sequence."""
    return model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]


# ---- SFT -----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("micro_batch", "optimizer_steps"), [(8, 1), (1, 2)])
def test_sft_is_cross_entropy_on_the_reference(model, completions, micro_batch, optimizer_steps):
    """At temperature 1, although the model samples at another one."""

    def loss_of(model):
        total = 0
        for c in completions:
            logits = plain_logits(model, c.prompt_ids, c.ids)
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(c.ids), reduction="sum")
        return total / sum(len(c.ids) for c in completions)

    expected, loss = plain_update(model, loss_of, optimizer_steps)
    sizes = (micro_batch, optimizer_steps)
    found, logged = update(model, completions, baselines.sft_loss, *sizes)
    assert (expected - weights(model)).norm() > 0.05
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert logged["cross_entropy"] == pytest.approx(loss, abs=1e-5)


def test_the_targets_of_sft_are_references_that_end():
    tokenizer, references = toy_world.make_tokenizer(), ["### a29*3+7=94\n", "", r"\boxed{59}"]
    problems = [
        {"reference": r, "question": "29a*3=", "answer": "94", "domain": "math"} for r in references
    ]
    settings = SimpleNamespace(eos_token_id=[tokenizer.eos_token_id], max_new_tokens=5)
    model = SimpleNamespace(generation_config=settings)
    made = baselines.read_references(model, tokenizer, problems, 8, 8)
    for problem, c in zip(problems, made, strict=True):
        whole = [*tokenizer(problem["reference"]).input_ids, tokenizer.eos_token_id]
        assert c.ids == whole[:5] and c.truncated == (len(whole) > 5)
        assert c.correct is None and c.steps == [(0, len(c.ids))]
        assert c.prompt_ids == exprl.policy_prompt(tokenizer, problem["question"])
    assert [c.truncated for c in made] == [True, False, False]
    tokenizer.eos_token = None  # then one of the tokens that end a sample
    made = baselines.read_references(model, tokenizer, problems, 8, 8)
    assert made[1].ids == settings.eos_token_id


# ---- Self-distillation ---------------------------------------------------------------------------
def reverse_kl(student, teacher):
    """The KL of each position, from its definition -> (T,)."""
    p, q = (student / TEMPERATURE).softmax(-1), (teacher / TEMPERATURE).softmax(-1)
    return (p * (p / q).log()).sum(-1)


@pytest.fixture
def teach(monkeypatch):
    """teach(model): it becomes the teacher, and the prompt of a problem is its "teacher"."""

    def start(teacher):
        monkeypatch.setattr(baselines, "load_teacher", lambda name: (teacher, None))
        monkeypatch.setattr(baselines, "teacher_prompt", lambda _, problem: problem["teacher"])

    return start


@pytest.mark.parametrize(("micro_batch", "optimizer_steps"), [(8, 1), (1, 2)])
def test_distill_is_the_reverse_kl_to_a_teacher_with_another_prompt(
    model, completions, teach, micro_batch, optimizer_steps
):
    torch.manual_seed(1)
    teacher = LlamaForCausalLM(model.config).eval()  # by mistake, it could be trained
    teach(teacher)

    def loss_of(model):
        total = 0
        for c in completions:
            with torch.no_grad():
                target = plain_logits(teacher, c.problem["teacher"], c.ids)
            total += reverse_kl(plain_logits(model, c.prompt_ids, c.ids), target).sum()
        return total / sum(len(c.ids) for c in completions)

    expected, loss = plain_update(model, loss_of, optimizer_steps)
    sizes = (micro_batch, optimizer_steps)
    found, logged = update(model, completions, baselines.distill_loss, *sizes)
    assert (expected - weights(model)).norm() > 1e-3
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert logged["teacher_kl"] == pytest.approx(loss, abs=1e-6) and loss > 1e-3
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_distill_from_the_same_model_and_prompt_changes_nothing(model, completions, teach):
    teach(copy.deepcopy(model))
    for c in completions:
        c.problem["teacher"] = c.prompt_ids
    _, logged = update(model, completions, baselines.distill_loss, 8, 1)
    assert logged["teacher_kl"] == pytest.approx(0, abs=1e-6)
    assert logged["grad_norm"] == pytest.approx(0, abs=1e-5)


def test_the_teacher_is_the_initial_model_and_sees_the_reference(tiny):
    teacher, tokenizer = baselines.load_teacher(str(tiny / "base"))
    policy, _ = exprl.load_policy(
        str(tiny / "base"), [{"question": ""}], exprl.SamplingSettings(max_new_tokens=1)
    )
    assert weights(teacher).equal(weights(policy))
    problem = {"question": "29a*3=", "reference": "### a29*3+7=94"}
    prompt = tokenizer.decode(baselines.teacher_prompt(tokenizer, problem))
    assert prompt == "### a29*3+7=94\n\n29a*3="  # the toy template drops the instruction


# ---- Training ------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["process", "sft", "distill"])
def test_only_the_teacher_s_prompt_contains_the_reference(train, tmp_path, method, monkeypatch):
    prompts, teacher_prompts = [], []
    original = exprl.completion_logits

    def spy(model, prompt_ids, completion_ids):
        of_teacher = method == "distill" and not next(model.parameters()).requires_grad
        (teacher_prompts if of_teacher else prompts).append(prompt_ids.tolist())
        return original(model, prompt_ids, completion_ids)

    monkeypatch.setattr(exprl, "completion_logits", spy)
    baselines.load_teacher.cache_clear()
    run = train(tmp_path / "run", "--method", method)
    records = read(run / "rollouts.jsonl")
    own = {tuple(record["prompt_ids"]) for record in records}
    by_question = {record["problem"]["question"]: record["problem"] for record in records}
    tokenizer = toy_world.make_tokenizer()
    allowed = {tuple(exprl.policy_prompt(tokenizer, question)) for question in by_question}
    assert own == allowed  # prompts that were sampled from or trained on
    assert len(records) == {"sft": 4, "process": 16, "distill": 16}[method]
    taught = {tuple(baselines.teacher_prompt(tokenizer, p)) for p in by_question.values()}
    assert {*map(tuple, teacher_prompts)} == (taught if method == "distill" else set())
    assert not taught & {*map(tuple, prompts)}


def test_sft_and_distill_have_neither_a_penalty_nor_a_judge(train, tmp_path, judge):
    asked = len(judge.requests)
    for method, loss in (("sft", "cross_entropy"), ("distill", "teacher_kl")):
        metrics = read(train(tmp_path / method, "--method", method) / "metrics.jsonl")
        assert all(record[loss] > 0 and "kl" not in record for record in metrics)
    assert len(judge.requests) == asked


@pytest.mark.parametrize("which", ["right", "none", "wrong"])
def test_which_reference_the_judge_is_shown(train, tmp_path, tiny, judge, which):
    rows, asked = read(tiny / "train.jsonl"), len(judge.requests)
    run = train(tmp_path / "run", "--method", "process", "--reference", which, "--seed", "3")
    places = {row["question"]: i for i, row in enumerate(rows)}
    kinds, shifts = set(), set()
    for request in judge.requests[asked:]:
        if len(request["messages"]) == 1:  # the test call at the start
            continue
        system, user = (message["content"] for message in request["messages"])
        kinds.add(system.split("\n")[0])
        assert judge_prompts.DOMAINS["math"]["correct"] in system
        assert ("no reference" in system) == (which == "none")
        question, _, shown = user.removeprefix("## Problem\n").partition("\n\n## ")
        shown = re.match(r"Reference solution\n(.*?\\boxed\{..\})\n", shown, re.DOTALL)
        assert (shown is None) == (which == "none") == ("## Reference" not in user)
        if shown:
            holders = [i for i, row in enumerate(rows) if row["reference"] == shown[1]]
            shifts |= {(places[question] - i) % len(rows) for i in holders}
    assert len(kinds) == 2  # the rubric is made from the same reference
    assert len(shifts) == (which != "none") and (0 in shifts) == (which == "right")
    expected = baselines.show_reference(rows, which, 3)
    for record in read(run / "rollouts.jsonl"):
        problem = record["problem"]
        assert problem["reference"] == expected[places[problem["question"]]]["reference"]


def test_a_wrong_reference_is_that_of_a_problem_at_a_fixed_distance():
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
    with pytest.raises(SystemExit, match="two problems"):
        baselines.show_reference(rows[:1], "wrong", 0)
