"""Properties of the pure functions of exprl.py: masks, log-probs, steps, scores, advantages, loss.

Each is compared with its formula written out once more in the plainest way, on small inputs.
Read a test's name as "FUNCTION: what is true of it". Needs no GPU, no network, no judge.
"""

import itertools
import math
import random
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import exprl


# ---- completion_mask -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5, 6, 2, 9], [1, 1, 1, 0]),  # the eos itself is trained on
        ([5, 6, 2, 2], [1, 1, 1, 0]),  # pad is the same token as eos
        ([2, 5, 6, 7], [1, 0, 0, 0]),  # empty answer
        ([5, 3, 6, 2], [1, 1, 0, 0]),  # any eos of the set, the first that comes
        ([5, 2, 6, 3], [1, 1, 0, 0]),
        ([5, 6, 7, 3], [1, 1, 1, 1]),
        ([5, 6, 7, 8], [1, 1, 1, 1]),  # cut off at the cap
        ([0, 0, 0, 0], [1, 1, 1, 1]),  # 0 is an ordinary token
    ],
)
def test_completion_mask_examples(tokens, expected):
    mask = exprl.completion_mask(torch.tensor([tokens]), {2, 3})
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [expected]


def test_completion_mask_treats_rows_independently():
    tokens = torch.randint(6, (200, 7), generator=torch.Generator().manual_seed(0))
    before = tokens.clone()
    mask = exprl.completion_mask(tokens, {0, 4})
    for row, kept in zip(tokens.tolist(), mask.tolist(), strict=True):
        ends = [t for t, token in enumerate(row) if token in (0, 4)]
        length = ends[0] + 1 if ends else len(row)
        assert kept == [t < length for t in range(len(row))]
    assert torch.equal(tokens, before)


# ---- token_logprobs ------------------------------------------------------------------------------
class Bigram:
    """A model whose logits depend on nothing but the current token: logits_p = table[input_p]."""

    def __init__(self, table):
        self.table = table

    def __call__(self, input_ids, attention_mask=None, logits_to_keep=0, **_):
        return SimpleNamespace(logits=self.table[input_ids][:, -logits_to_keep:])


PROMPTS = [[5, 9, 3], [1, 8, 8, 2, 6], [4, 7]]
COMPLETIONS = [[10, 11, 3, 2], [12, 2], [7, 7, 1, 9, 13]]


def make_model(name):
    """A tiny random transformer. Llama's positions are relative, GPT-2's absolute."""
    torch.manual_seed(0)
    if name == "llama":
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=16,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                initializer_range=0.3,
            )
        )
    else:
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=16,
                n_positions=32,
                n_embd=16,
                n_layer=2,
                n_head=2,
                initializer_range=0.3,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return model.eval()


def pad_left(rows, value, width):
    return torch.tensor([[value] * (width - len(row)) + row for row in rows])


def batch_logprobs(model, rows, temperature, pad=0, extra=0):
    """token_logprobs of prompts + completions, padded on the left; a tensor per completion."""
    sequences = [PROMPTS[i] + COMPLETIONS[i] for i in rows]
    width = max(map(len, sequences)) + extra
    longest = max(len(COMPLETIONS[i]) for i in rows)
    mask = pad_left([[1] * len(sequence) for sequence in sequences], 0, width)
    ids = pad_left(sequences, pad, width)
    logp = exprl.token_logprobs(model, ids, mask, longest, temperature)
    assert logp.shape == (len(rows), longest)
    return [row[longest - len(COMPLETIONS[i]) :] for i, row in zip(rows, logp, strict=True)]


def plain_logprobs(model, prompt, completion, temperature):
    """The same for one completion: a forward pass for each token, no batch, no padding."""
    logps = []
    for t, token in enumerate(completion):
        logits = model(torch.tensor([prompt + completion[:t]])).logits[0, -1]
        logps.append((logits.double() / temperature).softmax(dim=0)[token].log())
    return torch.stack(logps)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.5])
