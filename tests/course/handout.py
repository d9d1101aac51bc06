"""The assignment: what is graded, and the folder to hand out (assignment.py make)."""

import ast
from dataclasses import dataclass
from pathlib import Path

from jinja2 import StrictUndefined, Template

COURSE = Path(__file__).resolve().parent
ROOT = COURSE.parents[1]
HANDED_OUT = [
    "exprl.py",
    "judge_prompts.py",
    "requirements.txt",
    "train_small.sh",
    "tests/setup.sh",
    "tests/course/test_public.py",
    "tests/tools/attempts.py",
    "tests/tools/baselines.py",
    "tests/tools/calibrate.py",
    "tests/tools/evaluate.py",
    "tests/tools/program_judge.py",
    "tests/tools/quotes.py",
    "tests/tools/report.py",
    "tests/tools/value_judge.py",
    "tests/toy/compare.py",
    "tests/toy/toy_world.py",
    "tests/toy/words_world.py",
]


@dataclass(frozen=True)
class Function:
    """A graded function, its points, and the file that contains it."""

    name: str
    points: int
    file: str = "exprl.py"


PROBLEMS = {
    "Which tokens count, and how likely they were": [
        Function("completion_mask", 6),
        Function("completion_logits", 6),
        Function("token_logprobs", 6),
    ],
    "A judge that cannot be talked into a 5": [
        Function("parse_score", 7, "judge_prompts.py"),
        Function("fence", 4, "judge_prompts.py"),
        Function("judge_messages", 4, "judge_prompts.py"),
    ],
    "Steps and their advantages": [
        Function("split_steps", 8, "judge_prompts.py"),
        Function("step_advantages", 8),
    ],
    "Group advantages, and failures of the judge": [Function("group_advantages", 10)],
    "The clipped loss and the KL": [
        Function("policy_loss", 8),
        Function("kl_to_initial", 4),
        Function("reverse_kl", 4, "tests/tools/baselines.py"),
    ],
    "pass@k": [Function("pass_at_k", 5, "tests/tools/evaluate.py")],
}
FUNCTIONS = [function for functions in PROBLEMS.values() for function in functions]


def stop(message: str) -> None:
    """End the program with one line that says what is wrong and what to do."""
    raise SystemExit(f"assignment: {message}")


def chosen(only: list[str]) -> list[Function]:
    """Return the graded functions of these names, or all of them. Stops at an unknown name."""
    names = [function.name for function in FUNCTIONS]
    if unknown := [name for name in only if name not in names]:
        stop(f"no graded function is called {' or '.join(unknown)}: choose from {', '.join(names)}")
    return [function for function in FUNCTIONS if not only or function.name in only]


def find_functions(source: str) -> dict[str, ast.FunctionDef]:
    """Return the functions of a module, by name."""
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def blank(source: str, names: list[str]) -> str:
    """Return the source without the bodies of these functions. Signatures and docstrings stay."""
    lines, nodes = source.splitlines(keepends=True), find_functions(source)
    for node in sorted((nodes[name] for name in names), key=lambda node: -node.lineno):
        lines[node.body[0].end_lineno : node.end_lineno] = ["    raise NotImplementedError\n"]
    return "".join(lines)


def make(folder: str, only: list[str]) -> None:
    """Write a folder to hand out."""
    functions, out = chosen(only), Path(folder)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        stop(f"{out} exists and is not empty: give a new folder, so that nobody's work is lost")
    for name in HANDED_OUT:
        source = (ROOT / name).read_text(encoding="utf-8")
        if names := [function.name for function in functions if function.file == name]:
            source = blank(source, names)
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(source, encoding="utf-8")
    lines = {}
    for function in functions:
        node = find_functions((out / function.file).read_text(encoding="utf-8"))[function.name]
        lines[function.name] = f"{function.file}:{node.lineno}"
    problems = [
        (title, part)
        for title, all_of_it in PROBLEMS.items()
        if (part := [function for function in all_of_it if function in functions])
    ]
    template = Template(
        (COURSE / "assignment.md").read_text(encoding="utf-8"),
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    points = sum(function.points for function in functions)
    files = sorted({f"`{function.file}`" for function in FUNCTIONS})
    page = template.render(problems=problems, lines=lines, points=points, files=files)
    (out / "README.md").write_text(page, encoding="utf-8")
    print(f"{out}: {len(functions)} functions to write, {points} points")
    flags = " ".join(["--only", *only]) if only else ""
    print(f"grade the submissions: python tests/course/assignment.py grade FOLDER ... {flags}")
