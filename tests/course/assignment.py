"""The project as an assignment: a folder to hand out, and a grader for the submissions.

    python tests/course/assignment.py make OUT [--only FUNCTION ...]
    python tests/course/assignment.py grade submissions/* --out grades [--only FUNCTION ...]

`make` writes the folder to hand out (handout.py). `grade` runs the graded functions of each
submission in a sandbox (sandbox.py) and checks their properties (properties.py). A function gets
its points only if it has all of them. Otherwise the grader names the first property that it lacks.
The folder `--out` contains totals.csv (a row per student), details.csv (a row per student and
function) and the folder feedback (a text per student). A second run grades what is not yet in
details.csv.
"""

import argparse
import os
import secrets
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from csv import QUOTE_ALL
from pathlib import Path

import pandas as pd
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from handout import FUNCTIONS, chosen, make, stop  # noqa: E402

CONTAINER = (
    "Use --no-sandbox only for code that you trust, or in a container: docker run --rm --network "
    "none --memory 4g --pids-limit 100 -v $PWD:/exprl -w /exprl IMAGE python tests/course/"
    "assignment.py grade --no-sandbox submissions/* (IMAGE has the packages of requirements.txt)"
)


# ---- Submissions ---------------------------------------------------------------------------------
def read_file(folder, name):
    """Return the content of a graded file: a plain file in the folder, or one folder below it."""
    found = [*folder.glob(name)] or [*folder.glob(f"*/{name}")]
    if len(found) != 1:
        raise ValueError(f"There must be one {name} in the folder, and there are {len(found)}.")
    plain = folder.parent.resolve() / found[0].relative_to(folder.parent)
    if os.path.realpath(plain) != str(plain) or not plain.is_file():
        raise ValueError(f"{name} is a link, or not a file. Hand in a plain file.")
    if plain.stat().st_size > 2**20:
        raise ValueError(f"{name} is larger than 1 MB.")
    return plain.read_bytes()


def grade_submission(student, folder, functions, args):
    """Return a row for each function."""
    from properties import PROPERTIES, Graded, first_failure  # `make` does not wait for these
    from sandbox import Sandbox, Stopped

    files, wrong, rows = {}, {}, []
    for name in {function.file for function in functions}:
        try:
            files[name] = read_file(folder, name)
        except ValueError as error:
            wrong[name] = str(error)
        except OSError as error:  # it may be a mistake: the next submission is graded all the same
            wrong[name] = f"{name} cannot be read: {error.strerror}."
    with Sandbox(files, args.seconds, args.memory) as sandbox:
        for function in functions:
            module = Path(function.file).stem
            if function.file not in wrong:
                try:
                    sandbox.begin(module)
                except Stopped as reason:
                    wrong[function.file] = f"{function.file} cannot be imported. {reason}"
            failed = wrong.get(function.file)
            if failed is None:
                graded = Graded(sandbox.ask, module, function.name, args.seed)
                failed = first_failure(graded, PROPERTIES[function.name])
            row = {"student": student, "seed": args.seed, "function": function.name}
            row |= {"points": 0 if failed else function.points, "out_of": function.points}
            rows.append(row | {"failed": cell(failed)})
    return rows


# ---- Tables --------------------------------------------------------------------------------------
def cell(text):
    """Return a text that no spreadsheet reads as a formula, and no terminal as a command."""
    text = "".join(c if c.isprintable() else f"\\x{ord(c):x}" for c in text[:1500])
    return f"'{text}" if text.lstrip().startswith(tuple("=+-@＝＋－＠")) else text


def read_details(out):
    """Return the table of all functions of all students that are graded so far."""
    if not (out / "details.csv").exists():
        return pd.DataFrame(columns=["student", "function"])
    return pd.read_csv(out / "details.csv", keep_default_na=False, dtype={"student": str})


