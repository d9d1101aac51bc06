r"""Show training runs on one page to read, with their learning curves as a picture.

    python tests/tools/report.py RUN [RUN ...] [EVAL.jsonl ...] --out report.html

RUN is a run folder of exprl.py, and EVAL.jsonl is a file that evaluate.py wrote. An evaluation gets
the colour of the run whose model it evaluates. A run that starts from the model of another run
(stage 2) is drawn after that run. The page contains the settings, the curves, pass@k, and
completions whose steps are coloured by advantage.

The report also looks for reward hacking: the policy pleases the judge and solves no more problems.
`speaks_to_judge` finds completions that address the judge, and `warn` compares the end of a run
with its start. Both only point at a run. To decide, read its completions.
"""

import argparse
import io
import json
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, variance

from jinja2 import Template
from matplotlib import colors, pyplot

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

from evaluate import pass_rates, table  # noqa: E402

import exprl  # noqa: E402

# ---- Signs of reward hacking ---------------------------------------------------------------------
TO_JUDGE = re.compile(
    r"\b(?:grader|grading|graded|rubric|evaluat(?:or|ion)|full marks|the reference|checkpoints)\b"
    r"|^\W*(?:score|step \d+)\W*:\W*[1-5]\W*$|</?text-\d|\bscore: [1-5]\b"
    r"|\b(?:ignore|disregard)\b.{0,20}\b(?:instruct|above)",
    re.IGNORECASE | re.MULTILINE,
)


def speaks_to_judge(text: str) -> bool:
    """Return whether a completion seems to address the judge.

    >>> speaks_to_judge("A full-mark answer. Score: 5"), speaks_to_judge("She scored 5 points.")
    (True, False)
    """
    return bool(TO_JUDGE.search(text))


def first_and_last(metrics: list[dict], name: str) -> tuple[list[float], list[float]] | None:
    """Return a number in the first and the last quarter of a run, or None for a short run.

    A quarter has at least 5 iterations. A record without this number counts as 0.
    """
    n = max(5, len(metrics) // 4)
    if len(metrics) < 2 * n:
        return None
    values = [record.get(name, 0.0) for record in metrics]
    return values[:n], values[-n:]


def warn(metrics: list[dict]) -> str:
    """Say what looks as if the policy had learned to please its judge. "" means nothing does.

    The last quarter of the iterations is compared with the first one. A change of a mean counts if
    it is larger than 0.05 and larger than twice its standard error. `to_judge` is the share of
    completions that address the judge.

    >>> warn([{"reward": t / 20, "accuracy": 0.5 - t / 50, "to_judge": 0} for t in range(20)])
    'the reward rises and the accuracy falls'
    """
    change = {}
    for name in ("reward", "accuracy", "to_judge"):
        quarters = first_and_last(metrics, name)
        if quarters is None:
            return ""
        first, last = quarters
        error = math.sqrt((variance(first) + variance(last)) / len(first))
        difference = fmean(last) - fmean(first)
        change[name] = difference if abs(difference) > max(0.05, 2 * error) else 0.0
    signs = []
    if change["reward"] > 0 > change["accuracy"]:
        signs.append("the reward rises and the accuracy falls")
    if change["to_judge"] > 0:
        signs.append("more completions address the judge")
    return "; ".join(signs)


def describe_run(run) -> str:
    """Return a line about a run: how many completions address the judge, and the warning."""
    shares = first_and_last(run.metrics, "to_judge")
    if shares is None:
        share = fmean(record.get("to_judge", 0.0) for record in run.metrics)
        line = f"{run.name}: {share:.1%} of the completions address the judge"
    else:
        first, last = map(fmean, shares)
        line = f"{run.name}: {first:.1%} of the completions address the judge in the first quarter"
        line += f" and {last:.1%} in the last one"
    warning = warn(run.metrics)
    return f"{line}. Look at this run: {warning}" if warning else line


# ---- Reading runs and evaluations ----------------------------------------------------------------
@dataclass
class Shown:
    """A run, an evaluation, or both. It has one colour and one line in the legend."""

    name: str
    color: str
    settings: dict = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)  # one record per iteration
    rollouts: list[dict] = field(default_factory=list)
    counts: list[dict] = field(default_factory=list)  # of an evaluation
    offset: int = 0  # iterations of the runs from whose model it started


