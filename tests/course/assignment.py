"""The project as an assignment: a folder to hand out, and a grader for the submissions.

    python tests/course/assignment.py make OUT [--only FUNCTION ...]
    python tests/course/assignment.py grade submissions/* --out grades [--only FUNCTION ...]

`make` writes the folder to hand out (handout.py). `grade` (grading.py) runs the graded functions of
each submission in a sandbox (sandbox.py) and checks their properties (properties.py). A function
gets its points only if it has all of them. Otherwise the grader names the first one that it lacks.
The folder `--out` contains totals.csv (a row per student), details.csv (a row per student and
function) and the folder feedback (a text per student). A second run grades what is not yet in
details.csv.
"""

import argparse
import os
import secrets
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

from handout import make, stop  # noqa: E402


def main(argv=None):
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["make", "grade"])
    parser.add_argument("folder", nargs="+", help="the new folder to make, or the submissions")
    parser.add_argument("--only", nargs="+", default=[], help="only these functions")
    for flag, default, meaning in (
        ("--out", "grades", "folder for the tables and the feedback"),
        ("--seconds", 20.0, "time limit of a function"),
        ("--jobs", min(8, os.cpu_count()), "submissions that are graded at the same time"),
        ("--seed", secrets.randbelow(10**6), "seed of the random inputs; by default a random one"),
    ):
        parser.add_argument(flag, type=type(default), default=default, help=meaning)
    parser.add_argument("--no-sandbox", action="store_true", help="grade without bwrap")
    args = parser.parse_args(argv)
    if args.command == "make":
        make(args.folder[0], args.only)
    elif min(args.seconds, args.jobs) <= 0:
        stop("--seconds and --jobs must be above 0")
    else:
        from grading import grade  # not above: this takes seconds, and `make` has no need of it

        try:
            grade(args)
        except (OSError, ValueError) as error:
            stop(f"--out {args.out} cannot be used: {error}")


if __name__ == "__main__":
    main()
