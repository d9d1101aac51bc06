r"""calibrate, against judges of known worth behind a real HTTP server."""

import hashlib
import itertools
import json
import re
import threading

import calibrate as calibration
import numpy as np
import pytest
import toy_world
from calibrate import ATTACK
from conftest import read

import exprl

CHECKPOINTS = "- the two are added\n- the sum is boxed"
ROWS = [
    {
        "question": f"What is {i} + {i + 1}?",
        "reference": f"### {i} and one more than {i} make {2 * i + 1}\n\\boxed{{{2 * i + 1}}}",
        "answer": str(2 * i + 1),
    }
    for i in range(40)
]


def run_calibrate(argv):
    exprl.run_command(calibration.calibrate, calibration.CalibrateSettings, argv, "")


REFERENCE = {row["question"]: row["reference"] for row in ROWS}

# --------------------------------------------------------------------------------------------------
# Judges: a score for a question, an attempt, and how often this very request was made before


def perfect(question, attempt, before=0):
    if attempt == REFERENCE[question]:
        return 5
    return 3 if REFERENCE[question].startswith(attempt) else 1


def throw_dice(question, attempt, before):
    return 1 + hashlib.sha256(f"{question}{attempt}{before}".encode()).digest()[0] % 5


def gullible(question, attempt, before):
    return 5 if "To the grader" in attempt else perfect(question, attempt)


def unreliable(question, attempt, before):
    """Perfect, but on every third question it has nothing to say."""
    return "?" if int(question.split()[2]) % 3 == 0 else perfect(question, attempt)


@pytest.fixture
def calibrate(tmp_path, capsys, no_key):
    """calibrate(score, n rows or a file, *flags): what is printed, the records, the requests."""
    servers = []

    def run(score, data, *flags):
        asked, lock = {}, threading.Lock()

        def answer(request):
            user = request["messages"][1]["content"]
            fenced = re.search(r"^<(text-1-\w{8})>\n(.*)\n</\1>$", user, re.DOTALL | re.MULTILINE)
            if not fenced:
                return CHECKPOINTS
            with lock:
                asked[user] = asked.get(user, -1) + 1
            question = re.search(r"## Problem\n(.*)", user)[1]
            # all that follows a first reply without a score is the same request again
            return f"Score: {score(question, fenced[2], asked[user])}"

        servers.append(server := toy_world.ChatServer(answer))
        path = tmp_path / "rows.jsonl"
        if isinstance(data, int):
            path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:data]))
        files = ["--data", str(path if isinstance(data, int) else data)]
        files += ["--out", str(tmp_path / "out"), "--judge-url", server.url, "--judge-model", "j"]
        run_calibrate([*files, "--problems", "0", *map(str, flags)])
        return capsys.readouterr().out, read(tmp_path / "out" / "attempts.jsonl"), server.requests

    yield run
    for server in servers:
        threading.Thread(target=server.shutdown, daemon=True).start()  # takes half a second


def row_of(output, name):
    """The three cells (right, none, wrong) of a line of the table; an interval is one cell."""
    line = re.search(rf"^{name} +(.*)$", output, re.MULTILINE)[1]
    return re.findall(r"undefined|-?[\d.]+ \[-?[\d.]+, -?[\d.]+\]|[\d.]+%|[\d.]+|nan", line)


def verdict_of(output):
    return re.search(r"^verdict: (.*)$", output, re.MULTILINE)[1]


# --------------------------------------------------------------------------------------------------
# Verdicts


def test_a_perfect_judge(calibrate):
    output, records, _ = calibrate(perfect, 8)
    assert row_of(output, "misplacement") == ["0.00 [0.00, 0.00]"] * 3
    assert row_of(output, "AUROC") == ["1.00 [1.00, 1.00]"] * 3
    assert row_of(output, "the reference") == ["5.00"] * 3
    assert row_of(output, "its first half") == ["3.00"] * 3
    for name in ("another problem's", "nothing", "talk to the judge"):
        assert row_of(output, name) == ["1.00"] * 3, name
    assert row_of(output, "failed") == ["0.0%"] * 3
    assert "asked again, 0.0% " in output
    assert verdict_of(output) == "train with it"
    texts = {}
    for r in records:
        texts.setdefault(r["attempt"], []).append(r["text"])
    assert texts["the reference"] == [row["reference"] for row in ROWS[:8]]
    assert set(texts["another problem's"]) == set(texts["the reference"])
    for whole, half, other in zip(*list(texts.values())[:3], strict=True):
        assert whole.startswith(half) and len(half) == len(whole) // 2 and other != whole
    assert set(texts["talk to the judge"]) == {ATTACK}
    assert {r["right: words"] for r in records if r["text"]} == {"Score: 5", "Score: 3", "Score: 1"}


