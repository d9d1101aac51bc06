"""judge_eval: the scores of the completions that evaluate.py sampled, and exact match."""

import json
import re

import calibrate
import judge_eval
import program_judge
import pytest
import quotes
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
    """Write a file as evaluate.py does, with these texts for each row."""
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
def judge_it(tmp_path, no_key, capsys, monkeypatch):
    monkeypatch.setattr(calibrate, "DRAWS", 200)

    def run(answer, *flags):
        def reply(request):
            if len(request["messages"]) == 1:  # the test call at the start
                server.requests.remove(request)
                return "ready"
            return answer(request)

        server = program_judge.ChatServer(reply)
        argv = ["--judge-url", server.url, "--judge-model", "j", "--rubric", "none"]
        argv += ["--out", str(tmp_path / "out"), *map(str, flags)]
        classes = [judge_eval.JudgeEvalSettings, quotes.AnyJudgeSettings]
        exprl.run_command(judge_eval.judge_eval, classes, argv)
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
    assert cells(output, "correct, %") == ["100.00", "50.00"]
    assert cells(output, "with ### steps, %") == ["100.00", "0.00"]
    assert cells(output, r"with \boxed{}, %") == ["100.00", "0.00"]
    assert len(requests) == 12
    records = read(tmp_path / "out" / "judged.jsonl")
    assert len(records) == 12 and {r["file"] for r in records} == set(files)
    assert all(r["replies"] == [f"Score: {r['scores'][0]:.0f}"] for r in records)
    _, again = judge_it(score, "--samples", 0, "--files", *files)
    assert again == []  # all is in the cache


def test_the_first_problems_and_samples_only(judge_it, files):
    output, requests = judge_it(score, "--samples", 1, "--problems", 2, "--files", *files)
    assert "over 2 problems" in output and cells(output, "correct, %") == ["100.00", "0.00"]
    assert len(requests) == 4


def test_files_of_one_name_in_two_folders_are_two_columns(judge_it, files, tmp_path):
    (tmp_path / "other").mkdir()
    other = write(tmp_path / "other" / "good.jsonl", lambda r: ["it is 9"])
    output, _ = judge_it(score, "--files", files[0], other)
    assert cells(output, "judge's score") == ["5.00", "2.00"]


def test_a_failed_verdict_is_counted_and_left_out(judge_it, files):
    def answer(request):
        return "?" if "What is 2" in request["messages"][1]["content"] else score(request)

    output, _ = judge_it(answer, "--files", *files)
    assert cells(output, "failed, %") == ["33.33", "33.33"]
    assert cells(output, "judge's score") == ["5.00", "2.00"]


def test_a_problem_has_one_rubric(judge_it, files):
    def answer(request):
        is_rubric = "## Text to judge" not in request["messages"][1]["content"]
        return "- a\n- b" if is_rubric else "Score: 3"

    _, requests = judge_it(answer, "--rubric", "reference", "--files", *files)
    assert len(requests) == 3 + 6


def test_quotations(judge_it, files):
    """The judge quotes and code makes the score: of two items, both are stated, or none."""

    def quote(request):
        attempt = re.search(r"<text-1-\w+>\n(.*)\n</", request["messages"][-1]["content"])[1]
        return "\n".join(f"{j}: {attempt}" for j in (1, 2))

    output, _ = judge_it(quote, "--judge-input", "quotes", "--files", *files)
    assert cells(output, "judge's score") == ["5.00", "1.00"]
    assert cells(output, "score by code") == ["5.00", "1.00"]
    assert cells(output, "states a value, by code, %") == ["100.00", "0.00"]


def test_code_needs_no_quotation(judge_it, files):
    """A quotation that is not in the text is not rewarded, but code finds the value."""
    output, _ = judge_it(lambda _: "1: seven", "--judge-input", "quotes", "--files", *files)
    assert cells(output, "judge's score") == ["1.00", "1.00"]
    assert cells(output, "score by code") == ["5.00", "1.00"]


@pytest.mark.parametrize("text, message", [
    ("", "some.jsonl does not contain a problem"),
    ('{"question": "Q"}\n', "some.jsonl was not written by"),
    ("[1]\n", "some.jsonl was not written by"),
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
    with pytest.raises(SystemExit, match="different problems"):
        judge_it(score, "--files", *files)


def test_a_missing_file_is_one_line(judge_it, tmp_path):
    with pytest.raises(SystemExit, match="no such file") as stopped:
        judge_it(score, "--files", tmp_path / "none.jsonl")
    assert "\n" not in str(stopped.value)
