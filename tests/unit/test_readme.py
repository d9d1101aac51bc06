"""The README and its pages: their commands are run, anchors, tables and examples are right.

The commands run as they stand there, with flags added that make them small, in a folder where a toy
model is called Qwen2.5-0.5B and toy problems openai/gsm8k, and with the toy judge for the API's.
"""

import json
import re
import shlex
import shutil

import assignment
import baselines
import benchmark
import calibrate
import judge_eval
import pytest
import report
import test_assignment
import test_compare
import test_faults
import test_trl_example
import test_walkthrough
import torch
import toy_world
from conftest import ROOT, read

import exprl
import judge_prompts

PATHS = [
    ROOT / "README.md",
    *(ROOT / "tests" / f"{n}.md" for n in ("comparison", "gpu", "teaching")),
]
PAGES = {path: path.read_text(encoding="utf-8") for path in PATHS}
README = PAGES[ROOT / "README.md"]
SMALL = {
    "train": "--steps 1 --prompts-per-step 2 --group-size 2 --max-new-tokens 60",
    "eval": "--problems 4 --samples 2 --max-new-tokens 60",
    "calibrate": "--problems 3 --samples 2 --max-new-tokens 60",
    "benchmark": "--group 2 --micro-batch 2 --prompt-length 8 --length 4 --steps 1 --repeats 1",
}
ELSEWHERE = {  # command: the test that runs it
    "bash train_small.sh": test_walkthrough.test_the_readme_s_first_command,
    "bash train_small.sh Qwen2.5-0.5B": test_walkthrough.test_the_recipe_on_a_model_of_one_s_own,
    "bash train_small.sh compare": test_compare.test_killed_and_started_again_it_does_only_the_rest,
    "bash tests/run.sh": None,  # this is it
    "python tests/soak.py": test_faults.test_faults_and_kills_change_no_bit,
    'JUDGE_MODEL=toy-judge-lies-20 RUNS=runs/lies SYSTEMS="outcome process-delta process-end '
    'process-group" bash train_small.sh compare': test_compare.test_the_judge_is_the_one_asked_for,
    'SEEDS="1 2 3 4 5 6 7 8" SYSTEMS="sparse outcome process-delta process-group" '
    "RUNS=runs/eight-seeds bash train_small.sh compare": None,  # as the two above
    'LENGTH=8 SEEDS="1 2 3" SYSTEMS="sparse outcome process-delta process-group" '
    "RUNS=runs/eight bash train_small.sh compare": None,
    "python tests/assignment.py grade assignment --out grades.csv": test_assignment.graded,
    "accelerate launch --num_processes 2 tests/trl_example.py --model Qwen2.5-0.5B --method "
    "process": test_trl_example.test_pass_at_1_rises_on_two_processes,
}
PROGRAMS = (
    "vllm ",
    "ollama ",
    "OLLAMA_",
    "llama-server ",
    "transformers ",
    "pip ",
    "trl ",
    "accelerate config",
)  # not ours
OURS = ("python", "bash", "export", "accelerate ", "SEEDS=", "LENGTH=", "JUDGE_MODEL=")
COMMAND = re.compile("|".join(map(re.escape, (*OURS, *PROGRAMS))))


def find_commands() -> list[str]:
    """What stands in the README as a command, in order: lines of blocks, and in backquotes."""
    found = []
    for block, inline in re.findall(
        r"^ *```\n(.*?)^ *```$|`([^`\n]+)`", "\n".join(PAGES.values()), re.DOTALL | re.MULTILINE
    ):
        lines = map(str.strip, block.splitlines() if block else [inline])
        found += [line for line in lines if COMMAND.match(line) and " " in line]
    return found


COMMANDS = find_commands()