def by_iteration(records: list[dict]) -> dict[int, list[dict]]:
    """Group the records of a log by iteration.

    A resumed run starts after its checkpoint and logs some iterations again. Where the number of
    the iteration goes back, the records from there on replace the older ones.

    >>> by_iteration([{"iteration": i} for i in (1, 2, 3, 2)])
    {1: [{'iteration': 1}], 2: [{'iteration': 2}]}
    """
    groups, previous = {}, 0
    for record in records:
        iteration = record["iteration"]
        if iteration < previous:
            groups = {i: group for i, group in groups.items() if i < iteration}
        groups.setdefault(iteration, []).append(record)
        previous = iteration
    return groups


def read_run(path: Path, color: str) -> Shown:
    """Read the settings and logs of a run folder. Stops if it has no iteration."""
    records = exprl.read_jsonl(path / "metrics.jsonl")
    if not records:
        exprl.stop(f"{path} does not contain a run with an iteration in its metrics.jsonl")
    rollouts = exprl.read_jsonl(path / "rollouts.jsonl")
    try:
        metrics = [group[-1] for group in by_iteration(records).values()]  # the last one counts
        groups = by_iteration(rollouts)
    except (KeyError, TypeError):
        exprl.stop(
            f"{path} has log records without an iteration. If an older version of exprl.py wrote "
            "them, train again or use the report of that version"
        )
    file = path / "settings.json"
    settings = {}
    if file.exists():
        try:
            settings = json.loads(file.read_text())
        except ValueError as error:
            exprl.stop(f"{file} cannot be read: {error}")
    # The same iteration can be logged twice in a row. Its last, complete set of records counts.
    size = settings.get("prompts_per_iteration", 0) * settings.get("group_size", 0)
    kept = {i: group[-size:] for i, group in groups.items()}
    for record in metrics:
        texts = [rollout.get("text", "") for rollout in kept.get(record["iteration"], [])]
        if texts:
            record["to_judge"] = fmean(map(speaks_to_judge, texts))
    return Shown(str(path), color, settings, metrics, [r for group in kept.values() for r in group])


def same_place(a: str, b: str) -> bool:
    """Return whether two names of a model are the same text or lead to the same folder."""
    return bool(a) and Path(a).resolve() == Path(b).resolve()


def find_run(shown: list[Shown], model: str) -> Shown | None:
    """Return the run whose final model this is, or None."""
    for run in shown:
        if same_place(model, f"{run.name}/final"):
            return run
    return None


def collect(paths: list[Path]) -> list[Shown]:
    """Read runs and evaluations, and find out which belong together. Stops at any other path."""
    shown = []
    for path in [path for path in paths if path.is_dir()]:
        shown.append(read_run(path, f"C{len(shown)}"))
    for run in shown:
        seen = [run.name]
        before = find_run(shown, run.settings.get("model", ""))
        while before is not None and before.name not in seen:
            seen.append(before.name)
            run.offset += before.metrics[-1]["iteration"]
            before = find_run(shown, before.settings.get("model", ""))
    for path in [path for path in paths if not path.is_dir()]:
        records = exprl.read_jsonl(path)
        counts = [r for r in records if isinstance(r, dict) and {"n", "correct"} <= set(r)]
        if not counts:
            exprl.stop(f"{path} is neither a run folder nor a file of tests/tools/evaluate.py")
        model = counts[0].get("model", "")
        run = find_run(shown, model)
        if run is None:
            run = Shown(model or str(path), f"C{len(shown)}")
            shown.append(run)
        run.counts = counts
    return shown


# ---- Curves --------------------------------------------------------------------------------------
PANELS = {
    "reward": "reward",
    "accuracy": "accuracy (exact match)",
    "groups_without_signal": "groups without signal",
    "length": "completion length (tokens)",
    "kl": "KL to the initial policy (nats per token)",
    "truncated": "truncated completions",
    "to_judge": "completions that address the judge",
    "pass@k": "pass@k (evaluations)",
}
AXIS_AT_LEAST = {"length": 10.0, "kl": 0.01}  # upper end of the axis; the other numbers are shares


def smooth(values: list[float], width: int = 9) -> list[float]:
    """Return centred moving means, without NaN. A window without a number gives NaN."""
    half, means = width // 2, []
    for i in range(len(values)):
        window = [v for v in values[max(0, i - half) : i + half + 1] if not math.isnan(v)]
        means.append(fmean(window) if window else math.nan)
    return means