def save(out, student, rows):
    """Append rows to details.csv. Write totals.csv and the feedback of a student, and return it."""
    # The byte order mark of utf-8-sig tells spreadsheets that the file is UTF-8.
    form = {"index": False, "encoding": "utf-8-sig", "quoting": QUOTE_ALL}
    details = out / "details.csv"
    pd.DataFrame(rows).to_csv(details, mode="a", header=not details.exists(), **form)
    details = read_details(out)
    totals = details.pivot_table("points", "student", "function", aggfunc="last")
    totals = totals[[f.name for f in FUNCTIONS if f.name in totals]].astype("Int64")
    totals.insert(0, "total", totals.sum(axis=1))
    totals.reset_index().to_csv(out / "totals.partial", **form)
    (out / "totals.partial").replace(out / "totals.csv")
    mine = details[details.student == student]
    text = f"{student}: {mine.points.sum()} of {mine.out_of.sum()} points\n"
    for row in mine.itertuples():
        text += f"\n{row.function:20}{row.points}/{row.out_of}  {row.failed}".rstrip()
    (out / "feedback" / f"{student}.txt").write_text(f"{text}\n", encoding="utf-8")
    return text


# ---- Command line --------------------------------------------------------------------------------
def grade(args):
    """Grade the functions that are not yet in details.csv."""
    from sandbox import why_no_sandbox

    out, functions, folders = Path(args.out), chosen(args.only), {}
    for folder in map(Path, map(os.path.abspath, args.folder)):
        student = cell(folder.name)
        if student in folders or not os.path.isdir(folder):
            print(f"skipped: {student} is not a folder, or a second one of this name")
        else:
            folders[student] = folder
    if args.no_sandbox:
        args.memory = 0
        print(CONTAINER)
    elif reason := why_no_sandbox({folder.parent for folder in folders.values()}):
        stop(f"{reason}. {CONTAINER}")
    (out / "feedback").mkdir(parents=True, exist_ok=True)
    details = read_details(out)
    done = {*zip(details.student, details.function)}
    print(f"seed {args.seed}, results in {out}")
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = {}
        for student, folder in folders.items():
            todo = [function for function in functions if (student, function.name) not in done]
            if todo:
                jobs[pool.submit(grade_submission, student, folder, todo, args)] = student
            else:
                print(f"skipped: {student} is in {out / 'details.csv'}")
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), unit="submission"):
                try:
                    text = save(out, jobs[job], job.result())
                    tqdm.write(text if len(jobs) == 1 else text.split("\n")[0])
                except Exception as error:  # the grader's: the next run grades it again
                    tqdm.write(f"{jobs[job]} is not graded: {error!r}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            stop("interrupted. The same command continues")


def main(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    handing_out = commands.add_parser("make", help="write a folder to hand out")
    handing_out.add_argument("out", type=Path, help="the folder, which must be new or empty")
    grading = commands.add_parser("grade", help="grade submissions")
    grading.add_argument("folder", nargs="+", help="the submissions, a folder each")
    for command in (handing_out, grading):
        command.add_argument("--only", nargs="+", default=[], help="only these functions")
    for flag, default, meaning in (
        ("--out", "grades", "folder for the tables and the feedback"),
        ("--seconds", 20.0, "time limit of a function"),
        ("--memory", 1000, "memory limit of a process in MB"),
        ("--jobs", min(8, os.cpu_count()), "submissions that are graded at the same time"),
        ("--seed", secrets.randbelow(10**6), "seed of the random inputs; by default a random one"),
    ):
        grading.add_argument(flag, type=type(default), default=default, help=meaning)
    grading.add_argument("--no-sandbox", action="store_true", help="grade without bwrap")
    args = parser.parse_args(argv)
    if args.command == "make":
        make(args.out, args.only)
    elif min(args.seconds, args.memory, args.jobs) <= 0 or not 0 <= args.seed < 2**32:
        stop("--seconds, --memory and --jobs must be above 0, and --seed from 0 to 2^32 - 1")
    else:
        grade(args)


if __name__ == "__main__":
    main()