@pytest.fixture(scope="module")
def place(tiny, judge, tmp_path_factory):
    """The folder in which the README's commands run."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(tiny / "base", place / "Qwen2.5-0.5B")
    hub = place / "openai" / "gsm8k"
    hub.mkdir(parents=True)
    splits = "\n".join(f"  - split: {s}\n    path: {s}.jsonl" for s in ("train", "test"))
    (hub / "README.md").write_text(
        f"---\nconfigs:\n- config_name: main\n  data_files:\n{splits}\n---\n"
    )
    for name, file in (("train", "train.jsonl"), ("test", "heldout.jsonl")):
        rows = [
            {"question": r["question"], "answer": f"{r['reference']}\n#### {r['answer']}"}
            for r in read(tiny / file)
        ]
        (hub / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = read(tiny / "train.jsonl")[:6]
    for name in ("my.jsonl", "mixed.jsonl"):
        (place / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    toy = place / "runs" / "toy"
    shutil.copytree(tiny / "base", toy / "process" / "final")
    shutil.copy(tiny / "heldout.jsonl", toy)
    return place


def test_every_command_is_known():
    assert len(COMMANDS) > 25 and {*ELSEWHERE} <= {*COMMANDS}
    for command in COMMANDS:
        is_run = command.startswith(("python exprl.py ", "python tests/", "export "))
        assert is_run or command in ELSEWHERE or command.startswith(PROGRAMS), command
    for command in re.findall(r"python exprl\.py ([^`#\n]+)", exprl.__doc__):
        name, *flags = shlex.split(command)
        kind = exprl.EvalSettings if name == "eval" else exprl.TrainSettings
        exprl.read_flags(kind, flags if name == "eval" else [name, *flags], "")


def run(command: str, judge) -> None:
    """One command of the README, in this process, with small numbers."""
    command = re.sub(r"http://127\.0\.0\.1:\d+/v1", judge.url, command)
    command = command.replace('"$(cat judge.url)"', judge.url)
    script, *argv = shlex.split(command)[1:]
    if script == "tests/assignment.py":
        assignment.main(argv)
    elif script == "tests/report.py":
        report.main(argv)
    elif script == "tests/calibrate.py":
        argv += shlex.split(SMALL["calibrate"])
        exprl.run_command(calibrate.calibrate, calibrate.CalibrateSettings, argv, "")
    elif script == "tests/benchmark.py":
        argv += shlex.split(SMALL["benchmark"])
        exprl.run_command(benchmark.benchmark, benchmark.BenchmarkSettings, argv, "")
    elif script == "tests/judge_eval.py":
        exprl.run_command(judge_eval.judge_eval, judge_eval.JudgeEvalSettings, argv, "")
    elif script == "tests/baselines.py":
        argv += shlex.split(SMALL["train"])
        exprl.run_command(baselines.train, baselines.BaselineSettings, argv, "")
    elif script == "exprl.py" and "--help" in argv:
        with pytest.raises(SystemExit):
            exprl.main(argv)
    elif script == "exprl.py":
        exprl.main(argv + shlex.split(SMALL["eval" if argv[0] == "eval" else "train"]))
    else:
        assert command == "python tests/toy_world.py judge --url-file judge.url &"


def test_the_commands_run_in_the_order_of_the_page(place, judge, monkeypatch, capsys):
    """A later one reads what an earlier one wrote."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OPENAI_API_KEY", "...")
    monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
    ran = []
    for command in COMMANDS:
        if command in ELSEWHERE or not command.startswith("python ") or command in ran:
            continue
        run(command, judge)
        ran.append(command)
    assert len(ran) > 20
    made = [
        f"runs/Qwen2.5-0.5B-{m}" for m in ("process", "outcome", "process-sparse", "sft", "distill")
    ]
    for name in (*made, "runs/group", "runs/none", "runs/prefix", "runs/quotes", "runs/mixed"):
        assert (place / name / "final" / "config.json").exists(), name
        for row in read(place / name / "metrics.jsonl"):
            assert row["step"] == 1
    for name in ("hard.jsonl", "report.html", "curves.png", "assignment/exprl.py"):
        assert (place / name).stat().st_size > 0, name
    assert "verdict: " in capsys.readouterr().out


def test_what_the_page_says_a_run_writes_is_there(train, tmp_path):
    run = train(tmp_path / "run")
    table = README[README.index("## What a run writes") : README.index("## When something")]
    names = re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)
    assert "checkpoint.pt" in names
    for name in set(names) - {"eval-NNNNNN.jsonl"}:
        assert (run / name).exists(), name


def test_metrics_that_the_page_names_are_logged(train, tmp_path):
    part = README[README.index("## When something") : README.index("## The whole comparison")]
    named = {*re.findall(r"`(\w+)`", part)} - {
        "outcome",
        "sparse",
        "calibrate",
        "text",
        "answer",
        "judge_words",
    }
    logged = {*read(train(tmp_path / "run") / "metrics.jsonl")[0]}
    assert named <= logged and {"grad_norm", "seconds_judge", "cut"} <= named


def test_line_anchors_lead_to_what_they_name():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) > 15
    for name, file, line in links:
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b|{name}\b.* = ", text), f"{file}:{line} is {text!r}"


def test_links_lead_to_files_that_are_there():
    anchors = {}
    for page, text in PAGES.items():
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors[page] = {re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles}
    for page, text in PAGES.items():
        for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), (page.name, link)
            assert target not in anchors or not anchor or anchor in anchors[target], link