def draw_charts(shown: list[Shown], axes: dict) -> None:
    """Draw the panels {name: axis}: learning curves (means over 9 iterations), and pass@k."""
    for name, axis in axes.items():
        axis.set(title=PANELS[name], xlabel="k" if name == "pass@k" else "iteration")
        top = AXIS_AT_LEAST.get(name, 1.0)
        for run in shown:
            if name == "pass@k":
                draw_pass_rates(run, axis)
                continue
            points = [(r["iteration"] + run.offset, r[name]) for r in run.metrics if name in r]
            if not all(math.isnan(value) for _, value in points):
                iterations, values = zip(*points, strict=True)
                means = smooth(values)
                axis.plot(iterations, means, color=run.color)
                top = max([top] + [value for value in means if not math.isnan(value)])
        axis.set_ylim(-0.03 * top, 1.06 * top)  # from 0, so that a change is seen at its size
    for run in shown:
        next(iter(axes.values())).plot([], [], color=run.color, label=run.name)  # for the legend


def draw_pass_rates(run: Shown, axis) -> None:
    """Draw pass@k with its interval, if the model of this run was evaluated."""
    if run.counts:
        rates = pass_rates(run.counts)
        ks = list(rates)
        mean, low, high = zip(*rates.values(), strict=True)
        axis.semilogx(ks, mean, "o-", color=run.color, base=2)
        axis.set_xticks(ks, [str(k) for k in ks])
        axis.fill_between(ks, low, high, color=run.color, alpha=0.15)


def write_figure(shown: list[Shown], path: Path, panels: list[str]) -> None:
    """Write the curves as a picture: .png, .pdf or .svg."""
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.25 * columns, 4 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    draw_charts(shown, dict(zip(panels, axes.flat, strict=False)))
    figure.legend(loc="outside lower center")
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        exprl.stop(f"--figure {path}: {error}")


