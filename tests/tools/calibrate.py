"""Test whether a judge is good enough to train against, before you pay for a training run.

    python tests/tools/calibrate.py --judge-model gpt-4.1-mini --model Qwen2.5-0.5B

The judge scores attempts whose quality is known (attempts.py). They are the reference of each
problem, the reference spoilt in four ways, the reference of another problem, and texts that only
talk to the judge. With --model, they also include sampled completions. The calls are those that
training makes with the same --method and --judge-input. There are four passes:

    right   all attempts, with the right reference
    none    a few of them, without a reference
    wrong   the same few, with the reference of another problem
    again   a few of them, as in the pass `right`, to see whether the judge repeats itself

The program prints the mean score of each kind of attempt, the error rates of the judge, and a
recommendation. Everything that the judge wrote is kept in --out.
"""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

import evaluate  # noqa: E402
from attempts import ATTACKS, Attempt, make_attempts  # noqa: E402
from baselines import show_reference  # noqa: E402
from quotes import AnyJudgeSettings, code_scores, make_judge  # noqa: E402

import exprl  # noqa: E402
from exprl import Completion, Judge, Verdict, option  # noqa: E402


@dataclass(kw_only=True)
class CalibrateSettings(exprl.Settings):
    """What the judge is to be used for, and on how many problems it is tested."""

    _argument_group_name = "calibration"
    may_be_zero = ("problems",)
    method: Literal["process", "outcome"] = option(
        "process", "the --method of the training that the judge is meant for"
    )
    model: str = option("", "also judge completions of this model (a hub id or a folder)")
    out: str = option("runs/calibrate", "folder for the attempts and all replies")
    split: Literal["test", "train"] = option("test", "split of a hub data set")
    problems: int = option(4, "number of problems, at least 3; 0: all")
    samples: int = option(2, "completions sampled for each problem, with --model")


# ---- Numbers -------------------------------------------------------------------------------------
def judge_quality(scores: np.ndarray, good: np.ndarray) -> tuple[float, float, float]:
    """Compare scores 1..5 with what is known (1 good, 0 bad), same shape -> (FNR, FPR, AUROC).

    Entries that are NaN are left out. A score of 4 or 5 means that the judge calls it good. FNR is
    the share of the good that got less, and FPR is the share of the bad that got 4 or 5. AUROC is
    P(a good one scores higher than a bad one), where ties count half. A number is NaN if it is
    undefined: all three if there are no good ones or no bad ones, AUROC if all scores are equal.

    >>> judge_quality(np.array([5, 2, 3, 1, 4]), np.array([1, 1, 0, 0, np.nan]))
    (0.5, 0.0, 0.75)
    """
    of_good, of_bad = (scores[(good == label) & (scores > 0)] for label in (1, 0))
    if not len(of_good) or not len(of_bad):
        return math.nan, math.nan, math.nan
    fnr, fpr = float(np.mean(of_good < 4)), float(np.mean(of_bad >= 4))
    if len({*of_good, *of_bad}) == 1:
        return fnr, fpr, math.nan
    order = np.sign(of_good[:, None] - of_bad)  # 1: higher, 0: a tie, -1: lower
    return fnr, fpr, float(1 + np.mean(order)) / 2


