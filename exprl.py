r"""ExpRL in one file: reinforcement learning on problems the model cannot solve yet.

Sparse-reward RL needs a right answer now and then; on hard problems there is none to reinforce.
ExpRL (arXiv 2606.17024) uses each problem's reference solution as a reward scaffold:

  1. sample G completions of each problem; the policy sees the question, never the reference
  2. a judge, an LLM behind an API, compares a completion with the reference and writes a score k
     in 1..5, for all of it (Outcome) or for each of its steps (Process); reward s = (k - 1) / 4
  3. advantages   Outcome: A = (s - mean) / std over the problem's group, the same for each token
                  Process: A_t = s_t - s_(t-1), and A_1 = s_1 - s_T, for the tokens of step t
  4. update: PPO's clipped loss on those advantages + a small KL penalty to the initial policy
  5. after this "mid-training" the same loop with the sparse reward: 1 for a right answer, else 0

Simplified: one device, one batch after the other; no value network, no entropy bonus.

  python exprl.py --model Qwen2.5-0.5B                                       # stage 1 on GSM8K
  python exprl.py --model runs/Qwen2.5-0.5B-process/final --method sparse    # stage 2
  python exprl.py eval --model Qwen2.5-0.5B runs/Qwen2.5-0.5B-process/final  # pass@1, pass@k
  python exprl.py plot runs/Qwen2.5-0.5B-process --out curves.png            # learning curves

The file is in the order of the algorithm. A *question* has a *reference* (hidden) and an *answer*;
the policy gets a *prompt* and writes a *completion* made of *steps*; the judge gives a *score*
(1..5), which makes a *reward* (0..1), which makes an *advantage* for each token in the *mask*.
Shapes: B completions in a batch, G per prompt, P prompt and T completion tokens, V vocabulary.
"""

import argparse
import functools
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
import openai
import torch
from datasets import load_dataset
from math_verify import parse, verify
from matplotlib import pyplot
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

import judge_prompts

# ---- Settings that are no flags; those are at the end --------------------------------------------
POLICY_INSTRUCTION = (  # the one prompt of every method, stage and evaluation
    "Solve the problem by reasoning step by step. Start each step on a new line with ###. "
    r"End with the final answer in \boxed{}."
)
MAX_STEPS = 16  # what follows the 15th step of a completion is one step
JUDGE_OPTIONS = [  # tried in this order until the server refuses none of a set, then remembered
    {"temperature": 0.0, "max_completion_tokens": 2048}, {"temperature": 0.0, "max_tokens": 2048},
    {"max_completion_tokens": 2048}, {"max_tokens": 2048}]
JUDGE_TIMEOUT, JUDGE_RETRIES = 120.0, 4  # seconds a request; repeats after 429, 5xx, a lost line
CHECKPOINT = "checkpoint-" + "[0-9]" * 6  # a pattern of their names
JUDGE_ASKS = 3  # how often a judge is asked until its reply holds a score
COLUMNS = {"question": ("question", "problem", "prompt"), "reference": ("reference", "solution"),
           "answer": ("answer",)}
DATASETS = {"gsm8k": "openai/gsm8k:main", "math": "DigitalLearningGmbH/MATH-lighteval"}
OWNERS = {"qwen": "Qwen", "smollm": "HuggingFaceTB", "llama": "meta-llama", "gemma": "google",
          "meta-llama": "meta-llama", "phi": "microsoft", "olmo": "allenai", "pythia": "EleutherAI",
          "gpt2": "openai-community", "tinyllama": "TinyLlama", "deepseek": "deepseek-ai"}

def stop(message: str) -> NoReturn:
    """End the program with one line that says what is wrong and what to do (exit status 1)."""
    raise SystemExit(f"exprl: {' '.join(message.split())[:500]}")

def groups(items: list, size: int) -> list[list]:
    """Consecutive parts of `size` items; the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]

def read_log(path: Path, strict: bool = False) -> list:
    """The values of a JSON-lines file; a line torn by a crash is left out, or if strict stops."""
    values = []
    for number, line in enumerate(path.read_text("utf-8-sig").rstrip().split("\n"), 1):
        try:
            values.append(json.loads(line))
        except ValueError as error:
            if strict:
                stop(f"{path}, line {number}: is not JSON ({error})")
    return values

def write_log(path: Path, records: list[dict], mode: str = "a") -> None:
    """Append records as JSON lines; with mode "w" replace the file, whole or not at all."""
    target = path.with_suffix(".tmp") if mode == "w" else path
    with target.open(mode, encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    target.replace(path)

# ---- Data: rows of question, reference, answer ---------------------------------------------------
def last_boxed(text: str) -> str:
    r"""The content of the last \boxed{...}, braces balanced; "" if there is none or it is cut off.

    >>> last_boxed(r"so \boxed{1} and then \boxed{\frac{1}{2}}."), last_boxed(r"so \boxed{4")
    ('\\frac{1}{2}', '')
    """
    rest, depth = text.rpartition(r"\boxed{")[2] if r"\boxed{" in text else "", 1
    for i, character in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return rest[:i].strip()
    return ""

def normalise_row(record: object, needed: tuple[str, ...] = ("question", "answer")) -> dict:
    r"""A record with the usual column names -> {"question", "reference", "answer"}, all strings.

    GSM8K has both in one column, MATH the answer in its solution's \boxed{}. ValueError if one of
    what is needed is missing.

    >>> normalise_row({"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"})
    {'question': '1+1?', 'reference': 'It is 2.', 'answer': '2'}
    """
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    row = {}
    for name, columns in COLUMNS.items():
        values = [record.get(c) for c in columns if isinstance(record.get(c), (str, int, float))]
        row[name] = str(values[0]).strip() if values else ""
    solution, _, answer = row["answer"].rpartition("####")
    row["reference"] = row["reference"] or re.sub(r"<<.*?>>", "", solution).strip()
    row["answer"] = answer.strip() or last_boxed(row["reference"])
    missing = [f"{k} (no column {' or '.join(COLUMNS[k])})" for k in needed if not row[k]]
    if missing:
        raise ValueError(f"has no {', no '.join(missing)}")
    return row

def load_rows(source: str, split: str, n: int = 0, needed: tuple = ("question", "answer")) -> list:
    """Rows of gsm8k, math (levels 4 and 5), a JSON-lines file, or a hub id (or folder) [:config].

    `split` is of the hub. n rows, always the same (0: all). Stops at a malformed row, by its line.
    """
    name, _, config = DATASETS.get(source, source).partition(":")
    try:
        if source.endswith(".jsonl") or Path(source).is_file():
            records = read_log(Path(source), strict=True)
        else:
            records = load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub's errors share no class
        stop(f"--data {source}: cannot read it ({split} split): {error}")
    if source == "math":
        records = records.filter(lambda record: record["level"] in ("Level 4", "Level 5"))
    rows = []
    for number, record in enumerate(records, 1):
        try:
            rows.append(normalise_row(record, needed))
        except ValueError as error:
            stop(f"--data {source}, line {number}: {error}")
    order = np.random.default_rng(0).permutation(len(rows))[:n] if n else range(len(rows))
    return [rows[i] for i in order] or stop(f"--data {source} holds no problems")

def is_correct(completion: str, answer: str) -> bool:
    r"""The sparse reward, and accuracy in every log: of the last \boxed{}, else the last number.

    >>> is_correct(r"17, so \boxed{\frac{1}{2}}", "0.5"), is_correct("It costs $1,250.", "1250")
    (True, True)
    >>> is_correct(r"\boxed{3}, or rather 4", "4"), is_correct("four", "4")
    (False, False)
    """
    numbers = re.findall(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?(?:/\d+)?", completion)
    candidate = last_boxed(completion) or (numbers[-1] if numbers else "")
    return bool(candidate) and verify(parse(f"${answer}$"), parse(f"${candidate}$"))

# ---- Policy: loading, prompts, sampling ----------------------------------------------------------
def find_model(name: str) -> tuple:
    """(folder or hub id, tokenizer); a short name gets its owner. Stops if there is none such."""
    known = [owner for family, owner in OWNERS.items() if name.lower().startswith(family)]
    source = f"{known[0]}/{name}" if known and "/" not in name and not Path(name).is_dir() else name
    try:
        return source, AutoTokenizer.from_pretrained(source)
    except Exception as error:
        stop(f"--model {name}: no folder with a model (such as RUN/final), nor on the hub: {error}")

def load_model(source: str):
    """A model on CUDA, MPS or CPU, in float32: at a learning rate of 1e-6 most bf16 weights would
    never move. Every dropout is off: with it the update's log-probs are not the sampler's."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        config = AutoConfig.from_pretrained(source)
        dropouts = [k for k, v in vars(config).items() if "drop" in k and isinstance(v, float)]
        vars(config).update(dict.fromkeys(dropouts, 0.0))
        model = AutoModelForCausalLM.from_pretrained(source, config=config, dtype=torch.float32)
    except Exception as error:  # of many libraries: no configuration, torn weights, ...
        stop(f"the model {source} cannot be loaded: {error}")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(False):  # else: emulated
        model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)
    print(f"model: {source}, {model.num_parameters() / 1e6:.4g}M float32 parameters on {device}")
    return model.to(device).eval()