def test_the_readme_is_short_and_its_first_screen_has_what_counts():
    lines = README.splitlines()
    assert len(lines) <= 250
    first = "\n".join(lines[:40])
    for words in ("bash train_small.sh", "(.assets/method.svg)", "| stage 1: ExpRL", "| control:"):
        assert words in first, words


def test_the_worked_example_is_what_the_functions_give():
    rows = re.findall(
        r"^\| ([ab])\d \| .*? \| (\d) \| (\S+) \| .*? \| (\S+) \|", README, re.MULTILINE
    )
    assert len(rows) == 4
    rewards = [[(int(k) - 1) / 4 for name, k, *_ in rows if name == c] for c in "ab"]
    shown = [[float(s) for name, _, s, _ in rows if name == c] for c in "ab"]
    assert rewards == shown
    given = [[float(a) for name, *_, a in rows if name == c] for c in "ab"]
    assert exprl.step_advantages(rewards, "delta") == given
    scores = [
        (int(k) - 1) / 4 for k in re.search(r"with scores (\d) and (\d) for", README).groups()
    ]
    outcome = exprl.group_advantages(torch.tensor(scores), torch.tensor([True, True]), 2)
    a, b = re.search(r"of a get (\S+) and all of b (\S+),", README).groups()
    assert [float(a), float(b)] == pytest.approx(outcome.tolist(), abs=0.005)


def test_numbers_of_the_assignment_are_those_of_its_code():
    wrong = sum(map(len, test_assignment.mutants.MUTANTS.values()))
    right = sum(map(len, test_assignment.mutants.CORRECT.values()))
    n, points = len(assignment.FUNCTIONS), sum(f.points for f in assignment.FUNCTIONS)
    text = " ".join(PAGES[ROOT / "tests" / "teaching.md"].split())
    for words in (
        f"with the bodies of {n} functions taken out",
        f"six problems, {points} points by the grader",
        f"{wrong} wrong but plausible versions of the {n} functions",
        f"{right} other correct ones",
    ):
        assert words in text, words
    assert len(assignment.PROBLEMS) == 6


def test_the_toy_judge_that_lies_lies_as_often_as_its_name_says():
    row = toy_world.make_row(29, ["*3", "+7", "+7", "*3", "*3", "+7"])
    right, asked = toy_world.write_trace(row["question"], toy_world.apply), 400
    steps = re.split(r"^(?=### )", right, flags=re.MULTILINE)[1:]
    lies = {"together": 0, "outcome": 0}
    for i in range(asked):
        record = row | {"domain": "math", "question": row["question"]}
        for kind, texts in (("together", steps), ("outcome", [right])):
            fenced = judge_prompts.fence(texts)
            messages = judge_prompts.judge_messages(kind, record, f"- a\n- {i}", fenced)
            honest, *others = (
                toy_world.answer({"messages": messages, "model": f"toy-judge{name}"})
                for name in ("", "-lies-0", "-lies-20", "-lies-20", "-lies-100")
            )
            assert honest == others[0] and others[1] == others[2]  # asked again, it says the same
            scores = [re.findall(r": ([1-5])$", text, re.MULTILINE) for text in (honest, *others)]
            assert set(scores[0]) == {"5"} and set(scores[-1]) == {"1"}
            lies[kind] += scores[2].count("1") / len(scores[2])
    for share in lies.values():
        assert share / asked == pytest.approx(0.2, abs=0.06)


# ---- Memory --------------------------------------------------------------------------------------
MODELS = {  # parameters, layers, width, MLP width, key-value heads x their width, vocabulary
    "SmolLM2-135M": (134.5e6, 30, 576, 1536, 192, 49152),
    "Qwen2.5-0.5B": (494e6, 24, 896, 4864, 128, 151936),
    "Qwen2.5-1.5B": (1.54e9, 28, 1536, 8960, 256, 151936),
    "Qwen2.5-3B": (3.09e9, 36, 2048, 11008, 256, 151936),
}


def memory(N, L, h, f, k, V, B, T, P=200, S=64) -> float:
    """The page's formula, in GB: the larger of training and sampling."""
    activations = L * B * (P + T) * (34 * h + 8 * f + 2 * (P + T))
    logits = T * V * (2 * (2 * B - 1) + 12)
    training = 22 * N + activations + logits
    sampling = 18 * N + S * (8 * L * k * (P + T) + 16 * V)
    return max(training, sampling) / 1e9


def memory_table() -> str:
    """The page's rows."""
    rows = []
    for name, shape in MODELS.items():
        cells = [
            " / ".join(f"{memory(*shape, B, T):.1f}" for B in (4, 1)) for T in (512, 1024, 2048)
        ]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def test_the_memory_table_is_what_the_formula_gives():
    assert memory_table() in PAGES[ROOT / "tests" / "gpu.md"]
