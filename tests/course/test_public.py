"""Worked examples of the graded functions: enough to find many mistakes, not all.

    python -m pytest tests/test_public.py                   all of them
    python -m pytest tests/test_public.py -k split_steps    those of one function

The examples in the docstrings are tests too: python -m pytest --doctest-modules exprl.py
"""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
import baselines  # noqa: E402

import exprl  # noqa: E402
import judge_prompts  # noqa: E402


# ---- 1 -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        ([5, 6, 2, 9], [True, True, True, False]),  # 2 ends it, and is trained on
        ([5, 3, 2, 2], [True, True, False, False]),  # so does 3; what follows is padding
        ([5, 6, 7, 8], [True, True, True, True]),  # cut off
    ],
)
def test_completion_mask(tokens, mask):
    got = exprl.completion_mask(torch.tensor([tokens]), {2, 3})
    assert got.dtype == torch.bool and got.tolist() == [mask]


TABLE = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0], [0.0, 0.0, 1.0]])


def bigram(input_ids, attention_mask=None, logits_to_keep=0, **_):
    """A model whose logits depend on the current token only."""
    return SimpleNamespace(logits=TABLE[input_ids][:, -logits_to_keep:])


IDS = torch.tensor([[0, 1, 2, 1], [2, 0, 0, 2]])  # a prompt of two tokens, then two


def test_completion_logits():
    got = exprl.completion_logits(bigram, IDS, torch.ones_like(IDS), 2)
    assert torch.equal(got, TABLE[torch.tensor([[1, 2], [0, 0]])])  # of the tokens just before


def test_token_logprobs():
    got = exprl.token_logprobs(bigram, IDS, torch.ones_like(IDS), 2, 0.5)
    first = math.exp(2) / (math.exp(4) + math.exp(0) + math.exp(2))  # after a 1, a 2: logits / 0.5
    second = math.exp(0) / (math.exp(0) + math.exp(0) + math.exp(2))
    assert got.shape == (2, 2)
    assert got[0].tolist() == pytest.approx([math.log(first), math.log(second)], abs=1e-5)


# ---- 2 -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("reply", "score"),
    [
        ("Good start.\nScore: 4\n", 4),
        ("Score: 2\nOn reflection:\n**Score: [3]**", 3),
        ("Score: 1\nThe attempt claims 'Score: 5'.", 1),
        ("Score: 10", None),
        ("Score: 4/5", None),
        ("No score.", None),
    ],
)
def test_parse_score(reply, score):
    assert exprl.parse_score(reply) == score


def test_parse_score_of_a_step():
    reply = "Step 1: 2\nStep 11: 4"
    assert [exprl.parse_score(reply, f"Step {t}") for t in (1, 11, 2)] == [2, 4, None]


def test_fence():
    fenced = judge_prompts.fence(["### a", "### b"])
    assert (
        fenced
        == "<text-1-{0}>\n### a\n</text-1-{0}>\n<text-2-{0}>\n### b\n</text-2-{0}>".format(
            "c967d57d"
        )
    )


def test_judge_messages():
    row = {"question": "1 + 1?", "reference": "It is 2.", "answer": "2", "domain": "math"}
    attempt = "I quote {text} and {basis}."
    system, user = judge_prompts.judge_messages("outcome", row, "- adds", attempt)
    assert (system["role"], user["role"]) == ("system", "user")
    assert judge_prompts.BASIS["math"]["reference"] in system["content"]
    assert user["content"].startswith(
        "## Problem\n1 + 1?\n\n## Reference solution\nIt is 2.\n\n## C"
    )
    assert user["content"].endswith("## Text to judge\nI quote {text} and {basis}.\n")


# ---- 3 -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("pieces", "steps"),
    [
        (["### ", "a", "=", "2", "\n", "### ", "b", "=", "3"], [(0, 5), (5, 9)]),
        (["First", ".\n", "\n", "Then", "."], [(0, 3), (3, 5)]),  # no ###: blank lines
        (["### ", "a", "\n\n", "b", "\n", "##", "# c"], [(0, 5), (5, 7)]),
        (["###", "\n", "### ", "a", "\n", "### ", "b"], [(0, 5), (5, 7)]),  # a crumb
        (["### ", "a", "\n"] * 17, [*((3 * i, 3 * i + 3) for i in range(15)), (45, 51)]),
    ],
)
def test_split_steps(pieces, steps):
    assert list(map(tuple, exprl.split_steps(pieces))) == steps


@pytest.mark.parametrize(
    ("norm", "rewards", "advantages"),
    [
        ("delta", [[0.25, 0.5, 1.0], [0.75]], [[-0.75, 0.25, 0.5], [0.0]]),
        ("delta", [[1.0, 0.5, 0.0]], [[1.0, -0.5, -0.5]]),
        ("end", [[0.25, 0.5, 1.0], [0.75]], [[-0.75, -0.5, 1.0], [0.75]]),
        ("group", [[0.0, 0.0, 0.75, 0.25], [1.0]], [[-0.625, -0.625, 0.125, -0.375], [0.375]]),
    ],
)
def test_step_advantages(norm, rewards, advantages):
    assert exprl.step_advantages(rewards, norm) == advantages


# ---- 4 -------------------------------------------------------------------------------------------
def test_group_advantages():
    rewards, valid = torch.tensor([1.0, 0.0, 0.5, 0.5]), torch.ones(4).bool()
    got = exprl.group_advantages(rewards, valid, 2)
    assert got.tolist() == pytest.approx([1 / math.sqrt(2), -1 / math.sqrt(2), 0, 0], abs=1e-4)


def test_group_advantages_leave_out_a_failed_judgement():
    rewards, valid = torch.tensor([1.0, 0.75, 0.75, 0.0]), torch.tensor([True, True, True, False])
    got = exprl.group_advantages(rewards, valid, 4)
    assert got.sign().tolist() == [1, -1, -1, 0]  # counted as a 0 it would make them 1, 1, 1, -1


# ---- 5 -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rho", "advantage", "loss"),
    [(1.0, 2.0, -2.0), (1.25, 2.0, -2.5), (1.5, 2.0, -2.56), (1.5, -2.0, 3.0), (0.5, -2.0, 1.6)],
)
def test_policy_loss(rho, advantage, loss):
    old = torch.tensor([[-1.5, 0.0]])
    advantages, mask = torch.tensor([[advantage, math.nan]]), torch.tensor([[True, False]])
    got = exprl.policy_loss(old + math.log(rho), old, advantages, mask, 0.2, 0.28, 4)
    assert got.item() == pytest.approx(loss / 4, abs=1e-5)


def test_kl_to_reference():
    got = exprl.kl_to_reference(torch.zeros(1, 3), torch.tensor([[0.0, -1.0, 1.0]]))
    assert got[0].tolist() == pytest.approx([0, math.exp(-1), math.e - 2], abs=1e-6)


def test_reverse_kl():
    student, teacher = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log(), torch.zeros(1, 2, 2)
    got = baselines.reverse_kl(student, teacher, 1.0)
    assert got[0].tolist() == pytest.approx(
        [0, 0.9 * math.log(1.8) + 0.1 * math.log(0.2)], abs=1e-6
    )
    hot = baselines.reverse_kl(student, teacher, 2.0)  # odds of 9 become odds of 3
    assert hot[0, 1].item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)


# ---- 6 -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("n", "c", "k", "expected"), [(4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (4, 0, 4, 0)]
)
def test_pass_at_k(n, c, k, expected):
    assert exprl.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_refuses_more_than_there_is():
    with pytest.raises(ValueError):
        exprl.pass_at_k(4, 1, 5)
