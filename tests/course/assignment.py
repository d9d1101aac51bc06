"""The project as an assignment: a folder to hand out, and a grader for what comes back.

    python tests/assignment.py make OUT [--only FUNCTION ...]
    python tests/assignment.py grade FOLDER [FOLDER ...] [--out grades.csv] [--only FUNCTION ...]

`make` writes the script with the bodies of the graded functions taken out, public tests, the toy
world, and a README of six problems and two open questions. `grade` puts each graded function of
each folder, in a process of its own (sandbox.py), to the test of what must be true of it
(properties.py): points only if all is true, and otherwise the first thing that is not, in a
student's words.
"""

import argparse
import ast
import csv
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from jinja2 import StrictUndefined, Template

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
HANDED_OUT = ["exprl.py", "judge_prompts.py", "requirements.txt", "train_small.sh"]
HANDED_OUT += [
    f"tests/{name}"
    for name in (
        "attempts.py",
        "baselines.py",
        "calibrate.py",
        "compare.py",
        "report.py",
        "setup.sh",
        "test_public.py",
        "toy_world.py",
    )
]


@dataclass(frozen=True)
class Function:
    """A graded function: the file that holds it, and its points."""

    name: str
    points: int
    module: str = "exprl"

    @property
    def file(self) -> str:
        return f"{self.module.replace('.', '/')}.py"


PROBLEMS = {
    "Which tokens count, and how likely they were": [
        Function("completion_mask", 6),
        Function("completion_logits", 6),
        Function("token_logprobs", 6),
    ],
    "A judge that cannot be talked into a 5": [
        Function("parse_score", 7),
        Function("fence", 4, "judge_prompts"),
        Function("judge_messages", 4, "judge_prompts"),
    ],
    "Steps and their advantages": [Function("split_steps", 8), Function("step_advantages", 8)],
    "Group advantages, and judgements that failed": [Function("group_advantages", 10)],
    "The clipped loss and the KL": [
        Function("policy_loss", 8),
        Function("kl_to_reference", 4),
        Function("reverse_kl", 4, "tests.baselines"),
    ],
    "pass@k": [Function("pass_at_k", 5)],
}
FUNCTIONS = [function for functions in PROBLEMS.values() for function in functions]


def stop(message: str) -> None:
    """End the program with one line that says what is wrong and what to do."""
    raise SystemExit(f"assignment: {message}")


def chosen(only: list[str]) -> list[Function]:
    """The functions of these names, or all; stops at a name that is none of theirs."""
    names = [function.name for function in FUNCTIONS]
    if unknown := [name for name in only if name not in names]:
        stop(f"no graded function is called {' or '.join(unknown)}: there are {', '.join(names)}")
    return [function for function in FUNCTIONS if not only or function.name in only]


# --------------------------------------------------------------------------------------------------
# make


def find_functions(source: str) -> dict[str, ast.FunctionDef]:
    """The functions of a module, by name."""
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def blank(source: str, names: list[str]) -> str:
    """The source with the bodies of these functions taken out; signature and docstring stay."""
    lines, nodes = source.splitlines(keepends=True), find_functions(source)
    for node in sorted((nodes[name] for name in names), key=lambda node: -node.lineno):
        lines[node.body[0].end_lineno : node.end_lineno] = ["    raise NotImplementedError\n"]
    return "".join(lines)


def make(args: argparse.Namespace) -> None:
    """Write a folder to hand out."""
    functions, out = chosen(args.only), Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        stop(f"{out} is there and not empty: give a new folder, so that nobody's work is lost")
    (out / "tests").mkdir(parents=True, exist_ok=True)
    for name in HANDED_OUT:
        source = (ROOT / name).read_text(encoding="utf-8")
        if names := [function.name for function in functions if function.file == name]:
            source = blank(source, names)
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
        (TESTS / "assignment.md").read_text(encoding="utf-8"),
        undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    page = template.render(problems=problems, lines=lines, points=sum(f.points for f in functions))
    (out / "README.md").write_text(page, encoding="utf-8")
    print(f"{out}: {len(functions)} functions to write, {sum(f.points for f in functions)} points")
    only = " ".join(["--only", *args.only]) if args.only else ""
    print(f"grade what comes back: python tests/assignment.py grade FOLDER ... {only}".rstrip())


# --------------------------------------------------------------------------------------------------
# grade


