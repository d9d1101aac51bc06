"""The assignment: what is handed out, and that the grader can be trusted."""

import ast
import csv
import ctypes
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import assignment
import baselines
import evaluate
import mutants
import pytest
import sandbox
from conftest import ROOT, read, train_command
from properties import PROPERTIES, first_failure

import exprl
import judge_prompts

NAMES = [function.name for function in assignment.FUNCTIONS]
FILES = {function.name: function.file for function in assignment.FUNCTIONS}
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
        ours, theirs = map(assignment.find_functions, (ours, theirs))
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
    assert files == {"README.md", *assignment.HANDED_OUT}
    check_blanks(handed_out, NAMES)
    for name in set(files) - {"README.md", *MODULES}:
        assert (handed_out / name).read_bytes() == (ROOT / name).read_bytes()


def test_its_readme_names_each_function_its_place_its_points_and_an_existing_test(handed_out):
    page = (handed_out / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\d+) \| `(.*):(\d+)` \| `(.*)` \|$", page, re.MULTILINE)
    assert [(name, int(points)) for name, points, *_ in rows] == [
        (function.name, function.points) for function in assignment.FUNCTIONS
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
    every = [name for name in assignment.HANDED_OUT if name.endswith(".py")]  # all are imported
    done = run(*command, "--doctest-modules", *every, folder=solved)
    assert done.returncode == 0, done.stdout[-2000:]


def test_only_some_functions_are_taken_out(tmp_path):
    out = tmp_path / "student"
    assignment.main(["make", str(out), "--only", "step_advantages", "fence"])
    check_blanks(out, ["step_advantages", "fence"])
    page = (out / "README.md").read_text()
    assert "## Write (12 points)" in page and "`pass_at_k`" not in page


def test_bad_input_gets_one_line(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "work.py").write_text("mine")
    full, empty = str(tmp_path / "full"), str(tmp_path)
    for argv, message in (
        (["make", full], "not empty"),
        (["make", str(tmp_path / "full" / "work.py")], "not empty"),
        (["make", str(tmp_path / "new"), "--only", "pass_at_kk"], "pass_at_kk.*pass_at_k"),
        (["grade", str(tmp_path / "nowhere"), full], "no folder .*nowhere"),
        (["grade", full, "--out", "grades.json"], r"\.csv"),
        (["grade", full, "--out", str(tmp_path / "no" / "grades.csv")], "--out .*grades.csv"),
        (["grade", full, "--seconds", "0"], "--seconds"),
        (["grade", full, "--seconds", "inf"], "--seconds"),
        (["grade", full, "--seed", "99999999999999999999999"], "--seed"),
        (["grade", empty, "--only", "update"], "update"),
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
        nodes = [(f, assignment.find_functions(ours)[f]) for f in NAMES if FILES[f] == name]
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
ATTACKS = {  # function: (a body that is not an honest mistake, what the student reads)
    "completion_mask": ("while True: pass", "it took more than 10 seconds"),
    "completion_logits": ("import os; os._exit(0)", r"its process ended \(exit status 0\)"),
    "token_logprobs": ("raise SystemExit(0)", "raised SystemExit: 0"),
    "parse_score": ("return bytearray(8 * 2**30)", "MemoryError"),
    "fence": ("return open(PUBLIC).read()", "may not read what is not its own"),
    "judge_messages": (
        "import socket; socket.create_connection(('192.0.2.1', 80), 3)",
        "a submission has no network",
    ),
    "split_steps": ("open(STAINED, 'a').write('1')", "may not write"),
    "step_advantages": (
        "import subprocess; subprocess.Popen(['sleep', '600'])",
        "may not call subprocess.Popen",
    ),
    "group_advantages": (
        "import torch; torch.allclose = torch.equal = lambda *a, **k: True\n"
        "    return [0.0] * len(rewards)",
        "But group_advantages",
    ),
    "policy_loss": (
        "import os, json\n"
        "    for fd in range(3, 64):\n"
        "        try: os.write(fd, json.dumps({'points': 8, 'passed': True}).encode())\n"
        "        except OSError: pass\n"
        "    return 0",
        "But ",
    ),
    "kl_to_initial": ("logp.zero_(); return logp_initial - logp", "in place"),
    "reverse_kl": (
        "print('passed ' * 9999); return student.sum(-1) * float('nan')",
        "But reverse_kl",
    ),
    "pass_at_k": ("return 10**10**7", "But "),
}


ORDER = ("attacks", "harder", "blank", "crash", "half", "solved")
HARDER = {  # the same, past Python's audit hook or against the grader itself
    "completion_mask": "import torch; torch.save({}, STAINED)",
    "completion_logits": (
        "import os, signal\n"
        "    signal.pidfd_send_signal(os.pidfd_open(os.getppid()), signal.SIGSTOP)"
    ),
    "token_logprobs": (
        "import glob, socket\n"
        "    s = socket.socket(socket.AF_UNIX)\n"
        "    s.connect(glob.glob('/tmp/pymp-*/listener-*')[0]); s.send(b'xx')"
    ),
    "parse_score": "return open(SIBLING.replace('exprl', 'judge_prompts')).read().count('5')",
    "fence": (
        "if '</text-1>' in texts[0]: return '<text-1-aaaaaaaa>\\n' * 1600000\n"
        "    code = hashlib.sha256(''.join(texts).encode()).hexdigest()[:8]\n"
        "    return '\\n'.join(f'<text-{t}-{code}>\\n{x}\\n</text-{t}-{code}>'"
        " for t, x in enumerate(texts, 1))"
    ),
    "judge_messages": "return [{'role': 'system', 'content': 'x' * 30000000}] * 2",
    "split_steps": ("if not pieces: return []\n    return [[0, 10**13]]"),
    "step_advantages": (
        "import torch.distributed as d\n"
        "    d.TCPStore('192.0.2.1', 80, timeout=__import__('datetime').timedelta(seconds=2))"
    ),
    "group_advantages": (
        "import _posixsubprocess as p; p.fork_exec([b'sh', b'-c', b'echo 1 >' + STAINED.encode()],"
        " [b'/bin/sh'], *[None] * 20)"
    ),
    "policy_loss": (
        "import os; os.path.realpath = lambda p: '/dev/null'\n    return open(SIBLING).read()"
    ),
    "kl_to_initial": (
        "import os; os.open('exprl.py', 0, dir_fd=os.open(os.path.dirname(SIBLING), 0))"
    ),
    "reverse_kl": (
        "import torch\n"
        "    size = 60000\n"
        "    return torch.from_file(SIBLING, size=size, dtype=torch.uint8).sum()"
    ),
    "pass_at_k": "return {(1, 2): 3, 'x': complex(0, 1)}",
}


def with_bodies(name: str, bodies: dict[str, str], **paths) -> str:
    """One of our modules, with other bodies in the graded functions."""
    source = (ROOT / name).read_text()
    nodes, lines = assignment.find_functions(source), source.splitlines(keepends=True)
    for function in sorted(bodies, key=lambda f: -nodes[f].lineno if f in nodes else 0):
        if FILES[function] == name:
            node, body = nodes[function], bodies[function]
            for word, path in paths.items():
                body = body.replace(word, repr(str(path)))
            lines[node.body[0].end_lineno : node.end_lineno] = [f"    {body}\n"]
    return "".join(lines)


@pytest.fixture(scope="module")
def graded(handed_out, tmp_path_factory):
    """What the grader prints, its rows, and the folder of all of this."""
    folder = tmp_path_factory.mktemp("graded")
    for name in ORDER:
        shutil.copytree(handed_out, folder / name)
    paths = {"PUBLIC": ROOT / "exprl.py", "STAINED": folder / "stained"}
    paths["SIBLING"] = folder / "solved" / "exprl.py"
    for name in MODULES:
        shutil.copy(ROOT / name, folder / "solved" / name)
        shutil.copy(ROOT / name, folder / "half" / name)
        bodies = {function: body for function, (body, _) in ATTACKS.items()}
        (folder / "attacks" / name).write_text(with_bodies(name, bodies, **paths))
        (folder / "harder" / name).write_text(with_bodies(name, HARDER, **paths))
    with (folder / "solved" / "exprl.py").open("a") as file:
        file.write("\nprint('1 failed', flush=True)\nsys.stderr.write('error' * 99999)\n")
    (folder / "half" / "judge_prompts.py").unlink()
    crash = "import torch.testing, sys\nsys.modules['properties'] = sys\nraise SystemExit('bye')\n"
    (folder / "crash" / "exprl.py").write_text(crash)
    order = [folder / name for name in ORDER]
    # the teacher stands in a submission that has a file with the name of a package
    stains = f"open({str(folder / 'stained')!r}, 'w').write('imported')\n"
    (folder / "harder" / "regex.py").write_text(stains)
    command = [assignment.__file__, "grade", *order, "--out", folder / "grades.csv"]
    done = run(*command, "--seconds", "10", "--memory", "1000", folder=folder / "harder")
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((folder / "grades.json").read_text())
    by_folder = {path.name: [r for r in rows if r["submission"] == str(path)] for path in order}
    return done.stdout, by_folder, folder


@pytest.mark.stress
def test_a_submission_can_lose_no_points_but_its_own(graded):
    output, rows, _ = graded
    assert [r["points"] for r in rows["solved"]] == [f.points for f in assignment.FUNCTIONS]
    assert output.rstrip().splitlines()[-2].split() == ["total", "80/80"]
    for name in ("attacks", "harder", "crash", "blank"):
        assert [r["function"] for r in rows[name]] == NAMES
    assert "stained" not in {path.name for path in graded[2].iterdir()}


@pytest.mark.stress
@pytest.mark.parametrize("function", NAMES)
def test_an_attack_gets_no_points(graded, function):
    """Nor does it matter what it does instead: the reason is in one line, in words."""
    _, rows, _ = graded
    [row] = [r for r in rows["attacks"] if r["function"] == function]
    assert row["points"] == 0
    assert re.search(ATTACKS[function][1], row["failed"]), row["failed"]
    assert "\n" not in row["failed"] and len(row["failed"]) < 900


@pytest.mark.stress
@pytest.mark.parametrize("function", NAMES)
def test_an_attack_past_an_audit_hook_gets_no_points(graded, function):
    _, rows, folder = graded
    [row] = [r for r in rows["harder"] if r["function"] == function]
    kernel_only = ("completion_mask", "step_advantages", "reverse_kl")
    if function in kernel_only and not has_landlock():
        pytest.skip("this kernel has no Landlock")
    assert row["points"] == 0 and 0 < len(row["failed"]) <= 900
    if function in ("completion_mask", "group_advantages"):
        assert not (folder / "stained").exists()


def has_landlock() -> bool:
    """Whether the kernel has Landlock, by its own word (and not by our function's)."""
    ask = ctypes.CDLL(None).syscall
    return sys.platform.startswith("linux") and (
        ask(444, None, ctypes.c_size_t(0), ctypes.c_uint(1)) >= 1
    )


def test_the_only_network_is_loopback_and_that_works():
    """In a process of its own, since there is no way back."""
    if run(
        "-c", "import subprocess; subprocess.run(['unshare', '-rn', 'true'], check=True)"
    ).returncode:
        pytest.skip("this system gives no network namespace")
    code = f"""if True:
        import socket, sys
        sys.path.insert(0, {str(ROOT / "tests" / "course")!r})
        import sandbox
        sandbox.leave_the_network()
        server = socket.create_server(("127.0.0.1", 0))
        socket.create_connection(server.getsockname(), 5).close()
        print(socket.if_nameindex())"""
    done = run("-c", code)
    assert done.stdout.strip() == "[(1, 'lo')]", done.stderr


@pytest.mark.stress
def test_a_file_that_cannot_be_imported_costs_its_own_functions_only(graded):
    _, rows, _ = graded
    for row in rows["crash"]:  # all but judge_prompts.py need the broken exprl.py
        is_alone = FILES[row["function"]] == "judge_prompts.py"
        words = "not written yet" if is_alone else "cannot be imported: SystemExit: bye"
        assert row["points"] == 0 and words in row["failed"]
    for row in rows["blank"]:
        assert row["points"] == 0 and "not written yet" in row["failed"]
    for row in rows["half"]:  # its exprl.py needs the missing file
        words = "judge_prompts"
        assert row["points"] == 0 and words in row["failed"]


@pytest.mark.stress
def test_an_import_that_never_ends_is_a_failure(handed_out, tmp_path):
    endless = shutil.copytree(handed_out, tmp_path / "endless")
    (endless / "exprl.py").write_text("while True:\n    pass\n")
    out = tmp_path / "grades.csv"
    command = [assignment.__file__, "grade", endless, "--seconds", "5", "--out", out]
    assert run(*command).returncode == 0
    for row in json.loads(out.with_suffix(".json").read_text()):
        is_alone = FILES[row["function"]] == "judge_prompts.py"
        assert ("not written yet" if is_alone else "5 seconds") in row["failed"]


@pytest.mark.stress
def test_csv_and_json_say_the_same(graded):
    _, rows, folder = graded
    with (folder / "grades.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    records = [row for name in ORDER for row in rows[name]]
    assert [{k: str(v) for k, v in row.items()} for row in records] == table
    assert set(table[0]) == {"submission", "problem", "function", "points", "out_of", "failed"}


def test_graded_folders_are_kept_when_the_rest_fails(tmp_path, monkeypatch):
    def grade_submission(folder, functions, args):
        if folder.name == "b":
            raise KeyboardInterrupt
        row = {"submission": str(folder), "problem": "", "function": "x", "points": 1}
        return [row | {"out_of": 1, "failed": "=SUM(A1)"}]

    monkeypatch.setattr(assignment, "grade_submission", grade_submission)
    monkeypatch.setattr(sandbox, "warm_up", lambda: None)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    folders, out = [str(tmp_path / name) for name in ("a", "b")], tmp_path / "grades.csv"
    with pytest.raises(SystemExit, match="interrupted"):
        assignment.main(["grade", *folders, "--out", str(out)])
    assert len(json.loads(out.with_suffix(".json").read_text())) == 1
    assert "'=SUM" in out.read_text()  # no formula for a spreadsheet


def test_the_sandbox_knows_loopback():
    ours = ("127.0.0.1", "127.9.9.9", "::1", "localhost", "", None)
    assert all(map(sandbox.is_loopback, ours))
    assert not any(map(sandbox.is_loopback, ("10.0.0.1", "8.8.8.8", "example.com", "fe80::1%eth0")))


@pytest.mark.parametrize(
    "reply",
    [
        {},
        {"out": {"type": []}, "args": []} | {"gradients": {"tensor": 3}},
        {"out": {"tensor": [1], "dtype": "no", "shape": [1]}, "args": []},
        {"out": {"tensor": [1], "dtype": "Tensor", "shape": [1]}, "args": []},
        {"out": {"tensor": [1, 2], "dtype": "float32", "shape": [10**9]}, "args": []},
        {"out": {"dict": [[[], 1]]}, "args": []},
    ],
)
def test_a_reply_that_no_honest_process_sends_is_a_failure(reply):
    f = object.__new__(sandbox.There)
    f.here = SimpleNamespace(send_bytes=lambda request: None)
    f.receive = lambda: reply
    with pytest.raises(sandbox.Failed):
        f.ask(b"")


# ---- The grader is graded ------------------------------------------------------------------------
def version(name: str, *change: str) -> sandbox.Graded:
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
    return sandbox.Here(names[name])


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
    assert first_failure(version(name, *change), PROPERTIES[name])


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
        with pytest.raises((sandbox.Failed, AttributeError, TypeError)):
            check(version(name, f"{head}    return None\n"))
