r"""A judge that is a program: it checks which values of the reference an attempt calculates. Free.

    python tests/tools/value_judge.py                   # prints the --judge-url, and then serves it
    python exprl.py --judge-url http://127.0.0.1:8124/v1 --model Qwen2.5-0.5B

It works for any problems whose references contain calculations or numbers, such as GSM8K. It needs
no key, no network and no model. It reads the same prompts as an LLM judge and answers with the same
scores, so nothing in exprl.py changes.

The *values* of a reference are the results of its calculations, in order. The line
"(18 - 7) * 2 = 22" has two: 11, which the writer did in his head, and 22. A line without a
calculation has its last number as its value, unless the question contains this number.

A step of an attempt *reaches* a value if it contains a calculation that
  - is true: the two sides of its equals sign are equal, up to rounding to two decimals
  - uses only known numbers: those of the question, those that the reference takes from elsewhere
    (24 hours a day), 1, 2 and 100, and the results of earlier steps that reached a value
  - has a result that is the next value of the reference, or one after it
and if the step contains no other kind of calculation. The answer in \boxed{} counts like a value
once all values are reached. Any other box is wrong.

Process: a step that reaches a value scores 5, and every other step scores 1. The last step scores 5
only if no value is left to reach.
Outcome: the lines are read up to the first wrong calculation. The score is 1 if no value is
reached, 5 if all are reached and nothing is wrong, and in between it grows with the share.

A list of numbers, the question again, and words to the judge contain no such calculation. They
score 1. What this judge cannot see:
  - Whether a correct value came from a senseless calculation. 18 - 7 = 11 counts even if the story
    does not subtract. A policy can therefore try out calculations.
  - A sound route with other values. It scores 1 until it meets the reference again.
  - Anything that is not a calculation: "so 9 eggs are left", equations with letters, proofs,
    programs. Such a step scores 1, although it may be correct.
Measure it on your problems before you train: python tests/tools/calibrate.py --judge-url URL
"""

import argparse
import ast
import math
import operator
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2] / "tests" / "tools")]

import program_judge  # noqa: E402

# ---- Reading calculations ------------------------------------------------------------------------
NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
OPERAND = rf"[( ]*-?{NUMBER}[) ]*"
SIDE = rf"{OPERAND}(?:[-+*/]{OPERAND})*"
CALCULATION = re.compile(rf"(?<![\w.]){SIDE}(?:={SIDE})+(?![\w*/+-])")
OPERATIONS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


@dataclass
class Calculation:
    """A chain of equal sides, such as (18 - 7) * 2 = 22."""

    operands: list[Fraction]  # the numbers that it starts from: 18, 7, 2
    results: list[Fraction]  # the result of each operation, in order: 11, 22
    stated: Fraction  # the last side: 22
    is_true: bool


def tidy(text: str) -> str:
    r"""Write the arithmetic in a text with + - * / ( ) only, and drop units and other words.

    A letter that stands alone stays, because 2 x + 3 = 7 is not a calculation.

    >>> tidy(r"He pays 3 x $1,200 = $3,600"), tidy(r"\(\frac{9}{2} \times 4 = 18\) eggs")
    (' 3 * 1200 = 3600', ' (((9)/(2)) * 4 = 18 ) ')
    """
    text = re.sub(r"\\d?frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
    text = re.sub(r"\\times|\\cdot|[×·⋅]", "*", text)
    text = re.sub(r"\\div|÷", "/", text)
    text = re.sub(r"[−–]", "-", text)
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)  # 1,200
    text = re.sub(rf"({NUMBER}) ?\\?%", r"(\1/100)", text)
    text = re.sub(r"[-/]?[A-Za-z']*[A-Za-z]{2}[A-Za-z'-]*", " ", text)  # also /day and 5-day
    text = re.sub(r"(?:\*\*+|[$€£\\ ])+", " ", text)
    text = re.sub(r"(?<=[\d)]) ?[xX] ?(?=[\d(.])", " * ", text)
    return re.sub(r"(?<=\d) ?\((?=\d)", " * (", text)  # 2(60)


def is_near(a: Fraction, b: Fraction) -> bool:
    """Return whether two numbers agree up to rounding to two decimals."""
    return abs(a - b) < Fraction(1, 100)


def is_among(number: Fraction, numbers: list[Fraction]) -> bool:
    """Return whether a number is in a list, up to rounding."""
    return any(is_near(number, other) for other in numbers)


def read_numbers(text: str) -> list[Fraction]:
    """Return the numbers in a text.

    >>> [str(number) for number in read_numbers("8-3 of 1,200, or 0.5")]
    ['8', '3', '1200', '1/2']
    """
    return [Fraction(number) for number in re.findall(NUMBER, tidy(text)) if len(number) < 100]


def evaluate(node: ast.expr, results: list[Fraction]) -> Fraction:
    """Return the value of a parsed expression. Append the result of each operation to `results`."""
    if isinstance(node, ast.BinOp):
        left, right = evaluate(node.left, results), evaluate(node.right, results)
        results.append(OPERATIONS[type(node.op)](left, right))
        return results[-1]
    if isinstance(node, ast.UnaryOp):
        return -evaluate(node.operand, results)
    return Fraction(str(node.value))


def read_side(side: str, results: list[Fraction]) -> Fraction:
    """Return the value of one side, and append the result of each operation to `results`."""
    side = re.sub(r"(?<![\d.])0+(?=\d)", "", side.strip())  # Python does not read 007
    unmatched = side.count("(") - side.count(")")  # as in the sentence (18 - 7 = 11)
    side = side[max(unmatched, 0) : len(side) + min(unmatched, 0)]
    return evaluate(ast.parse(side, mode="eval").body, results)


