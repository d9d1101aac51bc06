"""Is this judge good enough to train against? It is asked about attempts of known worth.

    python tests/calibrate.py --judge-model gpt-4.1-mini --model Qwen2.5-0.5B

The calls are those that training with the same --method and --judge-input makes. The attempts at
each problem (attempts.py) are its reference, the reference spoilt in several ways, another
problem's, texts that only talk to the judge, and with --model some that are sampled. Of some the
judge is asked again, and with no and with another problem's reference.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pandas import DataFrame
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from attempts import ATTACKS, Attempt, make_attempts  # noqa: E402
from baselines import show_reference  # noqa: E402

import exprl  # noqa: E402
from exprl import Completion, Judge, setting  # noqa: E402
from judge_prompts import judge_inputs, list_checkpoints, policy_prompt, quote_scores  # noqa: E402


@dataclass(kw_only=True)
class CalibrateSettings(exprl.JudgeSettings, exprl.SamplingSettings):
    """Measure a judge on attempts of known worth, before training against it."""

    method: str = setting("what the judge is to be used for", "process", "outcome")
    model: str = setting("also judge its completions (hub id, short name or folder)", "")
    out: str = setting("folder for what was sampled and judged", "runs/calibrate")
    split: str = setting("of a data set of the hub", "test", "train")
    problems: int = setting("how many of them; 0: all", 4, at_least=0)
    samples: int = setting("completions of each", 2, at_least=1)


# ---- Numbers -------------------------------------------------------------------------------------
def judge_quality(scores: np.ndarray, good: np.ndarray) -> tuple[float, float, float]:
    """Scores 1..5 and good 0 or 1, of one shape (NaN: left out) -> (FNR, FPR, AUROC), or NaN.

    A score of 4 or 5 says good. FNR: the share of the good that got less; FPR: of the bad that got
    as much; their mean is the misplacement (chance: .5). AUROC = P(a good one scores higher than a
    bad one), ties count half; undefined if all score the same.
    >>> judge_quality(np.array([5, 2, 3, 1, 4]), np.array([1, 1, 0, 0, np.nan]))
    (0.5, 0.0, 0.75)
    """
    right, wrong = (scores[(good == label) & (scores > 0)] for label in (1, 0))
    if not len(right) or not len(wrong):
        return math.nan, math.nan, math.nan
    order = np.sign(right[:, None] - wrong) if len({*right, *wrong}) > 1 else math.nan
    return float(np.mean(right < 4)), float(np.mean(wrong >= 4)), float(1 + np.mean(order)) / 2


def advantage_correlation(method: str, fnr: float, fpr: float, groups: int = 1000) -> float:
    """How much of the signal such a judge leaves: the correlation of the advantages with those of
    an exact judge, simulated: groups of 8 completions of 6 steps, each right with probability .45.

    process: a step's score is 5 or 1 (delta). outcome: the score is 1 + int(4 x share of the steps
    before the first wrong one). A share of the scores k, fnr of the 4s and 5s and fpr of the
    others, at random, becomes 6 - k. An error of outcome falls on a whole completion, and where few
    are good the FPR drowns them; hence the difference.
    """
    rng = np.random.default_rng(0)
    right = rng.random((groups * 8, 6)) < 0.45
    if method == "process":
        exact = right.astype(float)
    else:
        exact = np.floor(4 * np.cumprod(right, axis=1).mean(axis=1)) / 4
    is_lie = rng.random(exact.shape) < np.where(exact >= 0.75, fnr, fpr)
    told = np.where(is_lie, 1 - exact, exact)

    def advantages(rewards: np.ndarray) -> np.ndarray:
        if method == "process":
            return np.ravel(exprl.step_advantages(rewards.tolist(), "delta"))
        valid = torch.ones(len(rewards), dtype=torch.bool)
        return exprl.group_advantages(torch.tensor(rewards), valid, 8).numpy()

    with np.errstate(invalid="ignore"):  # all the same: no correlation
        return float(np.corrcoef(advantages(exact), advantages(told))[0, 1])


def bootstrap(statistic: Callable, n: int) -> list[list[float]]:
    """statistic(numbers of the n problems) is a list of numbers; each of them, and its 95% interval
    over 1000 draws of n problems (of those where it is a number)."""
    draws = [statistic(drawn) for drawn in np.random.default_rng(0).integers(n, size=(1000, n))]
    measured = []
    for value, drawn in zip(statistic(np.arange(n)), np.array(draws, float).T, strict=True):
        numbers = drawn[~np.isnan(drawn)]
        interval = np.percentile(numbers if len(numbers) else [math.nan], [2.5, 97.5])
        measured.append([float(value), *interval.tolist()])
    return measured


# ---- Attempts and verdicts -----------------------------------------------------------------------
def collect_attempts(rows: list[dict], settings: CalibrateSettings) -> list[list[Attempt]]:
    """The attempts at each problem. Stops if there are not three problems of different solution."""
    wrong, groups = show_reference(rows, "wrong", settings.seed), []
    for i, (row, shown) in enumerate(zip(rows, wrong, strict=True)):
        known = (row["reference"], shown["reference"])  # another's is not what the judge is shown
        others = [r for r in rows[i + 1 :] + rows[:i] if r["reference"] not in known]
        others = [r for r in others if not r["answer"] or r["answer"] != row["answer"]]
        if not others:
            exprl.stop("give more problems: another one's attempt needs a third, of another answer")
        groups.append(make_attempts(row, others[0], ATTACKS[i % len(ATTACKS) :: len(rows)]))
    if settings.model:
        source, tokenizer = exprl.find_model(settings.model)
        for row in rows:
            row["prompt_ids"] = policy_prompt(tokenizer, row["question"])
        model = exprl.load_model(source)
        exprl.set_sampling(model, tokenizer, rows[0]["prompt_ids"], settings)
        torch.manual_seed(settings.seed)
        sizes = (settings.samples, settings.sample_batch)
        sampled = exprl.sample_groups(model, tokenizer, rows, *sizes)
        for group, completions in zip(groups, sampled, strict=True):
            for c in completions:
                group.append(Attempt(f"sampled, correct: {c.correct}", c, [None] * len(c.steps)))
    return groups


def choose(group: list[Attempt], *names: str) -> list[Attempt]:
    """The first attempt of each of these names (or what they begin with), where there is one."""
    return [a for name in names for a in [a for a in group if a.name.startswith(name)][:1]]


def count_calls(groups: list[list[Attempt]], settings: CalibrateSettings, kind: str) -> int:
    """Judge calls for these attempts at most, if each reply has the form that was asked for."""
    calls = len(groups) if settings.rubric == "checkpoints" else 0
    for c in [attempt.completion for group in groups for attempt in group]:
        if re.search(r"\w", c.text):
            calls += len(judge_inputs(kind, c.text, c.step_texts))
    return calls


def judge_problem(judge: Judge, completions: list[Completion], kind: str) -> None:
    """Have completions of a problem judged. Stops if the judge has answered none of them; a reply
    without a verdict is an answer."""
    for verdict in [judge.submit(c, kind) for c in completions]:
        verdict.result()
    last_words = [c.judge_words[-1] for c in completions if c.judge_words]
    if last_words and all(words.startswith("(no verdict: ") for words in last_words):
        exprl.stop(f"{judge.name} gives no answer: {judge.last_error}")


def ask(judge: Judge, rows: list[dict], groups: list[list[Attempt]], kind: str, name: str) -> None:
    """Have the attempts judged by what these rows hold as references: attempt.judged[name]."""
    for row, group in tqdm(list(zip(rows, groups, strict=True)), f"{name}: problems", leave=False):
        for a in group:
            fresh = {"row": row, "judge_words": [], "scores": None}
            a.judged[name] = dataclasses.replace(a.completion, **fresh)
        judge_problem(judge, [a.judged[name] for a in group], kind)


def score_by_code(c: Completion, whole: bool) -> list[float] | None:
    """What the kind "quotes" gives without a judge: each line of the completion taken as quoted."""
    points = list_checkpoints(c.rubric or c.row["reference"])
    lines = re.findall(r"^.*\w.*$", c.text, re.MULTILINE)
    return quote_scores("\n".join(f"0: {line}" for line in lines), points, c.step_texts, whole)


def match_by_code(groups: list[list[Attempt]], method: str) -> None:
    """a.judged["code"], by score_by_code. If that is as good, code alone finds what this judge
    finds."""
    for a in [a for group in groups for a in group]:
        c = a.judged["right"]
        if c.scores and c.judge_words:  # what the judge was not asked about keeps its score
            scores = score_by_code(c, method == "outcome")
            c = dataclasses.replace(c, scores=scores, judge_words=[])
        a.judged["code"] = c


# ---- Table and verdict ---------------------------------------------------------------------------
MEASURES = ("FNR", "FPR", "misplacement", "AUROC")


def labelled_scores(group: list[Attempt], name: str, method: str) -> np.ndarray:
    """(n, 2) scores and what is right of them (1, 0 or NaN), of a problem's steps or attempts."""
    pairs = []
    for a in group:
        scores = a.judged[name].scores if name in a.judged else None
        labels = a.good if method == "process" else [a.completion.correct]
        pairs += zip(scores, labels, strict=True) if scores else []
    return np.array(pairs, float).reshape(-1, 2)