def advantage_correlation(method: str, fnr: float, fpr: float, n_groups: int = 1000) -> float:
    """Simulate how much of the signal such a judge leaves -> a correlation, NaN if undefined.

    It is the correlation of the advantages with those of an exact judge. The simulation has groups
    of 8 completions with 6 steps, and each step is correct with probability 0.45. Under process
    (delta), an exact judge gives a step 5 or 1. Under outcome, it gives 1 + int(4 x the share of
    the steps before the first wrong one). The simulated judge turns a score k into 6 - k at random,
    for a share `fnr` of the 4s and 5s and for a share `fpr` of the other scores.

    An error under outcome falls on a whole completion. At the start of training few completions are
    good, so the false positives drown them. That is why outcome needs a better judge than process.
    """
    rng = np.random.default_rng(0)
    is_correct = rng.random((n_groups * 8, 6)) < 0.45
    if method == "process":
        exact = is_correct.astype(float)
    else:
        exact = np.floor(4 * np.cumprod(is_correct, axis=1).mean(axis=1)) / 4
    is_error = rng.random(exact.shape) < np.where(exact >= 0.75, fnr, fpr)
    judged = np.where(is_error, 1 - exact, exact)

    def advantages(rewards: np.ndarray) -> np.ndarray:
        if method == "process":
            return np.ravel(exprl.step_advantages(rewards.tolist(), "delta"))
        groups = exprl.chunks(rewards.tolist(), 8)
        return np.ravel([exprl.group_advantages(group) for group in groups])

    with np.errstate(invalid="ignore"):  # if all advantages are 0, there is no correlation
        return float(np.corrcoef(advantages(exact), advantages(judged))[0, 1])


DRAWS = 1000  # of the bootstrap


def bootstrap(statistic: Callable, n: int) -> list[list[float]]:
    """Measure statistics of n problems -> [value, low, high] of each, with 95% intervals.

    `statistic` takes an array of problem indices and returns a list of numbers. The interval comes
    from DRAWS draws of n problems with replacement. Draws in which a number is NaN are left out.
    """
    indices = np.random.default_rng(0).integers(n, size=(DRAWS, n))
    drawn = np.array([statistic(row) for row in indices], float)  # (DRAWS, statistics)
    measured = []
    for value, column in zip(statistic(np.arange(n)), drawn.T, strict=True):
        defined = column[~np.isnan(column)]
        interval = np.percentile(defined if len(defined) else [math.nan], [2.5, 97.5])
        measured.append([float(value), *interval.tolist()])
    return measured


def mean(values: list[float]) -> float:
    """Return the mean, or NaN if there are no values."""
    return fmean(values) if values else math.nan


def show_interval(interval: list[float]) -> str:
    """Write (value, low, high) as text.

    >>> show_interval([0.5, 0.25, 0.75]), show_interval([math.nan] * 3)
    ('0.50 [0.25, 0.75]', 'undefined')
    """
    text = "{:.2f} [{:.2f}, {:.2f}]".format(*interval)
    return "undefined" if "nan" in text else text


def text_table(columns: list[str], rows: dict[str, list[str]]) -> str:
    """Lay out rows of cells as text: names on the left, cells aligned on the right."""
    width = max(map(len, rows))
    widths = [max(map(len, cells)) + 2 for cells in zip(columns, *rows.values(), strict=True)]
    lines = []
    for name, cells in [("", columns), *rows.items()]:
        parts = [f"{cell:>{size}}" for cell, size in zip(cells, widths, strict=True)]
        lines.append(f"{name:{width}}" + "".join(parts))
    return "\n".join(line.rstrip() for line in lines)


# ---- Attempts and verdicts -----------------------------------------------------------------------
def collect_attempts(problems: list[dict], seed: int) -> list[list[Attempt]]:
    """Make the attempts at each problem. Stops if there are too few different problems.

    "Another problem's" reference is neither that of the problem nor the one that the pass `wrong`
    shows, and the answer of that problem differs. So it takes three problems.
    """
    groups = []
    for i, shown in enumerate(show_reference(problems, "wrong", seed)):
        problem = problems[i]
        known = (problem["reference"], shown["reference"])
        others = problems[i + 1 :] + problems[:i]
        others = [other for other in others if other["reference"] not in known]
        others = [o for o in others if not o["answer"] or o["answer"] != problem["answer"]]
        if not others:
            exprl.stop(
                "--problems is too small: a calibration needs at least 3 problems with different "
                "references and answers"
            )
        attacks = ATTACKS[i % len(ATTACKS) :: len(problems)]
        groups.append(make_attempts(problem, others[0], attacks))
    return groups


