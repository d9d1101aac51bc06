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
  python exprl.py calibrate --judge-model gpt-4.1-mini       # can this judge be trained against?
  python exprl.py report runs/Qwen2.5-0.5B-process           # curves, and completions to read

The file is in the order of the algorithm. A *question* has a *reference* (hidden) and an *answer*;
the policy gets a *prompt* and writes a *completion* made of *steps*; the judge gives a *score*
(1..5), which makes a *reward* (0..1), which makes an *advantage* for each token in the *mask*.
Shapes: B completions in a batch, G per prompt, P prompt and T completion tokens, V vocabulary.
"""

import argparse
import functools
import hashlib
import io
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import openai
import regex
import torch
from datasets import load_dataset
from jinja2 import Template
from math_verify import parse, verify
from matplotlib import colors, pyplot
from pandas import DataFrame
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

import judge_prompts
from judge_prompts import ATTACK, fence, judge_messages

# ---- Settings without a flag; the flags are at the end -------------------------------------------
MAX_STEPS = 16  # what follows the 15th step of a completion is one step
JUDGE_OPTIONS = [  # tried in this order until the server refuses none of a set, then remembered
    heat | {limit: 2048} for heat in ({"temperature": 0.0}, {})
    for limit in ("max_tokens", "max_completion_tokens")]  # some servers ignore the latter
JUDGE_TIMEOUT, JUDGE_RETRIES, JUDGE_ASKS = 120.0, 4, 3  # s; of a lost request; until it scores
COLUMNS = {"question": ("question", "problem", "prompt"), "reference": ("reference", "solution"),
           "answer": ("answer",), "domain": ("domain",)}
JUDGED, OTHERS = ("process", "outcome"), ("sparse", "sft", "distill")  # methods, by their rewards
DATASETS = {"gsm8k": "openai/gsm8k:main", "math": "DigitalLearningGmbH/MATH-lighteval"}
OWNERS = {"qwen": "Qwen", "smollm": "HuggingFaceTB", "llama": "meta-llama", "gemma": "google",
          "meta-llama": "meta-llama", "phi": "microsoft", "olmo": "allenai", "pythia": "EleutherAI"}

def stop(message: str) -> None:
    """End the program with one line that says what is wrong and what to do (exit status 1)."""
    raise SystemExit(f"exprl: {' '.join(message.split())[:500]}")
def chunks(items: list, size: int) -> list[list]:
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

# ---- Data: rows of question, reference, answer, domain -------------------------------------------
def last_boxed(text: str) -> str:
    r"""The content of the last \boxed{...}, with its braces balanced; "" if there is none."""
    return (regex.findall(r"\\boxed(\{(?:[^{}]|(?1))*\})", text) or ["{}"])[-1][1:-1].strip()
def normalise_row(record: object, needed: tuple[str, ...], domain: str) -> dict[str, str]:
    r"""A record with the usual column names -> its question, reference, answer and domain.
    In GSM8K two are in one column, in MATH the answer is in a \boxed{}. ValueError: malformed."""
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    row = {name: next((str(record[column]).strip() for column in columns
                       if isinstance(record.get(column), (str, int, float))), "")
           for name, columns in COLUMNS.items()}
    solution, _, answer = row["answer"].rpartition("####")
    row["reference"] = row["reference"] or re.sub(r"<<.*?>>", "", solution).strip()
    row["answer"] = answer.strip() or last_boxed(row["reference"])
    row["domain"] = row["domain"] or domain
    missing = [f"has no {k} (no column {' or '.join(COLUMNS[k])})" for k in needed if not row[k]]
    if missing:
        raise ValueError(", ".join(missing))
    if row["domain"] not in judge_prompts.SYSTEM:
        raise ValueError(f"has the domain {row['domain']}, not {' or '.join(judge_prompts.SYSTEM)}")
    return row
def load_rows(source: str, split: str, n=0, needed=("question", "answer"), domain="math") -> list:
    """n rows, always the same (0: all), of gsm8k, math (levels 4 and 5), a JSON-lines file, or a
    hub id (or folder) [:config], there of a split. Stops at a malformed row, by its line."""
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
            rows.append(normalise_row(record, needed, domain))
        except ValueError as error:
            stop(f"--data {source}, line {number}: {error}")
    order = np.random.default_rng(0).permutation(len(rows))[:n] if n else range(len(rows))
    return [rows[i] for i in order] or stop(f"--data {source} holds no problems")
def show_reference(rows: list[dict], which: str, seed: int) -> list[dict]:
    """Rows with the right reference, none, or a wrong one, of the row a fixed distance before."""
    if which == "wrong" and len(rows) < 2:
        stop("a wrong reference is another problem's: give two problems or more")
    shift = np.random.default_rng(seed).integers(1, len(rows)) if which == "wrong" else 0
    return [row | {"reference": "" if which == "none" else rows[i - shift]["reference"]}
            for i, row in enumerate(rows)]
def is_correct(completion: str, answer: str) -> bool:
    r"""The sparse reward, and accuracy in every log: of the last \boxed{}, else the last number."""
    numbers = re.findall(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?(?:/\d+)?", completion)
    candidate = last_boxed(completion) or (numbers[-1] if numbers else "")
    return bool(candidate) and verify(parse(f"${answer}$"), parse(f"${candidate}$"))

# ---- Policy: loading, prompts, sampling ----------------------------------------------------------
def find_model(name: str) -> tuple:
    """(folder or hub id, tokenizer); a short name gets its owner. Stops if there is no model."""
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
def policy_prompt(tokenizer, question: str, reference: str = "") -> list[int]:
    """All that the policy sees, as token ids. Only the teacher of distill is given a reference."""
    parts = [judge_prompts.TEACHER, reference] if reference else [judge_prompts.POLICY]
    text = "\n\n".join([*parts, question])  # one turn: not every chat has a system role
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
    A checkpoint brings top_k, top_p, penalties (Qwen2.5: 20, .8, 1.1), the library a top_k of 50.
    An eos is the tokenizer's, the configuration's, or what the chat template has after a turn."""
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
def load_policy(source: str, tokenizer, rows: list[dict], args) -> tuple:
    """(a model that is ready to sample, the rows with their prompt_ids)."""
    rows = tokenize_rows(rows, tokenizer, args.max_prompt_tokens)
    if len(rows) < getattr(args, "prompts_per_step", 0):
        stop(f"--prompts-per-step {args.prompts_per_step}: {args.data} has {len(rows)} problems")
    model = load_model(source)
    set_sampling(model, tokenizer, rows[0]["prompt_ids"], args.temperature, args.max_new_tokens)
    return model, rows
def completion_mask(tokens: Tensor, eos_ids: set[int]) -> Tensor:
    """(B, T) completion ids -> (B, T) bool: True up to and including the first eos.
    Not `tokens != pad`: pad may be the same token as eos, and no policy would learn to stop.
    >>> completion_mask(torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8]]), {2}).int().tolist()
    [[1, 1, 0, 0], [1, 1, 1, 1]]
    """
    ends = torch.tensor(sorted(eos_ids), dtype=tokens.dtype, device=tokens.device)
    is_eos = torch.isin(tokens, ends).long()
    return is_eos.cumsum(dim=1) - is_eos == 0  # no eos strictly before