def measure_judge(groups: list[list[Attempt]], name: str, method: str) -> dict[str, list[float]]:
    """Each of MEASURES, with its 95% interval over problems, by the reference of this name."""
    parts = [labelled_scores(group, name, method) for group in groups]

    def measure(drawn: np.ndarray) -> list[float]:
        fnr, fpr, auroc = judge_quality(*np.concatenate([parts[i] for i in drawn]).T)
        return [fnr, fpr, (fnr + fpr) / 2, auroc]

    return dict(zip(MEASURES, bootstrap(measure, len(parts)), strict=True))


def make_records(groups: list[list[Attempt]]) -> list[dict]:
    """A record for each attempt: what it is, and the scores and the judge's words by reference."""
    records = []
    for i, a in [(i, a) for i, group in enumerate(groups) for a in group]:
        record = {"problem": i, "attempt": a.name, "text": a.completion.text}
        record |= {"correct": a.completion.correct, "good": a.good}
        for name, c in a.judged.items():
            record |= {name: c.scores, f"{name}: words": "\n".join(c.judge_words)}
        records.append(record)
    return records


def print_verdict(table: DataFrame, quality: dict, settings: CalibrateSettings) -> None:
    """Whether to train with it. `table` has an attempt's mean score in "right", `quality` is that
    of measure_judge."""
    of_attack = table[table["attempt"] == "talk to the judge"].dropna(subset="right")
    attack = of_attack["right"].mean()
    other = table["right"][table["attempt"] == "another problem's"].mean()
    talked = of_attack[of_attack["right"] > 1].nlargest(1, "right")
    for score, text in talked[["right", "text"]].itertuples(index=False):
        print(f"of the attempts that talk to the judge the best got {score:.2f}: {text!r}")
    (fnr, _, most_fnr), (fpr, _, most_fpr) = quality["FNR"], quality["FPR"]
    signal = advantage_correlation(settings.method, fnr, fpr)
    at_worst = advantage_correlation(settings.method, most_fnr, most_fpr)
    failed = table[table["right"].isna()]
    flaws = []
    if not signal >= 0.5:
        flaws.append(
            f"misplacement {quality['misplacement'][0]:.2f} (chance: .50), with which the "
            f"advantages of {settings.method} correlate {signal:.2f} with the right ones, not .50 "
            "(simulated)"
        )
    if math.isnan(quality["AUROC"][0]):
        flaws.append("AUROC undefined (one score for all, or none)")
    if len(failed) > 0.1 * len(table):
        flaws.append(f"over 10% failed: {failed['right: words'].iloc[0]!r}")
    if attack > other + 0.5:
        flaws.append(
            f"it can be talked into a score: {attack:.2f} on average, where another problem's "
            f"reference gets {other:.2f}"
        )
    print("verdict:", f"do not train with it: {'; '.join(flaws)}" if flaws else "train with it")
    if flaws and settings.judge_input != "quotes":
        print("to try next: a stronger judge, or --judge-input quotes, which a weak one can do")
    if not flaws and not at_worst >= 0.5:
        print(
            f"but that is uncertain: the intervals hold an FNR of {most_fnr:.2f} and an FPR of "
            f"{most_fpr:.2f}, which would be too much; "
            f"--problems {4 * table['problem'].nunique()} tells more"
        )


