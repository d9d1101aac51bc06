"""Evaluate models: pass@1 and pass@k with intervals, and the problems that a model never solves.

    python tests/tools/evaluate.py --model Qwen2.5-0.5B runs/process/final runs/sparse/final
    python tests/tools/evaluate.py --model Qwen2.5-0.5B --split train --save-hard hard.jsonl

Every completion is kept in --out, one file per model, with one line per problem.
"""

import math
import random
import sys
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import exprl  # noqa: E402
from exprl import option  # noqa: E402


@dataclass(kw_only=True)
class EvalSettings(exprl.Settings):
    """Which models are evaluated, and on how many problems."""

    _argument_group_name = "evaluation"
    may_be_zero = ("problems",)
    model: list[str] = option(MISSING, "one or more hub ids or folders (RUN/final)")
    out: str = option("runs/eval", "folder for the results, one file per model")
    split: Literal["test", "train"] = option("test", "split of a hub data set")
    problems: int = option(200, "number of problems, always the same ones; 0: all")
    samples: int = option(8, "completions sampled for each problem (paper: 128)")
    save_hard: str = option(
        "", "write the problems that the last model never solves to this .jsonl file, for --data"
    )


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate P(at least one of k completions is correct), from n completions of which c are.

    pass@k = 1 - C(n - c, k) / C(n, k), which is unbiased (Chen et al. 2021, arXiv 2107.03374, eq.
    1). Raises ValueError unless 0 <= c <= n and 1 <= k <= n.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 0, 4), pass_at_k(4, 3, 2)
    (0.25, 0.5, 0.0, 1.0)
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def pass_rates(counts: list[dict]) -> dict[int, tuple[float, float, float]]:
    """Return {k: (mean, low, high)} of pass@k in 0..1, for k = 1, 2, 4, ... up to n.

    `counts` has a record per problem: n completions, of which `correct` are correct. low and high
    are the ends of the 95% bootstrap interval over problems.
    """
    draws = np.random.default_rng(0).integers(len(counts), size=(1000, len(counts)))
    rates, k = {}, 1
    while k <= counts[0]["n"]:
        values = np.array([pass_at_k(record["n"], record["correct"], k) for record in counts])
        low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
        rates[k] = values.mean().item(), low.item(), high.item()
        k *= 2
    return rates


def eval_file(out: str | Path, model: str) -> Path:
    """Return the file in which the completions of a model are kept. No two models share one.

    >>> print(eval_file("runs/eval", "runs/process/final"))
    runs/eval/runs__process__final.jsonl
    """
    return Path(out, model.replace("/", "__") + ".jsonl")


def choose(problems: list[dict], n: int) -> list[dict]:
    """Return n of the problems (0: all), the same ones every time."""
    return random.Random(0).sample(problems, n) if 0 < n < len(problems) else problems


def count_correct(name: str, problems: list[dict], settings: EvalSettings, sampling) -> list[dict]:
    """Sample completions of a model and return a record per problem; each is written at once."""
    file, n = eval_file(settings.out, name), settings.samples
    model, tokenizer = exprl.load_policy(name, problems, sampling)
    torch.manual_seed(sampling.seed)
    file.unlink(missing_ok=True)
    counts = []
    parts = exprl.chunks(problems, max(1, sampling.sample_batch // n))
    for part in tqdm(parts, name, leave=False):
        completions = []
        for some in exprl.chunks(range(n), sampling.sample_batch):  # several only if n is larger
            completions += exprl.sample(model, tokenizer, part, len(some), sampling.sample_batch)
        for group in exprl.chunks(completions, n):
            record = {"model": name, "n": n} | group[0].problem
            record["correct"] = sum(completion.correct for completion in group)
            record["truncated"] = sum(completion.truncated for completion in group)
            record["texts"] = [completion.text for completion in group]
            exprl.append_jsonl(file, [record])
            counts.append(record)
    return counts


def table(evaluations: dict[str, list[dict]]) -> str:
    """Lay out pass@k of {model: records of count_correct} as a text table, in percent."""
    width, most = max(map(len, evaluations)), {}
    lines = []
    for name, counts in evaluations.items():
        rates = pass_rates(counts)
        most = max(most, rates, key=len)
        size = f"{len(counts)} x {counts[0]['n']}"
        cells = [f"{100 * p:.1f} [{100 * a:.1f}, {100 * b:.1f}]" for p, a, b in rates.values()]
        lines.append(f"{name:{width}}{size:>20}" + "".join(f"{cell:>22}" for cell in cells))
    head = " " * width + f"{'problems x samples':>20}" + "".join(f"{f'pass@{k}':>22}" for k in most)
    note = "pass@k: at least one of k completions is correct; %, with 95% bootstrap intervals"
    return "\n".join([note, head, *lines])


def evaluate(settings: EvalSettings, sampling: exprl.SamplingSettings) -> None:
    """Evaluate models on the same problems and print pass@1, pass@2, pass@4, ..."""
    problems = exprl.load_problems(sampling.data, settings.split, "answer")
    problems = choose(problems, settings.problems)
    Path(settings.out).mkdir(parents=True, exist_ok=True)
    evaluations = {}
    for name in settings.model:
        evaluations[name] = count_correct(name, problems, settings, sampling)
        print(f"{name}: completions in {eval_file(settings.out, name)}")
    if settings.save_hard:
        hard = [record for record in evaluations[name] if not record["correct"]]
        Path(settings.save_hard).unlink(missing_ok=True)
        exprl.append_jsonl(Path(settings.save_hard), hard)
        print(f"{settings.save_hard}: the {len(hard)} problems that {name} never solves")
    print(f"\n{table(evaluations)}")


if __name__ == "__main__":
    exprl.run_command(evaluate, [EvalSettings, exprl.SamplingSettings], sys.argv[1:])