def policy_prompt(tokenizer, question: str) -> list[int]:
    """Instruction and question as token ids: all the policy sees. It takes no reference."""
    text = f"{POLICY_INSTRUCTION}\n\n{question}"  # as one turn: not every chat has a system role
    if not tokenizer.chat_template:
        return tokenizer(f"{text}\n\nSolution:\n").input_ids
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False).input_ids  # the template has written the BOS

def tokenize_rows(rows: list[dict], tokenizer, limit: int) -> list[dict]:
    """Rows with their "prompt_ids"; those of more than `limit` tokens are dropped and counted."""
    rows = [row | {"prompt_ids": policy_prompt(tokenizer, row["question"])} for row in rows]
    kept = [row for row in rows if len(row["prompt_ids"]) <= limit]
    if len(kept) < len(rows):
        print(f"dropped {len(rows) - len(kept)} problems with prompts of over {limit} tokens")
    return kept or stop(f"every prompt has over {limit} tokens: raise --max-prompt-tokens")

@torch.no_grad()
def set_sampling(model, tokenizer, prompt_ids: list[int], temperature: float, cap: int) -> None:
    """Make `generate` sample from softmax(logits / temperature), and end at every eos there is.

    A checkpoint brings its own top_k, top_p and penalties (Qwen2.5: 20, .8, 1.1), the library its
    top_k of 50: what is sampled would not be what is trained. Stops unless the scores it samples
    from are the logits / temperature. An eos is of tokenizer, generation config, or what the chat
    template writes after a turn: for Qwen2.5's base model <|im_end|>, beside its <|endoftext|>.
    """
    configured = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "ANSWER"}]
        tail = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
        after = tokenizer(tail, add_special_tokens=False).input_ids[:1]
        ends |= set(after) & set(tokenizer.added_tokens_decoder)
    eos_ids = sorted(ends - {None}) or stop("the model has no end-of-sequence token")
    pad_id = eos_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, max_new_tokens=cap,
        eos_token_id=eos_ids, pad_token_id=pad_id)
    ids = torch.tensor([prompt_ids], device=model.device)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4,
                         output_scores=True, output_logits=True, return_dict_in_generate=True)
    for scores, logits in zip(out.scores, out.logits, strict=True):
        if not torch.allclose(scores, logits / temperature, atol=1e-4):
            stop("`generate` samples from something else than softmax(logits / temperature)")

def completion_mask(tokens: torch.Tensor, eos_ids: set[int]) -> torch.Tensor:
    """(B, T) completion ids -> (B, T) bool: True up to and including the first eos.

    Not `tokens != pad`: pad may be the same token as eos, and no policy would learn to stop.

    >>> completion_mask(torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8]]), {2}).int().tolist()
    [[1, 1, 0, 0], [1, 1, 1, 1]]
    """
    ends = torch.tensor(sorted(eos_ids), dtype=tokens.dtype, device=tokens.device)
    is_eos = torch.isin(tokens, ends).long()
    return is_eos.cumsum(dim=1) - is_eos == 0  # no eos strictly before

def pad_left(sequences: list[list], device: torch.device, value: float = 0) -> torch.Tensor:
    """Lists of numbers -> (B, longest), padded on the left: all end in the last column."""
    rows = [torch.tensor(sequence) for sequence in sequences]
    return pad_sequence(rows, True, value, "left").to(device)

@dataclass
class Completion:
    """One completion, and all that becomes known of it on the way to the update."""
    row: dict  # question, reference, answer, prompt_ids
    ids: list[int]  # T token ids, up to and including the first eos
    text: str
    correct: bool
    cut: bool  # ended by the length cap
    steps: list[tuple[int, int]]  # token spans
    step_texts: list[str]
    verdict: Future | None = None  # of (scores, judge, rubric), from a thread
    judge: list[str] = field(default_factory=list)  # the judge's words, one for each call
    rubric: str = ""  # the checkpoints it was judged by
    scores: list[int] | None = None  # 1..5 for each step, or one in all; None: the judge failed
    rewards: list[float] | None = None  # 0..1, as the scores
    advantages: list[float] = field(default_factory=list)  # for each step

