"""One page about runs, to read, and their learning curves as a picture.

    python tests/report.py RUN [RUN ...] [EVAL.jsonl ...] --out report.html --figure curves.png

RUN is a folder that exprl.py has trained in, EVAL.jsonl a file that `exprl.py eval` has written. An
evaluation has the colour of the run whose model it evaluates; a run that goes on from another one's
model (stage 2) is drawn after it. The page has settings, curves, pass@k, and completions with their
steps coloured by advantage.
"""

import argparse
import io
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Template
from matplotlib import colors, pyplot
from pandas import DataFrame

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import exprl  # noqa: E402
import judge_prompts  # noqa: E402

# ---- What there is to show -----------------------------------------------------------------------


@dataclass
class Shown:
    """A run, an evaluation, or both: one colour, one line of the legend."""

    name: str
    color: str
    settings: dict = field(default_factory=dict)
    steps: DataFrame = field(default_factory=DataFrame)  # of metrics.jsonl
    rollouts: list[dict] = field(default_factory=list)
    counts: list[dict] = field(default_factory=list)  # of an evaluation
    offset: int = 0  # steps of the runs that it goes on from


def same_place(a: str, b: str) -> bool:
    """Whether two names of a model are the same folder, or the same text."""
    return bool(a) and Path(a).resolve() == Path(b).resolve()


def collect(paths: list[Path]) -> list[Shown]:
    """Runs and evaluations, matched. Stops at a path that is neither."""
    shown: list[Shown] = []
    for path in [path for path in paths if path.is_dir()]:
        steps = DataFrame([r for r in exprl.read_log(path / "metrics.jsonl") if "reward" in r])
        if steps.empty:
            exprl.stop(f"{path} holds no run with a step in its metrics.jsonl")
        settings = (exprl.read_log(path / "settings.json") or [{}])[0]
        rollouts = [r for r in exprl.read_log(path / "rollouts.jsonl") if "rewards" in r]
        shown.append(Shown(str(path), f"C{len(shown)}", settings, steps, rollouts))
    for run in shown:
        before, seen = run, []
        while before and before.name not in seen:  # the run whose model this one has started from
            seen.append(before.name)
            start = before.settings.get("model", "")
            before = next((r for r in shown if same_place(start, f"{r.name}/final")), None)
            run.offset += int(before.steps.step.max()) if before and before is not run else 0
    for path in [path for path in paths if not path.is_dir()]:
        counts = [r for r in exprl.read_log(path) if type(r) is dict and {"n", "correct"} <= set(r)]
        if not counts:
            exprl.stop(f"{path} holds no evaluation")
        model = counts[0].get("model", "")
        run = next((r for r in shown if same_place(model, f"{r.name}/final")), None)
        if run is None:
            run = Shown(model or str(path), f"C{len(shown)}")
            shown.append(run)
        run.counts = counts
    return shown


# ---- Curves --------------------------------------------------------------------------------------
PANELS = {
    "reward": "reward",
    "accuracy": "exact-match accuracy",
    "no_signal": "groups without signal",
    "length": "completion length (tokens)",
    "kl": "KL to the initial policy (nats per token)",
    "cut": "completions cut",
}
SMALLEST = {"length": 10.0, "kl": 0.01}  # upper end of the axis, at least; the others are shares


def draw_charts(shown: list[Shown], axes: list) -> None:
    """Learning curves (means over 9 steps) and pass@k, one axis for each."""
    for axis, (name, title) in zip(axes, PANELS.items(), strict=False):
        axis.set(title=title, xlabel="step")
        top = SMALLEST.get(name, 1.0)
        for run in shown:
            if name in run.steps and run.steps[name].notna().any():
                values = run.steps[name].rolling(9, 1, center=True).mean()
                axis.plot(run.steps.step + run.offset, values, color=run.color)
                top = max(top, float(values.max()))
        axis.set_ylim(-0.03 * top, 1.06 * top)  # from 0: a change is seen at its size
    axes[6].set(title="held-out pass@k", xlabel="k", ylim=(-0.03, 1.06))
    for run in shown:
        axes[0].plot([], [], color=run.color, label=run.name)
        if run.counts:
            rates = exprl.pass_rates(run.counts)
            mean, low, high = np.array(list(rates.values())).T
            k = [int(key[5:]) for key in rates]
            axes[6].semilogx(k, mean, "o-", color=run.color, base=2)
            axes[6].set_xticks(k, list(map(str, k)))
            axes[6].fill_between(k, low, high, color=run.color, alpha=0.15)


def write_figure(shown: list[Shown], path: Path) -> None:
    """The curves as a picture: .png, .pdf or .svg."""
    figure, axes = pyplot.subplot_mosaic("ABCD;EFG.", figsize=(17, 7), layout="constrained")
    draw_charts(shown, list(axes.values()))
    figure.legend(loc="lower right")
    try:
        figure.savefig(path, dpi=120)
    except ValueError as error:
        exprl.stop(f"--figure {path}: {error}")


