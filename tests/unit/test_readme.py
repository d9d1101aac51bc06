"""Facts on the pages: commands parse, links and names lead somewhere, and numbers are computed."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, TESTS, read
from transformers import HfArgumentParser

import exprl

README = ROOT / "README.md"
FAULTS = TESTS / "docs" / "faults.md"
PATHS = [README, *sorted({*TESTS.rglob("*.md")} - {TESTS / "course" / "assignment.md"})]
PAGES = {path: path.read_text() for path in PATHS}
SCRIPT = (ROOT / "train_small.sh").read_text()
OTHERS = ("vllm ", "ollama ", "OLLAMA_", "llama-server ", "transformers ", "trl ", "source ", "rm ")
OTHERS += ("accelerate config", "export ", "python -c ")  # commands that are not ours
OTHER_FLAGS = {"--multi_gpu", "--num_processes", "--max-model-len", "--index-url"}


# ---- Commands ------------------------------------------------------------------------------------
def find_commands(text):
    """Return what looks like a command on a page: lines of blocks, and code between backquotes."""
    found = []
    pattern = r"^ *```\n(.*?)^ *```$|`([^`\n]+)`"
    for block, inline in re.findall(pattern, text, re.DOTALL | re.MULTILINE):
        for line in map(str.strip, (block or inline).split("\n")):
            if re.match(r"(\w+=\S* *)*(python|bash|accelerate|pip) |[A-Z]\w*=", line):
                found.append(line)
    return found


COMMANDS = sorted({command for text in PAGES.values() for command in find_commands(text)})
COMMANDS += find_commands(f"```\n{exprl.__doc__}```\n")


class Parsed(BaseException):
    """Raised where a program has parsed its flags, so that it does nothing else."""


def check_flags(monkeypatch, program, arguments):
    """Start a program with these arguments, in this process, until it has parsed them.

    A wrong flag, choice or subcommand ends the program with a SystemExit of status 2.
    """

    def stop_after(original):
        def parse(*args, **kwargs):
            original(*args, **kwargs)
            raise Parsed

        return parse

    monkeypatch.chdir(ROOT)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "path", [str((ROOT / program).parent), *sys.path])
        patch.setattr(sys, "argv", [program, *arguments])
        for parser, name in (
            (argparse.ArgumentParser, "parse_args"),
            (HfArgumentParser, "parse_args_into_dataclasses"),
        ):
            patch.setattr(parser, name, stop_after(getattr(parser, name)))
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        except Parsed:
            return
        except SystemExit as end:
            assert end.code in (0, None) and "--help" in arguments, (program, arguments, end)
            return
    raise AssertionError(f"{program} never parsed its flags")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_a_page_parses(command, monkeypatch):
    if command.startswith(OTHERS):
        pytest.skip("not a program of ours")
    words = shlex.split(command, comments=True)
    while re.fullmatch(r"[A-Z]\w*=.*", words[0], re.DOTALL):  # VARIABLE=value before the command
        variable, words = words[0].split("=")[0], words[1:]
        assert re.search(rf"\$\{{{variable}\b", SCRIPT), f"train_small.sh does not use {variable}"
    if words[0] == "pip":
        files = [words[i + 1] for i, word in enumerate(words) if word == "-r"]
        assert all((ROOT / file).exists() for file in files), files
        return
    if words[0] == "accelerate":
        pytest.importorskip("trl")
        words = words[words.index("2") :]
    script, arguments = words[1], [word for word in words[2:] if word != "&"]
    assert (ROOT / script).exists(), script
    if script.endswith(".sh"):
        known = {
            "train_small.sh": ["compare", "words", "Qwen2.5-0.5B"],
            "tests/run.sh": ["--stress"],
        }
        assert arguments == [] or arguments[0] in known[script]
        return
    check_flags(monkeypatch, script, arguments)


def test_the_pages_have_their_commands():
    """The pattern that finds commands still finds them."""
    programs = {word for command in COMMANDS for word in command.split() if word.endswith(".py")}
    assert {"exprl.py", "tests/tools/evaluate.py", "tests/tools/report.py"} <= programs
    assert len(COMMANDS) > 20


def test_flags_that_the_pages_name_exist():
    flags = set(OTHER_FLAGS)
    for path in [ROOT / "exprl.py", *TESTS.rglob("*.py")]:
        source = path.read_text()
        fields = re.findall(r"^    (\w+): .*= option\(", source, re.MULTILINE)
        flags |= {f"--{name.replace('_', '-')}" for name in fields}
        flags |= set(re.findall(r'"(--[\w-]+)"', source))
    named = set()
    for page in {*PAGES} - {FAULTS}:  # that page shows wrong flags on purpose
        for code in re.findall(r"`([^`\n]+)`", PAGES[page]):
            if not code.startswith(OTHERS):
                named |= set(re.findall(r"(?<!\S)--[\w-]+", code))
    assert len(named) > 20 and named <= flags, named - flags


def test_shell_scripts_have_no_syntax_error():
    for path in [ROOT / "train_small.sh", *TESTS.glob("*.sh")]:
        subprocess.run(["bash", "-n", path], check=True)


# ---- Links, files and names ----------------------------------------------------------------------
def headings(text):
    """Return the anchors that GitHub gives to the headings of a page."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target.read_text()), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_names_of_a_page_exist(page):
    text = PAGES[page]
    for name in re.findall(r"`((?:tests/)?[\w/]+\.(?:py|sh))`", text):
        folders = [ROOT, page.parent, *TESTS.iterdir()]
        assert any((folder / name).exists() for folder in folders), name
    for name, file in re.findall(r"\[`(\w+)`\]\(([\w/.]+\.py)\)", text):
        source = (page.parent / file).read_text()
        assert re.search(rf"^(def|class) {name}\b|^{name} = ", source, re.MULTILINE), name