def read_calculations(text: str) -> list[Calculation]:
    """Return the calculations in a text. One that cannot be read is not true.

    >>> [found] = read_calculations("He has (18 - 7) * 2 = 22 eggs.")
    >>> [str(result) for result in found.results], found.is_true
    (['11', '22'], True)
    >>> read_calculations("39 = 39, and 39, 22, 11; 2 x + 3 = 7")
    []
    """
    found = []
    for match in CALCULATION.finditer(tidy(text)):
        operands, results, values = [], [], []
        try:
            for side in match[0].split("="):
                n_before = len(results)
                values.append(read_side(side, results))
                if len(results) > n_before:
                    operands += read_numbers(side)
        except (SyntaxError, ValueError, ArithmeticError, RecursionError, MemoryError):
            found.append(Calculation([], [], Fraction(0), is_true=False))
            continue
        if results:  # 39 = 39 is not a calculation
            is_true = all(is_near(value, values[-1]) for value in values)
            found.append(Calculation(operands, results, values[-1], is_true))
    return found


# ---- Following the reference ---------------------------------------------------------------------
def read_reference(question: str, reference: str) -> tuple[list[Fraction], list[Fraction]]:
    """Return (the values of a reference in order, the numbers that an attempt may start from)."""
    values, known = [], [*map(Fraction, (1, 2, 100)), *read_numbers(question)]
    for line in reference.split("\n"):
        calculations = [found for found in read_calculations(line) if found.results]
        for calculation in calculations:
            known += [n for n in calculation.operands if not is_among(n, values)]
            values += [*calculation.results[:-1], calculation.stated]
        last = read_numbers(line)[-1:]
        if not calculations and last and not is_among(last[0], known + values):
            values += last
    return values, known


def boxed_number(step: str) -> list[Fraction]:
    r"""Return the number in the last \boxed{} of a step, as a list. It is empty without a box."""
    return read_numbers(step.rpartition(r"\boxed")[2])[:1] if r"\boxed" in step else []


def follow(call: program_judge.Call, steps: list[str]) -> tuple[list[bool | None], list[float]]:
    """Follow an attempt -> (marks, shares), with an entry for each step.

    The mark is True if the step reaches a value, False if it contains something wrong, and None if
    it contains no calculation. The share is how far along the reference's values the attempt is
    after the step, from 0 to 1.
    """
    values, known = read_reference(call.question, call.reference)
    if call.kind == "alone":  # the steps before are not shown: their results are taken as given
        known = known + values
    n_reached, has_ended, marks, shares = 0, False, [], []
    for step in steps:
        mark = None
        for calculation in read_calculations(step):
            later = [
                i for i in range(n_reached, len(values)) if is_near(values[i], calculation.stated)
            ]
            starts_well = all(is_among(number, known) for number in calculation.operands)
            if not (calculation.is_true and starts_well and later):
                mark = False
                break
            mark, n_reached = True, later[0] + 1
            known = [*known, *calculation.results, calculation.stated]
        box = boxed_number(step)
        if box:
            is_answer = n_reached == len(values) and bool(values) and is_near(box[0], values[-1])
            mark = is_answer and mark is not False and not has_ended
            has_ended = True
        marks.append(mark)
        shares.append(n_reached / len(values) if values else 0.0)
    return marks, shares


def judge_outcome(call: program_judge.Call) -> str:
    """Score a whole attempt by the share of the values that it reaches before anything wrong."""
    marks, shares = follow(call, call.texts[0].split("\n"))
    end = marks.index(False) if False in marks else len(marks)
    share = shares[end - 1] if end else 0.0
    is_complete = share == 1 and end == len(marks)
    score = 5 if is_complete else min(4, 1 + math.ceil(4 * share))
    return f"Before anything wrong, {share:.0%} of the way is done.\nScore: {score}"


def judge_steps(call: program_judge.Call) -> list[int]:
    """Score each step: 5 if it reaches a value, else 1."""
    marks, shares = follow(call, call.texts)
    if call.kind == "together" and marks:  # the attempt is known to end here
        marks[-1] = shares[-1] == 1 and marks[-1] is not False
    return [5 if mark else 1 for mark in marks]


def write_rubric(call: program_judge.Call) -> str:
    """List the last values of the reference, 2 to 6 items. The judge itself does not need them."""
    values, _ = read_reference(call.question, call.reference)
    items = [f"- reaches {float(value):.10g}" for value in values[-6:]]
    return "\n".join(items if len(items) > 1 else [*items, "- states the answer", "- ends"][:2])


def answer(request: dict) -> str:
    """Reply to a chat-completions request."""
    call = program_judge.read_call(request["messages"])
    if call is None:
        return "I am ready."  # the test call at the start of a run
    if call.kind == "rubric":
        return write_rubric(call)
    if call.kind == "outcome":
        return judge_outcome(call)
    scores = judge_steps(call)
    if call.kind == "together":
        return "\n".join(f"Step {t}: {score}" for t, score in enumerate(scores, start=1))
    return f"Score: {scores[-1]}"


def main() -> None:
    """Serve the judge."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8124, help="port on this machine; 0: any")
    parser.add_argument("--url-file", type=Path, help="write the URL to this file")
    args = parser.parse_args()
    program_judge.serve(answer, args.url_file, args.port)


if __name__ == "__main__":
    main()