@torch.no_grad()
def sample_groups(model, tokenizer, rows: list, n: int, batch: int) -> list[list[Completion]]:
    """n completions of each row, `batch` at a time; decoded, split, their answers checked."""
    completions, settings = [], model.generation_config
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    for part in groups([row for row in rows for _ in range(n)], batch):
        prompts = [row["prompt_ids"] for row in part]
        input_ids = pad_left(prompts, model.device, settings.pad_token_id)
        attention_mask = pad_left([[1] * len(prompt) for prompt in prompts], model.device)
        tokens = model.generate(input_ids, attention_mask=attention_mask)[:, input_ids.shape[1] :]
        masks = completion_mask(tokens, set(settings.eos_token_id))
        for row, completion, mask in zip(part, tokens, masks, strict=True):
            ids = completion[mask].tolist()
            text, steps = decode(ids), split_steps([decode([token]) for token in ids])
            correct, cut = is_correct(text, row["answer"]), ids[-1] not in settings.eos_token_id
            parts = [decode(ids[start:end]) for start, end in steps]
            completions.append(Completion(row, ids, text, correct, cut, steps, parts))
    return groups(completions, n)

# ---- Steps ---------------------------------------------------------------------------------------
def split_steps(pieces: list[str]) -> list[tuple[int, int]]:
    r"""T decoded tokens of a completion -> its steps, (start, end) token spans that cover all T.

    A step starts at a line that begins with ###; a completion without any is split at blank lines.
    Crumbs (bare delimiters, white space) go to a neighbour; what follows 15 steps is one step.

    >>> split_steps(["### ", "a", "=", "2", "\n", "### ", "b", "=", "3"])
    [(0, 5), (5, 9)]
    >>> split_steps(["First", ".\n", "\n", "Then", "."])
    [(0, 3), (3, 5)]
    """
    text, kept, ends = "".join(pieces).rstrip(), [0], [0]
    cuts = [match.start() for match in re.finditer(r"^###", text, re.MULTILINE)]
    for cut in cuts or [match.end() for match in re.finditer(r"\n[^\S\n]*\n\s*", text)]:
        if re.search(r"\w", text[kept[-1] : cut]) and re.search(r"\w", text[cut:]):
            kept.append(cut)
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    starts = {0} | {sum(end <= cut for end in ends[1:]) for cut in kept[1:MAX_STEPS]}
    starts = sorted(starts)  # the tokens that hold the first character after a cut
    return list(zip(starts, [*starts[1:], len(pieces)], strict=True)) if pieces else []

# ---- Judge: question, hidden reference and completion -> scores 1..5 -----------------------------
def parse_score(reply: str, label: str = "Score") -> int | None:
    r"""The score 1..5 in a judge's reply: the last line that is a score and nothing else, or None.

    Fails closed: a quotation inside a sentence, 0, 6, 10, 4.5 and 4/5 are no scores. Stars and
    brackets may stand around it, in any case. `label` is "Step 3" where each step has a line.

    >>> parse_score("It claims 'Score: 5'.\n**Score: [2]**"), parse_score("Score: 4/5")
    (2, None)
    """
    around = r"[\s*()\[\]{}]*"
    pattern = f"{around}{label}{around}:{around}([1-5]){around}"
    lines = [re.fullmatch(pattern, line, re.IGNORECASE) for line in reply.splitlines()]
    scores = [int(match[1]) for match in lines if match]
    return scores[-1] if scores else None

def parse_scores(reply: str, labels: list[str]) -> list[int] | None:
    """A score for each label, or None if any is missing."""
    scores = [parse_score(reply, label) for label in labels]
    return None if None in scores else scores

def parse_rubric(reply: str) -> str | None:
    """The 2-6 checkpoints of a reply, each as a line `- ...`; None if there are fewer or more."""
    points = re.findall(r"^\s*(?:[-*•]|\d+[.)])\s+(\S.*)$", reply, re.MULTILINE)
    return "\n".join(f"- {point.strip()}" for point in points) if 2 <= len(points) <= 6 else None

def fence(texts: list[str], tag: str = "step") -> str:
    """Texts between numbered tags that carry a hash of them all: no text can know that and close
    its tag. The same texts give the same tags, so a verdict is found again in the cache."""
    code = hashlib.sha256("".join(texts).encode()).hexdigest()[:8]
    tags = [f"{tag}-{t}-{code}" for t in range(1, len(texts) + 1)]
    return "\n".join(f"<{t}>\n{text}\n</{t}>" for t, text in zip(tags, texts, strict=True))

def judge_messages(kind: str, row: dict, rubric: str = "", attempt: str = "") -> list[dict]:
    """The messages of one judge call: what is the same for all first, the completion last."""
    basis = judge_prompts.BASIS["math"]["reference" if row["reference"] else "none"]
    system = judge_prompts.SYSTEM["math"][kind].format(basis=basis, **judge_prompts.SHARED)
    texts = (row["question"], row["reference"], rubric, attempt)
    sections = zip(judge_prompts.USER, texts, strict=True)
    user = "\n".join(section.format(text=text) for section, text in sections if text)
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]

def judge_calls(completion: Completion, kind: str) -> list[tuple[str, list[str]]]:
    """(fenced text, labels of its scores) of each judge call that a completion needs.

    together: all steps in one call. prefix: each step with those before it. alone: by itself.
    """
    steps = completion.step_texts
    if kind == "outcome":
        return [(fence([completion.text], "attempt"), ["Score"])]
    if kind == "together":
        return [(fence(steps), [f"Step {t + 1}" for t in range(len(steps))])]
    if kind == "prefix":
        return [(fence(steps[: t + 1]), ["Score"]) for t in range(len(steps))]
    return [(fence([step]), ["Score"]) for step in steps]

