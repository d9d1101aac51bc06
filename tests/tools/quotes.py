r"""A judge that quotes instead of giving scores. The paper does not have it: it is our extension.

    python tests/tools/quotes.py --method outcome --model Qwen2.5-0.5B --data my.jsonl
    python tests/tools/quotes.py --method process --rubric none --model Qwen2.5-0.5B
    python tests/tools/calibrate.py --judge-input quotes --model Qwen2.5-0.5B

The idea is to give a weak judge an easier task than a score. For each rubric item, the judge copies
the words of the attempt that state the item. With --rubric none, the lines of the reference serve
as the items. Code then checks that the attempt contains the quotation and that the quotation states
the value of the item. Code also makes the score from the items that are stated (`step_scores`). The
judge sees neither a scale nor the reference.

It was measured no better than code alone. The judge had 1.5B parameters and saw 4 problems of
GSM8K. When it gave scores, texts that only talk to the judge got high ones under every prompt that
we tried. When it quoted, these texts got the lowest score, and its misplacement was 0.00 (the mean
of its two error rates, see calibrate.py). But without a judge, with each line of the attempt taken
as quoted, the misplacement was 0.00 too. Later, the judge was tried on 499 sampled completions.
Code found a value of the reference in 229 of them, and the judge's quotations in 145 of them.

Four more limits are known.
- An item without a value (a lemma of a proof) rests on the word of the judge.
- A sound route that avoids the intermediate results of the reference is rewarded at its end only.
- A correct value is rewarded even if it was reached by nonsense.
- All steps of a stretch have the same score. With --process-norm delta, the advantage of a stretch
  therefore falls on its first step only. (A *stretch* ends with a step that states an item.)
"""

import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Literal

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import exprl  # noqa: E402
import judge_prompts  # noqa: E402
from exprl import Verdict, option  # noqa: E402

TASK = r"""You check which checkpoints of a list an attempt at {problem} states.

{fence}

Answer with one line for each checkpoint, in order, and nothing else: its number, a colon, and the
words of the attempt that state it, copied exactly and with their value; or none, if the attempt
does not state it or states another value."""

ASK_AGAIN = r"""Your reply does not have the form that was asked for. Answer again, in exactly
that form: a score is a whole number from 1 to 5, with nothing after it on its line; checkpoints
are 2 to 6 lines that begin with a dash; words of an attempt stand on a line that begins with the
number of their checkpoint."""

# A finished case, shown as an earlier turn of the conversation. A weak judge learns the form from
# it, and learns to quote rather than to answer "none". Quoting too much does no harm, because
# find_items looks each quotation up.
EXAMPLE = {
    "question": "Ann has 3 boxes of 4 pens. She gives 5 pens away and then buys twice as many pens "
    "as she has left. How many pens does she have at the end?",
    "items": [
        "Ann has 3 * 4 = 12 pens.",
        "After giving 5 away she has 12 - 5 = 7 pens.",
        "She buys 2 * 7 = 14 pens.",
        "In the end she has 7 + 14 = 21 pens.",
    ],
    "attempt": "### First I multiply: 4 pens in each of 3 boxes makes 12 pens.\n"
    "### Then 12 - 5 = 7 pens are left, and twice as many is 14.\n"
    "### Together these are 7 + 14 = 21 pens.",
    "reply": '1: "4 pens in each of 3 boxes makes 12 pens"\n2: "12 - 5 = 7 pens are left"\n'
    '3: "twice as many is 14"\n4: "Together these are 7 + 14 = 21 pens"',
}


# ---- What the judge is shown ---------------------------------------------------------------------
def quote_messages(problem: dict, items: list[str], attempt: str) -> list[dict]:
    """Return the four messages of one call: task, EXAMPLE, its reply, and the attempt in question.

    The last message contains the question, the numbered rubric items and the attempt. The reference
    is not shown.
    """
    texts = judge_prompts.DOMAINS[problem["domain"]]
    task = TASK.format(problem=texts["problem"], fence=judge_prompts.SHARED["fence"])

    def user_message(question, items, attempt):
        numbered = "\n".join(f"{number}. {item}" for number, item in enumerate(items, start=1))
        shown = {"question": question, "reference": "", "domain": problem["domain"]}
        fenced = judge_prompts.fence([attempt])
        return judge_prompts.judge_messages("outcome", shown, numbered, fenced)[1]

    return [
        {"role": "system", "content": task},
        user_message(EXAMPLE["question"], EXAMPLE["items"], EXAMPLE["attempt"]),
        {"role": "assistant", "content": EXAMPLE["reply"]},
        user_message(problem["question"], items, attempt),
    ]


def split_lines(text: str) -> list[str]:
    """Split a text into lines, or a single line into sentences. Drop bullets and empty lines."""
    lines = text.strip().split("\n")
    if len(lines) == 1:
        lines = re.split(r"(?<=[.!?])\s+(?=[^\Wa-z])", text)
    return [re.sub(r"^\s*[-*#]+\s+", "", line).strip() for line in lines if re.search(r"\w", line)]