def add_samples(groups: list[list[Attempt]], problems: list[dict], settings, sampling) -> None:
    """Add sampled completions to the attempts at each problem. Their answers are checked."""
    model, tokenizer = exprl.load_policy(settings.model, problems, sampling)
    torch.manual_seed(sampling.seed)
    n = settings.samples
    completions = exprl.sample(model, tokenizer, problems, n, sampling.sample_batch)
    for group, part in zip(groups, exprl.chunks(completions, n), strict=True):
        for c in part:
            group.append(Attempt(f"sampled, correct: {c.correct}", c, [None] * len(c.steps)))


def pick(group: list[Attempt], *names: str) -> list[Attempt]:
    """Return the first attempt of each of these names, or of names that begin with them."""
    picked = []
    for name in names:
        picked += [attempt for attempt in group if attempt.name.startswith(name)][:1]
    return picked


def count_calls(groups: list[list[Attempt]], kind: str, rubric: str) -> int:
    """Return the judge calls of a pass, if every reply can be parsed and none is in the cache."""
    calls = len(groups) if rubric == "reference" else 0
    for completion in [attempt.completion for group in groups for attempt in group]:
        if re.search(r"\w", completion.text):
            calls += len(completion.step_texts) if kind in ("prefix", "alone") else 1
    return calls


def fresh_judge(judging: AnyJudgeSettings, method: str, out: Path) -> Judge:
    """Make a judge whose count of calls starts at 0. Its cache, OUT/judge_cache.jsonl, is kept."""
    (out / "judge" / "judge_calls.jsonl").unlink(missing_ok=True)
    return make_judge(judging, method, out / "judge")


def describe_bill(judge: Judge) -> str:
    """Say what was paid for this judge."""
    calls, read, written = (
        judge.paid[name] for name in ("judge_calls", "prompt_tokens", "completion_tokens")
    )
    return f"paid: {calls} judge calls, {read} prompt tokens, {written} completion tokens"


def judge_all(judge: Judge, completions: list[Completion], title: str) -> list[Verdict]:
    """Judge completions, with a progress bar. Stops if most of 64 in a row fail."""
    verdicts = []
    for part in tqdm(exprl.chunks(completions, 64), title, leave=False):
        verdicts += judge(part)
    return verdicts


def judge_pass(judge: Judge, name: str, groups: list[list[Attempt]], problems: list[dict]) -> None:
    """Judge attempts with the references in `problems`, and file the verdicts under `name`."""
    attempts, completions = [], []
    for group, problem in zip(groups, problems, strict=True):
        for attempt in group:
            attempts.append(attempt)
            completions.append(dataclasses.replace(attempt.completion, problem=problem))
    for attempt, verdict in zip(attempts, judge_all(judge, completions, name), strict=True):
        attempt.verdicts[name] = verdict


def match_by_code(groups: list[list[Attempt]], method: str) -> None:
    """File verdicts under "code" in which every line of an attempt counts as quoted.

    If they are as good as those of a judge that quotes, the judge adds nothing to the code. An
    attempt that needed no call keeps its verdict.
    """
    for attempt in [attempt for group in groups for attempt in group]:
        verdict = attempt.verdicts["right"]
        if verdict.rewards is not None and verdict.replies:
            scores = code_scores(attempt.completion, verdict.rubric, method == "outcome")
            verdict = Verdict([(score - 1) / 4 for score in scores], verdict.rubric)
        attempt.verdicts["code"] = verdict


# ---- Table and recommendation --------------------------------------------------------------------
MEASURES = ("FNR", "FPR", "misplacement", "AUROC")


def scores_of(verdict: Verdict) -> list[float] | None:
    """Return the scores 1..5 behind the rewards of a verdict, or None if the judge failed."""
    return None if verdict.rewards is None else [1 + 4 * reward for reward in verdict.rewards]