class Judge:
    """A judge behind an OpenAI-compatible API, asked from threads; every verdict is kept on disk.

    A verdict that fails is None, never a low score. Stops unless the server takes the key (it is
    asked for its models, which costs nothing). `paid` counts calls and tokens.
    """

    def __init__(self, model: str, url: str, threads: int, max_calls: int, cache: Path):
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        url = url or os.environ.get("OPENAI_BASE_URL") or (key and "https://api.openai.com/v1")
        if not url:
            stop("no judge: set OPENAI_API_KEY, or give --judge-url http://HOST:PORT/v1")
        if re.search(r"[^!-~]", key):
            stop("OPENAI_API_KEY holds a character that no key has")
        self.model, self.name = model, f"the judge {model} at {url}"
        self.max_calls, self.cache_path = max_calls, cache
        self.options, self.asked, self.last_error = JUDGE_OPTIONS, False, ""
        self.paid = dict.fromkeys(("judge_calls", "prompt_tokens", "completion_tokens"), 0)
        self.lock, self.pool = threading.Lock(), ThreadPoolExecutor(threads)
        cache.open("a").write("\n")  # ends a line that a crash has torn
        self.cache = {record["key"]: record["reply"] for record in read_log(cache)}
        try:
            self.client = openai.OpenAI(base_url=url, api_key=key or "none", timeout=JUDGE_TIMEOUT,
                                        max_retries=JUDGE_RETRIES)
            self.client.with_options(max_retries=1, timeout=20).models.with_raw_response.list()
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):  # else: some servers list no models
                stop(f"{self.name} refuses the key in OPENAI_API_KEY: {error}")
        except Exception as error:  # no connection, no URL, ...
            stop(f"{self.name} cannot be reached: {error.__cause__ or error}")

    def start(self, task: Callable, *arguments) -> Future:
        """Run a task in a thread; the first request of all alone, to learn what is refused."""
        is_first, future = not self.asked, self.pool.submit(task, *arguments)
        if is_first:
            future.result()
        return future

    def submit(self, group: list[Completion], kind: str, with_rubric: bool) -> None:
        """Hand the completions of one problem to the threads; equal ones share a verdict."""
        messages, verdicts = judge_messages("rubric", group[0].row), {}
        rubric = self.start(self.ask, messages, parse_rubric) if with_rubric else None
        for c in group:
            key = (c.cut, *c.step_texts)
            verdicts[key] = verdicts.get(key) or self.start(self.judge, c, kind, rubric)
            c.verdict = verdicts[key]

    def judge(self, c: Completion, kind: str, rubric: Future | None) -> tuple:
        """(scores or None, the judge's words, checkpoints) of one completion, in a thread."""
        if not re.search(r"\w", c.text) or (kind == "outcome" and c.cut):
            return [1] * (1 if kind == "outcome" else len(c.steps)), [], ""  # needs no call
        checkpoints, reply = rubric.result() if rubric else ("", "")
        scores, words = [], [] if checkpoints is not None else [reply]
        for attempt, labels in judge_calls(c, kind) if checkpoints is not None else []:
            messages = judge_messages(kind, c.row, checkpoints, attempt)
            new, reply = self.ask(messages, functools.partial(parse_scores, labels=labels))
            words.append(reply)
            if new is None:
                return None, words, checkpoints
            scores += new
        return scores or None, words, checkpoints

    def ask(self, messages: list[dict], parse: Callable) -> tuple:
        """(parse(reply), reply), from the cache or the server; (None, words) if it fails."""
        settings = json.dumps([self.model, JUDGE_OPTIONS[0], messages])
        key = hashlib.sha256(settings.encode()).hexdigest()
        if key in self.cache:
            return parse(self.cache[key]), self.cache[key]
        for _ in range(JUDGE_ASKS):
            try:
                reply = self.request(messages)
            except Exception as error:  # of the API, or of a reply that is none
                self.last_error = f"{type(error).__name__}: {error}"
                return None, f"(no verdict: {error})"
            if parse(reply) is not None:
                with self.lock:
                    self.cache[key] = reply
                    write_log(self.cache_path, [{"key": key, "reply": reply}])
                return parse(reply), reply
            again = {"role": "user", "content": judge_prompts.NO_SCORE}
            messages = [*messages[:2], {"role": "assistant", "content": reply or "(empty)"}, again]
        self.last_error = f"no score in its reply {reply!r}"
        return None, reply

    def request(self, messages: list[dict]) -> str:
        """The text of a paid reply, asked with the first options that the server takes."""
        with self.lock:
            if self.max_calls and self.paid["judge_calls"] >= self.max_calls:
                stop(f"--max-judge-calls {self.max_calls} reached: raise it and --resume to go on")
            self.asked, self.paid["judge_calls"] = True, self.paid["judge_calls"] + 1
        left = self.options
        for options in left:
            try:
                reply = self.client.chat.completions.create(
                    model=self.model, messages=messages, **options)
                break
            except openai.APIStatusError as error:
                if error.status_code in (401, 403, 404):
                    stop(f"{self.name}: {error}")
                if error.status_code not in (400, 422) or options is left[-1]:
                    raise
        usage, choices = getattr(reply, "usage", None), getattr(reply, "choices", None)
        with self.lock:
            for name in ("prompt_tokens", "completion_tokens"):
                self.paid[name] += getattr(usage, name, 0) or 0
            self.options = [options] if choices else self.options
        return str(choices[0].message.content or "") if choices else ""

# ---- Advantages ----------------------------------------------------------------------------------
def group_advantages(rewards: torch.Tensor, valid: torch.Tensor, group_size: int) -> torch.Tensor:
    """(B,) rewards, (B,) bool valid -> (B,) advantages A_i = (r_i - mean) / (std + eps), by group.

    Groups are consecutive blocks of G = group_size. mean and std (n - 1) are those of the group's
    valid members; the others get 0, and so does a group with fewer than two valid or no variance.
    Raises ValueError if B is no multiple of G. For ExpRL-Outcome and the sparse reward (GRPO).

    >>> A = group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.ones(4).bool(), 2)
    >>> [round(a, 4) for a in A.tolist()]
    [0.7071, -0.7071, 0.0, 0.0]
    """
    if rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not make groups of {group_size}")
    advantages = torch.zeros_like(rewards)
    for begin in range(0, rewards.numel(), group_size):
        members = begin + valid[begin : begin + group_size].nonzero().flatten()
        r = rewards[members]
        if len(r) > 1 and r.max() > r.min():
            advantages[members] = (r - r.mean()) / (r.std() + 1e-6)
    return advantages

def step_advantages(step_rewards: list[list[float]], norm: str) -> list[list[float]]:
    """One group's step rewards s_1..s_T, a list per completion -> advantages of the same shape.

    delta: A_t = s_t - s_(t-1), A_1 = s_1 - s_T   what a step added; sums to 0, one step gets 0
    end:   A_t = s_t - s_T for t < T, A_T = s_T
    group: A_t = s_t - mean over the group's completions of (mean over the completion's steps)
    No standard deviation. Judged completions only. ValueError for another norm. ExpRL-Process.

    >>> step_advantages([[0.25, 0.5, 1.0], [0.75]], "delta")
    [[-0.75, 0.25, 0.5], [0.0]]
    >>> step_advantages([[0.25, 0.5, 1.0], [0.75]], "end")
    [[-0.75, -0.5, 1.0], [0.75]]
    >>> step_advantages([[0.0, 1.0], [0.0]], "group")
    [[-0.25, 0.75], [-0.25]]
    """
    if norm == "delta":
        return [[s[t] - s[t - 1] for t in range(len(s))] for s in step_rewards]  # s[-1] is s_T
    if norm == "end":
        return [[r - s[-1] for r in s[:-1]] + s[-1:] for s in step_rewards]
    if norm == "group":
        means = [sum(s) / len(s) for s in step_rewards if s]
        return [[r - sum(means) / len(means) for r in s] for s in step_rewards]
    raise ValueError(f"norm {norm!r} is not delta, end or group")

