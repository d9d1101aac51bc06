"""evaluate: pass@k with intervals, the files of completions, and the hard problems."""

import itertools
import shutil

import evaluate
import pytest
from conftest import read

import exprl

CLASSES = [evaluate.EvalSettings, exprl.SamplingSettings]


def test_pass_at_k_against_brute_force():
    """The share of all k-subsets of n completions that contain a correct one."""
    for n in range(1, 7):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations(range(n), k))
            share = sum(min(subset) < c for subset in subsets) / len(subsets)
            assert evaluate.pass_at_k(n, c, k) == pytest.approx(share, abs=1e-12), (n, c, k)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match=r"pass@k"):
        evaluate.pass_at_k(n, c, k)


def test_the_interval_is_that_of_the_normal_approximation():
    """400 problems, half of them solved: the standard error is 0.5 / 20."""
    rates = evaluate.pass_rates([{"n": 1, "correct": i % 2} for i in range(400)])
    mean, low, high = rates[1]
    assert list(rates) == [1] and mean == 0.5
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.01)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.01)


def test_k_doubles_up_to_n():
    rates = evaluate.pass_rates([{"n": 6, "correct": 1}] * 10)
    assert list(rates) == [1, 2, 4]
    assert rates[4] == pytest.approx((4 / 6,) * 3)


def test_the_same_problems_are_chosen_every_time():
    problems = list(range(50))
    some = evaluate.choose(problems, 8)
    assert some == evaluate.choose(problems, 8) and len(set(some)) == 8
    assert some != problems[:8]  # a file may be sorted
    assert evaluate.choose(problems, 0) == evaluate.choose(problems, 99) == problems


def test_evaluation_from_end_to_end(tiny, tmp_path, capsys):
    """Two models of the same last name get two files, and hard problems are those of the last."""
    other = tmp_path / "copy" / "base"
    shutil.copytree(tiny / "base", other)
    hard = tmp_path / "hard.jsonl"
    flags = ["--model", tiny / "base", other, "--data", tiny / "train.jsonl", "--problems", "5"]
    flags += ["--samples", "6", "--temperature", "1", "--max-new-tokens", "60"]
    flags += ["--sample-batch", "12", "--out", tmp_path / "eval", "--save-hard", hard]
    exprl.run_command(evaluate.evaluate, CLASSES, [str(flag) for flag in flags])
    output = capsys.readouterr().out
    files = [evaluate.eval_file(tmp_path / "eval", str(model)) for model in (tiny / "base", other)]
    assert sorted((tmp_path / "eval").iterdir()) == sorted(files) and len({*files}) == 2
    first, second = map(read, files)
    assert [r["texts"] for r in first] == [r["texts"] for r in second]  # the same seed
    assert len(first) == 5 and {r["model"] for r in second} == {str(other)}
    for record in first:
        assert record["n"] == len(record["texts"]) == 6
        correct = [exprl.is_correct(text, record["answer"]) for text in record["texts"]]
        assert record["correct"] == sum(correct)
    problems = exprl.load_problems(str(tiny / "train.jsonl"), "train", "answer")
    chosen = evaluate.choose(problems, 5)
    assert [{name: r[name] for name in chosen[0]} for r in first] == chosen
    unsolved = [r["question"] for r in second if r["correct"] == 0]
    assert [p["question"] for p in exprl.load_problems(str(hard), "train", "answer")] == unsolved
    mean = 100 * sum(r["correct"] for r in first) / 30
    assert output.count(f"{mean:.1f} [") >= 2 and "pass@4" in output and "pass@8" not in output


def test_an_evaluation_replaces_the_one_before(tiny, tmp_path):
    flags = ["--model", tiny / "base", "--data", tiny / "heldout.jsonl", "--problems", "2"]
    flags += ["--samples", "2", "--temperature", "1", "--max-new-tokens", "60"]
    flags = [str(flag) for flag in [*flags, "--out", tmp_path]]
    exprl.run_command(evaluate.evaluate, CLASSES, flags)
    exprl.run_command(evaluate.evaluate, CLASSES, [*flags, "--seed", "5"])
    assert len(read(evaluate.eval_file(tmp_path, str(tiny / "base")))) == 2


def test_no_completion_is_correct_after_the_cap(tiny, tmp_path):
    """Truncated completions are counted."""
    flags = ["--model", tiny / "base", "--data", tiny / "heldout.jsonl", "--problems", "2"]
    flags += ["--samples", "2", "--temperature", "1", "--max-new-tokens", "9"]
    flags = [str(flag) for flag in [*flags, "--out", tmp_path]]
    exprl.run_command(evaluate.evaluate, CLASSES, flags)
    records = read(evaluate.eval_file(tmp_path, str(tiny / "base")))
    assert [(r["truncated"], r["correct"]) for r in records] == [(2, 0)] * 2
