"""The project as an assignment: a folder to hand out, and a grader for what comes back.

    python tests/course/assignment.py make OUT [--only FUNCTION ...]
    python tests/course/assignment.py grade FOLDER ... [--out grades.csv] [--only FUNCTION ...]

`make` writes a folder with the project's code, public tests, the toy world, and a README of six
problems and two open questions. The bodies of the graded functions are missing from the code.
`grade` runs each graded function of each folder in a process of its own (sandbox.py) and checks its
properties (properties.py). A function gets its points only if it has all of them. Otherwise the
grader names the first property that it lacks, in a student's words.
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
    "tests/tools/quotes.py",
    "tests/tools/report.py",
    "tests/toy/compare.py",
    "tests/toy/toy_world.py",
]


@dataclass(frozen=True)
class Function:
    """A graded function, its points, and the module that contains it."""

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
        Function("parse_score", 7, "judge_prompts"),
        Function("fence", 4, "judge_prompts"),
        Function("judge_messages", 4, "judge_prompts"),
    ],
    "Steps and their advantages": [
        Function("split_steps", 8, "judge_prompts"),
        Function("step_advantages", 8),
    ],
    "Group advantages, and failures of the judge": [Function("group_advantages", 10)],
    "The clipped loss and the KL": [
        Function("policy_loss", 8),
        Function("kl_to_initial", 4),
        Function("reverse_kl", 4, "tests.tools.baselines"),
    ],
    "pass@k": [Function("pass_at_k", 5, "tests.tools.evaluate")],
}
FUNCTIONS = [function for functions in PROBLEMS.values() for function in functions]


def stop(message: str) -> None:
    """End the program with one line that says what is wrong and what to do."""
    raise SystemExit(f"assignment: {message}")


def chosen(only: list[str]) -> list[Function]:
    """The graded functions of these names, or all of them. Stops at an unknown name."""
    names = [function.name for function in FUNCTIONS]
    if unknown := [name for name in only if name not in names]:
        stop(f"no graded function is called {' or '.join(unknown)}: choose from {', '.join(names)}")
    return [function for function in FUNCTIONS if not only or function.name in only]


# --------------------------------------------------------------------------------------------------
# make


def find_functions(source: str) -> dict[str, ast.FunctionDef]:
    """The functions of a module, by name."""
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


def blank(source: str, names: list[str]) -> str:
    """The source without the bodies of these functions. Signatures and docstrings stay."""
    lines, nodes = source.splitlines(keepends=True), find_functions(source)
    for node in sorted((nodes[name] for name in names), key=lambda node: -node.lineno):
        lines[node.body[0].end_lineno : node.end_lineno] = ["    raise NotImplementedError\n"]
    return "".join(lines)


def make(args: argparse.Namespace) -> None:
    """Write a folder to hand out."""
    functions, out = chosen(args.only), Path(args.out)
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
    page = template.render(problems=problems, lines=lines, points=sum(f.points for f in functions))
    (out / "README.md").write_text(page, encoding="utf-8")
    print(f"{out}: {len(functions)} functions to write, {sum(f.points for f in functions)} points")
    only = " ".join(["--only", *args.only]) if args.only else ""
    print(
        f"grade what comes back: python tests/course/assignment.py grade FOLDER ... {only}".rstrip()
    )


# --------------------------------------------------------------------------------------------------
# grade


def grade_function(folder: Path, function: Function, args: argparse.Namespace) -> tuple:
    """Return what is wrong with a function, or "", and whether its file could be imported."""
    # These imports are not at the top, because a submission's process imports this file, and must
    # not contain the properties.
    from properties import PROPERTIES, first_failure
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
    """The text without characters that move the cursor or break a line."""
    return "".join(c if c.isprintable() else "?" for c in text)


def save(rows: list[dict], path: Path) -> None:
    """Write the rows as CSV and as JSON. An existing file stays until the new one is complete."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        # a spreadsheet reads a cell as a formula if it begins with one of these
        writer.writerows(
            {k: f"'{v}" if str(v)[:1] in set("=+-@\t") else v for k, v in row.items()}
            for row in rows
        )
    partial.replace(path)
    partial.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    partial.replace(path.with_suffix(".json"))


def grade(args: argparse.Namespace) -> None:
    """Grade folders. Prints a line for each function, and saves the rows after each folder."""
    functions, rows, out = chosen(args.only), [], Path(args.out)
    folders = list(map(Path, dict.fromkeys(args.folder)))  # each once
    if missing := [str(folder) for folder in folders if not folder.is_dir()]:
        stop(f"no folder {', '.join(missing)}")
    if args.out and out.suffix != ".csv":
        stop(f"--out {out}: give a name that ends with .csv (the JSON file gets the same name)")
    if args.out and (out.is_dir() or not os.access(out.resolve().parent, os.W_OK)):
        stop(f"--out {out}: no file can be written there")
    if not (0 < args.seconds <= 86400 and 0 < args.memory <= 10**6 and 0 <= args.seed < 2**63):
        stop("give --seconds above 0 and up to 86400, --memory up to 1000000, and --seed from 0")
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
    told = {"metavar": "FUNCTION", "help": "only these functions (default: all)"}
    only.add_argument("--only", nargs="+", action="extend", default=[], **told)
    sub = commands.add_parser("make", help="write a folder to hand out", parents=[only])
    sub.add_argument("out", help="the folder, which must be new or empty")
    sub = commands.add_parser("grade", help="grade the folders that come back", parents=[only])
    sub.add_argument("folder", nargs="+", help="a submission")
    sub.add_argument("--out", default="", help="CSV file for all rows; a JSON file is also written")
    sub.add_argument(
        "--seconds", type=float, default=20, help="time limit of a function (default: 20)"
    )
    sub.add_argument(
        "--memory", type=int, default=2000, help="limit of a function in MB (default: 2000)"
    )
    sub.add_argument("--seed", type=int, default=0, help="seed of the random inputs (default: 0)")
    args = parser.parse_args(argv)
    if hasattr(sys.stdout, "reconfigure"):  # names of folders may contain any character
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        make(args) if args.command == "make" else grade(args)
    except KeyboardInterrupt:
        stop("interrupted: the folders graded so far are in --out")
    except OSError as error:
        stop(str(error))


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(COURSE)]
    main()