def fill_advantages(completions: list[Completion], args: argparse.Namespace) -> None:
    """Give each step of each completion its advantage. This is all in which the methods differ.

    A completion whose judgement failed gets none, and leaves the baseline and the loss.
    """
    for c in completions:
        if args.method == "sparse":
            c.rewards = [float(c.correct)]
        elif c.scores is not None:
            c.rewards = [(score - 1) / 4 for score in c.scores]
    if args.method == "process":
        for group in groups(completions, args.group_size):
            group = [c for c in group if c.rewards is not None]
            by_step = step_advantages([c.rewards for c in group], args.process_norm)
            for c, advantages in zip(group, by_step, strict=True):
                c.advantages = advantages
    else:
        rewards = torch.tensor([c.rewards[0] if c.rewards else 0.0 for c in completions])
        valid = torch.tensor([c.rewards is not None for c in completions])
        advantages = group_advantages(rewards, valid, args.group_size).tolist()
        for c, advantage in zip(completions, advantages, strict=True):
            c.advantages = [advantage] * len(c.steps)

# ---- Loss ----------------------------------------------------------------------------------------
def token_logprobs(model, input_ids: torch.Tensor, attention_mask: torch.Tensor,
                   n_completion: int, temperature: float) -> torch.Tensor:
    """log pi(y_t | x, y_<t) = log_softmax(logits / temperature)[y_t] -> (B, T) float32.

    input_ids, attention_mask (0: padding) are (B, P + T), n_completion is T. The float32 softmax is
    taken a row (T, V) at a time, and again in the backward pass: (B, T, V) stands in memory once.
    """
    logits = model(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False,
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp(min=0),  # padding takes no position
        logits_to_keep=n_completion + 1,
    ).logits[:, -n_completion - 1 : -1]  # (B, T, V): the logits at t - 1 predict token t
    def row_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:  # -> (T,)
        return torch.log_softmax(logits.float() / temperature, -1).gather(1, tokens[:, None])[:, 0]
    rows = zip(logits, input_ids[:, -n_completion:], strict=True)
    return torch.stack([checkpoint(row_logprobs, *row, use_reentrant=False) for row in rows])

def policy_loss(logp: torch.Tensor, logp_old: torch.Tensor, advantages: torch.Tensor,
                mask: torch.Tensor, clip_low: float, clip_high: float,
                denominator: float) -> torch.Tensor:
    """PPO's clipped loss, per token: logp, logp_old, advantages, bool mask (B, T) -> scalar.

    L = - sum over the mask of min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) / denominator,
    rho = exp(logp - logp_old). The denominator is the number of tokens in the whole optimizer step:
    with one for each micro-batch, gradient accumulation would change the loss. At rho = 1 the
    value is minus the mean advantage, often 0: what counts is its gradient.

    >>> old, ones = torch.tensor([[0.5, 0.5]]).log(), torch.ones(1, 2)
    >>> logp = torch.tensor([[0.5, 0.9]]).log()  # rho is 1 and 1.8, the second clipped at 1.28
    >>> round(policy_loss(logp, old, ones, ones.bool(), 0.2, 0.28, 2).item(), 3)
    -1.14
    """
    rho = torch.exp(torch.where(mask, logp - logp_old, 0.0))  # (B, T); padding may hold anything
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(rho * advantages, clipped * advantages)
    return -torch.where(mask, objective, 0.0).sum() / denominator

def kl_to_reference(logp: torch.Tensor, logp_ref: torch.Tensor) -> torch.Tensor:
    """(B, T) k3 estimate of KL(policy || initial policy) at each sampled token, in nats, never < 0.

    k3 = r - 1 - log r, r = pi_ref(y_t) / pi(y_t): its mean over the policy's own samples is the KL.

    >>> kl_to_reference(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -1.0]]))
    tensor([[0.0000, 0.3679]])
    """
    log_r = logp_ref - logp
    return torch.expm1(log_r) - log_r  # exp(x) - 1 would round to less than x

# ---- Training ------------------------------------------------------------------------------------
def collate(completions: list[Completion], model) -> dict[str, torch.Tensor]:
    """A micro-batch: input_ids, attention_mask (B, P + T); advantages, mask (B, T)."""
    pad = functools.partial(pad_left, device=model.device)
    sequences = [c.row["prompt_ids"] + c.ids for c in completions]
    return {
        "input_ids": pad(sequences, value=model.generation_config.pad_token_id),
        "attention_mask": pad([[1] * len(sequence) for sequence in sequences]),
        "advantages": pad([[a for a, (start, end) in zip(c.advantages, c.steps, strict=True)
                            for _ in range(start, end)] for c in completions]),
        "mask": pad([[True] * len(c.ids) for c in completions]),
    }

def update(model, initial, optimizer, completions: list[Completion], args) -> dict[str, float]:
    """The optimizer steps on one batch; returns means over its tokens at the last of them."""
    trained = [c for c in completions if c.rewards is not None]
    trained.sort(key=lambda c: len(c.row["prompt_ids"]) + len(c.ids))  # little padding
    batches = [collate(part, model) for part in groups(trained, args.micro_batch)]
    n_tokens = sum(len(c.ids) for c in trained)
    model.train()  # no dropout is left in it; gradient checkpointing works only in this mode
    for _ in range(args.updates_per_batch):
        sums = dict.fromkeys(("entropy", "kl", "ratio", "clip_fraction"), 0.0)
        for batch in batches:
            mask, a = batch["mask"], batch["advantages"]
            inputs = (batch["input_ids"], batch["attention_mask"], mask.shape[1], args.temperature)
            logp = token_logprobs(model, *inputs)
            if "old" not in batch:  # no weight has moved since these were sampled
                batch["old"] = logp.detach()
                batch["ref"] = token_logprobs(initial, *inputs) if initial else batch["old"]
            old = batch["old"]
            kl = torch.where(mask, kl_to_reference(logp, batch["ref"]), 0.0).sum() / n_tokens
            loss = policy_loss(logp, old, a, mask, args.clip_low, args.clip_high, n_tokens)
            (loss + args.kl * kl).backward()
            rho = torch.exp(logp.detach() - old)
            clipped = (rho > 1 + args.clip_high) & (a > 0) | (rho < 1 - args.clip_low) & (a < 0)
            sums["entropy"] -= old[mask].sum().item() / n_tokens  # E[-log pi] over its own samples
            sums["kl"] += kl.item() if initial else math.nan  # unknown without the initial model
            sums["ratio"] += rho[mask].sum().item() / n_tokens
            sums["clip_fraction"] += clipped[mask].sum().item() / n_tokens
        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return sums

