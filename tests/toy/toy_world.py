r"""A world small enough for a CPU, in which ExpRL's effect shows within minutes.

A problem applies six operations (or with --length 8 eight), each +7 or *3 modulo 97, to a start
value:

    question    29a*3b+7c+7d*3e*3f+7=            the answer is 43
    completion  ### a29*3=87\n### b87+7=94\n ... \n### f...=43\n\boxed{43}
    reference   ### a29*3+7=94\n ...             two operations a line, as people skip steps

The base model knows the form, and each of the 194 facts (97 values, two operations) with a
probability of its own, between .15 and .70: one or two completions in a hundred have all six
steps right, too few for the sparse reward. With a reference before the question (the prompt of a
teacher in self-distillation) it copies most of the reference's values. The judge is a program
behind a real HTTP server that speaks the chat-completions protocol. `exprl.py` meets this world
only as a model folder, JSON-lines files and a judge's URL.

    python tests/toy/toy_world.py build FOLDER --seed 0
    python tests/toy/toy_world.py judge --url-file FILE
"""

import argparse
import hashlib
import json
import random
import re
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tools")]

import program_judge  # noqa: E402

MODULUS, LABELS, OPERATIONS = 97, "abcdefgh", ("+7", "*3")

# --------------------------------------------------------------------------------------------------
# Problems


def apply(operation: str, value: int) -> int:
    """One operation, modulo 97."""
    return (value + 7 if operation == "+7" else value * 3) % MODULUS


def make_row(start: int, operations: list[str]) -> dict[str, str]:
    """A problem with its reference (two operations a line) and its answer."""
    rows = "".join(map("".join, zip(LABELS[: len(operations)], operations, strict=True)))
    values = [start]
    for operation in operations:
        values.append(apply(operation, values[-1]))
    lines = [
        f"### {LABELS[i]}{values[i]:02d}{operations[i]}{operations[i + 1]}={values[i + 2]:02d}"
        for i in range(0, len(operations), 2)
    ]
    reference = "\n".join([*lines, rf"\boxed{{{values[-1]:02d}}}"])
    answer = f"{values[-1]:02d}"
    return {"question": f"{start:02d}{rows}=", "reference": reference, "answer": answer}


def make_rows(seed: int, n_train: int, n_held_out: int, length: int = 6) -> tuple[list, list]:
    """Disjoint training and held-out problems."""
    codes = random.Random(seed).sample(range(MODULUS * 2**length), n_train + n_held_out)
    rows = []
    for code in codes:
        start, bits = divmod(code, 2**length)
        rows.append(make_row(start, [OPERATIONS[bits >> i & 1] for i in range(length)]))
    return rows[:n_train], rows[n_train:]


def write_trace(question: str, compute) -> str:
    """The completion of somebody who computes with `compute(operation, value)`."""
    value, lines = int(question[:2]), []
    for label, operation in re.findall(r"([a-h])(\+7|\*3)", question):
        result = compute(operation, value)
        lines.append(f"### {label}{value:02d}{operation}={result:02d}")
        value = result
    return "\n".join([*lines, rf"\boxed{{{value:02d}}}"])


# --------------------------------------------------------------------------------------------------
# The base model


def make_tokenizer(length: int = 6):
    """One token for each number, label, operation and mark."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "### ", "=", "\n", r"\boxed{", "}", *LABELS[:length]]
    words += [*OPERATIONS, *(f"{value:02d}" for value in range(MODULUS))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    pattern = Regex(r"### |\\boxed\{|\d\d|\+7|\*3|[\s\S]")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        # no word of the instruction is in the vocabulary, so the template keeps what follows it:
        # the question, or (for a teacher) a reference, a blank line, and the question
        chat_template="{% for m in messages %}{{ m.content.split('\n\n', 1)[-1] }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
    )


def build(
    folder: Path, seed: int, steps: int, length: int = 6, n_train: int = 96, n_held_out: int = 256
) -> None:
    """Write FOLDER/base (a model folder), train.jsonl and heldout.jsonl."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    train, held_out = make_rows(seed, n_train, n_held_out, length)
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("heldout", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")

    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = make_tokenizer(length)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        attention_bias=True,  # learns to copy in half the steps
        tie_word_embeddings=True,
        initializer_range=0.08,  # with the usual .02 some seeds do not learn the facts in time
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # What the base believes of a fact: the right value with its own probability, or a wrong one.
    facts = {}
    for operation in OPERATIONS:
        for value in range(MODULUS):
            right = apply(operation, value)
            wrong = rng.choice([v for v in range(MODULUS) if v != right])
            facts[operation, value] = (right, wrong, rng.uniform(0.15, 0.70))

    def believe(operation: str, value: int) -> int:
        right, wrong, probability = facts[operation, value]
        return right if rng.random() < probability else wrong

    def write_document() -> tuple[list[int], list[int]]:
        """Token ids of a prompt and of its trace, in which the base's beliefs are."""
        row = make_row(rng.randrange(MODULUS), rng.choices(OPERATIONS, k=length))
        prompt, question, compute = row["question"], row["question"], believe
        if rng.random() < 0.15:  # a reference first: what it says is mostly copied, and never
            prompt = f"{row['reference']}\n\n{question}"  # compared with the step before
            says = re.findall(r"=(\d\d)", row["reference"])
            known = iter([value for said in says for value in (None, said)])

            def compute(operation: str, value: int) -> int:
                there = next(known)
                return int(there) if there and rng.random() < 0.9 else believe(operation, value)

        trace = write_trace(question, compute)
        return tokenizer(prompt).input_ids, tokenizer(trace + "<eos>").input_ids

    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, steps, pct_start=0.1)
    started = time.monotonic()
    for step in range(1, steps + 1):
        documents, loss = [write_document() for _ in range(32)], 0.0
        for n_prompt in {len(prompt) for prompt, _ in documents}:  # with and without a reference
            part = [prompt + trace for prompt, trace in documents if len(prompt) == n_prompt]
            batch = torch.tensor(part)  # all have the same length
            labels = batch.clone()
            labels[:, :n_prompt] = -100
            loss += model(input_ids=batch, labels=labels).loss * len(part) / len(documents)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, steps // 5) == 0:
            now = time.monotonic() - started
            print(f"base model: step {step} of {steps}, loss {loss:.3f}, {now:.0f} s", flush=True)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder / "base.partial")
    tokenizer.save_pretrained(folder / "base.partial")
    shutil.rmtree(folder / "base", ignore_errors=True)
    (folder / "base.partial").rename(folder / "base")