def pad_left(sequences: list[list], device: torch.device, value: float = 0) -> Tensor:
    """Lists of numbers -> (B, longest), padded on the left: all end in the last column."""
    return pad_sequence([torch.tensor(row) for row in sequences], True, value, "left").to(device)
@dataclass
class Completion:
    """One completion, and all that becomes known of it on the way to the update."""
    row: dict  # question, reference, answer, domain, prompt_ids
    ids: list[int]  # T token ids, up to and including the first eos
    text: str
    correct: bool | None  # None: there is no answer to compare with
    cut: bool  # ended by the length cap
    steps: list[tuple[int, int]]  # token spans
    step_texts: list[str]
    judge_words: list[str] = field(default_factory=list)  # a reply for each call
    rubric: str = ""  # the checkpoints it was judged by
    scores: list[int] | None = None  # 1..5 for each step, or one in all; None: the judge failed
    rewards: list[float] | None = None  # 0..1, as the scores
    advantages: list[float] = field(default_factory=list)  # for each step
def read_completion(row: dict, ids: list[int], tokenizer, eos_ids: list[int]) -> Completion:
    """Token ids decoded, split into steps, the answer checked."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    text, steps = decode(ids), split_steps([decode([token]) for token in ids])
    correct = is_correct(text, row["answer"]) if row["answer"] else None
    parts = [decode(ids[start:end]) for start, end in steps]
    return Completion(row, ids, text, correct, ids[-1] not in eos_ids, steps, parts)
@torch.no_grad()
def sample_groups(model, tokenizer, rows: list, n: int, batch: int) -> Iterator[list[Completion]]:
    """n completions of each row, a group a row, `batch` completions at a time."""
    eos_ids, pad_id = model.generation_config.eos_token_id, model.generation_config.pad_token_id
    for some in chunks(rows, max(1, batch // n)):
        completions = []
        for part in chunks([row for row in some for _ in range(n)], batch):
            prompts = [row["prompt_ids"] for row in part]
            attention_mask = pad_left([[1] * len(prompt) for prompt in prompts], model.device)
            ids = pad_left(prompts, model.device, pad_id)
            tokens = model.generate(ids, attention_mask=attention_mask)[:, ids.shape[1] :]
            masks = completion_mask(tokens, set(eos_ids))
            completions += [read_completion(row, ids[mask].tolist(), tokenizer, eos_ids)
                            for row, ids, mask in zip(part, tokens, masks, strict=True)]
        yield from chunks(completions, n)
def read_references(rows: list[dict], tokenizer, settings: GenerationConfig) -> list[list]:
    """What SFT has in place of samples: reference + eos, cut where a sample would be."""
    ends, eos, sampled = settings.eos_token_id, tokenizer.eos_token_id, []
    for row in rows:
        ids = tokenizer(row["reference"], add_special_tokens=False).input_ids
        ids = [*ids, ends[0] if eos is None else eos][: settings.max_new_tokens]
        sampled.append([read_completion(row | {"answer": ""}, ids, tokenizer, ends)])
    return sampled

# ---- Steps ---------------------------------------------------------------------------------------
def split_steps(pieces: list[str]) -> list[tuple[int, int]]:
    r"""T decoded tokens of a completion -> its steps, (start, end) token spans that cover all T.
    A step starts at the beginning and at each line that begins with ### (not indented); without any
    such line, after each blank line. Crumbs (bare delimiters, white space) go to a neighbour, a
    token across a border to the later step; what follows 15 steps is one step. No tokens: [].
    >>> split_steps(["### ", "a", "=", "2", "\n", "### ", "b", "=", "3"])
    [(0, 5), (5, 9)]
    """
    text, starts, ends = "".join(pieces).rstrip(), [0], np.cumsum([0, *map(len, pieces)])
    cuts = [match.start() for match in re.finditer(r"^###", text, re.MULTILINE)]
    for cut in cuts or [match.end() for match in re.finditer(r"\n[^\S\n]*\n\s*", text)]:
        start = int(np.searchsorted(ends[1:], cut, "right"))  # the token that holds the border
        before, after = text[ends[starts[-1]] : ends[start]], text[ends[start] :]
        if re.search(r"\w", before) and re.search(r"\w", after):
            starts.append(start)
    spans = zip(starts[:MAX_STEPS], [*starts[1:MAX_STEPS], len(pieces)], strict=True)
    return list(spans) if pieces else []

# ---- Judge: question, hidden reference and completion -> scores 1..5 -----------------------------
def parse_score(reply: str, label: str = "Score") -> int | None:
    r"""The score 1..5 in a judge's reply: the last line that is a score and nothing else, or None.
    Fails closed: a quotation, 0, 6, 10, 4.5 and 4/5 are no scores. Blanks, stars and brackets
    ([{}]) may stand around label and number, quotation marks and > may not; capitals or not is all
    the same. `label` is "Step 3" where each step has a line.
    >>> parse_score("It claims 'Score: 5'.\n**Score: [2]**"), parse_score("Score: 4/5")
    (2, None)
    """
    around = r"[\s*()\[\]{}]*"
    pattern = f"{around}{label}{around}:{around}([1-5]){around}"
    lines = [re.fullmatch(pattern, line, re.IGNORECASE) for line in reply.splitlines()]
    return ([int(match[1]) for match in lines if match] or [None])[-1]
def parse_rubric(reply: str) -> str | None:
    """The 2-6 checkpoints of a reply, each as a line `- ...`; None if there are fewer or more."""
    points = re.findall(r"^\s*(?:[-*•]|\d+[.)])\s+(\S.*)$", reply, re.MULTILINE)
    return "\n".join(f"- {point.strip()}" for point in points) if 2 <= len(points) <= 6 else None
class Judge:
    """A judge behind an OpenAI-compatible API, asked from threads; every verdict is kept on disk.
    A verdict that fails is None, never a low score. Stops if no server answers or takes the key."""
    def __init__(self, args: argparse.Namespace, folder: Path):
        key, url = os.environ.get("OPENAI_API_KEY", "").strip(), args.judge_url
        url = url or os.environ.get("OPENAI_BASE_URL") or (key and "https://api.openai.com/v1")
        if not url:
            stop("no judge: set OPENAI_API_KEY, or give --judge-url http://HOST:PORT/v1")
        if re.search(r"[^!-~]", key):
            stop("OPENAI_API_KEY holds a character that no key has")
        self.args, self.name = args, f"the judge {args.judge_model} at {url}"
        self.options, self.last_error, self.repeat = JUDGE_OPTIONS, "", ""  # repeat: ask anew
        self.paid = dict.fromkeys(("judge_calls", "prompt_tokens", "completion_tokens"), 0)
        self.lock, self.pool = threading.Lock(), ThreadPoolExecutor(args.judge_threads)
        folder.mkdir(parents=True, exist_ok=True)
        self.cache_path = folder / "judge_cache.jsonl"
        self.cache_path.open("a").write("\n")  # ends a line that a crash has torn
        self.cache = {record["key"]: record["reply"] for record in read_log(self.cache_path)}
        try:
            self.client = openai.OpenAI(base_url=url, api_key=key or "none", timeout=JUDGE_TIMEOUT,
                                        max_retries=JUDGE_RETRIES)
            self.client.with_options(max_retries=1, timeout=20).models.with_raw_response.list()
        except openai.APIStatusError as error:
            if error.status_code in (401, 403):  # else: some servers list no models
                stop(f"{self.name} refuses the key in OPENAI_API_KEY: {error}")
        except Exception as error:  # no connection, no URL, ...
            stop(f"{self.name} cannot be reached: {error.__cause__ or error}")
    def announce(self, calls: int, kind: str, row: dict) -> None:
        """Say how much it will be asked, as if nothing were cached."""
        tokens = calls * (len(str(judge_messages(kind, row))) / 4 + self.args.max_new_tokens + 400)
        print(f"{self.name}: up to {calls:,} calls (more if replies lack a score), roughly "
              f"{tokens / 1e6:.1f}M tokens; verdicts are kept in {self.cache_path}")
    def submit(self, group: list[Completion], kind: str) -> list[Future]:
        """Hand the completions of one problem to the threads -> their (scores, words, rubric)."""
        rubric = self.args.rubric == "checkpoints" and self.pool.submit(
            self.ask, judge_messages("rubric", group[0].row), parse_rubric)
        return [self.pool.submit(self.judge, c, kind, rubric) for c in group]
    def judge(self, c: Completion, kind: str, rubric: Future | bool) -> tuple:
        """(scores or None, the judge's words, checkpoints) of one completion, in a thread. Calls:
        one in all (outcome, together), or a step, with those before it (prefix) or not (alone)."""
        texts = [c.text] if kind == "outcome" else c.step_texts
        if not re.search(r"\w", c.text) or (kind == "outcome" and c.cut):
            return [1] * len(texts), [], ""  # needs no call
        checkpoints, reply = rubric.result() if rubric else ("", "")
        if checkpoints is None:
            return None, [reply], ""
        calls = {"together": [texts], "prefix": [texts[: t + 1] for t in range(len(texts))]}
        labels = [f"Step {t + 1}" for t in range(len(texts))] if kind == "together" else ["Score"]
        scores, words = [], []
        def parse(reply: str) -> list[int] | None:
            found = [parse_score(reply, label) for label in labels]
            return None if None in found else found
        for call in calls.get(kind, [[text] for text in texts]):
            new, reply = self.ask(judge_messages(kind, c.row, checkpoints, fence(call)), parse)
            words.append(reply)
            if new is None:
                return None, words, checkpoints
            scores += new
        return scores, words, checkpoints
    def ask(self, messages: list[dict], parse: Callable) -> tuple:
        """(parse(reply), reply), from the cache or the server; (None, words) if it fails."""
        settings = json.dumps([self.args.judge_model, JUDGE_OPTIONS[0], messages]) + self.repeat
        key = hashlib.sha256(settings.encode()).hexdigest()
        if key in self.cache:
            return parse(self.cache[key]), self.cache[key]
        for _ in range(JUDGE_ASKS):
            try:
                reply = self.request(messages)
            except Exception as error:  # of the API (its words are in the body), or a broken reply
                self.last_error = f"{type(error).__name__}: {getattr(error, 'body', None) or error}"
                return None, f"(no verdict: {self.last_error})"
            if parse(reply) is not None:
                with self.lock:
                    self.cache[key] = reply
                    write_log(self.cache_path, [{"key": key, "reply": reply}])
                return parse(reply), reply
            again = {"role": "user", "content": judge_prompts.ASK_AGAIN}
            messages = [*messages[:2], {"role": "assistant", "content": reply or "(empty)"}, again]
        self.last_error = f"no score in its reply {reply!r}"
        return None, reply
    def request(self, messages: list[dict]) -> str:
        """The text of a paid reply, asked with the first options that the server takes."""
        limit, left = self.args.max_judge_calls, self.options
        with self.lock:
            if limit and self.paid["judge_calls"] >= limit:
                stop(f"--max-judge-calls {limit} reached: raise it (to train: and --resume)")
            self.paid["judge_calls"] += 1
        for options in left:
            try:
                reply = self.client.chat.completions.create(
                    model=self.args.judge_model, messages=messages, **options)
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
        return str((choices and choices[0].message.content) or "").encode(errors="replace").decode()

# ---- Advantages ----------------------------------------------------------------------------------
def group_advantages(rewards: Tensor, valid: Tensor, group_size: int, divide=True) -> Tensor:
    """(B,) rewards, (B,) bool valid -> (B,) advantages A = (r - mean) / (std + 1e-6), by group.
    Groups are consecutive blocks of G = group_size. mean and std (n - 1) are those of the group's
    valid members; the others get 0, and so does a group with fewer than two valid or no variance.
    Without `divide`, A_i = r_i - mean. ValueError if B is no multiple of G. ExpRL-Outcome; GRPO.
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
            advantages[members] = (r - r.mean()) / (r.std() + 1e-6 if divide else 1)
    return advantages
def step_advantages(step_rewards: list[list[float]], norm: str) -> list[list[float]]:
    """ExpRL-Process: a group's step rewards s_1..s_T, a list per completion -> advantages alike.
    delta: A_t = s_t - s_(t-1), A_1 = s_1 - s_T   what a step added; sums to 0, one step gets 0
    end:   A_t = s_t - s_T for t < T, A_T = s_T
    group: A_t = s_t - mean over the group's completions of (mean over the completion's steps)
    No standard deviation. Judged completions only; none gives []. ValueError for another norm.
    >>> [step_advantages([[0.25, 1.0], [0.5]], norm) for norm in ("delta", "end", "group")]
    [[[-0.75, 0.75], [0.0]], [[-0.75, 1.0], [0.5]], [[-0.3125, 0.4375], [-0.0625]]]
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
    """Give each step its advantage; where the judgement failed it gets none, and is in no loss."""
    for c in completions:
        if c.scores is not None:
            c.rewards = [(score - 1) / 4 for score in c.scores]
        elif args.method in OTHERS:
            c.rewards = [math.nan if c.correct is None else float(c.correct)]
            c.advantages = [1.0] * len(c.steps)  # sft and distill: all tokens alike
    if args.method == "process":
        for group in chunks(completions, args.group_size):
            valid = [c for c in group if c.rewards is not None]
            by_step = step_advantages([c.rewards for c in valid], args.process_norm)
            for c, advantages in zip(valid, by_step, strict=True):
                c.advantages = advantages
    elif args.method in ("outcome", "sparse"):
        rewards = torch.tensor([c.rewards[0] if c.rewards else 0.0 for c in completions])
        valid = torch.tensor([c.rewards is not None for c in completions])
        advantages = group_advantages(rewards, valid, args.group_size, not args.no_std)
        for c, advantage in zip(completions, advantages.tolist(), strict=True):
            c.advantages = [advantage] * len(c.steps)

# ---- Loss ----------------------------------------------------------------------------------------
def completion_logits(model, input_ids: Tensor, attention_mask: Tensor, n: int) -> Tensor:
    """(B, P + T) ids and mask, n = T -> (B, T, V) logits that predict the completion's tokens,
    those at t - 1 for token t. Mask 0 is padding, on the left; the position_ids that the model is
    given count from 0 at the first token that is none. model(...).logits are (B, P + T, V)."""
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    return model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions,
                 use_cache=False, logits_to_keep=n + 1).logits[:, -n - 1 : -1]
def row_by_row(function: Callable, *tensors: Tensor) -> Tensor:
    """function of each row of (B, T, ...) -> (B, T); the float32 copy of the logits exists for one
    row at a time, and is computed again in the backward pass."""
    rows = zip(*tensors, strict=True)
    return torch.stack([checkpoint(function, *row, use_reentrant=False) for row in rows])
def token_logprobs(model, input_ids: Tensor, attention_mask: Tensor, n_completion: int,
                   temperature: float) -> Tensor:
    """log pi(y_t | x, y_<t) = log_softmax(logits / temperature)[y_t] -> (B, T), all in float32.
    input_ids, attention_mask (0: padding) are (B, P + T), n_completion is T."""
    def pick(logits: Tensor, tokens: Tensor) -> Tensor:  # (T, V), (T,) -> (T,)
        return torch.log_softmax(logits.float() / temperature, -1).gather(1, tokens[:, None])[:, 0]
    logits = completion_logits(model, input_ids, attention_mask, n_completion)
    return row_by_row(pick, logits, input_ids[:, -n_completion:])
def policy_loss(logp: Tensor, logp_old: Tensor, advantages: Tensor, mask: Tensor, clip_low: float,
                clip_high: float, denominator: float) -> Tensor:
    """PPO's clipped loss: logp, logp_old, advantages, bool mask, all (B, T) -> scalar. Outside the
    mask they may be NaN or infinite: neither the loss nor its gradient sees that.
    L = - sum over the mask of min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) / denominator,
    rho = exp(logp - logp_old). The denominator is the number of tokens of the whole optimizer step,
    not of a micro-batch. At rho = 1 the value is minus the mean advantage, often 0, yet it trains.
    >>> old, ones = torch.tensor([[0.5, 0.5]]).log(), torch.ones(1, 2)
    >>> logp = torch.tensor([[0.5, 0.9]]).log()  # rho is 1 and 1.8, the second clipped at 1.28
    >>> round(policy_loss(logp, old, ones, ones.bool(), 0.2, 0.28, 2).item(), 3)
    -1.14
    """
    rho = torch.exp(torch.where(mask, logp - logp_old, 0.0))  # (B, T)
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(rho * advantages, clipped * advantages)
    return -torch.where(mask, objective, 0.0).sum() / denominator
def kl_to_reference(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """(B, T) k3 estimate of KL(policy || initial policy) at each sampled token, in nats, never < 0.
    k3 = r - 1 - log r, r = pi_ref(y_t) / pi(y_t): its mean over the policy's own samples is the KL.
    >>> kl_to_reference(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -1.0]]))
    tensor([[0.0000, 0.3679]])
    """
    log_r = logp_ref - logp
    return torch.expm1(log_r) - log_r  # exp(x) - 1 would round to less than x
def reverse_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(B, T, V) logits of both at the student's samples -> (B, T) KL(student || teacher), nats, all
    in float32: KL_t = sum_v p_S(v) (log p_S(v) - log p_T(v)), p = softmax(logits / temperature).
    Its gradient is the mean of a_t grad log p_S(y_t), a_t = log p_S(y_t) - log p_T(y_t), y_t ~ p_S.
    >>> reverse_kl(torch.tensor([[[0.0, 1.0]]]), torch.zeros(1, 1, 2), 1.0)
    tensor([[0.1109]])
    """
    def row_kl(student: Tensor, teacher: Tensor) -> Tensor:  # (T, V), (T, V) -> (T,)
        log_s, log_t = (torch.log_softmax(x.float() / temperature, -1) for x in (student, teacher))
        return (log_s.exp() * (log_s - log_t)).sum(-1)
    return row_by_row(row_kl, student, teacher)