def measure(completions: list[Completion], group_size: int) -> dict[str, float]:
    """What a batch says. Watch `accuracy` beside `reward`: a widening gap is reward hacking."""
    rewards = [np.mean(c.rewards) for c in completions if c.rewards is not None]
    silent = [not any(any(c.advantages) for c in g) for g in groups(completions, group_size)]
    numbers = {
        "reward": np.mean(rewards),
        "reward_std": np.std(rewards),
        "accuracy": np.mean([c.correct for c in completions]),
        "no_signal": np.mean(silent),
        "cut": np.mean([c.cut for c in completions]),
        "judge_failed": np.mean([c.rewards is None for c in completions]),
        "length": np.mean([len(c.ids) for c in completions]),
    }
    return {name: float(number) for name, number in numbers.items()}

def save_model(folder: Path, model, tokenizer, state: dict | None = None) -> None:
    """A model folder, with the trainer's state for --resume, written whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    if state:
        torch.save(state, partial / "trainer.pt")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)

def open_run(args: argparse.Namespace) -> tuple[int, Path | None]:
    """(steps done, checkpoint or None) of the run in --out. Stops if there is one and no --resume,
    or if it had other settings."""
    out, found = Path(args.out), None
    out.mkdir(parents=True, exist_ok=True)
    if (out / "settings.json").exists():
        if not args.resume:
            stop(f"{out} holds a run: add --resume to go on with it, or give another --out")
        before = json.loads((out / "settings.json").read_text())
        for name, value in vars(args).items():
            if not name.startswith(MAY_CHANGE) and before.get(name, value) != value:
                stop(f"{out} was started with {name} {before[name]}, not {value}")
        found = max(out.glob(CHECKPOINT), default=None)
    done = int(found.name[-6:]) if found else 0
    if done > args.steps:
        stop(f"{out} has done {done} steps already, more than --steps {args.steps}")
    for path in (out / "metrics.jsonl", out / "rollouts.jsonl"):  # forget what came later
        path.touch()
        write_log(path, [r for r in read_log(path) if found and r["step"] <= done], "w")
    return done, found

def train(args: argparse.Namespace) -> None:
    """Train a model with ExpRL or the sparse reward: sample, judge, advantage, update."""
    needed = ("question", "answer") if args.method == "sparse" else tuple(COLUMNS)
    rows, eval_rows, judge = load_rows(args.data, "train", needed=needed), [], None
    kind = "outcome" if args.method == "outcome" else args.judge_input
    if args.eval_every and not args.eval_data and Path(args.data).is_file():
        stop(f"--eval-every needs --eval-data: the file {args.data} has no test split")
    if args.eval_every:
        eval_rows = load_rows(args.eval_data or args.data, "test", args.eval_problems)
    name = Path(args.model.rstrip("/").removesuffix("/final")).name
    args.out = args.out or f"runs/{name}-{args.method}"
    out, (done, found) = Path(args.out), open_run(args)
    if args.method != "sparse":
        judge = Judge(args.judge_model, args.judge_url, args.judge_threads, args.max_judge_calls,
                      out.parent / "judge_cache.jsonl")  # the runs of a folder share it
    source, tokenizer = find_model(args.model)
    rows = tokenize_rows(rows, tokenizer, args.max_prompt_tokens)
    eval_rows = eval_rows and tokenize_rows(eval_rows, tokenizer, args.max_prompt_tokens)
    if args.prompts_per_step > len(rows):
        stop(f"--prompts-per-step {args.prompts_per_step}: {args.data} has {len(rows)} problems")
    model = load_model(str(found or source))
    initial = load_model(source).requires_grad_(False) if args.kl else None
    set_sampling(model, tokenizer, rows[0]["prompt_ids"], args.temperature, args.max_new_tokens)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    if found:
        state = torch.load(found / "trainer.pt", map_location=model.device)
        optimizer.load_state_dict(state["optimizer"])
    paid = judge.paid if judge else {}
    paid |= state["paid"] if found else {}
    stage_1 = Path(args.model).parent / "settings.json"
    before = json.loads(stage_1.read_text()) if stage_1.exists() else {}
    settings = vars(args) | {"sampling": model.generation_config.to_diff_dict(),
                             "steps_before": before.get("steps_before", 0) + before.get("steps", 0)}
    write_log(out / "settings.json", [settings], "w")
    print(f"run: {out}, {args.method}, {len(rows)} problems, {done} of {args.steps} steps done")
    if judge:  # say what it will be asked, before it is, as if nothing were cached
        calls = args.group_size * (MAX_STEPS if kind in ("prefix", "alone") else 1) + 1
        calls *= (args.steps - done) * args.prompts_per_step
        tokens = len(str(judge_messages(kind, rows[0]))) / 4 + args.max_new_tokens + 400
        print(f"{judge.name}: up to {calls:,} calls, more if replies lack a score, roughly "
              f"{calls * tokens / 1e6:.1f}M tokens; verdicts are kept in {judge.cache_path}")

    def save(step: int) -> None:
        newest, state = out / f"checkpoint-{step:06d}", {"optimizer": optimizer.state_dict()}
        save_model(newest, model, tokenizer, state | {"paid": paid})
        for folder in set(out.glob(CHECKPOINT)) - {newest}:
            shutil.rmtree(folder, ignore_errors=True)

    def hold_out(step: int) -> None:
        path = out / f"eval-{step:06d}.jsonl"
        rates = evaluate(model, tokenizer, eval_rows, args.eval_samples, args, path)
        write_log(out / "metrics.jsonl", [{"step": step, "eval": rates}])
    saved = whole = done  # last step on disk; last that is complete in memory, None in mid-update
    bar = tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps, desc=args.method)
    try:
        if eval_rows and not found:
            hold_out(0)
        for step in bar:
            torch.manual_seed(args.seed * 1_000_003 + step)  # resumed, it draws what this one draws
            rng = np.random.default_rng([args.seed, step])
            chosen = rng.choice(len(rows), args.prompts_per_step, replace=False)
            clock, completions, n = [time.monotonic()], [], args.group_size
            for part in groups([rows[i] for i in chosen], max(1, args.sample_batch // n)):
                for group in sample_groups(model, tokenizer, part, n, args.sample_batch):
                    completions += group
                    if judge:  # it reads these while others are sampled
                        judge.submit(group, kind, args.rubric == "checkpoints")
            clock.append(time.monotonic())
            for c in completions if judge else []:
                c.scores, c.judge, c.rubric = c.verdict.result()
            clock.append(time.monotonic())
            fill_advantages(completions, args)
            failed = sum(c.rewards is None for c in completions)
            if failed > len(completions) / 2:
                stop(f"{judge.name} failed on {failed} of {len(completions)} completions: --resume "
                     f"when it is mended. Its last error: {judge.last_error}")
            whole, held = None, []  # Ctrl-C waits for the end of the update
            signal.signal(signal.SIGINT, lambda *_, held=held: held.append(True))
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, step / 5)  # warm-up
            metrics = {"step": step} | measure(completions, n) | paid
            metrics |= update(model, initial, optimizer, completions, args)
            if not math.isfinite(metrics["grad_norm"]):
                stop(f"step {step}: the gradient is no number; lower --lr, or raise --kl")
            clock.append(time.monotonic())
            phases = zip(("sample", "judge", "update"), np.diff(clock).tolist(), strict=True)
            metrics |= {f"seconds_{phase}": seconds for phase, seconds in phases}
            write_log(out / "metrics.jsonl", [metrics])
            write_log(out / "rollouts.jsonl", [
                {"step": step, "prompt": tokenizer.decode(c.row["prompt_ids"])}
                | {key: value for key, value in (c.row | vars(c)).items()
                   if key not in ("row", "verdict", "ids", "prompt_ids")} for c in completions])
            whole = step
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if held:
                raise KeyboardInterrupt
            bar.set_postfix({k: f"{metrics[k]:.3f}" for k in ("reward", "accuracy")} | paid)
            if eval_rows and (step % args.eval_every == 0 or step == args.steps):
                hold_out(step)
            if step % args.save_every == 0 or step == args.steps:
                save(step)
                saved = step
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        bar.close()
        if judge:
            judge.pool.shutdown(wait=False, cancel_futures=True)  # calls on their way end, are kept
        if whole is not None and whole > saved:
            save(whole)  # also after an error or Ctrl-C
    save_model(out / "final", model, tokenizer)
    print(f"trained model: {out / 'final'}; every completion: {out / 'rollouts.jsonl'}")

# ---- Evaluation ----------------------------------------------------------------------------------
def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of P(one of k completions is right), from n completions of which c are.

    pass@k = 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, eq. 1). Raises
    ValueError unless 0 <= c <= n and 1 <= k <= n.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(4, 0, 4), pass_at_k(4, 3, 2)
    (0.25, 0.5, 0.0, 1.0)
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@k needs 0 <= c <= n and 1 <= k <= n, not n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)

def pass_rates(counts: list[dict]) -> dict[str, list[float]]:
    """{"pass@1": [mean, low, high], "pass@2": ...}, with 95% bootstrap intervals over problems."""
    rates, rng, n = {}, np.random.default_rng(0), counts[0]["n"]
    drawn = rng.integers(len(counts), size=(2000, len(counts)))  # 2000 times, with replacement
    for k in [2**i for i in range(n.bit_length())]:
        values = np.array([pass_at_k(n, record["correct"], k) for record in counts])
        interval = np.percentile(values[drawn].mean(axis=1), [2.5, 97.5])
        rates[f"pass@{k}"] = [float(number) for number in (values.mean(), *interval)]
    return rates

def evaluate(model, tokenizer, rows: list[dict], n: int, args, path: Path) -> dict:
    """Sample each problem n times -> pass_rates. Counts per problem go to `path` as they come."""
    counts = []
    write_log(path, counts, "w")
    bar = tqdm(groups(rows, max(1, args.sample_batch // n)), f"eval, {n} samples each", leave=False)
    for number, part in enumerate(bar):
        torch.manual_seed(args.seed * 1_000_003 + number)
        for group in sample_groups(model, tokenizer, part, n, args.sample_batch):
            counts.append({key: group[0].row[key] for key in COLUMNS} | {
                "n": n, "correct": sum(c.correct for c in group), "cut": sum(c.cut for c in group)})
        write_log(path, counts[-len(part) :])
        bar.set_postfix(accuracy=f"{np.mean([c['correct'] for c in counts]) / n:.3f}")
    return pass_rates(counts)

def evaluate_models(args: argparse.Namespace) -> None:
    """Evaluate models: a table of pass@1 and pass@k, and optionally the problems that one fails."""
    if args.save_hard and len(args.model) > 1:
        stop("--save-hard takes one --model: hard for whom?")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.save_hard:
        write_log(Path(args.save_hard), [])  # can it be written?
    models, table = {name: find_model(name) for name in args.model}, {}
    chosen = load_rows(args.data, args.split, args.problems)
    for name, (source, tokenizer) in models.items():
        rows = tokenize_rows(chosen, tokenizer, args.max_prompt_tokens)
        path = Path(args.out) / (name.strip("./").replace("/", "-") + ".jsonl")
        model = load_model(source)
        set_sampling(model, tokenizer, rows[0]["prompt_ids"], args.temperature, args.max_new_tokens)
        table[name] = evaluate(model, tokenizer, rows, args.samples, args, path)
        print(f"{name}: pass@1 {table[name]['pass@1'][0]:.1%}; counts per problem: {path}")
    if args.save_hard:
        hard = [row for row in read_log(path) if row["correct"] <= args.max_rate * row["n"]]
        write_log(Path(args.save_hard), [{key: row[key] for key in COLUMNS} for row in hard], "w")
        print(f"{args.save_hard}: {len(hard)} of {len(rows)} problems, solved at most "
              f"{args.max_rate:.0%} of the time")
    width = max(map(len, [*table, "model"]))
    print("\nmeans over problems, with 95% bootstrap intervals")
    print(f"{'model':{width}}" + "".join(f"{k + ', %':>20}" for k in table[name]))
    for name, rates in table.items():
        cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*100 * np.array(r)) for r in rates.values()]
        print(f"{name:{width}}" + "".join(f"{cell:>20}" for cell in cells))

# ---- Figures -------------------------------------------------------------------------------------
def plot(args: argparse.Namespace) -> None:
    """Draw the learning curves of runs in one figure, those of stage 2 after those of stage 1."""
    panels = {"reward": "reward", "accuracy": "exact-match accuracy (dots, if any: held-out)",
              "no_signal": "groups without signal", "length": "completion length (tokens)",
              "kl": "KL to the run's initial policy (nats per token)", "cut": "completions cut"}
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained")
    for i, run in enumerate(map(Path, args.run)):
        log = read_log(run / "metrics.jsonl")
        steps = [record for record in log if "reward" in record]
        if not steps:
            stop(f"{run} holds no run with a step in its metrics.jsonl")
        before = json.loads((run / "settings.json").read_text())["steps_before"]
        x, window = [before + record["step"] for record in steps], max(1, len(steps) // 20)
        for axis, (name, title) in zip(axes.flat, panels.items(), strict=True):
            y = [record[name] for record in steps]
            axis.plot(x, y, color=f"C{i}", alpha=0.2)
            smooth = np.convolve(y, np.ones(window) / window, "valid")
            axis.plot(x[window - 1 :], smooth, color=f"C{i}", label=run.name)
            axis.set(title=title, xlabel="step")
        held_out = [(before + r["step"], r["eval"]["pass@1"][0]) for r in log if "eval" in r]
        axes.flat[1].plot(*np.array(held_out).reshape(-1, 2).T, f"C{i}o")
    axes.flat[0].legend()
    figure.savefig(args.out, dpi=120)
    print(f"figure: {args.out}")

# ---- Command line --------------------------------------------------------------------------------
FLAGS = [  # commands, flag, default (None: required), smallest value or choices, meaning
    ("train", "--model", None, None, "hub id, short name (Qwen2.5-0.5B) or folder (RUN/final)"),
    ("eval", "--model", None, "+", "one or more: hub ids, short names, folders (RUN/final)"),
    ("plot", "run", None, "+", "run folders"),
    ("train", "--method", "process", ("process", "outcome", "sparse"), "what makes the rewards"),
    ("train eval", "--data", "gsm8k", None, "gsm8k, math, FILE.jsonl or HUB_ID[:CONFIG]"),
    ("train", "--out", "", None, "run folder (default: runs/MODEL-METHOD)"),
    ("eval", "--out", "runs/eval", None, "folder for the counts per problem"),
    ("plot", "--out", "curves.png", None, "the figure: .png, .pdf or .svg"),
    ("train", "--resume", False, None, "go on with the run in --out, exactly, if there is one"),
    ("train", "--judge-model", "gpt-4.1-mini", None, "the judge's name at its API"),
    ("train", "--judge-url", "", None, "its OpenAI-compatible API (or $OPENAI_BASE_URL, OpenAI)"),
    ("train", "--judge-input", "together", ("together", "prefix", "alone"), "steps in a call"),
    ("train", "--rubric", "checkpoints", ("checkpoints", "none"), "made of each reference first"),
    ("train", "--process-norm", "delta", ("delta", "end", "group"), "baseline of a step's reward"),
    ("train", "--judge-threads", 16, 1, "judge calls at a time"),
    ("train", "--max-judge-calls", 0, 0, "stop after so many paid calls; 0: no limit"),
    ("train", "--steps", 200, 1, "batches to train on"),
    ("train", "--prompts-per-step", 8, 1, "problems in a batch"),
    ("train", "--group-size", 8, 2, "completions of a problem, which an advantage compares"),
    ("train", "--updates-per-batch", 1, 1, "optimizer steps on each batch"),
    ("train", "--lr", 1e-6, 0, "learning rate of AdamW, constant after a short warm-up"),
    ("train", "--kl", 0.001, 0, "weight of the KL to the initial policy; 0: none is loaded"),
    ("train", "--clip-low", 0.2, 0, "the ratio is clipped at 1 - X"),
    ("train", "--clip-high", 0.28, 0, "the ratio is clipped at 1 + X"),
    ("train", "--micro-batch", 4, 1, "completions in one backward pass"),
    ("train", "--gradient-checkpointing", False, None, "less memory for more time"),
    ("train", "--save-every", 10, 1, "steps between checkpoints"),
    ("train", "--eval-every", 0, 0, "steps between evaluations; 0: none"),
    ("train", "--eval-data", "", None, "held-out problems (default: the test split of --data)"),
    ("train", "--eval-problems", 128, 0, "how many of them; 0: all"),
    ("train", "--eval-samples", 8, 1, "completions of each"),
    ("eval", "--split", "test", ("train", "test"), "of a data set of the hub"),
    ("eval", "--problems", 200, 0, "how many of them; 0: all"),
    ("eval", "--samples", 8, 1, "completions of each"),
    ("eval", "--save-hard", "", None, "write the problems that the model fails here, for --data"),
    ("eval", "--max-rate", 0.0, 0, "failed: solved by at most this share of the completions"),
    ("train eval", "--max-new-tokens", 512, 1, "length cap of a completion"),
    ("train eval", "--max-prompt-tokens", 512, 1, "problems with longer prompts are dropped"),
    ("train eval", "--temperature", 0.8, 0.01, "of the policy"),
    ("train eval", "--sample-batch", 64, 1, "completions in one call of generate"),
    ("train eval", "--seed", 0, 0, "of sampling and of the order of problems"),
]
COMMANDS = {"train": train, "eval": evaluate_models, "plot": plot}
MAY_CHANGE = (  # on --resume; another value of any other flag would make it another run
    "resume", "steps", "out", "judge_url", "judge_threads", "max_judge_calls", "micro_batch",
    "gradient_checkpointing", "save_every", "eval")

def at_least(text: str, kind: type, smallest: float) -> float:
    """An argparse type: a finite number that is not too small."""
    try:
        value = kind(text)
    except ValueError:
        value = -math.inf
    if not smallest <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no {kind.__name__} of {smallest} or more")
    return value

def parse_flags(argv: list[str]) -> argparse.Namespace:
    """The flags of a command, from the table above; wrong ones end the program (status 2)."""
    parser = argparse.ArgumentParser(
        "exprl.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    subs = {name: subparsers.add_parser(name, help=run.__doc__, description=run.__doc__,
                                        allow_abbrev=False) for name, run in COMMANDS.items()}
    is_train = argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help")
    for names, flag, default, limit, meaning in FLAGS:
        given = {"help": f"{meaning} (default: {default})" if default else meaning}
        if flag.startswith("-"):
            given |= {"default": default, "required": default is None}
        if default is False:
            given["action"] = "store_true"
        elif type(default) in (int, float):
            given["type"] = functools.partial(at_least, kind=type(default), smallest=limit)
        else:
            given |= {"nargs": limit} if limit == "+" else {"choices": limit}
        for name in names.split():
            subs[name].add_argument(flag, **given)
    return parser.parse_args(["train", *argv] if is_train else argv)

def main(argv: list[str] | None = None) -> None:
    """Run a command; without one, `train`."""
    args = parse_flags(sys.argv[1:] if argv is None else argv)
    logging.disable_progress_bar()
    try:
        COMMANDS[args.command](args)
    except KeyboardInterrupt:
        stop("interrupted; a training run goes on from its last checkpoint with --resume")
    except torch.OutOfMemoryError:
        stop("out of memory: lower --sample-batch; in training, --micro-batch too")
    except OSError as error:
        stop(str(error))

if __name__ == "__main__":
    main()