def list_items(text: str) -> list[str]:
    """Return the rubric items in a rubric or a reference: the lines that contain a number.

    A text of a single line is split into sentences. If no line contains a number, all lines are
    items. At most the last 16 items are kept.

    >>> list_items("Let x be his age. Then 2x = 8. So x = 4.")
    ['Then 2x = 8.', 'So x = 4.']
    """
    lines = split_lines(text)
    with_number = [line for line in lines if re.search(r"\d", line)]
    return (with_number or lines)[-16:]


# ---- From quotations to scores -------------------------------------------------------------------
NUMBER = r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+|/0*[1-9]\d*)?"  # in 8-3 the numbers are 8 and 3


def stated_value(text: str) -> Fraction | None:
    """Return the number that a line states, or None if it states none.

    It is the first number after the last =. Without such a number, it is the last one of the line.

    >>> print(stated_value("5 * 2 = 10 in 3 days"), stated_value("it is $1,200"))
    10 1200
    """
    _, equals, right_side = text.rpartition("=")
    after_equals = re.findall(NUMBER, right_side) if equals else []
    anywhere = re.findall(NUMBER, text)
    if not anywhere:
        return None
    number = after_equals[0] if after_equals else anywhere[-1]
    try:
        return Fraction(number.replace(",", ""))
    except ValueError:  # Python refuses to read a number of thousands of digits
        return None


def normalise(text: str) -> str:
    """Drop marks, case and the white space that does not separate two numbers.

    >>> normalise("So **12** pens,  then 3 4."), normalise("4 = 12\\n### 12 + 1")
    ('so12pens,then3 4', '4=12 12+1')
    """
    text = re.sub(r"[*_`\"'“”’#$\\]+", "", text).lower()
    text = re.sub(r"\s+", " ", text)
    return re.sub(r"(?<![\d.,]) | (?!\d)", "", text).strip(".,:;")


# A quotation has to contain its numbers whole. These two patterns stand around the quoted words.
# The 2 of 12, 1.2 or 1,200 is not a quotation of 2. Neither is the 2 of 2 + 3 or of a list 2, 3, 4.
NOT_INSIDE_A_NUMBER = r"(?!(?<=\d)\d|(?<=\d[.,])\d)"
NO_NUMBER_FOLLOWS = r"(?!(?<=\d)(?:[.,;\s]*|[-+*/×÷^]\(?)\d)"


def find_items(reply: str, items: list[str], steps: list[str]) -> list[int | None] | None:
    """Return, for each rubric item, the index of the first step that states it. None: no step does.

    The judge only points at words. They count if the attempt contains them, apart from white space,
    case and marks, and if they state the value of an item. Words without a value count for the item
    whose number the judge wrote, if that item has no value either. Words that cross a border
    between two steps belong to the later step. Returns None if no line of the reply has the form
    `number: words`.

    >>> find_items('1: "3 * 4 = 12"\\n2: none', ["12 pens", "7 left"], ["3 * 4 = 12", "is 7"])
    [0, None]
    """
    quotations = re.findall(r"^[^\w\n]*(\d+)[^\w\n]*[:.)][^\S\n]*(\S.*)$", reply, re.MULTILINE)
    if not quotations:
        return None
    up_to_step = [normalise("".join(steps[: t + 1])) for t in range(len(steps))]
    found = [None] * len(items)
    for number, words in quotations:
        quoted = normalise(words)
        if quoted in ("", "none"):
            continue
        pattern = NOT_INSIDE_A_NUMBER + re.escape(quoted) + NO_NUMBER_FOLLOWS
        containing = [t for t, text in enumerate(up_to_step) if re.search(pattern, text)]
        if not containing:
            continue
        for j, item in enumerate(items):
            value = stated_value(item)
            matches = number == str(j + 1) if value is None else stated_value(words) == value
            if matches and (found[j] is None or containing[0] < found[j]):
                found[j] = containing[0]
    return found


def step_scores(found: list[int | None], n_steps: int) -> list[float]:
    """Turn the steps that state the rubric items (None: no step) into a score 1..5 for each step.

    A stretch of steps ends with a step that states an item, and the last stretch runs to the end. A
    missing item is due in the stretch of the next item that is stated, or else in the last stretch.
    All m steps of a stretch get the score 1 + 4 stated / max(due, m / 2). The m / 2 allows two
    steps for each item. Without it, a policy could write guesses until one of them matches a value.

    >>> step_scores([1, None, 2, None], 5), step_scores([0], 2), step_scores([3], 4)
    ([5.0, 5.0, 3.0, 1.0, 1.0], [5.0, 5.0], [3.0, 3.0, 3.0, 3.0])
    """
    is_stated = [[] for _ in range(n_steps)]  # at the step where each item is due
    due_at = n_steps - 1
    for step in reversed(found):
        if step is not None:
            due_at = step
        is_stated[due_at].append(step is not None)
    ends = [t for t in range(n_steps) if is_stated[t]]
    borders = [0, *(end + 1 for end in ends[:-1]), n_steps]
    scores = []
    for end, start, stop in zip(ends, borders, borders[1:]):
        n_stated, n_due, length = sum(is_stated[end]), len(is_stated[end]), stop - start
        scores += [1 + 4 * (n_stated / max(n_due, length / 2))] * length
    return scores


