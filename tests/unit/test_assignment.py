"""The assignment: what is handed out, and that the grader can be trusted."""

import ast
import csv
import inspect
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import assignment
import attacks
import baselines
import evaluate
import grading
import handout
import mutants
import pytest
import runner
import sandbox
from conftest import ROOT, read, train_command
from properties import PROPERTIES, Failed, Graded, first_failure
from test_gates import measure

import exprl
import judge_prompts

COURSE = ROOT / "tests" / "course"
NAMES = [function.name for function in handout.FUNCTIONS]
FILES = {function.name: function.file for function in handout.FUNCTIONS}
MODULES = {
    "exprl.py": exprl,
    "judge_prompts.py": judge_prompts,
    "tests/tools/baselines.py": baselines,
    "tests/tools/evaluate.py": evaluate,
}
NOT_WRITTEN = "    raise NotImplementedError\n"


def run(*command, folder=ROOT, timeout=280) -> subprocess.CompletedProcess:
    """A command with this interpreter, as a teacher or a student would type it."""
    alone = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(
        command, cwd=folder, env=alone, capture_output=True, text=True, timeout=timeout, check=False
    )


def solve(blank: Path, solved: Path) -> Path:
    """A copy of a folder with our functions in it."""
    shutil.copytree(blank, solved)
    for name in MODULES:
        shutil.copy(ROOT / name, solved / name)
    return solved


# ---- Handing out ---------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    out = tmp_path_factory.mktemp("assignment") / "student"
    done = run("tests/course/assignment.py", "make", out)
    assert done.returncode == 0, done.stderr
    return out


def check_blanks(folder: Path, names: list[str]) -> None:
    """The folder's modules are ours, without the bodies of these functions."""
    for file in MODULES:
        ours, theirs = ((place / file).read_text() for place in (ROOT, folder))
        ours, theirs = map(handout.find_functions, (ours, theirs))
        assert list(ours) == list(theirs)
        for function, node in theirs.items():
            if function not in names:
                assert ast.dump(node) == ast.dump(ours[function])
                continue
            assert ast.get_docstring(node) == ast.get_docstring(ours[function])
            assert ast.dump(node.args) == ast.dump(ours[function].args)
            assert ast.unparse(node.body[1:]) == "raise NotImplementedError"


def test_the_folder_has_all_that_is_needed_and_no_solution(handed_out):
    files = {str(p.relative_to(handed_out)) for p in handed_out.rglob("*") if p.is_file()}
    assert files == {"README.md", *handout.HANDED_OUT}
    check_blanks(handed_out, NAMES)
    for name in set(files) - {"README.md", *MODULES}:
        assert (handed_out / name).read_bytes() == (ROOT / name).read_bytes()