def grade_function(folder: Path, function: Function, args: argparse.Namespace) -> tuple:
    """(what is wrong with a function, or "", whether its file could be imported at all)."""
    from properties import PROPERTIES, first_failure  # not above: no submission may hold them
    from sandbox import Failed, There

    limits = (args.seconds, args.memory, args.seed)
    with There(folder, function.module, function.name, *limits) as f:
        try:
            f.load()
        except Failed as failure:
            return f"{function.file} cannot be imported: {failure}", False
        return first_failure(f, PROPERTIES[function.name]), True


def grade_submission(folder: Path, functions: list[Function], args) -> list[dict]:
    """A row for each function: submission, problem, function, points, out_of, failed."""
    rows, broken = [], {}  # broken: what is wrong with a file that cannot be imported
    for number, (title, all_of_it) in enumerate(PROBLEMS.items(), 1):
        for function in [function for function in all_of_it if function in functions]:
            failed = broken.get(function.module, "")
            if not failed and not (folder / function.file).is_file():
                failed = broken[function.module] = f"there is no {function.file} in the folder"
            if not failed:
                failed, is_imported = grade_function(folder, function, args)
                if not is_imported:
                    broken[function.module] = failed
            failed = printable(failed)[:900]
            row = {"submission": str(folder), "problem": f"{number} {title}"}
            row |= {"function": function.name, "points": 0 if failed else function.points}
            rows.append(row | {"out_of": function.points, "failed": failed})
    return rows


def printable(text: str) -> str:
    """The text without what would move the cursor, or break a line."""
    return "".join(c if c.isprintable() else "?" for c in text)


def save(rows: list[dict], path: Path) -> None:
    """The rows as CSV, and as JSON beside it; the file that is there stays until all is written."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        # a spreadsheet takes what begins with one of these for a formula
        writer.writerows(
            {k: f"'{v}" if str(v)[:1] in set("=+-@\t") else v for k, v in row.items()}
            for row in rows
        )
    partial.replace(path)
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    partial.replace(path.with_suffix(".json"))


def grade(args: argparse.Namespace) -> None:
    """Grade folders; prints a line for each function, and keeps the rows after each folder."""
    functions, rows, out = chosen(args.only), [], Path(args.out)
    folders = list(map(Path, dict.fromkeys(args.folder)))  # each once
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        stop(f"there is no folder {', '.join(missing)}")
    if args.out and out.suffix != ".csv":
        stop(f"--out {out}: give a name that ends with .csv; the JSON file is written beside it")
    if args.out and (out.is_dir() or not os.access(out.resolve().parent, os.W_OK)):
        stop(f"--out {out}: no file can be written there")
    if not (0 < args.seconds <= 86400 and 0 < args.memory <= 10**6 and 0 <= args.seed < 2**63):
        stop("--seconds is at most 86400, --memory 1000000 (MB); neither is 0, nor --seed below 0")
    from sandbox import warm_up

    warm_up()
    for folder in folders:
        print(printable(str(folder)), flush=True)
        graded = grade_submission(folder, functions, args)
        for row in graded:
            points = f"{row['points']}/{row['out_of']}"
            print(f"  {row['function']:18}{points:>6}  {row['failed']}".rstrip(), flush=True)
        total = f"{sum(r['points'] for r in graded)}/{sum(r['out_of'] for r in graded)}"
        print(f"  {'total':18}{total:>6}", flush=True)
        rows += graded
        if args.out:
            save(rows, out)
    if args.out:
        print(f"{out}, {out.with_suffix('.json')}: {len(rows)} rows")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    only = argparse.ArgumentParser(add_help=False)
    told = {"metavar": "FUNCTION", "help": "these functions only (default: all)"}
    only.add_argument("--only", nargs="+", action="extend", default=[], **told)
    sub = commands.add_parser("make", help="write a folder to hand out", parents=[only])
    sub.add_argument("out", help="the folder; it must be new or empty")
    sub = commands.add_parser("grade", help="grade the folders that come back", parents=[only])
    sub.add_argument("folder", nargs="+", help="a submission")
    sub.add_argument("--out", default="", help="CSV file of all rows; a JSON file beside it")
    sub.add_argument("--seconds", type=float, default=20, help="for a function (default: 20)")
    sub.add_argument("--memory", type=int, default=2000, help="MB for a function (default: 2000)")
    sub.add_argument("--seed", type=int, default=0, help="of the random inputs (default: 0)")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # names of folders may hold anything
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        make(args) if args.command == "make" else grade(args)
    except KeyboardInterrupt:
        stop("interrupted; what is graded is in --out")
    except OSError as error:
        stop(str(error))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(TESTS)]
    main()