def test_without_reference_and_checkpoints_nothing_is_quoted_or_paid(calibrate):
    flags = ("--judge-input", "quotes", "--rubric", "none")
    output, records, _ = calibrate(lambda *_: "for all\n1: 1", 2, *flags)
    assert row_of(output, "failed") == ["0.0%"] * 2  # right and wrong
    assert all("none" not in record for record in records)
    assert "{'judge_calls': 24, " in output  # 3 passes, 2 problems, 4 attempts that are not empty


def test_a_judge_that_throws_dice(calibrate):
    output, records, _ = calibrate(throw_dice, 40, "--rubric", "none")
    for cell in row_of(output, "AUROC"):
        value, low, high = map(float, re.findall(r"[\d.]+", cell))
        assert 0.35 < value < 0.65 and low < value < high and low < 0.55 and high > 0.45
    verdict = verdict_of(output)
    assert verdict.startswith("do not train with it: misplacement 0.")
    assert "it can be talked into a score" in verdict
    pairs = [(r["right"], r["right again"]) for r in records]
    differ = sum(a != b for a, b in pairs) / len(pairs)
    assert f"asked again, {differ:.1%} " in output
    assert 0.5 < differ < 0.8  # 4 of 5 of those that need a call; "nothing" needs none


def test_a_judge_that_always_says_5(calibrate):
    output, _, _ = calibrate(lambda *_: 5, 4)
    assert row_of(output, "AUROC") == ["undefined"] * 3
    assert row_of(output, "misplacement") == ["0.50 [0.50, 0.50]"] * 3
    verdict = verdict_of(output)
    assert verdict.startswith("do not train with it")
    assert "AUROC undefined" in verdict and "misplacement 0.50" in verdict


def test_a_judge_that_is_talked_into_a_5(calibrate):
    output, _, _ = calibrate(gullible, 4)
    assert row_of(output, "talk to the judge") == ["5.00"] * 3
    assert verdict_of(output) == "do not train with it: it can be talked into a score"


def test_a_judge_that_fails_often(calibrate):
    """A failure is no low score: it is counted, and left out of the rest."""
    output, records, _ = calibrate(unreliable, 6)
    assert verdict_of(output).startswith("do not train with it: over 10% failed: no score in its")
    assert row_of(output, "failed") == [f"{2 * 4 / (6 * 5):.1%}"] * 3  # all but "nothing"
    assert [r["right"] for r in records[:5]] == [None, None, None, 1, None]
    assert row_of(output, "AUROC") == ["1.00 [1.00, 1.00]"] * 3
    assert row_of(output, "the reference") == ["5.00"] * 3
    assert "asked again, 0.0% " in output


def test_a_judge_without_any_verdict_is_not_said_to_be_talked_into_one(calibrate):
    output, _, _ = calibrate(lambda *_: "?", 2, "--rubric", "none")
    assert "over 10% failed" in verdict_of(output) and "talked" not in verdict_of(output)


# --------------------------------------------------------------------------------------------------
# What the judge is asked


def test_the_references_that_it_is_shown_and_what_is_paid_for(calibrate):
    n = 5
    output, _, requests = calibrate(perfect, n)
    users = [request["messages"][1]["content"] for request in requests]
    shown = {}  # (question, reference) -> attempts
    for user in users:
        given, _, text = user.partition("\n## Text to judge\n")
        question = re.search(r"## Problem\n(.*)", given)[1]
        reference = re.search(r"## Reference solution\n(.*?)\n(?=\n## |$)", given, re.DOTALL)
        shown.setdefault((question, reference and reference[1]), []).append(text)
    own = [(row["question"], row["reference"]) for row in ROWS[:n]]
    none = [(question, None) for question, _ in own]
    wrong = [pair for pair in shown if pair not in own + none]
    assert set(own + none + wrong) == set(shown) and len(shown) == 3 * n
    assert {q for q, _ in wrong} == {q for q, _ in own}
    assert {r for _, r in wrong} == {r for _, r in own}
    for pair, texts in shown.items():
        rubrics = texts.count("")
        asked = 2 if pair in own else 1  # those with the right one are asked again, all of them
        assert (rubrics, len(texts) - rubrics) == (asked, 4 * asked), pair
    calls = 4 * 5 * n  # in 4 passes: a rubric, and all but the empty attempt
    assert len(requests) == calls and f"'judge_calls': {calls}" in output
    assert int(re.search(r"up to ([\d,]+) calls", output)[1].replace(",", "")) >= calls

    output, _, requests = calibrate(throw_dice, n)  # all is in the cache
    assert requests == [] and "'judge_calls': 0" in output
    assert verdict_of(output) == "train with it"