# ---- Training ------------------------------------------------------------------------------------
def collate(completions: list[Completion], model) -> dict[str, Tensor]:
    """advantages, mask (B, T); input_ids, attention_mask (B, P + T); distill: the teacher's too."""
    pad = functools.partial(pad_left, device=model.device)
    batch = {"mask": pad([[True] * len(c.ids) for c in completions])}
    batch["advantages"] = pad([[a for a, (start, end) in zip(c.advantages, c.steps, strict=True)
                                for _ in range(start, end)] for c in completions])
    for owner in ("", "teacher_"):
        if f"{owner}prompt_ids" in completions[0].row:
            inputs = [c.row[f"{owner}prompt_ids"] + c.ids for c in completions]
            batch[f"{owner}input_ids"] = pad(inputs, value=model.generation_config.pad_token_id)
            batch[f"{owner}attention_mask"] = pad([[1] * len(ids) for ids in inputs])
    return batch
def batch_loss(model, initial, batch: dict, n_tokens: int, args) -> tuple[Tensor, dict]:
    """A micro-batch's share of the loss, and of means over the n_tokens of the optimizer step.
    sft: with A = 1 and rho = 1 on a reference's tokens, the gradient is that of cross-entropy."""
    mask, a, n_completion = batch["mask"], batch["advantages"], batch["mask"].shape[1]
    inputs = (batch["input_ids"], batch["attention_mask"], n_completion)
    def mean(values: Tensor) -> Tensor:
        return torch.where(mask, values, 0.0).sum() / n_tokens
    if args.method == "distill":
        with torch.no_grad():
            teacher = completion_logits(initial, batch["teacher_input_ids"],
                                        batch["teacher_attention_mask"], n_completion)
        loss = mean(reverse_kl(completion_logits(model, *inputs), teacher, args.temperature))
        return loss, {"teacher_kl": loss}
    logp = token_logprobs(model, *inputs, 1.0 if args.method == "sft" else args.temperature)
    if "old" not in batch or args.method == "sft":  # rho = 1: at the first update; sft: always
        batch["old"] = batch["ref"] = logp.detach()
        if initial:
            batch["ref"] = token_logprobs(initial, *inputs, args.temperature)
    old, kl = batch["old"], mean(kl_to_reference(logp, batch["ref"]))
    loss = policy_loss(logp, old, a, mask, args.clip_low, args.clip_high, n_tokens)
    rho = torch.exp(logp.detach() - old)
    clipped = (rho > 1 + args.clip_high) & (a > 0) | (rho < 1 - args.clip_low) & (a < 0)
    return loss + args.kl * kl, {
        "cross_entropy" if args.method == "sft" else "entropy": mean(-old),  # E[-log pi]
        "kl": kl if initial else kl * math.nan,  # unknown without the initial model
        "ratio": mean(rho), "clip_fraction": mean(clipped.float())}
