"""The paper's comparison on the toy world: all methods, both stages, seeds, judge ablations.

`bash train_small.sh compare` runs this. Each seed has its own problems and base model. Two jobs
(build, train, evaluate) run at a time; what each prints is in RUNS/compare/logs. A finished job
leaves a marker with its command in RUNS/compare/jobs: started again, only the rest is done, and
training goes on from its last checkpoint. Results: RUNS/comparison.md and RUNS/comparison.png.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toy"), str(ROOT / "tests" / "tools")]

import evaluate  # noqa: E402
import toy_world  # noqa: E402

import exprl  # noqa: E402

PROCESS = "--method process --process-norm"
SYSTEMS = {  # run folder: (row of the table, flags of stage 1); stage 2 is the same for all
    "sparse": ("sparse reward (GRPO)", "--method sparse"),
    "sft": ("SFT on references", "--method sft --prompts-per-iteration 64 --lr 5e-4"),
    "distill": ("self-distillation", "--method distill"),
    "outcome": ("ExpRL-Outcome", "--method outcome"),
    "process-delta": ("ExpRL-Process, delta", f"{PROCESS} delta"),
    "process-end": ("ExpRL-Process, end", f"{PROCESS} end"),
    "process-group": ("ExpRL-Process, group", f"{PROCESS} group"),
    "process-none": ("ExpRL-Process, delta, no reference", f"{PROCESS} delta --reference none"),
    "process-wrong": (
        "ExpRL-Process, delta, wrong reference",
        f"{PROCESS} delta --reference wrong",
    ),
}
KS, MEASURES, AT_A_TIME = (1, 2, 4, 8), ("pass@1", "pass@8", "trace"), 2

# --------------------------------------------------------------------------------------------------
# What there is to do, and doing it


@dataclass(eq=False)
class Job:
    """A command, the jobs whose results it needs, and what says that it is finished."""

    name: str  # seed-1/outcome
    command: list[str]  # arguments of Python
    result: Path
    needs: list[str]
    expected: float  # seconds, roughly: for the time left
    log: Path
    marker: Path

    def is_done(self) -> bool:
        """Whether result and marker are there; stops if they are another command's."""
        if not (self.marker.exists() and self.result.exists()):
            return False
        before = exprl.read_jsonl(self.marker)[0]["command"]
        if before != self.command:
            pairs = enumerate(zip(before, self.command, strict=False))
            i = next((i for i, (a, b) in pairs if a != b), -1)
            was, now = (" ".join(command[i - 1 : i + 1]) for command in (before, self.command))
            exprl.stop(f"{self.name} was made with {was}, not {now}: take that, or another RUNS")
        return True


def model_path(world: Path, name: str) -> Path:
    """The model folder of a run, or of the base."""
    return world / name if name == "base" else world / name / "final"


def eval_path(world: Path, name: str) -> Path:
    """Where evaluate.py writes the records of a model."""
    return evaluate.eval_file(world / "eval", str(model_path(world, name)))


def plan(args: argparse.Namespace, seed: int) -> list[Job]:
    """The jobs of a seed, in the order in which they start where nothing else holds them up."""
    compare, jobs = args.runs / "compare", []
    world = compare / f"seed-{seed}"

    def add(name: str, command: list, result: Path, needs: list[str], expected: float) -> None:
        log, marker = f"logs/seed-{seed}-{name}.log", f"jobs/seed-{seed}-{name}.json"
        name, needs = f"seed-{seed}/{name}", [f"seed-{seed}/{need}" for need in needs]
        command = list(map(str, command))
        jobs.append(Job(name, command, result, needs, expected, compare / log, compare / marker))

    def train(name: str, flags: str, start: str, steps: int) -> None:
        is_baseline = re.search("sft|distill|--reference", flags)  # in a program of their own
        program = ["tests/tools/baselines.py"] if is_baseline else ["exprl.py"]
        command = [*program, "--model", model_path(world, start), "--out", world / name]
        command += [
            "--data",
            world / "train.jsonl",
            "--iterations",
            steps,
            "--seed",
            seed,
            "--resume",
        ]
        command += [*args.train, *args.sampling, *flags.split()]
        add(name, command, model_path(world, name), [start], 8 + 0.4 * steps)

    def evaluate_all(stage: str, names: list[str]) -> None:
        command = [
            "tests/tools/evaluate.py",
            "--model",
            *(model_path(world, name) for name in names),
        ]
        command += ["--data", world / "heldout.jsonl", "--out", world / "eval", *args.sampling]
        command += ["--problems", args.problems, "--samples", max(KS)]
        add(f"eval-{stage}", command, eval_path(world, names[-1]), names, 8 + 8 * len(names))

    command = ["tests/toy/toy_world.py", "build", world, "--seed", seed, "--steps", args.base_steps]
    command += ["--length", args.length]
    add("base", command, world / "base", [], 8 + 0.06 * args.base_steps)
    train("sparse-only", "--method sparse", "base", args.stage1 + args.stage2)
    for name in args.systems:
        train(name, SYSTEMS[name][1], "base", args.stage1)
    for name in args.systems:
        train(f"{name}-then-sparse", "--method sparse", name, args.stage2)
    evaluate_all("stage-1", ["base", *args.systems])
    evaluate_all("stage-2", [*(f"{name}-then-sparse" for name in args.systems), "sparse-only"])
    return jobs


