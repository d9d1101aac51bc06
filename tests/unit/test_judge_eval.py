"""judge_eval: the judge's score beside what exact match says, of what eval has written."""

import json
import re

import judge_eval
import pytest
import toy_world
from conftest import read

import exprl

ROWS = [
    {
        "question": f"What is {i} + 1?",
        "reference": f"{i} + 1 = {i + 1}\nso it is {i + 1}",
        "answer": str(i + 1),
        "domain": "math",
    }
    for i in range(1, 4)
]


def write(path, texts_of):
    """A file of eval: the texts of each row."""
    records = []
    for row in ROWS:
        texts = texts_of(row)
        correct = sum(exprl.is_correct(text, row["answer"]) for text in texts)
        records.append(row | {"model": "m", "n": len(texts), "correct": correct, "texts": texts})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def files(tmp_path):
    boxes = ("### so \\boxed{%s}", "### it is \\boxed{%s}")
    right = write(tmp_path / "good.jsonl", lambda r: [box % r["answer"] for box in boxes])
    wrong = write(tmp_path / "bad.jsonl", lambda r: ["it is 9", f"it is {r['answer']}"])
    return [right, wrong]


@pytest.fixture
def judge_it(tmp_path, no_key, capsys):
    def run(answer, *flags):
        server = toy_world.ChatServer(answer)
        argv = ["--judge-url", server.url, "--judge-model", "j", "--rubric", "none"]
        argv += ["--out", str(tmp_path / "out"), *map(str, flags)]
        exprl.run_command(judge_eval.judge_eval, judge_eval.JudgeEvalSettings, argv, "")
        server.shutdown()
        return capsys.readouterr().out, server.requests

    return run


def cells(output, name):
    return re.findall(r"([\d.]+) \[", re.search(rf"^{re.escape(name)} .*$", output, re.M)[0])


def score(request):
    return "Score: 5" if "###" in request["messages"][1]["content"] else "Score: 2"


def test_the_table(judge_it, files, tmp_path):
    output, requests = judge_it(score, "--samples", 0, "--files", *files)
    assert cells(output, "judge's score") == ["5.00", "2.00"]
    assert cells(output, "right, %") == ["100.00", "50.00"]
    assert cells(output, "with ### steps, %") == ["100.00", "0.00"]
    assert cells(output, r"with \boxed{}, %") == ["100.00", "0.00"]
    assert len(requests) == 12
    records = read(tmp_path / "out" / "judged.jsonl")
    assert len(records) == 12 and {r["model"] for r in records} == set(files)
    assert all(r["judge_words"] == [f"Score: {r['scores'][0]}"] for r in records)
    _, again = judge_it(score, "--samples", 0, "--files", *files)
    assert again == []  # all is in the cache


def test_the_first_problems_and_samples_only(judge_it, files):
    output, requests = judge_it(score, "--samples", 1, "--problems", 2, "--files", *files)
    assert "over 2 problems" in output and cells(output, "right, %") == ["100.00", "0.00"]
    assert len(requests) == 4


def test_files_of_one_name_in_two_folders_are_two_columns(judge_it, files, tmp_path):
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other" / "good.jsonl", lambda r: ["it is 9"])
    output, _ = judge_it(score, "--files", files[0], other)
    assert cells(output, "judge's score") == ["5.00", "2.00"]


def test_a_problem_without_a_verdict_does_not_end_the_rest(judge_it, files):
    """It is counted; a judge that answers nothing at all stops it."""

    def answer(request):
        return "?" if "What is 2" in request["messages"][1]["content"] else score(request)

    output, _ = judge_it(answer, "--files", *files)
    assert cells(output, "failed, %") == ["33.33", "33.33"]
    assert cells(output, "judge's score") == ["5.00", "2.00"]
    with pytest.raises(SystemExit, match="gives no answer"):
        judge_it(
            lambda request: (400, {"error": {"message": "no"}}),
            "--judge-model",
            "k",
            "--files",
            *files,
        )


def test_a_rubric_is_asked_for_once_a_problem(judge_it, files):
    def answer(request):
        is_rubric = "## Text to judge" not in request["messages"][1]["content"]
        return "- a\n- b" if is_rubric else "Score: 3"

    _, requests = judge_it(answer, "--rubric", "checkpoints", "--files", *files)
    assert len(requests) == 3 + 6


def test_quotations(judge_it, files):
    """The judge quotes, code makes the score: of two checkpoints both, and none."""

    def quote(request):
        attempt = re.search(r"<text-1-\w+>\n(.*)\n</", request["messages"][-1]["content"])[1]
        return "\n".join(f"{j}: {attempt}" for j in (1, 2))

    output, _ = judge_it(quote, "--judge-input", "quotes", "--files", *files)
    assert cells(output, "judge's score") == ["5.00", "1.00"]
    assert cells(output, "score by code") == ["5.00", "1.00"]
    assert cells(output, "states a value, by code, %") == ["100.00", "0.00"]


def test_what_code_finds_needs_no_quotation(judge_it, files):
    """A judge that quotes what is not there pays nothing; by code the value is found."""
    output, _ = judge_it(lambda _: "1: seven", "--judge-input", "quotes", "--files", *files)
    assert cells(output, "judge's score") == ["1.00", "1.00"]
    assert cells(output, "score by code") == ["5.00", "1.00"]


@pytest.mark.parametrize("text, message", [
    ("", "holds no problem"),
    ('{"question": "Q"}\n', "is not a file of counts"),
    ("[1]\n", "holds no problem"),
])  # fmt: skip
def test_another_file(judge_it, tmp_path, text, message):
    (tmp_path / "some.jsonl").write_text(text)
    with pytest.raises(SystemExit, match=message):
        judge_it(score, "--files", tmp_path / "some.jsonl")


def test_files_of_other_problems(judge_it, files):
    with open(files[1]) as file:
        lines = file.readlines()
    with open(files[1], "w") as file:
        file.writelines(lines[1:])
    with pytest.raises(SystemExit, match="not of the same problems"):
        judge_it(score, "--files", *files)


def test_a_missing_file_is_one_line(judge_it, tmp_path):
    with pytest.raises(SystemExit, match="No such file") as stopped:
        judge_it(score, "--files", tmp_path / "none.jsonl")
    assert "\n" not in str(stopped.value)
