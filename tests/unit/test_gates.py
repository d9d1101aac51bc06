"""Gates of the project's own: the size of the two files, their imports, and the top level."""

import ast
import io
import subprocess
import tokenize

import pytest
from conftest import ROOT, TESTS

COUNTED = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
HAVE_DOCSTRINGS = (ast.Module, ast.ClassDef, ast.FunctionDef)


def measure(name):
    """Return (program tokens, lines of code). Docstrings, comments and blank lines are free."""
    source = (ROOT / name).read_text()
    is_free = set()  # the lines of docstrings
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, HAVE_DOCSTRINGS) and ast.get_docstring(node) is not None:
            is_free |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    tokens, lines = 0, set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in COUNTED and token.start[0] not in is_free:
            tokens += 1
            lines |= {*range(token.start[0], token.end[0] + 1)}
    return tokens, len(lines)


def imports(name):
    """Return the first parts of the names of all modules that a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def test_exprl_is_short_and_not_dense():
    tokens, lines = measure("exprl.py")
    assert tokens <= 5500
    assert tokens / lines <= 9.0


def test_judge_prompts_is_short():
    assert measure("judge_prompts.py")[0] <= 900


def test_judge_prompts_is_texts_in_and_texts_out():
    heavy = {"torch", "openai", "threading", "transformers", "datasets", "concurrent", "exprl"}
    assert not imports("judge_prompts.py") & heavy


@pytest.mark.parametrize("name", ["exprl.py", "judge_prompts.py"])
def test_neither_file_imports_anything_under_tests(name):
    under_tests = {path.stem for path in TESTS.rglob("*.py")}
    assert not imports(name) & {*under_tests, "tests", "importlib", "runpy"}


def test_the_top_level_is_fixed():
    command = ["git", "ls-files"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("this copy of the project is not a git repository")
    top = {path.split("/")[0] for path in done.stdout.splitlines()}
    visible = {name for name in top if not name.startswith(".")}
    files = {"exprl.py", "judge_prompts.py", "train_small.sh", "requirements.txt", "README.md"}
    assert visible == files | {"tests"}
