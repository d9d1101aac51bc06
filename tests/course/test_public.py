"""Worked examples of the graded functions. They find many mistakes, but not all.

    python -m pytest tests/course/test_public.py                   all of them
    python -m pytest tests/course/test_public.py -k split_steps    those of one function

The examples in the docstrings are tests too: python -m pytest --doctest-modules exprl.py
"""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]
import baselines  # noqa: E402
import evaluate  # noqa: E402

import exprl  # noqa: E402
import judge_prompts  # noqa: E402


# ---- 1 -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "mask"),
    [
        ([5, 6, 2, 9], [True, True, True, False]),  # 2 is an eos, and is trained on
        ([5, 3, 2, 2], [True, True, False, False]),  # so is 3, and padding follows
        ([5, 6, 7, 8], [True, True, True, True]),  # truncated
    ],
)
def test_completion_mask(tokens, mask):
    got = exprl.completion_mask(torch.tensor([tokens]), {2, 3})
    assert got.dtype == torch.bool and got.tolist() == [mask]


TABLE = torch.tensor([[0.0, 1.0, 3.0], [2.0, 0.0, 1.0], [0.0, 0.0, 1.0]])


class Cache:
    """The cache of a model that does not look back."""

    def batch_repeat_interleave(self, repeats):
        pass


def bigram(input_ids, logits_to_keep=0, **_):
    """A model whose logits depend only on the current token."""
    return SimpleNamespace(logits=TABLE[input_ids][:, -logits_to_keep:], cache=Cache())


PROMPT = torch.tensor([0, 1])
COMPLETIONS = torch.tensor([[2, 1], [0, 2]])


def test_completion_logits():
    got = exprl.completion_logits(bigram, PROMPT, COMPLETIONS)
    assert torch.equal(got, TABLE[torch.tensor([[1, 2], [1, 0]])])  # of the token before each


def test_token_logprobs():
    got = exprl.token_logprobs(bigram, PROMPT, COMPLETIONS, 0.5)
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
    assert judge_prompts.parse_score(reply) == score


def test_parse_score_of_a_step():
    reply = "Step 1: 2\nStep 11: 4"
    assert [judge_prompts.parse_score(reply, f"Step {t}") for t in (1, 11, 2)] == [2, 4, None]


def test_fence():
    fenced = judge_prompts.fence(["### a", "### b"])
    block = "<text-{0}-c967d57d>\n{1}\n</text-{0}-c967d57d>"
    assert fenced == block.format(1, "### a") + "\n" + block.format(2, "### b")


def test_judge_messages():
    row = {"question": "1 + 1?", "reference": "It is 2.", "answer": "2", "domain": "math"}
    attempt = "I quote {text} and {basis}."
    system, user = judge_prompts.judge_messages("outcome", row, "- adds", attempt)
    assert (system["role"], user["role"]) == ("system", "user")
    assert system["content"] == judge_prompts.system_message("outcome", "math", True)
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
        (["###", "\n", "### ", "a", "\n", "### ", "b"], [(0, 5), (5, 7)]),  # a part without letters
        (["### ", "a", "\n"] * 17, [*((3 * i, 3 * i + 3) for i in range(15)), (45, 51)]),
    ],
)
def test_split_steps(pieces, steps):
    assert list(map(tuple, judge_prompts.split_steps(pieces))) == steps


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
    got = exprl.group_advantages([1.0, 0.0, 0.5, 0.5])
    assert got == pytest.approx([math.sqrt(1.5), -math.sqrt(1.5), 0, 0], abs=1e-4)
    assert exprl.group_advantages([1.0, 0.0, 0.5], divide_by_std=False) == [0.5, -0.5, 0.0]
    assert exprl.group_advantages([0.5, 0.5]) == [0.0, 0.0]


def test_group_advantages_leave_out_a_failure_of_the_judge():
    a, b, c, d = exprl.group_advantages([1.0, 0.75, 0.75, None])
    assert a > 0 and b < 0 and c < 0 and d == 0  # a 0 in its place would give b > 0 and c > 0


# ---- 5 -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"),
    [(1.0, 2.0, -2.0), (1.25, 2.0, -2.5), (1.5, 2.0, -2.56), (1.5, -2.0, 3.0), (0.5, -2.0, 1.6)],
)
def test_policy_loss(ratio, advantage, loss):
    old = torch.tensor([-1.5, 0.0])
    logp = old + torch.tensor([math.log(ratio), 0.0])
    got = exprl.policy_loss(logp, old, torch.tensor([advantage, 1.0]), 0.2, 0.28)
    assert got.tolist() == pytest.approx([loss, -1.0], abs=1e-5)


def test_kl_to_initial():
    got = exprl.kl_to_initial(torch.zeros(3), torch.tensor([0.0, -1.0, 1.0]))
    assert got.tolist() == pytest.approx([0, math.exp(-1), math.e - 2], abs=1e-6)


def test_reverse_kl():
    student, teacher = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log(), torch.zeros(1, 2, 2)
    got = baselines.reverse_kl(student, teacher, 1.0)
    expected = [0, 0.9 * math.log(1.8) + 0.1 * math.log(0.2)]
    assert got[0].tolist() == pytest.approx(expected, abs=1e-6)
    hot = baselines.reverse_kl(student, teacher, 2.0)  # odds of 9 become odds of 3
    assert hot[0, 1].item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)


# ---- 6 -------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("n", "c", "k", "expected"), [(4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 2, 2, 5 / 6), (4, 0, 4, 0)]
)
def test_pass_at_k(n, c, k, expected):
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_refuses_k_above_n():
    with pytest.raises(ValueError):
        evaluate.pass_at_k(4, 1, 5)
