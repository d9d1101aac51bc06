r"""What does the judge say of completions that `eval` has sampled, beside what exact match says?

    python exprl.py eval --model Qwen2.5-0.5B runs/Qwen2.5-0.5B-process/final
    python tests/judge_eval.py --files runs/eval/*.jsonl --judge-input quotes --rubric none

Training raises the judge's score: that is what it is for. Whether the model reasons better, or has
learned to please this judge, shows in the columns beside it, and in the texts.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pandas import DataFrame
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from calibrate import bootstrap, judge_problem, score_by_code  # noqa: E402

import exprl  # noqa: E402
from exprl import COLUMNS, Completion, Judge, setting  # noqa: E402


@dataclass(kw_only=True)
class JudgeEvalSettings(exprl.JudgeSettings):
    """Have completions of `eval` judged, each as a whole (outcome)."""

    files: list[str] = setting("what eval wrote: a file a model, of the same problems")
    out: str = setting("folder for the scores and the judge's words", "runs/judge-eval")
    problems: int = setting("how many of them, the first; 0: all", 0, at_least=0)
    samples: int = setting("completions of each, the first; 0: all", 1, at_least=0)


def read_eval(path: Path, settings: JudgeEvalSettings) -> list[list[Completion]]:
    """The completions in a file of `eval`, by problem. Stops at a file that is not one. Which ones
    were cut off is not in it: they are judged as they stand, where training gives them a 1."""
    groups = []
    try:
        for record in exprl.read_log(path)[: settings.problems or None]:
            row = {key: record[key] for key in COLUMNS}
            texts = record["texts"][: settings.samples or None]
            groups.append([])
            for text in texts:
                spans = exprl.split_steps(list(text))
                steps = [text[start:end] for start, end in spans]
                correct = exprl.is_correct(text, row["answer"])
                groups[-1].append(Completion(row, [], text, correct, False, spans, steps))
    except (KeyError, TypeError) as error:
        exprl.stop(f"{path} is not a file of counts that `exprl.py eval` wrote: {error!r}")
    if not groups:
        exprl.stop(f"{path} holds no problem")
    return groups


def by_code(c: Completion) -> float:
    """The score of the whole without a judge; 1 for a text without words."""
    return (score_by_code(c, True) or [1.0])[0]


def judge_eval(settings: JudgeEvalSettings) -> None:
    """Have completions of `eval` judged, each as a whole (outcome)."""
    systems = {file: read_eval(Path(file), settings) for file in settings.files}
    asked = [[group[0].row["question"] for group in groups] for groups in systems.values()]
    if any(questions != asked[0] for questions in asked):
        exprl.stop("the files are not of the same problems: eval the models with the same flags")
    out = Path(settings.out)
    judge = Judge(settings, out)
    try:
        for part in tqdm(list(zip(*systems.values(), strict=True)), "problems", leave=False):
            judge_problem(judge, [c for group in part for c in group], "outcome")
    finally:  # also after Ctrl-C: nothing more is paid
        judge.close()

    table, records = {}, []
    for name, groups in systems.items():
        columns = {
            "judge's score": lambda c: c.scores[0] if c.scores else math.nan,
            "right, %": lambda c: 100 * c.correct,
            "with ### steps, %": lambda c: 100 * bool(re.search("^###", c.text, re.MULTILINE)),
            r"with \boxed{}, %": lambda c: 100 * bool(exprl.last_boxed(c.text)),
            "letters": lambda c: len(c.text),
            "failed, %": lambda c: 100 * (c.scores is None),
        }
        if settings.judge_input == "quotes":  # what the judge could find, and code finds without it
            columns["score by code"] = by_code
            columns["states a value, by code, %"] = lambda c: 100 * (by_code(c) > 1)
        values = [[[of(c) for c in group] for group in groups] for of in columns.values()]
        values = np.ma.masked_invalid(np.array(values, float))  # (columns, problems, samples)

        def means(drawn: np.ndarray, values: np.ma.MaskedArray = values) -> np.ndarray:
            return values[:, drawn].mean(axis=(1, 2)).filled(math.nan)

        shown = [
            "{:.2f} [{:.2f}, {:.2f}]".format(*interval)
            for interval in bootstrap(means, len(groups))
        ]
        table[name] = dict(zip(columns, shown, strict=True))
        for c in [c for group in groups for c in group]:
            told = {"model": name, "question": c.row["question"], "text": c.text}
            told |= {"correct": c.correct, "scores": c.scores, "judge_words": c.judge_words}
            records.append(told)
    exprl.write_log(out / "judged.jsonl", records, "w")
    print(
        f"means, with 95% intervals over {len(asked[0])} problems\n{DataFrame(table).to_string()}"
    )
    print(f"{judge.paid}; texts and the judge's words: {out / 'judged.jsonl'}")


if __name__ == "__main__":
    exprl.run_command(judge_eval, JudgeEvalSettings, sys.argv[1:], __doc__)