def update(model, initial, optimizer, completions: list[Completion], args) -> dict[str, float]:
    """The optimizer steps on one batch; returns means over its tokens at the last of them."""
    trained = [c for c in completions if c.rewards is not None]
    trained.sort(key=lambda c: len(c.row["prompt_ids"]) + len(c.ids))  # little padding
    batches = [collate(part, model) for part in chunks(trained, args.micro_batch)]
    n_tokens = sum(len(c.ids) for c in trained)
    model.train()  # no dropout is left in it; gradient checkpointing works only in this mode
    for _ in range(args.updates_per_batch):
        sums = {}
        for batch in batches:
            loss, shares = batch_loss(model, initial, batch, n_tokens, args)
            loss.backward()
            sums |= {k: sums.get(k, 0.0) + share.item() for k, share in shares.items()}
        sums["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return sums
def measure(completions: list[Completion], group_size: int) -> dict[str, float]:
    """What a batch says. Watch `accuracy` beside `reward`: a widening gap is reward hacking."""
    rewards = [np.mean(c.rewards) for c in completions if c.rewards is not None]
    silent = [not any(any(c.advantages) for c in g) for g in chunks(completions, group_size)]
    lists = {"reward": rewards, "no_signal": silent, "cut": [c.cut for c in completions],
             "accuracy": [c.correct for c in completions if c.correct is not None] or [np.nan],
             "judge_failed": [c.rewards is None for c in completions],
             "length": [len(c.ids) for c in completions]}
    return {k: float(np.mean(v)) for k, v in lists.items()} | {"reward_std": float(np.std(rewards))}
def open_run(args: argparse.Namespace) -> dict:
    """The checkpoint of the run in --out, or step 0. Stops without --resume or at new settings."""
    out, state = Path(args.out), {"step": 0}
    out.mkdir(parents=True, exist_ok=True)
    if (out / "settings.json").exists() or (out / "checkpoint.pt").exists():
        if not args.resume:
            stop(f"{out} holds a run: add --resume to go on with it, or give another --out")
        before = json.loads((out / "settings.json").read_text())
        for name, value in vars(args).items():
            if not name.startswith(MAY_CHANGE) and before.get(name, value) != value:
                stop(f"{out} was started with {name} {before[name]}, not {value}")
        if (out / "checkpoint.pt").exists():
            state = torch.load(out / "checkpoint.pt", map_location="cpu")
    for path in (out / "metrics.jsonl", out / "rollouts.jsonl"):  # forget what came later
        path.touch()
        write_log(path, [r for r in read_log(path) if r["step"] <= state["step"] > 0], "w")
    return state
def train(args: argparse.Namespace) -> None:
    """Train a model by one of the methods: sample, judge, advantage, update."""
    needed = ("question", "answer" if args.method == "sparse" else "reference")
    rows, eval_rows = load_rows(args.data, "train", needed=needed, domain=args.domain), []
    kind = "outcome" if args.method == "outcome" else args.judge_input
    if args.eval_every and not args.eval_data and Path(args.data).is_file():
        stop(f"--eval-every needs --eval-data: the file {args.data} has no test split")
    if args.eval_every:
        eval_rows = load_rows(args.eval_data or args.data, "test", args.eval_problems)
    name = Path(args.model.rstrip("/").removesuffix("/final")).name
    args.out = args.out or f"runs/{name}-{args.method}"
    out, state, judge, initial = Path(args.out), open_run(args), None, None
    if args.method in JUDGED:
        rows = show_reference(rows, args.reference, args.seed)
        judge = Judge(args, out.parent)  # the runs of a folder share its cache
    source, tokenizer = find_model(args.model)
    if args.method == "distill":
        for row in rows:
            row["teacher_prompt_ids"] = policy_prompt(tokenizer, row["question"], row["reference"])
    model, rows = load_policy(source, tokenizer, rows, args)
    eval_rows = eval_rows and tokenize_rows(eval_rows, tokenizer, args.max_prompt_tokens)
    if args.method == "distill" or (args.kl and args.method != "sft"):  # sft has no penalty
        initial = load_model(source).requires_grad_(False)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    paid, done = judge.paid if judge else {}, state["step"]
    if done:
        model.load_state_dict(state.pop("model"))  # not to be held twice
        optimizer.load_state_dict(state.pop("optimizer"))
        paid |= state["paid"]
    settings = vars(args) | {"sampling": model.generation_config.to_diff_dict()}
    write_log(out / "settings.json", [settings], "w")
    print(f"run: {out}, {args.method}, {len(rows)} problems, {done} of {args.steps} steps done")
    if judge and done < args.steps:
        calls = args.group_size * (MAX_STEPS if kind in ("prefix", "alone") else 1) + 1
        judge.announce(calls * (args.steps - done) * args.prompts_per_step, kind, rows[0])
    def save(step: int) -> None:
        state = {"step": step, "paid": paid, "model": model.state_dict()}
        torch.save(state | {"optimizer": optimizer.state_dict()}, out / "checkpoint.tmp")
        (out / "checkpoint.tmp").replace(out / "checkpoint.pt")
    def hold_out(step: int) -> None:
        path = out / f"eval-{step:06d}.jsonl"
        rates = evaluate(model, tokenizer, eval_rows, args.eval_samples, args, path)
        write_log(out / "metrics.jsonl", [{"step": step, "eval": rates}])
    n = 1 if args.method == "sft" else args.group_size
    saved = whole = done  # last step on disk; last that is complete in memory, None in mid-update
    bar = tqdm(range(done + 1, args.steps + 1), initial=done, total=args.steps, desc=args.method)
    try:
        held = {record["step"] for record in read_log(out / "metrics.jsonl") if "eval" in record}
        if eval_rows and done not in held and (done % args.eval_every == 0 or done == args.steps):
            hold_out(done)  # the base model, or what an interruption cost
        for step in bar:
            torch.manual_seed(args.seed * 1_000_003 + step)  # resumed, it draws what this one draws
            rng = np.random.default_rng([args.seed, step])
            completions, verdicts, clock = [], [], [time.monotonic()]
            chosen = [rows[i] for i in rng.choice(len(rows), args.prompts_per_step, replace=False)]
            sampled = sample_groups(model, tokenizer, chosen, n, args.sample_batch)
            if args.method == "sft":
                sampled = read_references(chosen, tokenizer, model.generation_config)
            for group in sampled:
                completions += group
                verdicts += judge.submit(group, kind) if judge else []  # while others are sampled
            clock.append(time.monotonic())
            for c, verdict in zip(completions, verdicts, strict=bool(judge)):
                c.scores, c.judge_words, c.rubric = verdict.result()
            clock.append(time.monotonic())
            fill_advantages(completions, args)
            if sum(c.rewards is None for c in completions) > len(completions) / 2:
                stop(f"{judge.name} failed on most completions; --resume later. {judge.last_error}")
            whole = None
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1.0, step / 5)  # warm-up
            metrics = {"step": step} | measure(completions, n) | paid
            metrics |= update(model, initial, optimizer, completions, args)
            if not math.isfinite(metrics["grad_norm"]):
                stop(f"step {step}: the gradient is no number; lower --lr, or raise --kl")
            clock.append(time.monotonic())
            phases = ("seconds_sample", "seconds_judge", "seconds_update")
            metrics |= zip(phases, np.diff(clock).tolist(), strict=True)
            write_log(out / "metrics.jsonl", [metrics])
            write_log(out / "rollouts.jsonl", [
                {"step": step, "prompt": tokenizer.decode(c.row["prompt_ids"])}
                | {k: v for k, v in (c.row | vars(c)).items()
                   if k != "row" and not k.endswith("ids")} for c in completions])
            whole = step
            bar.set_postfix({k: f"{metrics[k]:.3f}" for k in ("reward", "accuracy")} | paid)
            if eval_rows and (step % args.eval_every == 0 or step == args.steps):
                hold_out(step)
            if step % args.save_every == 0 or step == args.steps:
                save(step)
                saved = step
    finally:
        bar.close()
        if judge:
            args.max_judge_calls = -1  # no thread makes another call; those on their way are kept
            judge.pool.shutdown(wait=False, cancel_futures=True)
        if whole is not None and whole > saved:
            save(whole)  # also after an error or Ctrl-C
    model.save_pretrained(out / "final")
    tokenizer.save_pretrained(out / "final")
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
def bootstrap(statistic: Callable, n: int) -> list[float]:
    """statistic(numbers of the n problems) and its 95% interval over 1000 draws of n of them."""
    draws = [statistic(drawn) for drawn in np.random.default_rng(0).integers(n, size=(1000, n))]
    interval = np.percentile([x for x in draws if x == x] or [math.nan], [2.5, 97.5])
    return [float(x) for x in (statistic(np.arange(n)), *interval)]