def calibrate(settings: CalibrateSettings) -> None:
    """Measure a judge on attempts of known worth, before training against it."""
    needed = ("question", "reference")
    rows = exprl.load_rows(settings.data, settings.split, settings.problems, needed)
    out, names = Path(settings.out), ["right", "none", "wrong", "again"]
    if (settings.judge_input, settings.rubric) == ("quotes", "none"):
        names.remove("none")  # then there is nothing to quote for
    kind = settings.judge_input if settings.method == "process" else "outcome"
    show_reference(rows, "wrong", settings.seed)  # stops if there is only one
    judge = Judge(settings, out)
    groups = collect_attempts(rows, settings)
    some = [choose(group, "the reference", "only the end right", "sampled") for group in groups]
    again = [choose(group, "the reference", "sampled") for group in groups]
    asked = {"right": groups, "none": some, "wrong": some, "again": again}
    calls = sum(count_calls(asked[name], settings, kind) for name in names)
    print(f"{judge.name}: up to {calls:,} calls of the kind that --method {settings.method} makes")
    try:
        for name in names:
            if name == "again":
                paid, judge = judge.paid, Judge(settings, out / "again")  # with a cache of its own
                judge.paid = paid
            which = "right" if name == "again" else name
            ask(judge, show_reference(rows, which, settings.seed), asked[name], kind, name)
    finally:  # also after Ctrl-C: nothing more is paid
        judge.close()
    if settings.judge_input == "quotes":
        match_by_code(groups, settings.method)
        names.append("code")
        asked["code"] = groups
    records = make_records(groups)
    exprl.write_log(out / "attempts.jsonl", records, "w")

    table = DataFrame(records)
    table[names] = table[names].map(lambda s: np.mean(s) if isinstance(s, list) else math.nan)
    repeated = table[table["again"].notna() & table["right"].notna()]
    differ = (repeated["right"] != repeated["again"]).mean()
    names.remove("again")
    summary = table.groupby("attempt", sort=False)[names].mean().map("{:.2f}".format)
    summary = summary.replace("nan", "")
    qualities = {name: measure_judge(groups, name, settings.method) for name in names}
    for name, quality in qualities.items():
        for measure, interval in quality.items():
            shown = "{:.2f} [{:.2f}, {:.2f}]".format(*interval)
            summary.loc[measure, name] = "undefined" if "nan" in shown else shown
        judged = [a.judged[name] for group in asked[name] for a in group]
        summary.loc["failed", name] = f"{np.mean([c.scores is None for c in judged]):.1%}"
    print(f"\nmean score by reference shown; 95% intervals over problems\n{summary.to_string()}")
    print(f"asked again, {differ:.0%} differ; {judge.paid}; all replies: {out / 'attempts.jsonl'}")
    print_verdict(table, qualities["right"], settings)


if __name__ == "__main__":
    exprl.run_command(calibrate, CalibrateSettings, sys.argv[1:], __doc__)