# ---- The page ------------------------------------------------------------------------------------


def examples(log: list[dict], n: int = 4) -> dict[str, list[dict]]:
    """Completions of a rollouts.jsonl that a learner wants to see, n of each sort or fewer."""
    judged = [r | {"mean": np.mean(r["rewards"])} for r in log if (r["rewards"] or [-1])[0] >= 0]
    first, last = {r["question"]: r for r in judged[::-1]}, {r["question"]: r for r in judged}
    pairs = [(first[q], last[q]) for q in first if first[q]["step"] < last[q]["step"]]
    pairs.sort(key=lambda pair: pair[0]["mean"] - pair[1]["mean"])
    improved = [pair for pair in pairs[: n // 2] if pair[0]["mean"] < pair[1]["mean"]]
    judged.sort(key=lambda r: 0 if r["correct"] is None else -abs(r["mean"] - r["correct"]))
    return {
        "Largest improvement: the first and the last completion of a problem": [
            r for pair in improved for r in pair
        ],
        "Judge vs. answer": [r for r in judged[:n] if r["correct"] not in (None, r["mean"])],
        "Failed judgements": [r for r in log if not r["rewards"]][:n],
    }


# A Jinja template: it escapes all that is not marked as safe.
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
<div class="grid">{% for chart in charts %}<div>{{ chart | safe }}</div>{% endfor %}</div>
{% for run in runs if run.settings %}
<h2>{{ run.name }}</h2>
{% if run.warning %}<p><b>Look at this run: {{ run.warning }}.</b>{% endif %}
<details><summary>settings</summary><pre>{{ run.settings | tojson(indent=1) }}</pre></details>
<p>Steps are coloured by their advantage: blue above 0, orange below. Curves are means over 9 steps.
{% for title, rollouts in run.examples.items() %}
<h3>{{ title }}</h3>
{% for r in rollouts %}
<article>
<p>Step {{ r.step }} of the training, exact match: {{ r.correct }}{{ ", cut off" if r.cut }}
{% set by_step = (r.scores or []) | length == r.step_texts | length %}
{% if r.scores and not by_step %}, score of the whole: {{ "%.3g" | format(r.scores[0]) }}{% endif %}
<div class="grid">
<div><pre><b>question</b>{{ r.question }}</pre>
{% for text in r.step_texts %}
{% set a = r.advantages[loop.index0] or 0 %}
<pre style="background: rgb({{ "0 114 178" if a > 0 else "213 94 0" }} /
{{ [a | abs / 3 + 0.1, 0.5] | min if a else 0 }})"><b>{% if by_step -%}
score {{ "%.3g" | format(r.scores[loop.index0]) }}, {% endif -%}
{{ "advantage %+.2f" | format(a) if r.advantages else "no advantage" }}</b>{{ text }}</pre>
{% endfor %}</div>
<div>{% for name, text in (("reference", r.reference),
("checkpoints", r.rubric), ("the judge", r.judge_words | join("\n\n"))) if text %}
<pre><b>{{ name }}</b>{{ text }}</pre>
{% endfor %}</div>
</div>
</article>
{% else %}<p>none
{% endfor %}{% endfor %}{% endfor %}
</html>
"""


def write_page(shown: list[Shown], path: Path) -> None:
    """One HTML file that needs no other, to be read on black and on white."""
    grey = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with pyplot.rc_context(dict.fromkeys(grey, "#808080")):
        figures = [pyplot.subplots(figsize=(5, 3.2), layout="constrained") for _ in range(7)]
        draw_charts(shown, [axis for _, axis in figures])
    charts = []
    for figure, axis in figures:
        if axis.lines:
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True)
            charts.append(file.getvalue()[file.getvalue().index("<svg") :])
    runs = []
    for run in shown:
        part = {"name": run.name, "color": colors.to_hex(run.color), "settings": run.settings}
        part |= judge_prompts.warn(run.steps.to_dict("records"))
        runs.append(part | {"examples": examples(run.rollouts)})
    page = Template(PAGE, autoescape=True).render(runs=runs, charts=charts)
    path.write_text(page, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", nargs="+", type=Path, help="run folders, and files of eval")
    parser.add_argument("--out", type=Path, default="report.html", help="(default: report.html)")
    parser.add_argument("--figure", type=Path, default="curves.png", help="(default: curves.png)")
    args = parser.parse_args(argv)
    try:
        shown = collect(args.path)
        write_figure(shown, args.figure)
        write_page(shown, args.out)
    except (OSError, UnicodeError) as error:
        exprl.stop(str(error))
    finally:
        pyplot.close("all")
    print(f"figure: {args.figure}\nreport: {args.out}")


if __name__ == "__main__":
    main()