def test_commands_in_docstrings_name_files_that_exist():
    for path in [ROOT / "exprl.py", ROOT / "judge_prompts.py", *TESTS.rglob("*.py")]:
        for name in re.findall(r"^ *(?:python|bash) ([\w/]+\.(?:py|sh))", path.read_text(), re.M):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_has_no_path_of_one_machine(page):
    assert not re.search(r"(?<![\w.])/(work|tmp|home|root|Users|mnt)/", PAGES[page])


def keys_of(page, heading):
    """Return what stands between backquotes in the first column of the table under a heading."""
    part = PAGES[page].split(f"## {heading}\n")[1].split("\n## ")[0]
    first = re.findall(r"^\| (`.*?) \|", part, re.MULTILINE)
    return {name for cell in first for name in re.findall(r"`([^`]+)`", cell)}


def test_a_run_writes_what_its_page_says(train, tmp_path):
    run = train(tmp_path / "runs" / "run")
    page = TESTS / "docs" / "outputs.md"
    files = {f"{path.name}{'/' * path.is_dir()}" for path in run.iterdir()}
    assert keys_of(page, "The folder of a run") - {"runs/NAME/"} == files
    assert (run.parent / "judge_cache.jsonl").exists()
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        assert keys_of(page, name) == {*read(run / name)[0]}


# ---- Numbers -------------------------------------------------------------------------------------
def test_the_worked_example_is_what_the_functions_give():
    text = README.read_text()
    pattern = r"^\| ([ab])\d \| .*? \| (\d) \| (\S+) \| .*? \| (\S+) \|"
    rows = re.findall(pattern, text, re.MULTILINE)
    assert len(rows) == 4
    rewards = [[(int(k) - 1) / 4 for name, k, *_ in rows if name == c] for c in "ab"]
    assert rewards == [[float(s) for name, _, s, _ in rows if name == c] for c in "ab"]
    given = [[float(a) for name, *_, a in rows if name == c] for c in "ab"]
    assert exprl.step_advantages(rewards, "delta") == given
    a, b = exprl.group_advantages([(5 - 1) / 4, (2 - 1) / 4])  # the scores of Outcome in the text
    assert f"{a:+.2f}".replace("0.", ".") in text and f"{b:+.2f}".replace("0.", ".") in text


MODELS = {  # parameters, layers, width, MLP width, key-value heads x their width, vocabulary
    "SmolLM2-135M": (134.5e6, 30, 576, 1536, 192, 49152),
    "Qwen2.5-0.5B": (494e6, 24, 896, 4864, 128, 151936),
    "Qwen2.5-1.5B": (1.54e9, 28, 1536, 8960, 256, 151936),
    "Qwen2.5-3B": (3.09e9, 36, 2048, 11008, 256, 151936),
}


def memory(N, L, h, f, k, V, B, T, P=200, S=64):
    """Return the peak in GB by the formula of tests/docs/gpu.md."""
    forward = L * ((P + B * T) * (34 * h + 8 * f) + B * (P + T) * (8 * k + 2 * T))
    forward += T * V * (6 * B + 8)
    backward = 2 * N + L * P * (34 * h + 8 * f)
    training = 22 * N + max(forward, backward)
    sampling = 18 * N + S * (8 * L * k * (P + T) + 28 * V)
    return max(training, sampling) / 1e9


@pytest.mark.parametrize("name", MODELS)
def test_the_memory_table_is_what_the_formula_gives(name):
    cells = []
    for T in (512, 1024, 2048):
        four, one = (memory(*MODELS[name], B, T) for B in (4, 1))
        cells.append(f"{four:.1f} / {one:.1f}")
    assert f"| {name} | {' | '.join(cells)} |" in PAGES[TESTS / "docs" / "gpu.md"]


def test_the_number_of_judge_calls_follows_from_the_defaults():
    training = exprl.TrainingSettings(model="any")
    problems = training.iterations * training.prompts_per_iteration
    calls = problems * (training.group_size + 1)
    assert f"{calls:,}" in PAGES[TESTS / "docs" / "judges.md"]
    assert f"{calls:,}" in PAGES[README]
    assert exprl.JudgeSettings().judge_model in PAGES[README]


def test_the_results_of_the_readme_stand_in_the_tables_of_the_experiments():
    results = PAGES[README].split("## Results\n")[1].split("\n## ")[0]
    numbers = re.findall(r"(\d+\.\d)%\s+(\[\d+\.\d, \d+\.\d\])", results)
    assert len(numbers) >= 3
    tables = PAGES[TESTS / "docs" / "comparison.md"] + PAGES[TESTS / "docs" / "words.md"]
    for mean, interval in numbers:
        assert f"| {mean} {interval} |" in tables


def test_the_readme_names_the_required_version_of_torch():
    [package] = re.findall(r"pip install (torch==\S+)", PAGES[README])
    assert package in (ROOT / "requirements.txt").read_text().split()