def pass_rates(counts: list[dict]) -> dict[str, list[float]]:
    """{"pass@1": [mean, low, high], "pass@2": ...}, with 95% bootstrap intervals over problems."""
    rates = {}
    for k in [2**i for i in range(counts[0]["n"].bit_length())]:
        values = np.array([pass_at_k(record["n"], record["correct"], k) for record in counts])
        rates[f"pass@{k}"] = bootstrap(lambda drawn, v=values: v[drawn].mean(), len(counts))
    return rates
def evaluate(model, tokenizer, rows: list[dict], n: int, args, path: Path) -> dict:
    """Sample each problem n times -> pass_rates. Counts and texts go to `path` as they come."""
    counts, sampled = [], sample_groups(model, tokenizer, rows, n, args.sample_batch)
    write_log(path, counts, "w")
    torch.manual_seed(args.seed)
    for group in tqdm(sampled, f"eval, {n} samples each", len(rows), leave=False):
        counts.append({key: group[0].row[key] for key in COLUMNS} | {
            "n": n, "correct": sum(c.correct for c in group), "cut": sum(c.cut for c in group),
            "texts": [c.text for c in group]})
        write_log(path, counts[-1:])
    return pass_rates(counts)
def evaluate_models(args: argparse.Namespace) -> None:
    """Evaluate models: a table of pass@1 and pass@k, and optionally the problems that one fails."""
    if args.save_hard and len(args.model) > 1:
        stop("--save-hard takes one --model: hard for whom?")
    Path(args.out).mkdir(parents=True, exist_ok=True)
    models, table = {name: find_model(name) for name in args.model}, {}
    chosen = load_rows(args.data, args.split, args.problems, domain=args.domain)
    for name, (source, tokenizer) in models.items():
        model, rows = load_policy(source, tokenizer, chosen, args)
        path = Path(args.out) / (name.strip("./").replace("/", "-") + ".jsonl")
        rates = evaluate(model, tokenizer, rows, args.samples, args, path)
        table[name] = {f"{k}, %": "{:.1f} [{:.1f}, {:.1f}]".format(*100 * np.array(rate))
                       for k, rate in rates.items()}
        print(f"{name}: pass@1 {rates['pass@1'][0]:.1%}; counts per problem: {path}")
    if args.save_hard:
        hard = [row for row in read_log(path) if row["correct"] <= args.max_rate * row["n"]]
        write_log(Path(args.save_hard), [{key: row[key] for key in COLUMNS} for row in hard], "w")
        print(f"{args.save_hard}: {len(hard)} of {len(rows)} problems")
    print(f"\nmeans over problems, with 95% bootstrap intervals\n{DataFrame(table).T.to_string()}")

