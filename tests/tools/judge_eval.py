r"""Judge the completions that evaluate.py sampled, and compare the scores with exact match.

    python tests/tools/evaluate.py --model Qwen2.5-0.5B runs/process/final
    python tests/tools/judge_eval.py --files runs/eval/*.jsonl

Training raises the judge's score, because that is its aim. Does the model also reason better, or
did it only learn to please this judge? Compare the score with the other lines of the table, and
read the texts.
"""

import math
import re
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

from attempts import cut_into_steps  # noqa: E402
from calibrate import (  # noqa: E402
    bootstrap,
    describe_bill,
    fresh_judge,
    judge_all,
    scores_of,
    show_interval,
    text_table,
)
from quotes import AnyJudgeSettings, code_scores  # noqa: E402

import exprl  # noqa: E402
from exprl import Completion, option  # noqa: E402


@dataclass(kw_only=True)
class JudgeEvalSettings(exprl.Settings):
    """Which completions are judged."""

    _argument_group_name = "completions"
    may_be_zero = ("problems", "samples")
    files: list[str] = option(MISSING, "files that evaluate.py wrote, all of the same problems")
    out: str = option("runs/judge-eval", "folder for the scores and the replies")
    problems: int = option(0, "number of problems, the first ones of each file; 0: all")
    samples: int = option(1, "completions of each problem, the first ones; 0: all")


def read_completions(path: Path, settings: JudgeEvalSettings) -> list[list[Completion]]:
    """Read the completions in a file of evaluate.py, one list for each problem.

    The file does not say which completions were truncated. All are judged as they stand, although
    training gives a truncated completion the lowest score.
    """
    if not path.exists():
        exprl.stop(f"--files {path}: there is no such file")
    groups = []
    try:
        for record in exprl.read_jsonl(path)[: settings.problems or None]:
            names = ("question", "reference", "answer", "domain")
            problem = {name: record[name] for name in names}
            groups.append([])
            for text in record["texts"][: settings.samples or None]:
                correct = exprl.is_correct(text, problem["answer"])
                steps = cut_into_steps(text)
                groups[-1].append(Completion(problem, text, steps, [], correct, False, [], []))
    except (KeyError, TypeError) as error:
        exprl.stop(f"--files {path} was not written by tests/tools/evaluate.py: {error!r}")
    if not groups:
        exprl.stop(f"--files {path} does not contain a problem")
    return groups


def score_by_code(completion: Completion) -> float:
    """Score the whole completion without a judge (see quotes.py). A text without words gets 1."""
    scores = code_scores(completion, "", is_outcome=True) if completion.step_texts else None
    return scores[0] if scores else 1.0


def measure(completion: Completion, verdict: exprl.Verdict, with_code: bool) -> dict[str, float]:
    """Return one number for each line of the table. NaN: the judge failed."""
    scores = scores_of(verdict)
    values = {
        "judge's score": math.nan if scores is None else scores[0],
        "correct, %": 100 * completion.correct,
        "with ### steps, %": 100 * bool(re.search("^###", completion.text, re.MULTILINE)),
        r"with \boxed{}, %": 100 * (r"\boxed{" in completion.text),
        "length in characters": len(completion.text),
        "failed, %": 100 * (scores is None),
    }
    if with_code:  # what a judge that quotes could find, and what code finds without it
        values["score by code"] = score_by_code(completion)
        values["states a value, by code, %"] = 100 * (score_by_code(completion) > 1)
    return values


def judge_eval(settings: JudgeEvalSettings, judging: AnyJudgeSettings) -> None:
    """Judge sampled completions, each as a whole, and compare the scores with exact match."""
    systems = {file: read_completions(Path(file), settings) for file in settings.files}
    questions = [[group[0].problem["question"] for group in part] for part in systems.values()]
    if any(other != questions[0] for other in questions):
        exprl.stop("--files: the files contain different problems; evaluate all models together")
    out = Path(settings.out)
    judge = fresh_judge(judging, "outcome", out)
    with_code = judging.judge_input == "quotes"
    rows, records = {}, []
    for name, groups in systems.items():
        completions = [completion for group in groups for completion in group]
        verdicts = judge_all(judge, completions, name)
        numbers = [measure(c, v, with_code) for c, v in zip(completions, verdicts, strict=True)]
        for line in numbers[0]:
            values = np.array([number[line] for number in numbers]).reshape(len(groups), -1)

            def mean(indices, values=values):
                drawn = values[indices]
                known = drawn[~np.isnan(drawn)]
                return [known.mean() if len(known) else math.nan]

            [interval] = bootstrap(mean, len(groups))
            rows.setdefault(line, []).append(show_interval(interval))
        for completion, verdict in zip(completions, verdicts, strict=True):
            record = {"file": name, "question": completion.problem["question"]}
            record |= {"text": completion.text, "correct": completion.correct}
            record |= {"scores": scores_of(verdict), "replies": [*verdict.replies]}
            records.append(record)
    file = out / "judged.jsonl"
    file.unlink(missing_ok=True)
    exprl.append_jsonl(file, records)
    print(f"means, with 95% intervals over {len(questions[0])} problems")
    print(text_table(settings.files, rows))
    print(f"{describe_bill(judge)}\ntexts and replies: {file}")


if __name__ == "__main__":
    exprl.run_command(judge_eval, [JudgeEvalSettings, AnyJudgeSettings], sys.argv[1:])