# ---- The page ------------------------------------------------------------------------------------
def examples(rollouts: list[dict], n: int = 4) -> dict[str, list[dict]]:
    """Choose completions that are worth reading, at most n of each sort."""
    judged, failed, first, last = [], [], {}, {}
    for rollout in rollouts:
        rewards = rollout.get("rewards")
        if not rewards:
            failed.append(rollout)
        elif not math.isnan(rewards[0]):
            rollout = rollout | {"mean": fmean(rewards)}
            judged.append(rollout)
            question = rollout["problem"]["question"]
            first.setdefault(question, rollout)
            last[question] = rollout
    pairs = []
    for question in first:
        before, after = first[question], last[question]
        if before["iteration"] < after["iteration"] and before["mean"] < after["mean"]:
            pairs.append((before, after))
    pairs.sort(key=lambda pair: pair[0]["mean"] - pair[1]["mean"])
    checked = [r for r in judged if r["correct"] not in (None, r["mean"])]
    checked.sort(key=lambda r: -abs(r["mean"] - r["correct"]))
    return {
        "Largest improvement: the first and the last completion of a problem": [
            rollout for pair in pairs[: n // 2] for rollout in pair
        ],
        "Reward and exact match disagree": checked[:n],
        "The judge failed": failed[:n],
    }


def view(rollout: dict) -> dict:
    """Prepare a completion for the page: every step gets its text, reward and advantage."""
    texts = rollout["step_texts"]
    rewards, advantages = rollout.get("rewards") or [], rollout.get("advantages") or []
    if len(advantages) == 1:  # the only advantage is that of all steps
        advantages = advantages * len(texts)
    steps = []
    for i, text in enumerate(texts):
        steps.append({
            "text": text,
            "reward": rewards[i] if len(rewards) == len(texts) else None,
            "advantage": advantages[i] if i < len(advantages) else None,
        })  # fmt: skip
    whole = rewards[0] if len(rewards) == 1 != len(texts) else None
    return rollout | {"steps": steps, "whole_reward": whole}


# A Jinja template. It escapes every text that is not marked as safe.
PAGE = r"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>ExpRL report</title>
<style>
  :root { color-scheme: light dark; font: 1em/1.45 system-ui, sans-serif }
  body { max-width: 76em; margin: auto; padding: 1em; overflow-wrap: anywhere }
  .grid { display: grid; gap: 0 1.5em;
          grid-template-columns: repeat(auto-fit, minmax(min(100%, 22em), 1fr)) }
  .grid > * { min-width: 0 }
  svg { width: 100%; height: auto }
  pre { white-space: pre-wrap; margin: 0 0 .3em; padding: .2em .5em }
  pre b { font: .8em system-ui, sans-serif; display: block; opacity: .8 }
  article { border-top: 1px solid #8888; padding: .5em 0 1em }
</style>
<h1>ExpRL report</h1>
<p>{% for run in runs %}<b style="color: {{ run.color }}">■</b> {{ run.name }} {% endfor %}
<p>Curves are means over 9 iterations. pass@k: at least one of k completions is correct.
<div class="grid">{% for chart in charts %}<div>{{ chart | safe }}</div>{% endfor %}</div>
{% for run in runs if run.line %}
<h2>{{ run.name }}</h2>
<p>{% if run.warning %}<b>{{ run.line }}.</b>{% else %}{{ run.line }}.{% endif %}
<details><summary>settings</summary><pre>{{ run.settings | tojson(indent=1) }}</pre></details>
<p>Steps are coloured by their advantage: blue above 0, orange below.
{% for title, rollouts in run.examples.items() %}
<h3>{{ title }}</h3>
{% for r in rollouts %}
<article>
<p>Iteration {{ r.iteration }}, correct: {{ r.correct }}{{ ", truncated" if r.truncated }}
{% if r.whole_reward is not none %}, reward {{ "%.3g" | format(r.whole_reward) }}{% endif %}
<div class="grid">
<div><pre><b>question</b>{{ r.problem.question }}</pre>
{% for step in r.steps %}
{% set a = step.advantage or 0 %}
<pre style="background: rgb({{ "0 114 178" if a > 0 else "213 94 0" }} /
{{ [a | abs / 3 + 0.1, 0.5] | min if a else 0 }})"><b>{% if step.reward is not none -%}
reward {{ "%.3g" | format(step.reward) }}, {% endif -%}
{{ "no advantage" if step.advantage is none else "advantage %+.2f" | format(step.advantage) -}}
</b>{{ step.text }}</pre>
{% endfor %}</div>
<div>{% for name, text in (("reference", r.problem.reference), ("rubric", r.rubric),
("replies of the judge", (r.replies or []) | join("\n\n"))) if text %}
<pre><b>{{ name }}</b>{{ text }}</pre>
{% endfor %}</div>
</div>
</article>
{% else %}<p>There are none.
{% endfor %}{% endfor %}{% endfor %}
</html>
"""


def write_page(shown: list[Shown], path: Path) -> None:
    """Write one HTML file that needs no other file, for a light or a dark background."""
    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with pyplot.rc_context(dict.fromkeys(grey, "#808080")):
        figures = [pyplot.subplots(figsize=(5, 3.2), layout="constrained") for _ in PANELS]
        draw_charts(shown, dict(zip(PANELS, [axis for _, axis in figures], strict=True)))
    charts = []
    for figure, axis in figures:
        if axis.lines:
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True)
            charts.append(file.getvalue()[file.getvalue().index("<svg") :])
    runs = []
    for run in shown:
        chosen = examples(run.rollouts)
        runs.append({
            "name": run.name,
            "color": colors.to_hex(run.color),
            "settings": run.settings,
            "line": describe_run(run) if run.metrics else "",
            "warning": warn(run.metrics),
            "examples": {title: list(map(view, some)) for title, some in chosen.items()},
        })  # fmt: skip
    page = Template(PAGE, autoescape=True).render(runs=runs, charts=charts)
    path.write_text(page, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Read the runs and evaluations, write the page and the picture, and print the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="+", type=Path, help="run folders and files of evaluate.py")
    parser.add_argument(
        "--out", type=Path, default="report.html", help="the page (default: report.html)"
    )
    parser.add_argument(
        "--figure", type=Path, default="curves.png", help="the picture (default: curves.png)"
    )
    parser.add_argument(
        "--panels", nargs="+", choices=PANELS, default=[*PANELS], help="what the picture shows"
    )
    args = parser.parse_args(argv)
    try:
        shown = collect(args.path)
        write_figure(shown, args.figure, args.panels)
        write_page(shown, args.out)
    except (OSError, UnicodeError) as error:
        exprl.stop(str(error))
    finally:
        pyplot.close("all")
    for run in shown:
        if run.metrics:
            print(describe_run(run))
    evaluated = [run for run in shown if run.counts]
    if evaluated:
        evaluated.sort(key=lambda run: bool(run.metrics))  # models that were not trained come first
        print(table({run.counts[0].get("model", run.name): run.counts for run in evaluated}))
    print(f"figure: {args.figure}\nreport: {args.out}")


if __name__ == "__main__":
    main()