def quote_scores(reply: str, items: list, steps: list, is_outcome: bool) -> list[float] | None:
    """Turn a reply into a score 1..5 for each step, or one score for the outcome.

    For the outcome, the whole attempt is a single stretch. Returns None if the reply contains no
    quotation, or if there are no items.
    """
    found = find_items(reply, items, steps)
    if not found:
        return None
    if is_outcome:
        last = len(steps) - 1
        found = [None if step is None else last for step in found]
    scores = step_scores(found, len(steps))
    return scores[:1] if is_outcome else scores


def code_scores(completion, rubric: str, is_outcome: bool) -> list[float] | None:
    """Score a completion without a judge, as if each of its lines had been quoted."""
    items = list_items(rubric or completion.problem["reference"])
    lines = re.findall(r"^.*\w.*$", completion.text, re.MULTILINE)
    reply = "\n".join(f"0: {line}" for line in lines)
    return quote_scores(reply, items, completion.step_texts, is_outcome)


# ---- The judge -----------------------------------------------------------------------------------
class QuoteJudge(exprl.Judge):
    """A judge that quotes, in place of exprl.Judge: one call per completion under both methods."""

    def request(self, messages, patience):
        """Return the text of one reply. A judge that is asked again reads our ASK_AGAIN."""
        known, ours = judge_prompts.ASK_AGAIN, ASK_AGAIN
        messages = [m | {"content": ours} if m["content"] == known else m for m in messages]
        return super().request(messages, patience)

    def judge(self, completion, rubric_and_reply):
        """Judge one completion -> Verdict. Rewards without a call are those of exprl.Judge."""
        rubric, rubric_reply = rubric_and_reply
        is_outcome = self.kind == "outcome"
        if not re.search(r"\w", completion.text) or (is_outcome and completion.truncated):
            return Verdict([0.0] if is_outcome else [0.0] * len(completion.step_texts))
        if rubric is None:
            return Verdict(None, replies=[rubric_reply])
        items = list_items(rubric or completion.problem["reference"])
        parse_reply = partial(
            quote_scores, items=items, steps=completion.step_texts, is_outcome=is_outcome
        )
        messages = quote_messages(completion.problem, items, completion.text)
        scores, reply = self.ask(messages, parse_reply)
        if scores is None:
            return Verdict(None, rubric, [reply])
        return Verdict([(score - 1) / 4 for score in scores], rubric, [reply])


@dataclass(kw_only=True)
class AnyJudgeSettings(exprl.JudgeSettings):
    """The settings of a judge that gives scores or quotes."""

    judge_input: Literal["together", "prefix", "alone", "quotes"] = option(
        "together",
        "together, prefix, alone: as in exprl.py, which trains with these three. quotes: the judge "
        "quotes the attempt and code makes the score (tests/tools/quotes.py, our extension)",
    )


def make_judge(judging: AnyJudgeSettings, method: str, out: Path) -> exprl.Judge:
    """Make the judge that --judge-input names. `out` is created."""
    out.mkdir(parents=True, exist_ok=True)
    kind_of_judge = QuoteJudge if judging.judge_input == "quotes" else exprl.Judge
    return kind_of_judge(judging, method, out)


# ---- Training with it ----------------------------------------------------------------------------
@dataclass(kw_only=True)
class QuoteTrainingSettings(exprl.TrainingSettings):
    """What is trained, as in exprl.py."""

    method: Literal["process", "outcome"] = option(
        "process", "process: a score for every step. outcome: a score for the whole completion"
    )
    out: str = option("", "run folder; if empty, runs/quotes-METHOD")


@dataclass(kw_only=True)
class QuoteJudgeSettings(exprl.JudgeSettings):
    """The settings of a judge that quotes. They are kept apart from those of other runs."""

    judge_input: Literal["quotes"] = option("quotes", "the only choice here")


def train(training, sampling, judging):
    """Train with a judge that quotes. All other stages are those of exprl.py."""
    training.out = training.out or f"runs/quotes-{training.method}"
    problems = exprl.load_problems(sampling.data, "train", "reference")
    exprl.open_run(Path(training.out), vars(training) | vars(sampling) | vars(judging))
    judge = make_judge(judging, training.method, Path(training.out))
    exprl.train(training, sampling, judging, problems, reward=judge)


if __name__ == "__main__":
    classes = [QuoteTrainingSettings, exprl.SamplingSettings, QuoteJudgeSettings]
    exprl.run_command(train, classes, sys.argv[1:])