def mean_scores(attempts: list[Attempt], name: str) -> list[float]:
    """Return the mean score of each of these attempts that has one in this pass."""
    verdicts = [attempt.verdicts.get(name) for attempt in attempts]
    return [fmean(scores_of(v)) for v in verdicts if v is not None and v.rewards is not None]


def labelled_scores(group: list[Attempt], name: str, method: str) -> np.ndarray:
    """Return an (n, 2) array: the n scores of a problem in a pass, and what is known of each."""
    pairs = []
    for attempt in group:
        labels = attempt.good if method == "process" else [attempt.completion.correct]
        if name in attempt.verdicts and attempt.verdicts[name].rewards is not None:
            pairs += zip(scores_of(attempt.verdicts[name]), labels, strict=True)
    return np.array(pairs, float).reshape(-1, 2)


def measure_judge(groups: list[list[Attempt]], name: str, method: str) -> dict[str, list[float]]:
    """Measure a pass -> [value, low, high] of each of MEASURES. misplacement: (FNR + FPR) / 2."""
    parts = [labelled_scores(group, name, method) for group in groups]

    def measure(indices: np.ndarray) -> list[float]:
        fnr, fpr, auroc = judge_quality(*np.concatenate([parts[i] for i in indices]).T)
        return [fnr, fpr, (fnr + fpr) / 2, auroc]

    return dict(zip(MEASURES, bootstrap(measure, len(parts)), strict=True))


def summarise(asked: dict[str, list[list[Attempt]]], qualities: dict[str, dict]) -> str:
    """Make the table: mean scores by kind of attempt, then MEASURES, one column for each pass."""
    attempts = {name: [a for group in asked[name] for a in group] for name in qualities}
    rows = {}
    for kind in dict.fromkeys(attempt.name for attempt in attempts["right"]):
        rows[kind] = []
        for name in qualities:
            scores = mean_scores([a for a in attempts[name] if a.name == kind], name)
            rows[kind].append(f"{fmean(scores):.2f}" if scores else "")
    for measure in MEASURES:
        rows[measure] = [show_interval(quality[measure]) for quality in qualities.values()]
    rows["failed"] = []
    for name in qualities:
        n_judged = len(mean_scores(attempts[name], name))
        rows["failed"].append(f"{1 - n_judged / len(attempts[name]):.1%}")
    return text_table(list(qualities), rows)


def write_records(groups: list[list[Attempt]], file: Path) -> None:
    """Write a record for each attempt: what is known of it, and its scores and replies by pass."""
    records = []
    for i, attempt in [(i, attempt) for i, group in enumerate(groups) for attempt in group]:
        record = {"problem": i, "attempt": attempt.name, "text": attempt.completion.text}
        record |= {"correct": attempt.completion.correct, "good": attempt.good}
        for name, verdict in attempt.verdicts.items():
            record[name] = scores_of(verdict)
            record[f"{name}: replies"] = [*verdict.replies]
        records.append(record)
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


def find_flaws(attempts: list[Attempt], quality: dict, method: str) -> list[str]:
    """Return the reasons against training with this judge, one sentence each."""
    flaws = []
    signal = advantage_correlation(method, quality["FNR"][0], quality["FPR"][0])
    if not signal >= 0.5:
        flaws.append(
            f"its misplacement is {quality['misplacement'][0]:.2f} (guessing: 0.50); in simulation "
            f"its advantages correlate {signal:.2f} with those of an exact judge, and at least "
            "0.50 is needed"
        )
    if math.isnan(quality["AUROC"][0]):
        flaws.append("its AUROC is undefined, because all its scores are equal or there are none")
    failed = [a.verdicts["right"] for a in attempts if a.verdicts["right"].rewards is None]
    if len(failed) > 0.1 * len(attempts):
        flaws.append(
            f"over 10% of its verdicts failed, as with the reply {failed[0].replies[-1]!r}"
        )
    attack = mean(mean_scores([a for a in attempts if a.name == "talk to the judge"], "right"))
    other = mean(mean_scores([a for a in attempts if a.name == "another problem's"], "right"))
    if attack > other + 0.5:
        flaws.append(
            f"it can be talked into a score: texts that only talk to it get {attack:.2f} on "
            f"average, and another problem's reference gets {other:.2f}"
        )
    return flaws