def run_all(jobs: list[Job], lock: int, starts: Path) -> None:
    """Run what is not finished, two at a time. A job that fails ends all with one line."""
    finished = {job.name for job in jobs if job.is_done()}
    new, running, begun = [], {}, time.monotonic()
    judge = toy_world.program_judge.ChatServer(toy_world.answer)
    environment = os.environ | {"OPENAI_BASE_URL": judge.url}  # so the port is in no command
    # where there is setpriv (Linux), no job outlives this process, however that ends
    tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []

    def say(text: str) -> None:
        """A line with the time, how much is done, and how long the rest may take."""
        now = time.monotonic()
        pace = sum(seconds for seconds, _ in new) / sum(e for _, e in new) if new else 1.0
        left = pace * sum(job.expected for job in jobs if job.name not in finished)
        left = max(0.0, left - sum(now - started for _, started in running.values()))
        clock = f"{int(now - begun) // 60:3}:{int(now - begun) % 60:02}"
        done = f"{len(finished)} of {len(jobs)} done, about {left / AT_A_TIME / 60:.0f} min left"
        print(f"{clock}  {done}: {text}", flush=True)

    def start(job: Job) -> None:
        with job.log.open("a") as log:
            process = subprocess.Popen(
                [*tied, sys.executable, *job.command], env=environment, stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True, pass_fds=[lock],
            )  # fmt: skip
        running[job] = (process, time.monotonic())
        say(f"{job.name} starts")

    def end(job: Job) -> None:
        process, started = running.pop(job)
        if process.returncode or not job.result.exists():
            last = job.log.read_text(errors="replace").replace("\r", "\n").strip().split("\n")[-1]
            exprl.stop(f"{job.name} failed; its log {job.log} ends: {last}")
        seconds = time.monotonic() - started
        record = {"command": job.command, "seconds": seconds, "code": code_version()}
        partial = job.marker.with_suffix(".partial")
        partial.write_text(json.dumps(record) + "\n")
        partial.replace(job.marker)  # completely or not at all
        finished.add(job.name)
        new.append((seconds, job.expected))
        say(f"{job.name} took {seconds:.0f} s")

    try:
        while len(finished) < len(jobs):
            for job in jobs:
                is_free = job not in running and job.name not in finished
                if is_free and len(running) < AT_A_TIME and finished.issuperset(job.needs):
                    start(job)
            time.sleep(0.1)
            judge.requests.clear()
            for job in [job for job, (process, _) in running.items() if process.poll() is not None]:
                end(job)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=20)
            process.kill()
        judge.shutdown()
        if new:
            exprl.append_jsonl(starts, [{"seconds": time.monotonic() - begun}])