def test_its_readme_names_each_function_its_place_its_points_and_an_existing_test(handed_out):
    page = (handed_out / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| `(.*):(\d+)` \| `(.*)` \|$", page, re.MULTILINE)
    assert [(name, int(points)) for name, points, *_ in rows] == [
        (function.name, function.points) for function in handout.FUNCTIONS
    ]
    public = (ROOT / "tests" / "course" / "test_public.py").read_text()
    for name, _, file, line, command in rows:
        lines = (handed_out / file).read_text().splitlines()
        assert lines[int(line) - 1].startswith(f"def {name}(")
        assert command.endswith(f"{file} tests/course/test_public.py -k {name}")
        assert f"\ndef test_{name}(" in public
    assert "## Write (80 points)" in page and "{" + "%" not in page
    assert len(re.findall(r"^### \d\. ", page, re.MULTILINE)) == 6
    for path in re.findall(r"(?<![\w/])(?:tests/[\w/]+\.(?:py|sh)|\w+\.(?:py|sh))\b", page):
        assert (handed_out / path).is_file(), path
    for name in re.findall(r"Read ([^.:]*)[.:]", page):  # the functions to read exist
        for word in re.findall(r"`(\w+)(?:\.\w+)?`", name):
            assert any(hasattr(module, word) for module in MODULES.values()), word


def test_public_tests_fail_on_the_blank_and_pass_on_the_solution(handed_out, tmp_path):
    tests = "tests/course/test_public.py"
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-rA", tests]
    blank = run(*command, folder=handed_out).stdout
    assert "NotImplementedError" in blank and not re.search(r"^PASSED", blank, re.MULTILINE)
    for name in NAMES:
        assert f"::test_{name}" in blank
    solved = solve(handed_out, tmp_path / "solved")
    every = [name for name in handout.HANDED_OUT if name.endswith(".py")]  # all are imported
    done = run(*command, "--doctest-modules", *every, folder=solved)
    assert done.returncode == 0, done.stdout[-2000:]


def test_only_some_functions_are_taken_out(tmp_path):
    out = tmp_path / "student"
    assignment.main(["make", str(out), "--only", "step_advantages", "fence"])
    check_blanks(out, ["step_advantages", "fence"])
    page = (out / "README.md").read_text()
    assert "## Write (12 points)" in page and "`pass_at_k`" not in page


def test_bad_input_gets_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(grading, "why_no_sandbox", lambda folders: "")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "work.py").write_text("mine")
    full, bad = str(tmp_path / "full"), tmp_path / "bad"
    bad.mkdir()
    (bad / "details.csv").write_text("a,b\n1,2\n")
    for argv, message in (
        (["make", full], "not empty"),
        (["make", str(tmp_path / "full" / "work.py")], "not empty"),
        (["make", str(tmp_path / "new"), "--only", "pass_at_kk"], "pass_at_kk.*pass_at_k"),
        (["grade", full, "--out", str(bad)], "--out .*bad cannot be used"),
        (["grade", full, "--out", str(tmp_path / "full" / "work.py")], "--out .*work.py"),
        (["grade", full, "--seconds", "0"], "--seconds"),
        (["grade", full, "--only", "update"], "update"),
    ):
        with pytest.raises(SystemExit, match=message) as stopped:
            assignment.main(argv)
        assert "\n" not in str(stopped.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.stress
def test_the_solved_folder_trains_on_the_toy_world(handed_out, tiny, judge, tmp_path):
    """With our bodies put into the blanks, the folder is our code and trains against a judge."""
    solved = shutil.copytree(handed_out, tmp_path / "solved")
    for name in MODULES:
        source, ours = (solved / name).read_text(), (ROOT / name).read_text()
        nodes = [(f, handout.find_functions(ours)[f]) for f in NAMES if FILES[f] == name]
        for _, node in sorted(nodes, key=lambda item: item[1].lineno):
            body = ours.splitlines(keepends=True)[node.body[0].end_lineno : node.end_lineno]
            source = source.replace(NOT_WRITTEN, "".join(body), 1)
        assert source == ours
        (solved / name).write_text(source)
    done = run("exprl.py", *train_command(tiny, judge, tmp_path / "run"), folder=solved)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(read(tmp_path / "run" / "rollouts.jsonl")) == 16
    assert (tmp_path / "run" / "final").is_dir()


# ---- Grading -------------------------------------------------------------------------------------
MAIN = 'if __name__ == "__main__"'
MISTAKES = {  # name: (code at the end of judge_prompts.py, what the student reads)
    "input": ("n = int(input('How many? '))", f"EOFError.*{MAIN}"),
    "path": ("open('README.md')", f"README.md.*line.*{MAIN}"),
    "log": ("open('debug.log', 'w')", f"debug.log.*{MAIN}"),
    "helpers": ("import my_helpers", "my_helpers.*graded files"),
    "syntax": ("def f(:", "judge_prompts.py, line [0-9]+"),
    "endless": ("while True: pass", "imported. It took more than 5 seconds"),
    "exit": ("raise SystemExit('bye')", "imported. SystemExit: bye"),
}


@pytest.fixture(scope="session")
def bwrap():
    """Skip a test where there is no sandbox."""
    if reason := sandbox.why_no_sandbox([]):
        pytest.skip(f"the attacks are not tried: {reason}")


def read_details(out):
    """Return the rows of details.csv, by student and function."""
    rows = {}
    with (out / "details.csv").open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["student"], {})[row["function"]] = row
    return rows


def grade_here(folders, out, *flags):
    """Run the grader in this process, which has already imported all it needs. Return the rows."""
    assignment.main(["grade", *map(str, folders), "--out", str(out), *flags])
    return read_details(out)