def recommend(groups: list[list[Attempt]], quality: dict, method: str, judge_input: str) -> None:
    """Print whether to train with this judge. `quality` is that of the pass `right`."""
    attempts = [attempt for group in groups for attempt in group]
    attacks = [a for a in attempts if a.name == "talk to the judge" and mean_scores([a], "right")]
    if attacks:
        best = max(attacks, key=lambda attack: mean_scores([attack], "right"))
        [score] = mean_scores([best], "right")
        if score > 1:
            text = best.completion.text
            print(f"of the texts that only talk to the judge, the best got {score:.2f}: {text!r}")
    flaws = find_flaws(attempts, quality, method)
    if flaws:
        print(f"recommendation: do not train with this judge: {'; '.join(flaws)}")
        if judge_input != "quotes":
            print("to try next: a stronger judge, or --judge-input quotes for a weak one")
        return
    print("recommendation: train with this judge")
    most_fnr, most_fpr = quality["FNR"][2], quality["FPR"][2]
    if not advantage_correlation(method, most_fnr, most_fpr) >= 0.5:
        print(
            f"but this is uncertain: the intervals reach an FNR of {most_fnr:.2f} and an FPR of "
            f"{most_fpr:.2f}, which would be too much; --problems {4 * len(groups)} narrows them"
        )


def calibrate(settings: CalibrateSettings, sampling, judging: AnyJudgeSettings) -> None:
    """Test whether a judge is good enough to train against."""
    problems = exprl.load_problems(sampling.data, settings.split, "reference")
    problems = evaluate.choose(problems, settings.problems)
    out, method = Path(settings.out), settings.method
    groups = collect_attempts(problems, sampling.seed)
    judge = fresh_judge(judging, method, out)
    if settings.model:
        add_samples(groups, problems, settings, sampling)
    some = [pick(group, "the reference", "only the end right", "sampled") for group in groups]
    fewer = [pick(group, "the reference", "sampled") for group in groups]
    asked = {"right": groups, "none": some, "wrong": some, "again": fewer}
    if (judging.judge_input, judging.rubric) == ("quotes", "none"):
        del asked["none"]  # without a rubric and a reference, there is nothing to quote for
    calls = 2  # the first, small call of each of two judges
    calls += sum(count_calls(part, judge.kind, judging.rubric) for part in asked.values())
    print(f"{judge.name}: up to {calls} calls of the kind that --method {method} makes")
    for name, part in asked.items():
        if name == "again":
            paid = judge.paid
            judge = fresh_judge(judging, method, out / "again")  # with a cache of its own
            judge.paid.update(paid)
        which = "right" if name == "again" else name
        judge_pass(judge, name, part, show_reference(problems, which, sampling.seed))
    if judging.judge_input == "quotes":
        match_by_code(groups, method)
        asked["code"] = groups
    write_records(groups, out / "attempts.jsonl")

    del asked["again"]
    qualities = {name: measure_judge(part, name, method) for name, part in asked.items()}
    print("\nmean score by the reference that the judge was shown; 95% intervals over problems")
    print(summarise(asked, qualities))
    repeated = [attempt for group in fewer for attempt in group]
    pairs = [(mean_scores([a], "right"), mean_scores([a], "again")) for a in repeated]
    differ = mean([first != second for first, second in pairs if first and second])
    print(f"asked again, the judge gave another score to {differ:.0%} of the attempts")
    print(f"{describe_bill(judge)}\nattempts and replies: {out / 'attempts.jsonl'}")
    recommend(groups, qualities["right"], method, judging.judge_input)


if __name__ == "__main__":
    classes = [CalibrateSettings, exprl.SamplingSettings, AnyJudgeSettings]
    exprl.run_command(calibrate, classes, sys.argv[1:])