# ---- Calibration: is this judge good enough to train against? ------------------------------------
def judge_quality(scores: np.ndarray, correct: np.ndarray) -> tuple[float, float]:
    """Scores 1..5 and correct 0 or 1, of one shape (NaN: left out) -> (misplacement, AUROC) or NaN.
    misplacement = (FNR + FPR) / 2 where a score of 4 or 5 says right; chance is .5. AUROC = P(a
    right one scores higher than a wrong one), ties count half; undefined if all score the same.
    >>> judge_quality(np.array([5, 2, 3, 1, 4]), np.array([1, 1, 0, 0, np.nan]))
    (0.25, 0.75)
    """
    right, wrong = (scores[(correct == label) & (scores > 0)] for label in (1, 0))
    if not len(right) or not len(wrong):
        return math.nan, math.nan
    order = np.sign(right[:, None] - wrong) if len({*right, *wrong}) > 1 else math.nan
    return float(np.mean(right < 4) + np.mean(wrong > 3)) / 2, float(1 + np.mean(order)) / 2
def calibrate(args: argparse.Namespace) -> None:
    """Measure a judge on attempts of known worth, before training against it."""
    needed, out = ("question", "reference"), Path(args.out)
    rows = load_rows(args.data, args.split, args.problems, needed, args.domain)
    others = show_reference(rows, "wrong", args.seed + 1)  # not what is shown as the wrong one
    rows = [row | {"other": other["reference"]} for row, other in zip(rows, others, strict=True)]
    judge, attempts, sampled = Judge(args, out), [], [[] for _ in rows]
    if args.model:
        source, tokenizer = find_model(args.model)
        model, rows = load_policy(source, tokenizer, rows, args)
        torch.manual_seed(args.seed)
        sampled = sample_groups(model, tokenizer, rows, args.samples, args.sample_batch)
    names = ["right", "none", "wrong"]
    for row, group in zip(rows, sampled, strict=True):
        own = row["reference"]
        attempts += [("the reference", own, 1), ("its first half", own[: len(own) // 2], None),
                     ("another problem's", row["other"], 0), ("nothing", "", None),
                     ("talk to the judge", ATTACK, 0)]
        attempts += [(f"sampled, correct: {c.correct}", c.text, c.correct) for c in group]
    table = DataFrame(attempts, columns=["attempt", "text", "correct"])
    judge.announce(4 * (len(table) + len(rows)), "outcome", rows[0])
    try:
        for shown in (*names, "right again"):
            (which, _, judge.repeat), verdicts = shown.partition(" "), []
            parts = chunks(attempts, len(attempts) // len(rows))
            for row, part in zip(show_reference(rows, which, args.seed), parts, strict=True):
                group = [Completion(row, [], text, None, False, [], []) for _, text, _ in part]
                verdicts += judge.submit(group, "outcome")
            verdicts = [v.result() for v in tqdm(verdicts, f"{shown} reference", leave=False)]
            table[shown] = [scores[0] if scores else math.nan for scores, *_ in verdicts]
            table[f"{shown}: words"] = ["\n".join(words) for _, words, _ in verdicts]
    finally:  # also after Ctrl-C: nothing more is paid
        judge.pool.shutdown(wait=False, cancel_futures=True)
    table.to_json(out / "attempts.jsonl", orient="records", lines=True)
    summary = table.groupby("attempt", sort=False)[names].mean().map("{:.2f}".format)
    correct = table["correct"].to_numpy(float).reshape(len(rows), -1)  # (problems, attempts)
    for shown in names:
        scores = table[shown].to_numpy(float).reshape(correct.shape)
        for i, name in enumerate(("misplacement", "AUROC")):
            def statistic(drawn: np.ndarray, scores: np.ndarray = scores, i: int = i) -> float:
                return judge_quality(scores[drawn], correct[drawn])[i]
            value = "{:.2f} [{:.2f}, {:.2f}]".format(*bootstrap(statistic, len(rows)))
            summary.loc[name, shown] = "undefined" if "nan" in value else value
        summary.loc["failed", shown] = f"{table[shown].isna().mean():.1%}"
    differ = (table["right"] - table["right again"]).dropna().ne(0).mean()
    print(f"\nmean score by reference shown; 95% intervals over problems\n{summary.to_string()}")
    print(f"asked again, {differ:.1%} differ; {judge.paid}; all replies: {out / 'attempts.jsonl'}")
    misplaced, auroc = judge_quality(table["right"].to_numpy(float), correct.ravel())
    flaws = {f"misplacement {misplaced:.2f} (chance: .50)": not misplaced < 0.3,
             "AUROC undefined (one score for all, or none)": math.isnan(auroc),
             f"over 10% failed: {judge.last_error}": table["right"].isna().mean() > 0.1,
             "it can be talked into a score": table.right[table.text == ATTACK].mean() > 2}
    found = "; ".join(flaw for flaw in flaws if flaws[flaw])
    print(f"verdict: do not train with it: {found}" if found else "verdict: train with it")

# ---- Report --------------------------------------------------------------------------------------
PANELS = {"reward": "reward", "accuracy": "exact-match accuracy (dots: held-out)",
          "no_signal": "groups without signal", "length": "completion length (tokens)",
          "kl": "KL to the initial policy (nats per token)", "cut": "completions cut"}
def draw_charts(paths: list[Path], axes: list) -> None:
    """Learning curves of run folders, and pass@k of their evaluations and of files of `eval`."""
    for i, path in enumerate(paths):
        color, log, evals = f"C{i}", [], [path]
        axes[0].plot([], [], color, label=path.name)
        if path.is_dir():
            log, evals = read_log(path / "metrics.jsonl"), sorted(path.glob("eval-*.jsonl"))
            log = log or stop(f"{path} holds no run with a step in its metrics.jsonl")
        steps = DataFrame([record for record in log if "reward" in record])
        for axis, (name, title) in zip(axes, PANELS.items(), strict=False):
            axis.set(title=title, xlabel="step")
            if name in steps and steps[name].notna().any():
                axis.plot(steps.step, steps[name].rolling(9, 1, center=True).mean(), color)
        for record in [record for record in log if "eval" in record]:
            axes[1].plot(record["step"], record["eval"]["pass@1"][0], f"{color}o")
        for file in evals[:: max(1, len(evals) - 1)]:
            counts = [r for r in read_log(file) if type(r) is dict and {"n", "correct"} <= set(r)]
            rates = pass_rates(counts or stop(f"{file} holds no evaluation"))
            (mean, low, high), k = np.array(list(rates.values())).T, [int(key[5:]) for key in rates]
            axes[6].semilogx(k, mean, f"{color}o{'-' if file == evals[-1] else ':'}", base=2)
            axes[6].fill_between(k, low, high, color=color, alpha=0.15)
    axes[6].set(title="held-out pass@k (dotted: the first)", xlabel="k")
def examples(log: list[dict], n: int = 4) -> dict[str, list[dict]]:
    """Completions of a rollouts.jsonl that a learner wants to see, n of each sort or fewer."""
    judged = [r | {"mean": np.mean(r["rewards"])} for r in log if (r["rewards"] or [-1])[0] >= 0]
    first, last = {r["question"]: r for r in judged[::-1]}, {r["question"]: r for r in judged}
    pairs = [(first[q], last[q]) for q in first if first[q]["step"] < last[q]["step"]]
    pairs.sort(key=lambda pair: pair[0]["mean"] - pair[1]["mean"])
    judged.sort(key=lambda r: 0 if r["correct"] is None else -abs(r["mean"] - r["correct"]))
    return {"Largest improvement: the first and the last completion of a problem":
            [r for a, b in pairs[: n // 2] if a["mean"] < b["mean"] for r in (a, b)],
            "Judge vs. answer": [r for r in judged[:n] if r["correct"] not in (None, r["mean"])],
            "Failed judgements": [r for r in log if not r["rewards"]][:n]}
def report(args: argparse.Namespace) -> None:
    """A page about runs: settings, learning curves, pass@k, completions to read. plot: curves."""
    paths, charts, runs = [Path(path) for path in args.run], [], []
    if args.command == "plot":
        figure, axes = pyplot.subplot_mosaic("ABCD;EFG.", figsize=(17, 7), layout="constrained")
        draw_charts(paths, list(axes.values()))
        figure.legend(loc="lower right")
        figure.savefig(args.out, dpi=120)
        return print(f"figure: {args.out}")
    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    with pyplot.rc_context(dict.fromkeys(parts, "#808080")):  # to be read on black and on white
        figures = [pyplot.subplots(figsize=(5, 3.2), layout="constrained") for _ in range(7)]
        draw_charts(paths, [axis for _, axis in figures])
    for figure, axis in figures:
        if axis.lines:
            figure.savefig(file := io.StringIO(), format="svg", transparent=True)
            charts.append(file.getvalue()[file.getvalue().index("<svg") :])
    for i, path in enumerate(paths):
        runs.append({"name": str(path), "color": colors.to_hex(f"C{i}")})
        if path.is_dir():
            runs[i] |= {"settings": json.loads((path / "settings.json").read_text()),
                        "examples": examples(read_log(path / "rollouts.jsonl"))}
    page = Template(judge_prompts.PAGE, autoescape=True).render(runs=runs, charts=charts)
    Path(args.out).write_text(page, encoding="utf-8")
    print(f"report: {args.out}")

# ---- Command line --------------------------------------------------------------------------------
FLAGS = [  # commands, flag, default (None: required), smallest value or choices, meaning
    ("train", "--model", None, None, "hub id, short name (Qwen2.5-0.5B) or folder (RUN/final)"),
    ("eval", "--model", None, "+", "one or more: hub ids, short names, folders (RUN/final)"),
    ("plot report", "run", None, "+", "run folders, and files that eval wrote"),
    ("calibrate", "--model", "", None, "also judge its completions (hub id, short name or folder)"),
    ("train", "--method", "process", JUDGED + OTHERS, "ExpRL by step or answer; GRPO; baselines"),
    ("train eval calibrate", "--data", "gsm8k", None, "gsm8k, math, FILE.jsonl or HUB_ID[:CONFIG]"),
    ("train", "--out", "", None, "run folder (default: runs/MODEL-METHOD)"),
    ("eval calibrate", "--out", "runs/eval", None, "folder for what was sampled and judged"),
    ("plot", "--out", "curves.png", None, "the figure: .png, .pdf or .svg"),
    ("report", "--out", "report.html", None, "the page"),
    ("train", "--resume", False, None, "go on with the run in --out, exactly, if there is one"),
    ("train calibrate", "--judge-model", "gpt-4.1-mini", None, "the judge's name at its API"),
    ("train calibrate", "--judge-url", "", None, "its API (or $OPENAI_BASE_URL, or OpenAI's)"),
    ("train", "--judge-input", "together", ("together", "prefix", "alone"), "steps in a call"),
    ("train calibrate", "--rubric", "checkpoints", ("checkpoints", "none"), "of the reference"),
    ("train", "--reference", "right", ("right", "none", "wrong"), "what the judge is shown"),
    ("train eval calibrate", "--domain", "math", tuple(judge_prompts.SYSTEM), "if a row has none"),
    ("train", "--process-norm", "delta", ("delta", "end", "group"), "baseline of a step's reward"),
    ("train calibrate", "--judge-threads", 16, 1, "judge calls at a time"),
    ("train calibrate", "--max-judge-calls", 0, 0, "stop after so many paid calls; 0: no limit"),
    ("train", "--steps", 200, 1, "batches to train on"),
    ("train", "--prompts-per-step", 8, 1, "problems in a batch"),
    ("train", "--group-size", 8, 2, "completions of a problem, which an advantage compares"),
    ("train", "--updates-per-batch", 1, 1, "optimizer steps on each batch"),
    ("train", "--lr", 1e-6, 0, "learning rate of AdamW, constant after a short warm-up"),
    ("train", "--kl", 0.001, 0, "weight of the KL to the initial policy; 0: none is loaded"),
    ("train", "--no-std", False, None, "A = r - mean, not divided by the group's std"),
    ("train", "--clip-low", 0.2, 0, "the ratio is clipped at 1 - X"),
    ("train", "--clip-high", 0.28, 0, "the ratio is clipped at 1 + X"),
    ("train", "--micro-batch", 4, 1, "completions in one backward pass"),
    ("train", "--gradient-checkpointing", False, None, "less memory for more time"),
    ("train", "--save-every", 10, 1, "steps between checkpoints"),
    ("train", "--eval-every", 0, 0, "steps between evaluations; 0: none"),
    ("train", "--eval-data", "", None, "held-out problems (default: the test split of --data)"),
    ("train", "--eval-problems", 128, 0, "how many of them; 0: all"),
    ("train", "--eval-samples", 8, 1, "completions of each"),
    ("eval calibrate", "--split", "test", ("train", "test"), "of a data set of the hub"),
    ("eval", "--problems", 200, 0, "how many of them; 0: all"),
    ("eval calibrate", "--samples", 8, 1, "completions of each"),
    ("calibrate", "--problems", 20, 0, "how many of them; 0: all"),
    ("eval", "--save-hard", "", None, "write the problems that the model fails here, for --data"),
    ("eval", "--max-rate", 0.0, 0, "failed: solved by at most this share of the completions"),
    ("train eval calibrate", "--max-new-tokens", 512, 1, "length cap of a completion"),
    ("train eval calibrate", "--max-prompt-tokens", 512, 1, "longer prompts are dropped"),
    ("train eval calibrate", "--temperature", 0.8, 0.01, "of the policy"),
    ("train eval calibrate", "--sample-batch", 64, 1, "completions in one call of generate"),
    ("train eval calibrate", "--seed", 0, 0, "of sampling and of the order of problems"),
]
COMMANDS = {"train": train, "eval": evaluate_models, "calibrate": calibrate,
            "plot": report, "report": report}
MAY_CHANGE = ("resume", "steps", "out", "judge_url", "judge_threads", "max_judge_calls", "eval",
              "micro_batch", "gradient_checkpointing", "save_every")  # on --resume
def parse_flags(argv: list[str]) -> argparse.Namespace:
    """The flags of a command, from the table above; wrong ones end the program (status 2)."""
    parser = argparse.ArgumentParser(
        "exprl.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    subparsers = parser.add_subparsers(dest="command", required=True)
    subs = {name: subparsers.add_parser(name, help=run.__doc__, description=run.__doc__,
                                        allow_abbrev=False) for name, run in COMMANDS.items()}
    for names, flag, default, limit, meaning in FLAGS:
        told = default or type(default) in (int, float)
        given = {"help": f"{meaning} (default: {default})" if told else meaning}
        given |= {"default": default, "required": default is None} if flag[0] == "-" else {}
        if default is False:
            given["action"] = "store_true"
        elif type(default) in (int, float):
            given["type"] = type(default)
        else:
            given |= {"nargs": limit} if limit == "+" else {"choices": limit}
        for name in names.split():
            subs[name].add_argument(flag, **given)
    is_train = argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help")
    args = parser.parse_args(["train", *argv] if is_train else argv)
    for _, flag, default, limit, _ in FLAGS:
        value = getattr(args, flag.strip("-").replace("-", "_"), None)
        if type(default) in (int, float) and value is not None and not limit <= value < math.inf:
            subs[args.command].error(f"argument {flag}: {value} is no number of {limit} or more")
    return args
def main(argv: list[str] | None = None) -> None:
    """Run a command; without one, `train`."""
    args = parse_flags(sys.argv[1:] if argv is None else argv)
    logging.disable_progress_bar()
    try:
        COMMANDS[args.command](args)
    except KeyboardInterrupt:
        stop("interrupted; a training run goes on from its last checkpoint with --resume")
    except torch.OutOfMemoryError:
        stop("out of memory: --micro-batch 1, --gradient-checkpointing, a smaller --sample-batch")
    except (OSError, UnicodeError) as error:
        stop(str(error))
if __name__ == "__main__":
    main()
