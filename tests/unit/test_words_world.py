"""The problems in words: true references, disjoint files, and values within bounds."""

import random
import re

import pytest
import value_judge
import words_world
from conftest import read

import exprl

FILES = ("base", "train", "valid", "heldout")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the four files, smaller than usual."""
    folder = tmp_path_factory.mktemp("words")
    sizes = dict.fromkeys(FILES, 60)
    words_world.build(folder, seed=0, length=4, sizes=sizes)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_references_are_true_and_reach_the_answer(world, name):
    for problem in read(world / f"{name}.jsonl"):
        lines = problem["reference"].split("\n")
        calculations = [value_judge.read_calculations(line) for line in lines[:-1]]
        assert all(len(found) == 1 and found[0].is_true for found in calculations)
        assert lines[-1] == rf"### \boxed{{{problem['answer']}}}"
        assert str(calculations[-1][0].stated) == problem["answer"]
        results = [result for found in calculations for result in found[0].results]
        assert max(results) <= words_world.LARGEST
        start = int(re.search(r"\d+", problem["question"])[0])
        assert [start, *results] == sorted({start, *results})  # no story reaches its answer early


def test_only_the_base_sees_one_operation_on_each_line(world):
    for name in FILES:
        n_operations = []
        for problem in read(world / f"{name}.jsonl"):
            for line in problem["reference"].split("\n")[:-1]:
                n_operations.append(len(value_judge.read_calculations(line)[0].results))
        assert {*n_operations} == ({1} if name == "base" else {2})


def test_no_problem_is_in_two_files(world):
    problems = [problem for name in FILES for problem in read(world / f"{name}.jsonl")]
    assert len({problem["question"] for problem in problems}) == 4 * 60
    numbers = [problem["reference"] for problem in problems]
    assert len({*numbers}) == 4 * 60  # other names and items are not enough


def test_the_same_seed_makes_the_same_problems():
    first, again, other = (
        words_world.make_problems(random.Random(seed), [4] * 5, 2, set()) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_the_question_tells_the_operations_of_the_reference(world):
    """Solve each question from its words alone."""
    factors = {"doubles": 2, "twice": 2, "triples": 3, "three times": 3}
    for problem in read(world / "train.jsonl"):
        first, *sentences, _ = re.split(r"(?<=\.) ", problem["question"])
        value = int(re.search(r"\d+", first)[0])
        for sentence in sentences:
            [factor] = [n for word, n in factors.items() if word in sentence.lower()] or [None]
            if factor:
                value *= factor
            else:
                assert re.search("buys|finds|friend gives|wins", sentence)
                value += int(re.search(r"\d+", sentence)[0])
        assert value == int(problem["answer"]), problem["question"]


def test_exprl_loads_the_files(world):
    problems = exprl.load_problems(str(world / "heldout.jsonl"), "test", "answer")
    assert len(problems) == 60
    assert all(exprl.is_correct(p["reference"], p["answer"]) for p in problems)
