"""The grader: grades submissions in a sandbox, several at a time, and writes the tables."""

import os
from concurrent.futures import ThreadPoolExecutor, as_completed
from csv import QUOTE_ALL
from dataclasses import astuple
from pathlib import Path

import pandas as pd
from handout import FUNCTIONS, chosen, stop
from properties import PROPERTIES, Graded, first_failure
from sandbox import Sandbox, Stopped, why_no_sandbox
from tqdm import tqdm

COLUMNS = ["student", "seed", "function", "points", "out_of", "failed"]
CONTAINER = (
    "Use --no-sandbox only for code that you trust, or in a container with a copy of all this: "
    "docker run --rm --network none --memory 4g --pids-limit 100 -v $PWD:/exprl -w /exprl IMAGE "
    "python tests/course/assignment.py grade --no-sandbox submissions/*"
)


# ---- Submissions ---------------------------------------------------------------------------------
def read_file(folder, name):
    """Return the content of a graded file: a plain file in the folder, or one folder below it."""
    found = [*folder.glob(name)] or [*folder.glob(f"*/{name}")]
    if len(found) != 1:
        raise ValueError(f"there must be one in the folder, but there are {len(found)}")
    plain = folder.parent.resolve() / found[0].relative_to(folder.parent)
    if os.path.realpath(plain) != str(plain) or not plain.is_file():
        raise ValueError("it is not a plain file, or there is a link on the way to it")
    if plain.stat().st_size > 2**20:
        raise ValueError("it is larger than 1 MB")
    return plain.read_bytes()


def grade_submission(student, folder, functions, args):
    """Return a row for each function."""
    files, wrong, rows = {}, {}, []
    for name in {function.file for function in functions}:
        try:
            files[name] = read_file(folder, name)
        except (OSError, ValueError) as error:
            wrong[name] = f"{name} cannot be read: {error.args[-1]}."
    with Sandbox(files, args.seconds, not args.no_sandbox) as sandbox:
        for name, points, file in map(astuple, functions):
            module = Path(file).stem
            try:
                if file not in wrong:
                    sandbox.begin(module)
            except Stopped as reason:
                wrong[file] = f"{file} cannot be imported. {reason}"
            graded = Graded(sandbox.ask, module, name, args.seed)
            failed = wrong.get(file) or first_failure(graded, PROPERTIES[name])
            rows.append([student, args.seed, name, 0 if failed else points, points, cell(failed)])
    return rows


# ---- Tables --------------------------------------------------------------------------------------
def cell(text):
    """Return a text that no spreadsheet reads as a formula, and no terminal as a command."""
    text = "".join(c if c.isprintable() else f"\\x{ord(c):x}" for c in text[:1500])
    return f"'{text}" if text.lstrip().startswith(tuple("=+-@＝＋－＠")) else text


def read_details(out):
    """Return the table of all functions of all students that are graded so far."""
    if not (out / "details.csv").exists():
        return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(
        out / "details.csv", usecols=COLUMNS, keep_default_na=False, dtype={"student": str}
    )


def save(out, student, rows):
    """Append rows to details.csv. Write totals.csv and a student's feedback. Return the total."""
    # The byte order mark of utf-8-sig tells spreadsheets that the file is UTF-8.
    form = {"index": False, "encoding": "utf-8-sig", "quoting": QUOTE_ALL}
    details = out / "details.csv"
    pd.DataFrame(rows, columns=COLUMNS).to_csv(
        details, mode="a", header=not details.exists(), **form
    )
    details = read_details(out)
    totals = details.pivot_table("points", "student", "function", aggfunc="last")
    totals = totals[[f.name for f in FUNCTIONS if f.name in totals]].astype("Int64")
    totals.insert(0, "total", totals.sum(axis=1))
    totals.reset_index().to_csv(out / "totals.csv", **form)
    mine = details[details.student == student]
    total = f"{student}: {mine.points.sum()} of {mine.out_of.sum()} points"
    lines = [f"{r.function:20}{r.points}/{r.out_of}  {r.failed}" for r in mine.itertuples()]
    file = out / "feedback" / f"{student[:60]}.txt"
    file.write_text("\n".join([total, "", *lines]), encoding="utf-8")
    return total


def grade(args):
    """Grade the functions that are not yet in details.csv."""
    out, functions, folders = Path(args.out), chosen(args.only), {}
    for folder in map(Path, map(os.path.abspath, args.folder)):
        student = cell(folder.name)
        if student in folders or not os.path.isdir(folder):
            print(f"skipped: {student} is not a folder, or a second one of this name")
        else:
            folders[student] = folder
    if args.no_sandbox:
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
            for job in tqdm(as_completed(jobs), total=len(jobs)):
                try:
                    tqdm.write(save(out, jobs[job], job.result()))
                except Exception as error:  # the grader's: the next run grades it again
                    tqdm.write(f"{jobs[job]} is not graded: {error!r}")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            stop("interrupted. The same command continues")