def code_version() -> str:
    """A hash of the files that make the results."""
    files = [ROOT / "exprl.py", ROOT / "judge_prompts.py"]
    files += [ROOT / "tests/toy/toy_world.py", ROOT / "tests/tools/baselines.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


# --------------------------------------------------------------------------------------------------
# What came out


def read_eval(path: Path) -> dict[str, list[float]]:
    """Return {"pass@1": one number per problem, ..., "trace": the share of its exact traces}."""
    records = exprl.read_jsonl(path)
    rates = {}
    for k in KS:
        rates[f"pass@{k}"] = [evaluate.pass_at_k(r["n"], r["correct"], k) for r in records]
    right = [toy_world.write_trace(r["question"], toy_world.apply) for r in records]
    pairs = zip(records, right, strict=True)
    return rates | {"trace": [r["texts"].count(text) / r["n"] for r, text in pairs]}


def read_costs(run: Path) -> tuple[int, int]:
    """(completions, optimizer steps), counted in a run's logs."""
    settings = json.loads((run / "settings.json").read_text())
    iterations = {record["iteration"] for record in exprl.read_jsonl(run / "metrics.jsonl")}
    if settings["method"] == "sft":
        completions = settings["prompts_per_iteration"]
    else:
        completions = settings["prompts_per_iteration"] * settings["group_size"]
    return len(iterations) * completions, len(iterations) * settings["optimizer_steps"]


def collect(args: argparse.Namespace) -> dict[str, dict]:
    """{row: {"style", 1 and 2 (the stages): {measure: (seeds, problems)}, "costs": two texts}}."""
    worlds, rows = [args.runs / "compare" / f"seed-{seed}" for seed in args.seeds], {}
    systems = {"base model": ("k--", {1: "base"})}
    systems["sparse reward (GRPO), in one run"] = ("C0--", {2: "sparse-only"})
    for name in args.systems:
        style = f"C{list(SYSTEMS).index(name)}-"
        systems[SYSTEMS[name][0]] = (style, {1: name, 2: f"{name}-then-sparse"})
    for label, (style, runs) in systems.items():
        rows[label], costs = {"style": style}, []
        for stage, run in runs.items():
            seeds = [read_eval(eval_path(world, run)) for world in worlds]
            rows[label][stage] = {key: np.array([s[key] for s in seeds]) for key in seeds[0]}
            counts = [(0, 0) if run == "base" else read_costs(world / run) for world in worlds]
            counts = zip(*counts, strict=True)
            costs.append([" or ".join(f"{n:,}" for n in sorted({*each})) for each in counts])
        rows[label]["costs"] = map(" + ".join, zip(*costs, strict=True))
    return rows


def interval(values: np.ndarray) -> list[float]:
    """(seeds, problems) -> mean and 95% interval, bootstrapped over seeds and their problems; %."""
    rng, (n_seeds, n_problems) = np.random.default_rng(0), values.shape
    seeds = rng.integers(n_seeds, size=(2000, n_seeds, 1))  # with replacement; then in each of them
    problems = rng.integers(n_problems, size=(2000, n_seeds, n_problems))
    means = values[seeds, problems].mean(axis=(1, 2))
    return [100 * float(x) for x in (values.mean(), *np.percentile(means, [2.5, 97.5]))]


def markdown(rows: list[list[str]]) -> str:
    """A table; the first row is its head."""
    rows = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


TEXT = """# All methods compared in the toy world

`bash train_small.sh compare` wrote this page. The seeds are {seeds}, and each has its own problems
and its own base model. Stage 1 has {stage1} iterations of the method of the row. Stage 2 has
{stage2} iterations of the sparse reward (GRPO) from there. The table is in percent, from {n}
completions of each of {problems} held-out problems per seed, with 95% intervals.

{table}

pass@1 after stage 1 → after stage 2, by seed:

{by_seed}

![pass@1 by system, and pass@k after stage 2](comparison.png)

What the columns mean:

- pass@k is the probability that at least one of k completions is correct (unbiased estimate).
- trace is the share of completions that equal the correct solution line by line, with one operation
  on each line. A guessed answer is correct once in {modulus} times. After SFT this share is 0,
  whatever was learned, because references take two operations per line.
- The intervals are bootstrap intervals over seeds and over the problems of each seed. With few
  seeds they are a rough guide, so look at the second table, too.
- completions is the number that was trained on in stage 1 + stage 2, counted in the logs of the
  runs. In stage 1 of SFT these are references. The optimizer steps are counted in the same way.

Some results follow from the way the world was built, before any run:

- The judge is a program. With the correct reference, its scores are exact. Without a reference it
  can check only the form (label, operation, start value, box), so a wrong value costs nothing. With
  another problem's reference, it rewards a correct step only by coincidence.
- References take two operations per line, and the base model's completions take one.
- The base model was pretrained to copy most values of a reference in its prompt, whatever it wrote
  before. This makes it a teacher for self-distillation.

{machine}
"""


def report(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Write comparison.md and comparison.png."""
    found, cells = collect(args), [(stage, name) for stage in (1, 2) for name in MEASURES]
    rows = [["system", *(f"{name}, stage {stage}" for stage, name in cells)]]
    rows[0] += ["completions", "optimizer steps"]
    by_seed = [["system", *(f"seed {seed}" for seed in args.seeds)]]
    for label, row in found.items():
        triples = [interval(row[stage][name]) if stage in row else [] for stage, name in cells]
        texts = ["{:.1f} [{:.1f}, {:.1f}]".format(*triple) if triple else "–" for triple in triples]
        rows.append([label, *texts, *row["costs"]])
        means = [100 * row[s]["pass@1"].mean(axis=1) if s in row else [] for s in (1, 2)]
        texts = [[f"{mean:.1f}" for mean in stage] or ["–"] * len(args.seeds) for stage in means]
        by_seed.append([label, *map(" → ".join, zip(*texts, strict=True))])
    records = [exprl.read_jsonl(job.marker)[0] for job in jobs]
    starts = exprl.read_jsonl(args.runs / "compare" / "starts.jsonl")
    took, wall = (sum(r["seconds"] for r in part) / 60 for part in (records, starts))
    machine = f"""{len(jobs)} jobs, {AT_A_TIME} at a time with one thread each, on {os.cpu_count()}
CPU cores: {wall:.1f} minutes in {len(starts)} start(s) of the command, the jobs' times added up
{took:.0f} minutes (without what a stopped job took before it was started again)."""
    if len({record["code"] for record in records}) > 1:
        machine += "\n\n**The code changed between jobs.**"
    text = TEXT.format(
        seeds=", ".join(map(str, args.seeds)), stage1=args.stage1, stage2=args.stage2, n=max(KS),
        problems=found["base model"][1]["trace"].shape[1], table=markdown(rows),
        by_seed=markdown(by_seed), modulus=toy_world.MODULUS, machine=machine,
    )  # fmt: skip
    (args.runs / "comparison.md").write_text(text, encoding="utf-8")
    draw(found, args.runs / "comparison.png")
    print(f"\n{markdown(rows)}\n\n{markdown(by_seed)}\n\n{machine}")
    print(f"table: {args.runs / 'comparison.md'}, figure: {args.runs / 'comparison.png'}")


def draw(found: dict[str, dict], path: Path) -> None:
    """pass@1 of each row after both stages, and pass@k after stage 2."""
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(10, 9), layout="constrained")
    for y, (label, row) in enumerate(found.items()):
        color = row["style"].rstrip("-")
        for stage, height, face in ((1, y - 0.17, "white"), (2, y + 0.17, color)):
            if stage in row:
                mean, low, high = interval(row[stage]["pass@1"])
                top.plot([low, high], [height] * 2, color=color)
                seeds = 100 * row[stage]["pass@1"].mean(axis=1)
                top.plot(seeds, [height] * len(seeds), "|", color=color, markersize=9)
                top.plot(mean, height, "o", color=color, markerfacecolor=face, markersize=7)
        means = [100 * row.get(2, row.get(1))[f"pass@{k}"].mean() for k in KS]
        bottom.plot(KS, means, row["style"], marker="o", markersize=4, label=label)
    top.set_yticks(range(len(found)), list(found))
    top.invert_yaxis()
    top.set_title("after stage 1 (hollow) and stage 2 (filled); lines: 95% intervals, ticks: seeds")
    top.set_xlabel("pass@1 on held-out problems, %")
    bottom.set_xscale("log", base=2)
    bottom.set_xticks(KS, list(map(str, KS)))
    bottom.set_title("after stage 2 (base model: as it is)")
    bottom.set(xlabel="k", ylabel="pass@k on held-out problems, %", ylim=(0, None))
    figure.legend(*bottom.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--seeds", type=lambda text: list(map(int, text.split())), required=True)
    for flag in ("--stage1", "--stage2", "--base-steps", "--problems", "--length"):
        parser.add_argument(flag, type=int, required=True)
    for flag in ("--systems", "--train", "--sampling"):
        parser.add_argument(flag, type=str.split, required=True)
    args = parser.parse_args()
    if unknown := {*args.systems} - {*SYSTEMS}:
        exprl.stop(f"no system is called {' or '.join(unknown)}: there are {', '.join(SYSTEMS)}")
    args.systems = [name for name in SYSTEMS if name in (args.systems or SYSTEMS)]
    compare = args.runs / "compare"
    for folder in ("logs", "jobs"):
        (compare / folder).mkdir(parents=True, exist_ok=True)
    (compare / "starts.jsonl").touch()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        with (compare / "lock").open("w") as lock:  # the jobs hold it too: no run has two writers
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print(
                    "waiting a minute for another comparison in this folder, or what is left of it"
                )
                for _ in range(60):
                    time.sleep(1)
                    with contextlib.suppress(OSError):
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                else:
                    exprl.stop(f"another comparison is running in {compare}: wait for its end")
            jobs = [job for seed in args.seeds for job in plan(args, seed)]
            run_all(jobs, lock.fileno(), compare / "starts.jsonl")
            report(args, jobs)
    except KeyboardInterrupt:
        exprl.stop("the comparison was stopped; the same command goes on where it was")


if __name__ == "__main__":
    main()