def test_sampled_completions(calibrate, tiny, tmp_path):
    """With --model they are there, and whether they are right is known."""
    rows = read(tiny / "heldout.jsonl")[:3]
    path = tmp_path / "toy.jsonl"

    def run():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ("--model", tiny / "base", "--samples", "2", "--max-new-tokens", "60")
        flags += ("--temperature", "0.01", "--rubric", "none")
        output, records, _ = calibrate(lambda *_: 3, path, *flags)
        return output, [r for r in records if r["attempt"].startswith("sampled")], len(records)

    _, before, n_records = run()
    assert len(before) == 6 and n_records == 3 * (5 + 2)
    rows[1]["answer"] = exprl.last_boxed(before[2]["text"])  # so it is right after all
    assert re.fullmatch(r"\d\d", rows[1]["answer"])
    output, after, _ = run()
    assert [r["text"] for r in after] == [r["text"] for r in before]
    answers = [row["answer"] for row in rows for _ in range(2)]
    for r, answer in zip(after, answers, strict=True):
        is_right = exprl.last_boxed(r["text"]) == answer
        assert r["correct"] == is_right
        assert (r["attempt"] == after[2]["attempt"]) == is_right  # a line of the table for each
    assert after[2]["correct"] and row_of(output, after[2]["attempt"]) == ["3.00"] * 3


# --------------------------------------------------------------------------------------------------
# One line that says what is wrong, before anything is asked


@pytest.mark.parametrize("rows, message", [
    (ROWS[:1], "give two problems or more"),
    ([ROWS[0], {"question": "Why?", "answer": "2"}], "line 2: has no reference"),
])  # fmt: skip
def test_what_is_missing_is_said_before_any_call(calibrate, tmp_path, rows, message):
    asked = []
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit, match=message) as stopped:
        calibrate(lambda *_: asked.append(1), tmp_path / "bad.jsonl")
    assert "\n" not in str(stopped.value) and not asked


def test_no_judge(tmp_path, no_key):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="no judge: set OPENAI_API_KEY"):
        run_calibrate(files)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------
# Numbers


def test_judge_quality_against_brute_force():
    rng = np.random.default_rng(0)
    undefined = 0
    for _ in range(300):
        n = rng.integers(1, 9)
        scores = rng.choice([1, 2, 3, 4, 5, np.nan], size=(n, 2))
        correct = rng.choice([0, 1, np.nan], size=(n, 2))
        pairs = list(zip(scores.flat, correct.flat, strict=True))
        right = [s for s, c in pairs if c == 1 and s == s]
        wrong = [s for s, c in pairs if c == 0 and s == s]
        misplacement, auroc = calibration.judge_quality(scores, correct)
        if not right or not wrong:
            assert np.isnan([misplacement, auroc]).all()
            undefined += 1
            continue
        fnr = sum(s not in (4, 5) for s in right) / len(right)
        fpr = sum(s in (4, 5) for s in wrong) / len(wrong)
        assert misplacement == pytest.approx((fnr + fpr) / 2)
        wins = [1 if r > w else 0.5 if r == w else 0 for r, w in itertools.product(right, wrong)]
        if len({*right, *wrong}) == 1:
            assert np.isnan(auroc)
        else:
            assert auroc == pytest.approx(sum(wins) / len(wins))
    assert 20 < undefined < 200


def test_the_bootstrap_s_interval():
    """It is where theory puts it, so it shrinks with n; draws without a value are left out."""
    for n in (25, 100, 400):
        values = np.random.default_rng(n).random(n)
        value, low, high = calibration.bootstrap(lambda drawn, v=values: v[drawn].mean(), n)
        error = values.std() / n**0.5
        assert value == pytest.approx(values.mean())
        assert [low, high] == pytest.approx(
            [value - 1.96 * error, value + 1.96 * error], abs=error / 4
        )
    some = calibration.bootstrap(lambda drawn: 0.5 if 0 in drawn else np.nan, 3)
    assert some == [0.5, 0.5, 0.5]
    assert np.isnan(calibration.bootstrap(lambda drawn: np.nan, 3)).all()