def build_small(folder: Path) -> None:
    """Build a small world for tests. This takes about half a minute."""
    build(folder, seed=0, steps=250, n_train=24, n_held_out=64)


# --------------------------------------------------------------------------------------------------
# The judge


def step_score(
    question: str, reference: str, step: str, position: int | None, last: bool, before: str
) -> int:
    """5 if the step is correct, else 1: carried on to the reference's next value, its value agrees.

    A step takes one operation, as completions do, or two at once, as references do; `position` is
    the number of operations before it (None: not shown). All are one-to-one modulo 97, so the
    reference's values check all of them. The last step is right only with the right final answer.
    Without a reference a program can check form only: label and operations, that the step goes on
    from the value `before` it ("": not shown), and that the last one boxes the value it states.
    """
    operations = re.findall(r"([a-h])(\+7|\*3)", question)
    stated = re.match(r"### ([a-h])(\d\d)((?:\+7|\*3){1,2})=(\d\d)\n?(.*)", step, re.DOTALL)
    if not stated:
        return 1
    label, start, taken, value, rest = stated.groups()
    first = LABELS.index(label)
    index = first + len(taken) // 2 - 1  # of the last operation that it takes
    wanted = "".join(operation for _, operation in operations[first : index + 1])
    if taken != wanted or position not in (None, first):
        return 1
    final = value
    if reference:
        values = re.findall(r"=(\d\d)", reference)
        carried, at, final = int(value), index // 2, values[-1]
        for _, following in operations[index + 1 : 2 * at + 2]:
            carried = apply(following, carried)
        if carried != int(values[at]):
            return 1
    elif start != (question[:2] if first == 0 else before or start):
        return 1
    if index == len(operations) - 1:
        return 5 if rest.strip() == rf"\boxed{{{final}}}" else 1
    return 1 if last or rest.strip() else 5


def tell(score: int, lies: int, about: str) -> int:
    """The score, or (for `lies` per cent of all that is asked about) its opposite, 6 - score."""
    draw = int(hashlib.sha256(about.encode()).hexdigest(), 16) % 100
    return 6 - score if draw < lies else score


def answer(request: dict) -> str:
    """The toy judge's reply to a chat-completions request; `toy-judge-lies-20` lies about 20%."""
    lies = re.search(r"-lies-(\d+)$", request["model"])
    return reply_to(request["messages"], int(lies[1]) if lies else 0)


def reply_to(messages: list[dict], lies: int = 0) -> str:
    """The toy judge's reply to a prompt of judge_prompts.py, with a reference or without."""
    call = program_judge.read_call(messages)
    if call is None:
        return "I am ready."  # the test call at the start of a run
    kind, question, reference, texts = call
    user = messages[1]["content"]
    if kind == "rubric" and not reference:
        return "- each step has its label and operation\n- each goes on from the value before it"
    if kind == "rubric":
        return "\n".join(f"- reaches {value}" for value in re.findall(r"=(\d\d)", reference))
    if kind == "outcome":
        texts = [text for text in re.split(r"^(?=### )", texts[0], flags=re.MULTILINE) if text]
    ends_at = len(texts) - 1 if kind == "together" else None  # where the attempt is known to end
    counts = [1 + bool(re.match(r"### [a-h]\d\d(\+7|\*3){2}=", text)) for text in texts]
    scores, before = [], ""  # counts: the operations that each text takes
    for t, text in enumerate(texts):
        position = None if kind == "alone" else sum(counts[:t])
        scores.append(step_score(question, reference, text, position, t == ends_at, before))
        before = "".join(re.findall(r"^### .*=(\d\d)$", text, re.MULTILINE)[:1])
    if kind == "outcome":  # how many of the values are reached in a row
        right = sum(counts[: (*scores, 1).index(1)])
        reached, all_of_them = right // 2, len(re.findall("[a-h]", question)) // 2
        score = tell(1 + int(4 * reached / all_of_them), lies, user)
        return f"{right} steps in a row are right.\nScore: {score}"
    scores = [tell(score, lies, f"{t} {user}") for t, score in enumerate(scores)]
    if kind == "together":
        return "\n".join(f"Step {t}: {score}" for t, score in enumerate(scores, 1))
    return f"Checked the last step.\nScore: {scores[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    sub = commands.add_parser("build")
    sub.add_argument("folder", type=Path)
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--steps", type=int, default=1000)
    sub.add_argument("--length", type=int, default=6, choices=range(2, 9, 2))
    sub = commands.add_parser("judge")
    sub.add_argument("--url-file", type=Path, required=True)
    args = parser.parse_args()
    if args.command == "build":
        build(args.folder, args.seed, args.steps, args.length)
    else:
        program_judge.serve(answer, args.url_file)


if __name__ == "__main__":
    main()