def run_grader(folders, out, *flags, timeout=1700, **secrets):
    """Run the grader as a teacher would. Return the process and the rows."""
    command = [sys.executable, assignment.__file__, "grade", *folders, "--out", out, *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | secrets
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=timeout, env=environment,
        cwd=out.parent, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done, read_details(out)


def points(of_student):
    return {function: int(row["points"]) for function, row in of_student.items()}


FULL = {function.name: function.points for function in handout.FUNCTIONS}


@pytest.fixture(scope="module")
def graded(bwrap, handed_out, tmp_path_factory):
    """The process, the rows and the folder of one run over honest submissions with mistakes."""
    folder = tmp_path_factory.mktemp("graded")
    solved = solve(handed_out, folder / "solved")
    with (solved / "exprl.py").open("a") as file:
        file.write("\nprint('1 failed', flush=True)\nsys.stderr.write('error' * 99999)\n")
    shutil.copytree(handed_out, folder / "blank")
    shutil.copytree(solved, folder / "half")
    (folder / "half" / "judge_prompts.py").unlink()
    hangs = shutil.copytree(solved, folder / "hangs" / "one folder below")
    hanging = (
        (solved / "exprl.py").read_text().replace("    known = [", "    while True: pass\n#", 1)
    )
    (hangs / "exprl.py").write_text(hanging)
    (folder / "stray.zip").write_text("not a folder")
    folders = sorted(folder.iterdir())
    out, fence = folder / "out", ["--only", "fence"]
    done, _ = run_grader(folders, out, "--seconds", "5")
    correct = (solved / "judge_prompts.py").read_text()
    for name, (code, _) in MISTAKES.items():
        (folder / name).mkdir()
        (folder / name / "judge_prompts.py").write_text(f"{correct}\n{code}\n")
    mistakes = [folder / name for name in MISTAKES]
    grade_here(mistakes, out, *fence, "--seconds", "5")  # it adds to the tables
    shutil.copytree(solved, folder / "no-sandbox")
    more = [folder / "no-sandbox", folder / "blank"]  # the last one is skipped
    rows = grade_here(more, out, *fence, "--no-sandbox")
    return done, rows, folder


@pytest.mark.stress
def test_the_stub_gets_nothing_and_the_solution_everything(graded):
    done, rows, _ = graded
    assert points(rows["solved"]) == FULL and points(rows["no-sandbox"]) == {"fence": 4}
    assert set(points(rows["blank"]).values()) == {0}
    assert all(row["failed"] == "It is not written yet." for row in rows["blank"].values())
    assert "solved: 80 of 80 points" in done.stdout and "stray.zip is not a folder" in done.stdout


@pytest.mark.stress
def test_a_function_that_hangs_costs_its_own_points_only(graded):
    _, rows, _ = graded
    assert rows["hangs"]["group_advantages"]["failed"] == "It took more than 5 seconds."
    assert points(rows["hangs"]) == FULL | {"group_advantages": 0}


@pytest.mark.stress
def test_a_file_that_is_missing_costs_its_own_functions_and_those_that_import_it(graded):
    _, rows, _ = graded
    assert "cannot be read: there must be one" in rows["half"]["fence"]["failed"]
    assert "No module named 'judge_prompts'" in rows["half"]["pass_at_k"]["failed"]


@pytest.mark.stress
@pytest.mark.parametrize("name", MISTAKES)
def test_a_student_reads_what_to_change(graded, name):
    _, rows, _ = graded
    assert re.search(MISTAKES[name][1], rows[name]["fence"]["failed"])


@pytest.mark.stress
def test_the_tables_and_the_feedback_agree(graded):
    _, rows, folder = graded
    text = (folder / "out" / "totals.csv").read_bytes()
    assert text.startswith(b"\xef\xbb\xbf")  # for spreadsheets
    totals = {r["student"]: r for r in csv.DictReader(text.decode("utf-8-sig").splitlines())}
    assert set(totals) == set(rows)
    for student, of_student in rows.items():
        expected = points(of_student)
        assert {name: int(totals[student][name]) for name in expected} == expected
        assert int(totals[student]["total"]) == sum(expected.values())
        feedback = (folder / "out" / "feedback" / f"{student}.txt").read_text()
        due = sum(FULL[name] for name in expected)
        assert feedback.startswith(f"{student}: {sum(expected.values())} of {due} points\n")
        assert all(row["failed"] in feedback for row in of_student.values())
    assert len({row["seed"] for of in rows.values() for row in of.values()}) == 3  # random seeds


@pytest.mark.stress
def test_a_class_of_wrong_functions_gets_points_for_the_others(bwrap, tmp_path):
    wrong = mutants.write_class(tmp_path / "class", n_students=4)
    rows = grade_here([tmp_path / "class" / name for name in wrong], tmp_path / "out")
    for student, functions in wrong.items():
        lost = {*functions, *({"token_logprobs"} if "completion_logits" in functions else ())}
        assert points(rows[student]) == FULL | dict.fromkeys(lost, 0)


# ---- Attacks -------------------------------------------------------------------------------------
class Listener:
    """Listens on a TCP port, a UNIX socket and an abstract one, and counts who connects."""

    def __init__(self, path):
        addresses = [("127.0.0.1", 0), str(path), "\0exprl-attack"]
        families = [socket.AF_INET, socket.AF_UNIX, socket.AF_UNIX]
        self.servers = [socket.socket(family) for family in families]
        self.connections = 0
        for server, address in zip(self.servers, addresses, strict=True):
            server.bind(address)
            server.listen()
            threading.Thread(target=self.count, args=[server], daemon=True).start()

    def count(self, server):
        while True:
            server.accept()
            self.connections += 1


def processes_with(word):
    """Return the command lines of all processes that contain a word."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes())
        except OSError:
            continue
    return [line for line in lines if word in line]


@pytest.fixture(scope="module")
def attacked(bwrap, handed_out, tmp_path_factory):
    """One run over all attacks, with an honest submission before, between and after them."""
    world = tmp_path_factory.mktemp("attacked")
    folder = world / "class"
    honest = [solve(handed_out, folder / name) for name in ("a first", "m middle", "z last")]
    classmate, stain = honest[2] / "judge_prompts.py", world / "stained"
    listener, out = Listener(world / "s"), world / "out"
    packages = Path(sys.prefix) / "lib"
    words = {
        "SOLVED": str(ROOT / "judge_prompts.py"), "CLASSMATE": str(classmate),
        "STAIN": str(stain), "PACKAGES": str(packages), "SOCKET": str(world / "s"),
        "PORT": listener.servers[0].getsockname()[1], "GRADER": os.getpid(),
    }  # fmt: skip
    names = []
    for name, code in attacks.CODE.items():
        copy = shutil.copytree(
            handed_out, folder / f"attack {len(names):02} {name.replace('/', ' ')}"
        )
        for word, value in words.items():
            code = re.sub(rf"\b{word}\b", lambda _, value=value: repr(value), code)
        with (copy / "judge_prompts.py").open("a") as file:
            file.write(f"\n{code}")
        names.append(copy)
    for name, attack in attacks.FOLDERS.items():
        copy = shutil.copytree(handed_out, folder / name)
        attack(copy, classmate)
        names.append(copy)
    before = {path: path.read_bytes() for path in (classmate, ROOT / "judge_prompts.py")}
    folders = [honest[0], *names[:20], honest[1], *names[20:], honest[2]]
    began = time.monotonic()
    done, rows = run_grader(
        folders, out, "--only", "parse_score", "fence", "--seconds", "4", "--jobs", "2",
        OPENAI_API_KEY="sk-secret-of-the-teacher",
    )  # fmt: skip
    seconds = time.monotonic() - began
    return SimpleNamespace(**locals())


@pytest.mark.stress
def test_no_attack_gets_points_and_honest_submissions_keep_theirs(attacked):
    rows = attacked.rows
    assert len(attacks.CODE) + len(attacks.FOLDERS) >= 30
    assert len(rows) == len(attacked.folders)
    for path in attacked.folders:
        row = rows[grading.cell(path.name)]
        due = 11 if path in attacked.honest else 0
        assert sum(points(row).values()) == due, (path.name, row)


@pytest.mark.stress
def test_no_attack_leaves_a_trace(attacked):
    assert attacked.listener.connections == 0
    assert not attacked.stain.exists()
    assert not list(attacked.packages.glob("**/stained*"))
    assert not processes_with(b"# a daemon") and not processes_with(b"runner.py")
    for path, content in attacked.before.items():
        assert path.read_bytes() == content


@pytest.mark.stress
def test_no_attack_reaches_what_the_teacher_opens(attacked):
    files = [path for path in attacked.out.rglob("*") if path.is_file()]
    assert len(files) > len(attacked.folders)
    for path in files:
        text = path.read_text(encoding="utf-8-sig")
        assert "sk-secret" not in text and "root:x:0" not in text
        assert not set(text.replace("\n", "")) - set(filter(str.isprintable, text))
    for of_student in attacked.rows.values():
        for row in of_student.values():
            assert len(row["failed"]) < 2000
            assert not any(value.lstrip().startswith(tuple("=+-@")) for value in row.values())


@pytest.mark.stress
def test_the_time_of_an_attack_is_bounded(attacked):
    """No attack takes more than two functions of 4 seconds, and three starts of the sandbox."""
    assert attacked.seconds < 20 * len(attacked.folders)


@pytest.mark.parametrize(
    "data",
    [
        {"other": 3},
        {"tensor": [1], "type": "no", "grad": False},
        {"tensor": [1], "type": "load", "grad": False},
        {"tensor": "text", "type": "torch.LongTensor", "grad": False},
        {"tensor": {"dict": {}}, "type": "torch.LongTensor", "grad": False},
        {"tensor": [[1], [2, 3]], "type": "torch.LongTensor", "grad": False},
        {"tensor": [10**400], "type": "torch.LongTensor", "grad": False},
        {"tensor": [[[[[[[1]]]]]]], "type": "torch.LongTensor", "grad": False},
        {"dict": [[[], 1]]},
        {"model": ["GPT-2", 0], "training": False},
        [[[[[[[1]]]]]]],
    ],
)
def test_data_that_no_honest_process_sends_is_refused(data):
    with pytest.raises(
        (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError)
    ):
        runner.decode(data)


@pytest.mark.parametrize("name", NAMES)
def test_recorded_answers_are_worth_nothing(name):
    """Each function has random arguments: the answers for one seed do not pass for another."""
    answers, ours = {}, version(name)

    def key(request):
        return json.dumps([request["args"], request["gradients"]])

    def record(request):
        return answers.setdefault(key(request), ours.ask(request))

    first = Graded(record, "mutant", name, seed=1)
    assert first_failure(first, PROPERTIES[name]) == ""

    def replay(request):
        unknown = {"out": next(iter(answers.values())).get("out"), "args": request["args"]}
        return answers.get(key(request), unknown)

    assert first_failure(Graded(replay, "mutant", name, seed=1), PROPERTIES[name]) == ""
    assert first_failure(Graded(replay, "mutant", name, seed=2), PROPERTIES[name])


def test_without_bwrap_the_grader_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match=r"package bubblewrap.*--no-sandbox.*docker") as stopped:
        assignment.main(["grade", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "\n" not in str(stopped.value)


def test_no_sandbox_where_submissions_could_read_the_solution(monkeypatch):
    monkeypatch.setattr(sandbox, "VISIBLE", {ROOT})
    monkeypatch.setattr(sandbox.shutil, "which", lambda name: name)
    assert "every submission can read" in sandbox.why_no_sandbox([])


def test_a_second_run_continues_and_no_row_is_lost(tmp_path, monkeypatch, capsys):
    """A failure of the grader is not a row: the next run tries again."""
    graded = []

    def grade_submission(student, folder, functions, args):
        graded.append((student, len(functions)))
        if student == "b" and len(graded) < 3:
            raise RuntimeError("the sandbox does not start")
        return [[student, args.seed, f.name, 0, f.points, "wrong"] for f in functions]

    monkeypatch.setattr(grading, "grade_submission", grade_submission)
    monkeypatch.setattr(grading, "why_no_sandbox", lambda folders: "")
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
    a, b, c, out = (str(tmp_path / name) for name in ("a", "b", "c", "out"))
    assignment.main(["grade", a, b, "--out", out, "--jobs", "1", "--only", "fence"])
    assert "b is not graded: RuntimeError" in capsys.readouterr().out
    assignment.main(["grade", b, c, a, "--out", out, "--jobs", "1", "--only", "fence"])
    assert "skipped: a is in" in capsys.readouterr().out
    assignment.main(["grade", a, "--out", out, "--only", "fence", "pass_at_k"])
    assert graded == [("a", 1), ("b", 1), ("b", 1), ("c", 1), ("a", 1)]
    totals = (tmp_path / "out" / "totals.csv").read_text(encoding="utf-8-sig").splitlines()
    assert totals == [
        '"student","total","fence","pass_at_k"', '"a","0","0","0"', '"b","0","0",""',
        '"c","0","0",""',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "due"),
    [
        ("Ada", "Ada"),
        ("=1+1", "'=1+1"),
        (" ＝1", "' ＝1"),
        ("-x", "'-x"),
        ("a\nb\x1b[2J\u202e", r"a\xab\x1b[2J\x202e"),
    ],
)
def test_cells_are_harmless(text, due):
    assert grading.cell(text) == due


def test_grader_and_sandbox_are_small():
    """The docstrings of these files and the inputs in properties.py and models.py do not count."""
    files = ["assignment.py", "grading.py", "sandbox.py", "runner.py"]
    assert sum(measure(f"tests/course/{name}")[0] for name in files) <= 3000


# ---- The grader is graded ------------------------------------------------------------------------
def version(name: str, *change: str) -> Graded:
    """A function as it is, or with one edit (old, new), or from a source of its own."""
    function = getattr(MODULES[FILES[name]], name)
    source = inspect.getsource(function)
    if len(change) == 2:
        n = source.count(change[0])
        assert n == 1, f"{name} contains {change[0]!r} {n} times: change the mutant"
        source = source.replace(*change)
    elif change:
        [source] = change
    names = dict(function.__globals__)
    exec(compile(source, f"<{name}>", "exec"), names)
    module = SimpleNamespace(**{name: names[name]})

    def ask(request: dict) -> dict:
        sys.modules["mutant"] = module
        reply = json.loads(json.dumps(runner.perform(request)))
        return reply if "error" in reply else reply | {"out": runner.decode(reply["out"])}

    return Graded(ask, "mutant", name, seed=0)


def test_each_graded_function_has_its_mutants_and_its_correct_variants():
    assert list(mutants.MUTANTS) == list(mutants.CORRECT) == list(PROPERTIES) == NAMES
    for name in NAMES:
        assert len(mutants.MUTANTS[name]) >= 8 and len(mutants.CORRECT[name]) == 3
        bodies = [mutant[-2:] for mutant in mutants.MUTANTS[name]]
        assert len(set(bodies)) == len(bodies)


@pytest.mark.parametrize("name", NAMES)
def test_our_own_function_has_every_property(name):
    assert first_failure(version(name), PROPERTIES[name]) == ""


@pytest.mark.parametrize(
    ("name", "change"),
    [
        pytest.param(name, change, id=f"{name}-{what}")
        for name in NAMES
        for what, *change in mutants.MUTANTS[name]
    ],
)
def test_a_wrong_version_lacks_a_property(name, change):
    """And the student reads what is due, what came, and for which input."""
    words = first_failure(version(name, *change), PROPERTIES[name])
    assert re.search(r"\. Expected .+, but got .+, for .+\.$", words), words


@pytest.mark.parametrize(
    ("name", "i"), [(name, i) for name in NAMES for i in range(len(mutants.CORRECT[name]))]
)
def test_another_correct_version_has_every_property(name, i):
    f = version(name, mutants.CORRECT[name][i])
    assert first_failure(f, PROPERTIES[name]) == ""


@pytest.mark.parametrize("name", NAMES)
def test_a_function_that_returns_nothing_fails_each_property(name):
    source = inspect.getsource(getattr(MODULES[FILES[name]], name))
    head = source[: source.index(":\n") + 2]
    for check in PROPERTIES[name]:
        assert check.__doc__.strip().endswith(".")
        with pytest.raises((Failed, AttributeError, TypeError)):
            check(version(name, f"{head}    return None\n"))