@torch.no_grad()
def test_token_logprobs_equal_one_forward_pass_per_token(name, temperature):
    model = make_model(name)
    for i, logp in enumerate(batch_logprobs(model, [0, 1, 2], temperature)):
        expected = plain_logprobs(model, PROMPTS[i], COMPLETIONS[i], temperature)
        torch.testing.assert_close(logp.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_token_logprobs_do_not_see_the_padding(name):
    model = make_model(name)
    plain = batch_logprobs(model, [0, 1, 2], 0.8)
    padded = batch_logprobs(model, [0, 1, 2], 0.8, pad=7, extra=6)
    torch.testing.assert_close(padded, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_token_logprobs_do_not_see_the_rest_of_the_batch(name):
    model = make_model(name)
    together = batch_logprobs(model, [0, 1, 2], 0.8)
    for rows in ([0], [1], [2], [2, 0], [1, 2]):
        expected = [together[i] for i in rows]
        torch.testing.assert_close(batch_logprobs(model, rows, 0.8), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_token_logprobs_gradient_equals_that_of_the_plain_computation(name):
    model = make_model(name)
    weights = list(model.parameters())
    logp = torch.cat(batch_logprobs(model, [0, 1, 2], 0.7))
    rows = [plain_logprobs(model, PROMPTS[i], COMPLETIONS[i], 0.7) for i in range(3)]
    direction = torch.linspace(-1, 2, len(logp))  # a different weight for each token
    got = torch.autograd.grad((logp * direction).sum(), weights)
    expected = torch.autograd.grad((torch.cat(rows) * direction).sum(), weights)
    assert max(gradient.abs().max() for gradient in got) > 0.01
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_token_logprobs_of_constant_logits(temperature):
    logits = torch.tensor([0.0, 1.0, 3.0])
    ids = torch.tensor([[0, 2, 1], [1, 0, 2]])
    model = Bigram(logits.expand(3, 3))
    logp = exprl.token_logprobs(model, ids, torch.ones_like(ids), 2, temperature)
    total = math.log(sum(math.exp(x / temperature) for x in (0, 1, 3)))
    expected = torch.tensor([[3.0, 1.0], [0.0, 3.0]]) / temperature - total
    torch.testing.assert_close(logp, expected)


def test_token_logprobs_of_token_t_come_from_the_logits_at_t_minus_1():
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[3, 0, 2, 1, 1], [0, 0, 1, 3, 2]])
    for n in (1, 2, 4):  # 4: a prompt of one token
        logp = exprl.token_logprobs(Bigram(table), ids, torch.ones_like(ids), n, 0.5)
        expected = [
            [(table[row[t - 1]] / 0.5).softmax(dim=0)[row[t]].log() for t in range(5 - n, 5)]
            for row in ids
        ]
        torch.testing.assert_close(logp, torch.tensor(expected))


def test_token_logprobs_are_float32_arithmetic_on_bfloat16_logits():
    table = 10 * torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    table = table.bfloat16()
    ids = torch.randint(50, (4, 9), generator=torch.Generator().manual_seed(1))
    logp = exprl.token_logprobs(Bigram(table), ids, torch.ones_like(ids), 8, 0.7)
    exact = torch.log_softmax(table.double() / 0.7, dim=1)[ids[:, :-1], ids[:, 1:]]
    assert logp.dtype == torch.float32
    torch.testing.assert_close(logp.double(), exact, atol=1e-4, rtol=0)


class LargestFloat32(TorchDispatchMode):
    """Watches every operation; `.size` is that of the largest float32 tensor that came out."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float32:
                self.size = max(self.size, x.numel())
        return out


def test_token_logprobs_never_hold_all_logits_in_float32():
    B, T, V = 4, 6, 50
    table = torch.randn(V, V).bfloat16().requires_grad_()
    ids = torch.randint(V, (B, T + 3))
    kept = {}  # float32 tensors that wait for the backward pass

    def pack(x):
        if x.dtype == torch.float32:
            kept[x.data_ptr()] = x.numel()
        return x

    with LargestFloat32() as seen:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logp = exprl.token_logprobs(Bigram(table), ids, torch.ones_like(ids), T, 0.8)
        logp.sum().backward()
    assert table.grad.abs().sum() > 0
    assert seen.size < B * T * V
    assert sum(kept.values()) < B * T * V


# ---- split_steps ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([], []),
        (["a"], [(0, 1)]),
        ([" ", "\n\n", ""], [(0, 3)]),  # nothing but white space
        (["### ", "a", "=", "2", "\n", "### ", "b", "=", "3"], [(0, 5), (5, 9)]),
        (["First", ".\n", "\n", "Then", "."], [(0, 3), (3, 5)]),
        (["Intro", ".\n", "###", " a"], [(0, 2), (2, 4)]),  # what comes before the first ###
        (["#", "##", " a", "\n", "##", "# b"], [(0, 4), (4, 6)]),  # a delimiter of several tokens
        (
            ["### ", "a", ".\n###", " b"],
            [(0, 2), (2, 4)],
        ),  # a token that ends a line and starts one
        (["### ", "a", " ### ", "b", "\nc"], [(0, 5)]),  # ### inside a line
        (["### ", "a", "\n\n", "b", "\n\n", "### ", "c"], [(0, 5), (5, 7)]),  # ### over blank lines
        (["a", "\n", "b", "\n", "c"], [(0, 5)]),  # one new line is no blank line
        (["a", "\n \n", "b", "\n\n\n\n", "c"], [(0, 2), (2, 4), (4, 5)]),
        (
            ["###", "\n", "### ", "a", "\n", "### ", "b"],
            [(0, 5), (5, 7)],
        ),  # crumb at the beginning,
        (["\n\n", "a", "\n\n", "b"], [(0, 3), (3, 4)]),
        (["### ", "a", "\n", "### ", "b", "\n", "###", "\n"], [(0, 3), (3, 8)]),  # at the end
        (["a", "\n\n", "b", "\n\n", ""], [(0, 2), (2, 5)]),
    ],
)
def test_split_steps_examples(pieces, expected):
    assert list(map(tuple, exprl.split_steps(pieces))) == expected


def test_split_steps_leaves_no_bare_delimiter_as_a_step():
    pieces = ["### ", "a", "\n", "###", "\n", "### ", " \n", "###", " b", "\n"]
    steps = exprl.split_steps(pieces)
    assert len(steps) == 2  # the two crumbs may go to either
    assert ["a" in pieces[start:end] for start, end in steps] == [True, False]


@pytest.mark.parametrize("step", [["### ", "a", "\n"], ["a", ".", "\n\n"]])
@pytest.mark.parametrize("n", [15, 16, 17, 40])
def test_split_steps_puts_the_tail_into_the_16th_step(step, n):
    spans = [(3 * i, 3 * i + 3) for i in range(n)]
    if n > 16:
        spans = [*spans[:15], (45, 3 * n)]
    assert list(map(tuple, exprl.split_steps(step * n))) == spans


@pytest.mark.parametrize("delimited", [True, False])
def test_split_steps_finds_the_steps_however_they_are_tokenised(delimited):
    rng = random.Random(0)
    for _ in range(200):
        pieces, expected = [], []
        for _ in range(rng.randint(1, 16)):
            words = " ".join(rng.choices(["so", "x", "=", "2", "#", "(y)"], k=rng.randint(1, 6)))
            lines = f"### a {words}\nb\n" if delimited else f"a {words}\nb\n\n"
            begin = len(pieces)
            while lines:
                size = rng.randint(1, 5)
                pieces.append(lines[:size])
                lines = lines[size:]
            expected.append((begin, len(pieces)))
        assert list(map(tuple, exprl.split_steps(pieces))) == expected


def test_split_steps_covers_every_token_once():
    rng, seen = random.Random(0), set()
    vocabulary = ["", " ", "\n", "\n\n", "\r\n", "#", "###", "### ", "\n###", "a", " b", "é", "�"]
    for _ in range(3000):
        pieces = rng.choices(vocabulary, k=rng.randint(1, 60))
        before = list(pieces)
        steps = exprl.split_steps(pieces)
        assert pieces == before
        covered = [token for start, end in steps for token in range(start, end)]
        assert covered == list(range(len(pieces)))
        assert all(start < end for start, end in steps)
        assert len(steps) <= 16
        texts = ["".join(pieces[start:end]) for start, end in steps]
        assert len(texts) == 1 or all(text.strip("# \r\n") for text in texts)  # none is a crumb
        seen.add(len(steps))
    assert {1, 2, 5} <= seen


# ---- parse_score ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        *[(f"Score: {k}", k) for k in range(1, 6)],
        ("Good start.\nScore: 4\n", 4),
        ("Score: 2\nOn reflection:\nScore: 4", 4),  # the last, not the first
        ("Score: 4\nOn reflection:\nScore: 2", 2),  # nor the largest
        ("Score: 3\r\n\r\nThank you.", 3),  # the last line that is one, not the last line
        ("It ends with 'Score: 5'.\nScore: 1", 1),
        ("Score: 1\nThe attempt claims Score: 5", 1),
        ("  Score:4  ", 4),
        ("SCORE: 4", 4),
        ("score: 4", 4),
        ("**Score: 4**", 4),
        ("**Score:** 4", 4),
        ("Score: **4**", 4),
        ("*Score*: 4", 4),
        ("Score: [4]", 4),
        ("[Score: 4]", 4),
        ("Score: (4)", 4),
        ("**Score: [4]**", 4),
    ],
)
def test_parse_score_reads(reply, expected):
    assert exprl.parse_score(reply) == expected


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "No score.",
        "4",
        "Score:",
        "Score: four",
        "Score: k",
        "Score 4",
        "Score: \n4",
        "Score: 0",
        "Score: 6",
        "Score: 9",
        "Score: 10",
        "Score: 15",
        "Score: 41",
        "Score: 100",
        "Score: 4.5",
        "Score: 4.0",
        "Score: -4",
        "Score: 4/5",
        "Score: 4 / 5",
        "Score: 3-4",
        "Score: 4 out of 5",
        "Score: 4 or 5",
        "Score: 4 5",
        "Score: 5 Score: 5",
        "The attempt says Score: 5",
        "> quoted: Score: 5",
        "My Score: 4",
        "Underscore: 4",
    ],
)
def test_parse_score_is_none_for_anything_else(reply):
    assert exprl.parse_score(reply) is None


def test_parse_score_of_a_step_is_not_that_of_another():
    reply = "Step 1: 2\nStep 11: 4\n**Step 2:** [3]"
    labels = ["Step 1", "Step 2", "Step 11", "Step 3", "Score"]
    assert [exprl.parse_score(reply, label) for label in labels] == [2, 3, 4, None, None]


# ---- group_advantages ----------------------------------------------------------------------------
def plain_group_advantages(rewards, valid, size):
    advantages = []
    for i, r in enumerate(rewards):
        first = i // size * size
        group = [rewards[j] for j in range(first, first + size) if valid[j]]
        if not valid[i] or len(group) < 2 or len(set(group)) == 1:
            advantages.append(0.0)
        else:
            advantages.append((r - statistics.mean(group)) / (statistics.stdev(group) + 1e-6))
    return advantages


def test_group_advantages_equal_the_plain_formula():
    rng = random.Random(0)
    for _ in range(200):
        size, groups = rng.randint(1, 6), rng.randint(1, 4)
        rewards = [rng.choice([0.0, 0.25, 0.5, 0.75, 1.0]) for _ in range(size * groups)]
        valid = [rng.random() < 0.7 for _ in rewards]
        given = torch.tensor(rewards)
        got = exprl.group_advantages(given, torch.tensor(valid), size)
        expected = torch.tensor(plain_group_advantages(rewards, valid, size))
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        assert given.tolist() == rewards  # not changed in place


def test_group_advantages_leave_out_a_failed_judgement():
    rewards = torch.tensor([1.0, 0.75, 0.75, 0.0])
    valid = torch.tensor([True, True, True, False])
    got = exprl.group_advantages(rewards, valid, 4)
    assert got.sign().tolist() == [1, -1, -1, 0]  # counted as a 0 it would make them 1, 1, 1, -1
    for failed in (1.0, -50.0, math.inf, math.nan):  # whatever stands in its place
        rewards[3] = failed
        assert torch.equal(exprl.group_advantages(rewards, valid, 4), got)


def test_group_advantages_have_a_standard_deviation_of_one_with_n_minus_1():
    got = exprl.group_advantages(torch.tensor([0.0, 0.25, 1.0, 1.0]), torch.ones(4).bool(), 4)
    assert got.mean().item() == pytest.approx(0, abs=1e-6)
    assert statistics.stdev(got.tolist()) == pytest.approx(1, abs=1e-4)
    assert got[3] > got[1] > got[0]


def test_group_advantages_of_a_group_do_not_see_other_groups():
    group, valid = torch.tensor([0.0, 0.25, 1.0]), torch.ones(6).bool()
    alone = exprl.group_advantages(group, valid[:3], 3)
    for other in ([9.0, 9.0, 9.0], [0.0, 1.0, 5.0], [-1.0, 0.0, 70.0]):
        other = torch.tensor(other)
        first = exprl.group_advantages(torch.cat([group, other]), valid, 3)[:3]
        second = exprl.group_advantages(torch.cat([other, group]), valid, 3)[3:]
        torch.testing.assert_close([first, second], [alone, alone])


@pytest.mark.parametrize(
    ("rewards", "valid"),
    [
        ([0.0, 1.0, 0.5], [0, 0, 0]),  # all failed
        ([0.0, 1.0, 0.5], [0, 1, 0]),  # one valid
        ([1.0, 1.0, 0.5], [1, 1, 0]),  # the valid ones agree
        ([0.1, 0.1, 0.1], [1, 1, 1]),
        ([0.7] * 10, [1] * 10),
    ],
)
def test_group_advantages_without_a_signal_are_zero(rewards, valid):
    got = exprl.group_advantages(torch.tensor(rewards), torch.tensor(valid).bool(), len(rewards))
    assert got.tolist() == [0] * len(rewards)


def test_group_advantages_add_1e_6_to_the_standard_deviation():
    got = exprl.group_advantages(torch.tensor([0.0, 2e-6]), torch.ones(2).bool(), 2)
    expected = 1e-6 / (math.sqrt(2) * 1e-6 + 1e-6)
    assert got.tolist() == pytest.approx([-expected, expected], abs=1e-3)


def test_group_advantages_without_division_are_the_distance_from_the_mean():
    rewards = torch.tensor([0.0, 0.25, 1.0, 0.5, 0.5, 0.5])
    valid = torch.tensor([True, True, True, True, True, False])
    got = exprl.group_advantages(rewards, valid, 3, False)
    assert got.tolist() == pytest.approx([-1.25 / 3, -0.5 / 3, 1.75 / 3, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize(("n", "size"), [(3, 2), (5, 4), (2, 4)])
def test_group_advantages_refuse_a_broken_group(n, size):
    with pytest.raises(ValueError):
        exprl.group_advantages(torch.zeros(n), torch.ones(n).bool(), size)


# ---- step_advantages -----------------------------------------------------------------------------
def plain_step_advantages(step_rewards, norm):
    means = [statistics.mean(s) for s in step_rewards]
    result = []
    for s in step_rewards:
        T, advantages = len(s), []
        for t in range(1, T + 1):  # as on paper: s_1 ... s_T
            baseline = {
                "delta": s[t - 2] if t > 1 else s[T - 1],
                "end": s[T - 1] if t < T else 0,
                "group": statistics.mean(means),
            }[norm]
            advantages.append(s[t - 1] - baseline)
        result.append(advantages)
    return result


def random_rewards(rng):
    scores = [0.0, 0.25, 0.5, 0.75, 1.0]
    return [rng.choices(scores, k=rng.randint(1, 6)) for _ in range(rng.randint(1, 5))]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.5, 1], [-0.5, 0.5]),
        ([0.25, 0.5, 1], [-0.75, 0.25, 0.5]),
        ([1, 1, 1], [0, 0, 0]),
        ([1, 0.5, 0], [1, -0.5, -0.5]),
        ([0.75], [0]),  # leaving out the delimiter pays nothing
    ],
)
def test_step_advantages_delta_examples(rewards, expected):
    assert exprl.step_advantages([list(rewards)], "delta") == [expected]


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([0.25, 0.5, 1], [-0.75, -0.5, 1]),
        ([1, 0.5, 0], [1, 0.5, 0]),
        ([0.75], [0.75]),
    ],
)
def test_step_advantages_end_examples(rewards, expected):
    assert exprl.step_advantages([list(rewards)], "end") == [expected]


def test_step_advantages_group_example():  # means .25 and 1, each counts once: baseline .625
    got = exprl.step_advantages([[0, 0, 0.75, 0.25], [1]], "group")
    assert got == [[-0.625, -0.625, 0.125, -0.375], [0.375]]


@pytest.mark.parametrize("norm", ["delta", "end", "group"])
def test_step_advantages_equal_the_plain_formula(norm):
    rng = random.Random(0)
    for _ in range(200):
        rewards = random_rewards(rng)
        before = [list(s) for s in rewards]
        got, expected = exprl.step_advantages(rewards, norm), plain_step_advantages(rewards, norm)
        assert [len(a) for a in got] == [len(s) for s in rewards]
        flat = itertools.chain.from_iterable
        assert list(flat(got)) == pytest.approx(list(flat(expected)))
        assert rewards == before


def test_step_advantages_identities():
    rng = random.Random(1)
    for _ in range(200):
        rewards = random_rewards(rng)
        for advantages in exprl.step_advantages(rewards, "delta"):
            assert sum(advantages) == pytest.approx(0)
        for s, advantages in zip(rewards, exprl.step_advantages(rewards, "end"), strict=True):
            assert advantages[-1] == s[-1]
        means = [statistics.mean(a) for a in exprl.step_advantages(rewards, "group")]
        assert statistics.mean(means) == pytest.approx(0)


@pytest.mark.parametrize("norm", ["delta", "end"])
def test_step_advantages_without_a_group_baseline_do_not_see_the_group(norm):
    rewards = [[0.25, 1.0], [0.0, 0.5, 0.75], [1.0]]
    alone = [exprl.step_advantages([s], norm)[0] for s in rewards]
    assert exprl.step_advantages(rewards, norm) == alone


@pytest.mark.parametrize("norm", ["", "Delta", "mean", None])
def test_step_advantages_refuse_another_norm(norm):
    with pytest.raises(ValueError):
        exprl.step_advantages([[0.5, 1.0]], norm)


# ---- policy_loss ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("rho", "advantage", "objective", "slope"),
    [
        (1.00, 2.0, 2.00, 2.00),  # slope: the derivative of the objective by logp
        (1.00, -2.0, -2.00, -2.00),
        (
            1.25,
            2.0,
            2.50,
            2.50,
        ),  # below 1.28: with a symmetric clip of .2 it would have no gradient
        (1.50, 2.0, 2.56, 0.00),  # already likely enough: clipped at 1.28
        (1.50, -2.0, -3.00, -3.00),  # a bad token that became likelier is pushed down in full
        (0.75, -2.0, -1.60, 0.00),  # already unlikely enough: clipped at .8 (symmetric .28: at .72)
        (0.85, -2.0, -1.70, -1.70),
        (0.50, 2.0, 1.00, 1.00),  # a good token that became unlikely is pushed up in full
        (1.50, 0.0, 0.00, 0.00),
    ],
)
def test_policy_loss_clips_each_side_where_it_should(rho, advantage, objective, slope):
    old = torch.tensor([[-1.5]])
    logp = (old + math.log(rho)).requires_grad_()
    mask = torch.ones(1, 1).bool()
    loss = exprl.policy_loss(logp, old, torch.tensor([[advantage]]), mask, 0.2, 0.28, 4)
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == pytest.approx(-objective / 4, abs=1e-5)
    assert logp.grad.item() == pytest.approx(-slope / 4, abs=1e-5)


def random_batch(B=6, T=7):
    torch.manual_seed(0)
    old = torch.randn(B, T) - 2
    logp = old + 0.4 * torch.randn(B, T)
    return logp, old, torch.randn(B, T), torch.rand(B, T) < 0.7


def loss_and_gradient(logp, *arguments):
    logp = logp.clone().requires_grad_()
    loss = exprl.policy_loss(logp, *arguments)
    return loss.item(), torch.autograd.grad(loss, logp)[0]


def test_policy_loss_equals_the_plain_formula():
    logp, old, advantages, mask = random_batch()
    loss, gradient = loss_and_gradient(logp, old, advantages, mask, 0.2, 0.28, 11.0)
    expected, slopes = 0.0, torch.zeros_like(logp)
    for b, t in mask.nonzero().tolist():
        rho, a = math.exp(logp[b, t] - old[b, t]), advantages[b, t].item()
        expected -= min(rho * a, min(max(rho, 0.8), 1.28) * a) / 11
        is_clipped = (a > 0 and rho > 1.28) or (a < 0 and rho < 0.8)
        slopes[b, t] = 0 if is_clipped else -rho * a / 11
    assert loss == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(gradient, slopes)


def test_policy_loss_gradient_on_policy_is_that_of_the_policy_gradient():
    logp, _, advantages, mask = random_batch()
    loss, gradient = loss_and_gradient(logp, logp, advantages, mask, 0.2, 0.28, 10.0)
    torch.testing.assert_close(gradient, -advantages * mask / 10)
    assert loss == pytest.approx(-(advantages * mask).sum().item() / 10, abs=1e-5)


@pytest.mark.parametrize("garbage", [1e4, -1e4, math.inf, -math.inf, math.nan])
def test_policy_loss_does_not_see_masked_positions(garbage):
    logp, old, advantages, mask = random_batch()
    loss, gradient = loss_and_gradient(logp, old, advantages, mask, 0.2, 0.28, 11.0)
    for i in range(3):
        inputs = [logp.clone(), old.clone(), advantages.clone()]
        inputs[i][~mask] = garbage
        same_loss, same_gradient = loss_and_gradient(*inputs, mask, 0.2, 0.28, 11.0)
        assert same_loss == pytest.approx(loss, abs=1e-6)
        torch.testing.assert_close(same_gradient, gradient)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_policy_loss_adds_up_over_micro_batches(size):
    batch = random_batch()
    loss, gradient = loss_and_gradient(*batch, 0.2, 0.28, 11.0)
    parts = zip(*[x.split(size) for x in batch], strict=True)
    losses, gradients = zip(*[loss_and_gradient(*p, 0.2, 0.28, 11.0) for p in parts], strict=True)
    assert sum(losses) == pytest.approx(loss, abs=1e-5)
    torch.testing.assert_close(torch.cat(gradients), gradient)


def test_policy_loss_of_a_batch_without_tokens_is_zero():
    logp, old, advantages, mask = random_batch()
    loss, gradient = loss_and_gradient(logp, old, advantages, mask & False, 0.2, 0.28, 11.0)
    assert loss == 0 and not gradient.any()


# ---- kl_to_reference -----------------------------------------------------------------------------
def log_distributions(n=20, size=5):
    torch.manual_seed(0)
    return torch.randn(2, n, size, dtype=torch.float64).mul(2).log_softmax(dim=-1)


def test_kl_to_reference_is_the_kl_in_expectation_over_the_policy():
    logp, logp_ref = log_distributions()  # every token of the vocabulary once: sum, not samples
    mean = (logp.exp() * exprl.kl_to_reference(logp, logp_ref)).sum(dim=-1)
    torch.testing.assert_close(mean, (logp.exp() * (logp - logp_ref)).sum(dim=-1))
    reversed_kl = (logp_ref.exp() * (logp_ref - logp)).sum(dim=-1)
    assert (mean - reversed_kl).abs().max() > 0.1  # these distributions tell the two apart


def test_kl_to_reference_is_never_negative_and_zero_only_where_equal():
    logp, logp_ref = log_distributions()
    assert (exprl.kl_to_reference(logp, logp_ref) > 0).all()
    assert not exprl.kl_to_reference(logp, logp).any()


def test_kl_to_reference_of_a_small_difference_is_its_square_over_two():
    logp = torch.full((2, 3), -1.5, dtype=torch.float64)
    for small in (1e-3, -1e-3):
        kl = exprl.kl_to_reference(logp, logp + small)
        assert kl.shape == (2, 3)
        torch.testing.assert_close(kl, torch.full_like(kl, small**2 / 2), rtol=1e-3, atol=0)


def test_kl_to_reference_gradient_is_1_minus_r():
    logp, logp_ref = log_distributions()
    logp.requires_grad_()
    exprl.kl_to_reference(logp, logp_ref).sum().backward()
    torch.testing.assert_close(logp.grad, 1 - torch.exp(logp_ref - logp.detach()))


# ---- reverse_kl ----------------------------------------------------------------------------------
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_reverse_kl_equals_the_plain_formula_and_its_gradient(temperature):
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 2, 3, 5)  # B, T, V
    student.requires_grad_()
    got = exprl.reverse_kl(student, teacher, temperature)
    assert got.shape == (2, 3) and got.dtype == torch.float32
    p, q = ((x.double() / temperature).softmax(-1) for x in (student, teacher))
    expected = (p * (p / q).log()).sum(-1)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)
    weights = torch.linspace(-1, 2, 6).view(2, 3)
    [gradient] = torch.autograd.grad((got * weights).sum(), student)
    [plain] = torch.autograd.grad((expected * weights).sum(), student)
    torch.testing.assert_close(gradient, plain, atol=1e-6, rtol=1e-4)
    backwards = (q * (q / p).log()).sum(-1)
    assert (expected - backwards).abs().max() > 0.1  # these tell the two directions apart


def test_reverse_kl_by_hand():
    student, teacher = torch.tensor([[[0.5, 0.5], [0.9, 0.1]]]).log(), torch.zeros(1, 2, 2)
    got = exprl.reverse_kl(student, teacher, 1.0)
    expected = [[0.0, 0.9 * math.log(1.8) + 0.1 * math.log(0.2)]]
    torch.testing.assert_close(got, torch.tensor(expected), atol=1e-6, rtol=1e-5)
    hot = exprl.reverse_kl(student, teacher, 2.0)  # odds of 9 become odds of 3
    assert hot[0, 1].item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-6)


def test_reverse_kl_gradient_is_the_mean_of_the_sampled_form_s():
    torch.manual_seed(0)
    student, teacher = 2 * torch.randn(2, 1, 1, 6)
    student.requires_grad_()
    [full] = torch.autograd.grad(exprl.reverse_kl(student, teacher, 0.7).sum(), student)
    logp, logq = ((x[0, 0] / 0.7).log_softmax(-1) for x in (student, teacher))
    mean = 0
    for v in range(6):  # every token that may be drawn, with its probability
        loss = (logp[v] - logq[v]).detach() * logp[v]
        [gradient] = torch.autograd.grad(loss, student, retain_graph=True)
        mean += logp[v].exp().item() * gradient
    assert full.abs().max() > 0.05
    torch.testing.assert_close(mean, full, atol=1e-5, rtol=1e-4)


def test_reverse_kl_never_holds_all_logits_in_float32():
    B, T, V = 4, 6, 50
    student, teacher = torch.randn(2, B, T, V).bfloat16()
    student.requires_grad_()
    with LargestFloat32() as seen:
        exprl.reverse_kl(student, teacher, 0.8).sum().backward()
    assert student.grad.abs().sum() > 0
    assert seen.size < B * T * V


# ---- pass_at_k -----------------------------------------------------------------------------------
@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_equals_counting_all_subsets(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        right = [i < c for i in range(n)]
        hits = [any(subset) for subset in itertools.combinations(right, k)]
        assert exprl.pass_at_k(n, c, k) == pytest.approx(sum(hits) / len(hits), abs=1e-12)


def test_pass_at_k_of_many_samples_neither_overflows_nor_rounds_away():
    assert exprl.pass_at_k(10_000, 1, 1) == pytest.approx(1e-4)
    assert exprl.pass_at_k(10_000, 1, 5_000) == pytest.approx(0.5)
    all_wrong = math.prod((2000 - 30 - i) / (2000 - i) for i in range(100))
    assert exprl.pass_at_k(2000, 30, 100) == pytest.approx(1 - all_wrong)


def test_pass_at_k_is_a_float():
    for c in (0, 2, 4):
        assert type(exprl.pass_at_k(4, c, 2)) is float


@pytest.mark.parametrize(
    ("n", "c", "k"),
    [
        (4, 5, 1),
        (4, -1, 1),
        (4, 1, 0),
        (4, 1, -1),
        (4, 1, 5),
        (0, 0, 1),
        (0, 0, 0),
        (-1, 0, 1),
    ],
)
def test_pass_at_k_refuses_bad_input(n, c, k):
    with pytest.raises(ValueError):
        exprl.pass_at_k(n, c, k)


def test_kl_is_not_negative_where_policy_and_reference_nearly_agree():
    x = torch.linspace(-2e-3, 2e-3, 20001)
    assert (exprl.kl_to_reference(torch.zeros_like(x), x) >= 0).all()
