r"""Problems in words, for a pretrained language model that learns on a CPU.

A problem has a start value, and each of its operations is a sentence:

    question    Ben has 5 eggs. He buys 7 more. He finds 4 more. The number of eggs doubles. ...
    completion  ### 5 + 7 = 12\n### 12 + 4 = 16\n### 16 * 2 = 32\n ... ### \boxed{...}
    reference   ### 5 + 7 + 4 = 16\n ...         two operations per line, as people skip steps

The number only grows, up to 60. SmolLM2-135M adds and multiplies small numbers well, but it often
subtracts wrongly, and the problems should be hard because they are long. This program writes four
files into FOLDER:

    base.jsonl     short problems (1 or 2 operations). Their references do one operation per line.
                   SFT on them shows a language model the form of a solution.
    train.jsonl    the problems of both stages
    valid.jsonl    problems on which settings are chosen
    heldout.jsonl  problems on which the final models are evaluated

No two files share a problem: no two problems have the same start value and operations.

    python tests/toy/words_world.py FOLDER --seed 0
"""

import argparse
import json
import random
from pathlib import Path

NAMES = {  # name: its pronoun
    "Ben": "he", "Tom": "he", "Omar": "he", "Luis": "he", "Ivan": "he", "Sam": "he",
    "Ann": "she", "Mia": "she", "Nora": "she", "Ruth": "she", "Zoe": "she", "Eva": "she",
}  # fmt: skip
ITEMS = ["eggs", "pens", "coins", "cards", "apples", "books", "shells", "stamps", "marbles", "nuts"]
SENTENCES = {  # several sentences for each operation; the first word may be a pronoun
    "+": [
        "{he} buys {n} more.",
        "{he} finds {n} more.",
        "a friend gives {name} {n} {items}.",
        "{he} wins {n} {items} in a game.",
    ],
    "* 2": ["the number of {items} doubles.", "{he} gets twice as many {items} as before."],
    "* 3": ["the number of {items} triples.", "{he} gets three times as many {items} as before."],
}
OPERATIONS = ("+", "+", "* 2", "* 3")  # half of them are additions
LARGEST = 60
BASE_LENGTHS = (1, 2, 2)  # operations of the short problems


def apply(operation: str, value: int) -> int:
    """Apply an operation to a value.

    >>> apply("+ 7", 18), apply("* 3", 20)
    (25, 60)
    """
    sign, number = operation.split()
    return value + int(number) if sign == "+" else value * int(number)


def draw_operations(rng: random.Random, length: int) -> list[int | str]:
    """Draw a start value and operations, so that no value exceeds 60 -> [18, "+ 7", "* 2"]."""
    while True:
        start = value = rng.randrange(2, 21)
        operations = []
        while len(operations) < length and value <= LARGEST - 9:  # any addition fits
            operation = rng.choice(OPERATIONS)
            if operation == "+":
                operation += f" {rng.randrange(2, 10)}"
            if apply(operation, value) <= LARGEST:
                operations.append(operation)
                value = apply(operation, value)
        if len(operations) == length:
            return [start, *operations]


def write_question(rng: random.Random, start: int, operations: list[str]) -> str:
    """Tell a story in which the operations happen one after the other."""
    name, items = rng.choice(list(NAMES)), rng.choice(ITEMS)
    sentences = [f"{name} has {start} {items}."]
    for operation in operations:
        kind = operation if operation in SENTENCES else operation[0]
        sentence = rng.choice(SENTENCES[kind])
        sentence = sentence.format(he=NAMES[name], name=name, items=items, n=operation[2:])
        opening = rng.choice(["", "Then ", "After that, "])
        sentences.append(opening + sentence if opening else sentence[0].upper() + sentence[1:])
    return " ".join([*sentences, f"How many {items} does {name} have now?"])


def write_solution(start: int, operations: list[str], per_line: int) -> str:
    r"""Write a solution with up to `per_line` operations on each line.

    >>> print(write_solution(4, ["+ 7", "* 2", "+ 5"], per_line=2))
    ### (4 + 7) * 2 = 22
    ### 22 + 5 = 27
    ### \boxed{27}
    """
    lines, value = [], start
    for first in range(0, len(operations), per_line):
        expression = str(value)
        for operation in operations[first : first + per_line]:
            if operation[0] == "*" and "+" in expression:
                expression = f"({expression})"
            expression += f" {operation}"
            value = apply(operation, value)
        lines.append(f"### {expression} = {value}")
    return "\n".join([*lines, rf"### \boxed{{{value}}}"])


def make_problems(rng: random.Random, lengths: list[int], per_line: int, seen: set) -> list[dict]:
    """Make a problem of each length. `seen` has the operations of earlier problems and grows."""
    problems = []
    for length in lengths:
        drawn = draw_operations(rng, length)
        while tuple(drawn) in seen:
            drawn = draw_operations(rng, length)
        seen.add(tuple(drawn))
        start, *operations = drawn
        reference = write_solution(start, operations, per_line)
        answer = reference.split("{")[1].rstrip("}")
        question = write_question(rng, start, operations)
        problems.append({"question": question, "reference": reference, "answer": answer})
    return problems


def build(folder: Path, seed: int, length: int, sizes: dict) -> None:
    """Write base.jsonl, train.jsonl, valid.jsonl and heldout.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, seen = random.Random(seed), set()
    for name, size in sizes.items():
        is_base = name == "base"
        lengths = [rng.choice(BASE_LENGTHS) if is_base else length for _ in range(size)]
        problems = make_problems(rng, lengths, 1 if is_base else 2, seen)
        text = "".join(json.dumps(problem) + "\n" for problem in problems)
        (folder / f"{name}.jsonl").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(  # few problems have one operation, and 60 is too small for ten
        "--length", type=int, default=4, choices=range(2, 10), help="operations of a problem"
    )
    args = parser.parse_args()
    sizes = {"base": 384, "train": 512, "valid": 100, "heldout": 200}
    build(args.folder, args.seed, args.length, sizes)


if __name__ == "__main__":
    main()
