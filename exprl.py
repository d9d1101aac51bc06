r"""ExpRL in one file: reinforcement learning on problems the model cannot solve yet.

Sparse-reward RL needs a right answer now and then; on hard problems there is none to reinforce.
ExpRL (arXiv 2606.17024) uses each problem's reference solution as a reward scaffold. A step is:
  1. sample     G completions of each problem; the policy sees the question, never the reference
  2. judge      an LLM behind an API compares a completion with the reference and writes a score k
                in 1..5, for all of it (Outcome) or for each of its steps (Process)
  3. advantage  from the reward s = (k - 1) / 4:
                Outcome: A = (s - mean) / std over the problem's group, the same for each token
                Process: A_t = s_t - s_(t-1), and A_1 = s_1 - s_T, for the tokens of step t
  4. update     PPO's clipped loss on those advantages + a small KL penalty to the initial policy
  5. log        every number and every completion
That is stage 1, "RL mid-training". Stage 2 is the same loop with the sparse reward, 1 for a right
answer and else 0 (--method sparse), from the model of stage 1: now there are right answers.
  python exprl.py --model Qwen2.5-0.5B                                       # stage 1 on GSM8K
  python exprl.py --model runs/Qwen2.5-0.5B-process/final --method sparse    # stage 2
  python exprl.py eval --model Qwen2.5-0.5B runs/Qwen2.5-0.5B-process/final  # pass@1, pass@k

The file is in the order of the algorithm. A *question* has a *reference* (hidden) and an *answer*;
the policy gets a *prompt* and writes a *completion* made of *steps*; the judge gives a *score*
(1..5), which makes a *reward* (0..1), which makes an *advantage* for each token in the *mask*.
Shapes: B completions in a batch, G per prompt, P prompt and T completion tokens, V vocabulary.
"""

import argparse
import contextlib
import functools
import hashlib
import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path

import numpy as np
import regex
import torch
from datasets import load_dataset
from filelock import FileLock
from math_verify import parse, verify
from pandas import DataFrame
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging

import judge_prompts
from judge_prompts import JudgeAPI, judge_calls, judge_messages, policy_prompt, stop


# ---- Settings: each field is a flag; "paper:" gives the paper's value, where it has one ----------
def setting(meaning: str, *values, at_least: float | None = None):
    """A field of a settings class: what --help says, its default (without, it has to be given; of
    several values, the choices, the first is it), and the smallest number that it takes."""
    told = {"meaning": meaning, "choices": values if len(values) > 1 else None}
    return field(default=[*values, MISSING][0], metadata=told | {"at_least": at_least})


@dataclass(kw_only=True)
class SamplingSettings:
    """Which problems there are, and how completions of them are sampled."""

    data: str = setting("gsm8k, math, FILE.jsonl or HUB_ID[:CONFIG]", "gsm8k")
    temperature: float = setting("temperature of sampling (paper: 0.8)", 0.8, at_least=0.01)
    max_new_tokens: int = setting("length cap of a completion (paper: 16384)", 512, at_least=1)
    sample_batch: int = setting("completions in one call of generate", 64, at_least=1)
    seed: int = setting("of sampling and of each step's choice of problems", 0, at_least=0)


@dataclass(kw_only=True)
class JudgeSettings:
    """Which judge, and how it is asked."""

    judge_model: str = setting("the judge's name at its API", "gpt-4.1-mini")
    judge_url: str = setting("its API (or $OPENAI_BASE_URL, or OpenAI's)", "")
    judge_options: dict = setting("of each call, JSON", '{"temperature": 0, "max_tokens": 2048}')
    judge_threads: int = setting("judge calls at a time", 16, at_least=1)
    judge_patience: float = setting("minutes to wait for a judge that is out", 10.0, at_least=0)
    max_judge_calls: int = setting("stop after so many paid calls; 0: no limit", 0, at_least=0)
    rubric: str = setting("turn a reference into checkpoints first", "checkpoints", "none")
    judge_input: str = setting("what it is asked for", "together", "prefix", "alone", "quotes")


@dataclass(kw_only=True)
class TrainSettings(JudgeSettings, SamplingSettings):
    """Train a model by one of the methods: sample, judge, advantage, update, log."""

    model: str = setting("hub id, short name (Qwen2.5-0.5B) or folder (RUN/final)")
    method: str = setting("ExpRL by step, by outcome; stage 2", "process", "outcome", "sparse")
    out: str = setting("run folder (default: runs/MODEL-METHOD)", "")
    resume: bool = setting("go on with the run in --out, exactly, if there is one", False)
    process_norm: str = setting("what a step's reward is compared with", "delta", "end", "group")
    steps: int = setting("batches to train on (paper: 230)", 200, at_least=1)
    prompts_per_step: int = setting("problems in a batch (paper: 32 to 36)", 8, at_least=1)
    group_size: int = setting("G, completions of a problem (paper: 10 to 16)", 8, at_least=2)
    updates_per_batch: int = setting("optimizer steps on a batch (paper: 1, 2)", 1, at_least=1)
    lr: float = setting("learning rate of AdamW after 5 steps (paper: 1e-6)", 1e-6, at_least=0)
    kl: float = setting("weight of the KL to the initial policy (paper: .001)", 0.001, at_least=0)
    no_std: bool = setting("outcome, sparse: A = r - mean (paper: in stage 2)", False)
    clip_low: float = setting("the ratio is clipped at 1 - X (paper: .2)", 0.2, at_least=0)
    clip_high: float = setting("and at 1 + X (paper: .28, process .26)", 0.28, at_least=0)
    micro_batch: int = setting("completions in one backward pass", 4, at_least=1)
    save_every: int = setting("steps between checkpoints", 10, at_least=1)


@dataclass(kw_only=True)
class EvalSettings(SamplingSettings):
    """Evaluate models: a table of pass@1 and pass@k, and optionally the problems that one fails."""

    model: list[str] = setting("one or more: hub ids, short names, folders (RUN/final)")
    out: str = setting("folder for counts and texts", "runs/eval")
    split: str = setting("of a data set of the hub", "test", "train")
    problems: int = setting("how many of them; 0: all", 200, at_least=0)
    samples: int = setting("completions of each (paper: 128)", 8, at_least=1)
    save_hard: str = setting("write what the (last) model never solves here, for --data", "")


# ---- Messages and files --------------------------------------------------------------------------
def chunks(items: list, size: int) -> list[list]:
    """Consecutive parts of `size` items; the last may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def read_log(path: Path) -> list:
    """The values of a JSON-lines file; a line that a crash has torn is left out."""
    values = []
    for line in path.read_text("utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError):
            values.append(json.loads(line))
    return [value for value in values if isinstance(value, dict)]


def write_log(path: Path, records: list[dict], mode: str = "a") -> None:
    """Append records as JSON lines; with mode "w" replace the file, whole or not at all."""
    target = path.with_suffix(".tmp") if mode == "w" else path
    with target.open(mode, encoding="utf-8") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
    target.replace(path)


# ---- Data: rows of question, reference, answer, domain -------------------------------------------
DATASETS = {"gsm8k": "openai/gsm8k:main", "math": "DigitalLearningGmbH/MATH-lighteval"}
COLUMNS = {
    "question": ("question", "problem", "prompt"),
    "reference": ("reference", "solution"),
    "answer": ("answer",),
    "domain": ("domain",),
}


def last_boxed(text: str) -> str:
    r"""The content of the last \boxed{...}, with its braces balanced; "" if there is none."""
    boxes = regex.findall(r"\\boxed(\{(?:[^{}]|(?1))*\})", text)  # (?1): group 1 inside of itself
    return boxes[-1][1:-1].strip() if boxes else ""


def normalise_row(record: dict, needed: tuple[str, ...]) -> dict[str, str]:
    r"""A record with the usual column names -> its question, reference, answer and domain.
    GSM8K has "reference #### answer" in one column; in MATH the answer is in the reference's
    \boxed{}. ValueError: malformed."""
    if not isinstance(record, dict):
        raise ValueError("is not a JSON object")
    row = {}
    for name, columns in COLUMNS.items():
        values = [record[c] for c in columns if isinstance(record.get(c), (str, int, float))]
        row[name] = str([*values, ""][0]).strip().encode(errors="replace").decode()
    solution, _, answer = row["answer"].rpartition("####")
    row["reference"] = row["reference"] or re.sub(r"<<.*?>>", "", solution).strip()
    row["answer"] = answer.strip() or last_boxed(row["reference"])
    row["domain"] = row["domain"] or "math"
    for name in needed:
        if not row[name]:
            raise ValueError(f"has no {name} (no column {' or '.join(COLUMNS[name])})")
    if row["domain"] not in judge_prompts.SYSTEM:
        raise ValueError(f"has the domain {row['domain']}, not {' or '.join(judge_prompts.SYSTEM)}")
    return row


def load_rows(source: str, split: str, n=0, needed=("question", "answer")) -> list[dict]:
    """n rows, always the same (0: all), of gsm8k, math, a JSON-lines file, or a hub id (or folder)
    [:config], there of a split. Stops at a malformed row, by its line."""
    name, _, config = DATASETS.get(source, source).partition(":")
    rows = []
    try:
        if source.endswith(".jsonl") or Path(source).is_file():
            records = map(json.loads, Path(source).read_text("utf-8-sig").rstrip().split("\n"))
        else:
            records = load_dataset(name, config or None, split=split) or [{}]
        for record in records:
            rows.append(normalise_row(record, needed))
    except Exception as error:  # the hub's errors share no class
        stop(f"--data {source}, line {len(rows) + 1}: {error}")
    order = np.random.default_rng(0).permutation(len(rows))[:n] if n else range(len(rows))
    return [rows[i] for i in order]


def is_correct(completion: str, answer: str) -> bool:
    r"""The sparse reward, and accuracy in every log: of the last \boxed{}, else the last number."""
    numbers = re.findall(r"(?:(?<![\w)])-)?\d[\d,]*(?:\.\d+)?(?:/\d+)?", completion)  # 8-3: 8, 3
    candidate = last_boxed(completion) or (numbers[-1] if numbers else "")
    return 0 < len(candidate) < 1000 and verify(parse(f"${answer}$"), parse(f"${candidate}$"))


# ---- Policy: loading, prompts, sampling ----------------------------------------------------------
def find_model(name: str) -> tuple:
    """(folder or hub id, tokenizer); a short name gets its owner. Stops if there is no model."""
    known = {"Qwen": "Qwen", "SmolLM": "HuggingFaceTB", "Llama": "meta-llama", "gemma": "google"}
    owners = [owner for family, owner in known.items() if name.startswith(family)]
    is_whole = "/" in name or Path(name).is_dir() or not owners
    source = name if is_whole else f"{owners[0]}/{name}"
    try:
        return source, AutoTokenizer.from_pretrained(source)
    except Exception as error:
        stop(f"--model {name}: no folder with a model (such as RUN/final), nor on the hub: {error}")


def load_model(source: str):
    """A model on CUDA, MPS or CPU, in float32: at a learning rate of 1e-6 most bf16 weights would
    never move. It stays in eval mode: with dropout the log-probs were not those of the sampler."""
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except Exception as error:  # of many libraries: no configuration, torn weights, ...
        stop(f"the model {source} cannot be loaded: {error}")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(False):  # else: emulated
        model.forward = torch.autocast("cuda", torch.bfloat16)(model.forward)
    print(f"model: {source}, {model.num_parameters() / 1e6:.4g}M float32 parameters on {device}")
    return model.to(device).eval()


@torch.no_grad()
def set_sampling(model, tokenizer, prompt_ids: list[int], settings: SamplingSettings) -> None:
    """Make `generate` sample from softmax(logits / temperature), whose log-probs are trained. A
    checkpoint brings top_k, top_p, penalties (Qwen2.5: 20, .8, 1.1), the library a top_k of 50:
    they are set to do nothing. That is tried on a prompt, and whether read_prompts works: not every
    cache can be repeated."""
    eos_ids = judge_prompts.end_tokens(tokenizer, model)
    neutral = {"do_sample": True, "temperature": settings.temperature, "top_k": 0, "top_p": 1.0}
    ends = {"max_new_tokens": settings.max_new_tokens, "eos_token_id": eos_ids}
    model.generation_config = GenerationConfig(pad_token_id=eos_ids[0], **ends, **neutral)
    ids = torch.tensor([prompt_ids], device=model.device)
    told = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **told)
    for processed, logits in zip(out.scores, out.logits, strict=True):
        if not torch.allclose(processed, logits / settings.temperature, atol=1e-4):
            stop("`generate` samples from something else than softmax(logits / temperature)")
    pair, expected = out.sequences.repeat(2, 1), torch.stack(out.logits, dim=1)
    model.shares_prompts = True
    try:
        got = completion_logits(model, pair, torch.ones_like(pair), len(out.logits))
        model.shares_prompts = bool((got - expected).std() < 0.05 * expected.std())
    except Exception:  # of any kind: it comes from the model's own code
        model.shares_prompts = False


def completion_mask(tokens: Tensor, eos_ids: set[int]) -> Tensor:
    """(B, T) completion ids -> (B, T) bool: True up to and including the first eos.
    Not `tokens != pad`: pad may be the same token as eos, and no policy would learn to stop.
    >>> completion_mask(torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8]]), {2}).int().tolist()
    [[1, 1, 0, 0], [1, 1, 1, 1]]
    """
    ends = torch.tensor(sorted(eos_ids), dtype=tokens.dtype, device=tokens.device)
    is_eos = torch.isin(tokens, ends).long()
    return is_eos.cumsum(dim=1) - is_eos == 0  # no eos strictly before


def pad(sequences: list, device: torch.device, side="left") -> tuple[Tensor, Tensor]:
    """Lists of numbers -> (B, longest), padded with 0 on this side, and its mask, 0 for padding."""
    rows = [torch.tensor(row, device=device) for row in sequences]
    masks = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, True, 0, side), pad_sequence(masks, True, 0, side)


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
    scores: list[float] | None = None  # 1..5 for each step, or one in all; None: the judge failed
    rewards: list[float] | None = None  # 0..1, as the scores
    advantages: list[float] = field(default_factory=list)  # for each step
    ref_logprobs: list[float] | None = None  # T, under the initial policy; None: there is no KL


def read_completion(row: dict, ids: list[int], tokenizer, eos_ids: list[int]) -> Completion:
    """Token ids decoded, split into steps, the answer checked."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    text = decode(ids)
    steps = split_steps([decode([token]) for token in ids])  # singly: a step is a span of tokens
    step_texts = [decode(ids[start:end]) for start, end in steps]
    correct = is_correct(text, row["answer"]) if row["answer"] else None
    return Completion(row, ids, text, correct, ids[-1] not in eos_ids, steps, step_texts)


@torch.no_grad()
def sample_completions(model, prompt_ids: list[list[int]]) -> Iterator[tuple[int, list[int]]]:
    """A completion of each prompt, as they end: (its place, token ids up to and including the first
    eos). When a quarter of a batch has ended it leaves the batch, and the others go on with their
    part of the cache: what has ended costs no more. The plain way: all at the end."""
    tokens, mask = pad(prompt_ids, model.device)  # (B, P)
    start, end = tokens.shape[1], tokens.shape[1] + model.generation_config.max_new_tokens
    eos = torch.tensor(model.generation_config.eos_token_id, device=model.device)

    def quarter_has_ended(tokens: Tensor, *_) -> Tensor:  # (B, P + t) -> (B,), all the same
        return (torch.isin(tokens[:, -1], eos).float().mean() >= 1 / 4).expand(len(tokens))

    places, how = torch.arange(len(tokens), device=model.device), {}
    if model.shares_prompts:  # `generate` goes on from the last token, which is not in the cache
        cache, _ = read_prompts(model, tokens[:, :-1], mask[:, :-1])
        how = {"cache": cache, "stopping_criteria": [quarter_has_ended]}
    while len(tokens):
        n_left = end - tokens.shape[1]
        tokens = model.generate(tokens, attention_mask=mask, max_new_tokens=n_left, **how)
        has_ended = torch.isin(tokens[:, -1], eos) | (tokens.shape[1] == end)
        ended = tokens[has_ended, start:]
        keep = completion_mask(ended, set(eos.tolist()))
        for place, ids, is_kept in zip(places[has_ended], ended, keep, strict=True):
            yield int(place), ids[is_kept].tolist()
        mask = torch.cat([mask, torch.ones_like(tokens[:, mask.shape[1] :])], dim=1)
        places, tokens, mask = places[~has_ended], tokens[~has_ended], mask[~has_ended]
        if len(tokens):
            cache.batch_select_indices((~has_ended).nonzero()[:, 0])


def sample_groups(model, tokenizer, rows, n, batch, ended=None) -> Iterator[list[Completion]]:
    """n completions of each row, a group a row; `batch` completions at a time. `ended` is called
    with each as soon as it has ended, while others of its batch go on."""
    eos_ids, completions = model.generation_config.eos_token_id, []
    for part in chunks([row for row in rows for _ in range(n)], batch):
        done = {}
        for place, ids in sample_completions(model, [row["prompt_ids"] for row in part]):
            done[place] = read_completion(part[place], ids, tokenizer, eos_ids)
            if ended:
                ended(done[place])
        completions += [done[place] for place in sorted(done)]
        while len(completions) >= n:  # a group may take more than one batch
            yield completions[:n]
            completions = completions[n:]


# ---- Steps ---------------------------------------------------------------------------------------
MAX_STEPS = 16  # what follows the 15th step of a completion is one step


def split_steps(pieces: list[str]) -> list[tuple[int, int]]:
    r"""T decoded tokens of a completion -> its steps, (start, end) token spans that cover all T.
    A step starts at the beginning and at each line that begins with ### (not indented); without any
    such line, after each blank line. Crumbs (bare delimiters, white space) go to a neighbour, a
    token across a border to the later step; what follows 15 steps is one step. No tokens: [].
    >>> split_steps(["### ", "a", "=", "2", "\n", "### ", "b", "=", "3"])
    [(0, 5), (5, 9)]
    """
    text = "".join(pieces).rstrip()
    borders = [match.start() for match in re.finditer(r"^###", text, re.MULTILINE)]
    if not borders:
        borders = [match.end() for match in re.finditer(r"\n[^\S\n]*\n\s*", text)]
    starts, ends = [0], np.cumsum([len(piece) for piece in pieces])  # ends: places in the text
    for border in borders:
        start = int((ends <= border).sum())  # the token that holds the border
        before, after = "".join(pieces[starts[-1] : start]), "".join(pieces[start:])
        if re.search(r"\w", before) and re.search(r"\w", after):  # else a crumb
            starts.append(start)
    starts = starts[:MAX_STEPS]
    spans = zip(starts, [*starts[1:], len(pieces)], strict=True)
    return list(spans) if pieces else []


# ---- Judge: question, hidden reference and completion -> scores 1..5 -----------------------------
def parse_score(reply: str, label: str = "Score") -> int | None:
    r"""The score 1..5 in a judge's reply: the last line that is a score and nothing else, or None.
    Fails closed: a quotation, 0, 6, 10, 4.5 and 4/5 are no scores, and only \n ends a line. Blanks,
    stars and brackets ([{}]) may stand around label and number, quotation marks and > may not;
    capitals or not is all the same. `label` is "Step 3" where each step has a line.
    >>> parse_score("It claims 'Score: 5'.\n**Score: [2]**"), parse_score("Score: 4/5")
    (2, None)
    """
    around = r"[\s*()\[\]{}]*"
    pattern = f"{around}{label}{around}:{around}([1-5]){around}"
    lines = [re.fullmatch(pattern, line, re.IGNORECASE) for line in reply.split("\n")]
    scores = [int(match[1]) for match in lines if match]
    return scores[-1] if scores else None


class Judge(JudgeAPI):
    """A judge; its replies are kept on disk. A verdict that fails is None, never a low score."""

    def __init__(self, settings: JudgeSettings, folder: Path):
        super().__init__(settings)
        folder.mkdir(parents=True, exist_ok=True)
        self.cache_path = folder / "judge_cache.jsonl"
        self.cache_path.open("a").write("\n")  # ends a line that a crash has torn
        self.cache = {r.get("key"): r.get("reply", "") for r in read_log(self.cache_path)}
        self.verdicts = []  # on their way
        self.unscored = []  # replies without a score, for the cache if the step stands

    def submit(self, c: Completion, kind: str):
        """Hand a completion to the threads; returns the Future of that."""
        self.verdicts.append(self.pool.submit(self.judge, c, kind))
        return self.verdicts[-1]

    def wait(self, completions: list[Completion]) -> None:
        """Until all have their scores or have failed. Stops if most of these have failed."""
        for verdict in self.verdicts:
            verdict.result()
        self.verdicts.clear()
        if sum(c.scores is None for c in completions) > len(completions) / 2:
            stop(f"{self.name} failed on most completions; --resume later. {self.last_error}")
        write_log(self.cache_path, self.unscored)
        self.unscored.clear()

    def judge(self, c: Completion, kind: str) -> None:
        """Fill in the scores of a completion (None if one of its calls fails), in a thread. What
        has no words scores 1 without a call; under outcome, what was cut off too: it has no end."""
        steps = [c.text] if kind == "outcome" else c.step_texts
        if not re.search(r"\w", c.text) or (kind == "outcome" and c.cut):
            c.scores = [1] * len(steps)
            return
        checkpoints, reply = self.ask_rubric(c.row)
        if checkpoints is None:  # the rubric failed
            c.judge_words = [reply]
            return
        c.rubric, scores = checkpoints, []
        labels = [f"Step {t + 1}" for t in range(len(steps))] if kind == "together" else ["Score"]
        points = None
        if self.settings.judge_input == "quotes":
            points = judge_prompts.list_checkpoints(checkpoints or c.row["reference"])

        def parse(reply: str) -> list[float] | None:
            if points is not None:
                return judge_prompts.quote_scores(reply, points, c.step_texts, kind == "outcome")
            scores = [parse_score(reply, label) for label in labels]
            return None if None in scores else scores

        for messages in judge_calls(kind, c.row, checkpoints, c.text, c.step_texts, points):
            new, reply = self.ask(messages, parse)
            c.judge_words.append(reply)
            if new is None:
                return
            scores += new
        c.scores = scores

    def ask_rubric(self, row: dict) -> tuple:
        """(checkpoints, reply) of a problem: (None, reply) if it fails, ("", "") without rubric."""
        if self.settings.rubric == "none":
            return "", ""
        return self.ask(judge_messages("rubric", row), judge_prompts.parse_rubric)

    def ask(self, messages: list[dict], parse: Callable) -> tuple:
        """(parse(reply), reply), from the cache or the server; None if it has not the form that was
        asked for. Of equal calls under way one is paid; the others wait for it."""
        asked = [self.settings.judge_model, self.settings.judge_options, messages]
        digest = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        with self.lock_of(digest):
            if digest not in self.cache:
                self.cache[digest] = self.ask_until(messages, parse)
                record = {"key": digest, "reply": self.cache[digest]}
                with self.lock:
                    if parse(record["reply"]) is None:
                        self.unscored.append(record)
                    else:
                        write_log(self.cache_path, [record])
        return parse(self.cache[digest]), self.cache[digest]


# ---- Advantages ----------------------------------------------------------------------------------
def group_advantages(rewards: Tensor, valid: Tensor, group_size: int, divide=True) -> Tensor:
    """(B,) rewards, (B,) bool valid -> (B,) advantages A = (r - mean) / (std + 1e-6), by group.
    Groups are consecutive blocks of G = group_size. mean and std (n - 1) are those of the group's
    valid members; the others get 0, and so does a group with fewer than two valid or no variance.
    Without `divide`, A_i = r_i - mean. ValueError if B is no multiple of G. ExpRL-Outcome; GRPO.
    >>> group_advantages(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.ones(4).bool(), 2)
    tensor([ 0.7071, -0.7071,  0.0000,  0.0000])
    """
    if rewards.numel() % group_size:
        raise ValueError(f"{rewards.numel()} rewards do not make groups of {group_size}")
    advantages = torch.zeros_like(rewards)
    for begin in range(0, rewards.numel(), group_size):
        members = begin + valid[begin : begin + group_size].nonzero().flatten()
        r = rewards[members]
        if len(r) > 1 and r.max() > r.min():
            advantages[members] = (r - r.mean()) / ((r.std() + 1e-6) if divide else 1)
    return advantages


def step_advantages(step_rewards: list[list[float]], norm: str) -> list[list[float]]:
    """ExpRL-Process: a group's step rewards s_1..s_T, a list per completion -> advantages alike.
    delta: A_t = s_t - s_(t-1), A_1 = s_1 - s_T   what a step added
    end:   A_t = s_t - s_T for t < T, A_T = s_T
    group: A_t = s_t - mean over the group's completions of (mean over the completion's steps)
    No standard deviation. Judged completions only; none gives []. ValueError for another norm.
    Why A_1 has s_T under delta: the other differences telescope to s_T - s_1, and it takes that
    away. So the steps sum to 0: credit moves from some to others (in the loss times their tokens),
    and more steps are no more pay. One step alone gets s_1 - s_1 = 0: having no steps pays nothing.
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


def fill_advantages(completions: list[Completion], settings: TrainSettings) -> None:
    """Rewards and, for each step, the advantage. Where the judge failed there is no reward, and the
    completion is in no baseline and no loss: a reward of 0 would punish it for that."""
    for c in completions:
        if settings.method == "sparse":
            c.rewards = [float(c.correct)]
        elif c.scores is not None:
            c.rewards = [(score - 1) / 4 for score in c.scores]
    if settings.method == "process":
        for group in chunks(completions, settings.group_size):
            valid = [c for c in group if c.rewards is not None]
            by_step = step_advantages([c.rewards for c in valid], settings.process_norm)
            for c, advantages in zip(valid, by_step, strict=True):
                c.advantages = advantages
    else:  # outcome, and stage 2 (sparse)
        rewards = torch.tensor([c.rewards[0] if c.rewards else 0.0 for c in completions])
        judged = torch.tensor([c.rewards is not None for c in completions])
        by_group = group_advantages(rewards, judged, settings.group_size, not settings.no_std)
        for c, advantage in zip(completions, by_group.tolist(), strict=True):
            c.advantages = [advantage] * len(c.steps)


# ---- Loss and update -----------------------------------------------------------------------------
def completion_logits(model, input_ids: Tensor, attention_mask: Tensor, n: int) -> Tensor:
    """(B, P + T) ids and mask, n = T -> (B, T, V) logits that predict the completion's tokens,
    those at t - 1 for token t. Mask 0 is padding; the position_ids that the model is given count
    from 0 at the first token that is none. model(...).logits are (B, P + T, V)."""
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": positions}
    if not getattr(model, "shares_prompts", False):  # which set_sampling finds out
        return model(**inputs, use_cache=False, logits_to_keep=n + 1).logits[:, -n - 1 : -1]
    cache, first = read_prompts(model, input_ids[:, :-n], attention_mask[:, :-n])
    inputs |= {"input_ids": input_ids[:, -n:], "position_ids": positions[:, -n:]}
    return torch.cat([first, model(**inputs, cache=cache).logits[:, :-1]], dim=1)


def read_prompts(model, input_ids: Tensor, attention_mask: Tensor) -> tuple:
    """(B, P) prompts and mask -> the cache (keys and values) after them, and the (B, 1, V) logits
    of what comes next. A prompt that is there G times, once a completion, is computed once."""
    both = torch.stack([input_ids, attention_mask])
    (ids, mask), row = both.unique(dim=1, return_inverse=True)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    out = model(**inputs, use_cache=True, logits_to_keep=1)
    out.cache.batch_select_indices(row)
    return out.cache, out.logits[row]


def token_logprobs(model, input_ids, attention_mask, n_completion, temperature) -> Tensor:
    """log pi(y_t | x, y_<t) = log_softmax(logits / temperature)[y_t] -> (B, T), all in float32.
    input_ids, attention_mask (0: padding) are (B, P + T), n_completion is T. The float32 copy of
    the logits exists for one row at a time, and is computed again in the backward pass."""

    def pick(logits: Tensor, tokens: Tensor) -> Tensor:  # (T, V), (T,) -> (T,)
        return torch.log_softmax(logits.float() / temperature, -1).gather(1, tokens[:, None])[:, 0]

    logits = completion_logits(model, input_ids, attention_mask, n_completion)
    rows = zip(logits, input_ids[:, -n_completion:], strict=True)
    return torch.stack([recompute_in_backward(pick, *row, use_reentrant=False) for row in rows])


def policy_loss(logp, logp_old, advantages, mask, clip_low, clip_high, denominator) -> Tensor:
    """PPO's clipped loss: logp, logp_old, advantages, bool mask, all (B, T) -> scalar. Outside the
    mask they may be NaN or infinite: neither the loss nor its gradient sees that.
    L = - sum over the mask of min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A) / denominator,
    rho = exp(logp - logp_old). The denominator is the number of tokens of the whole optimizer step,
    not of a micro-batch. At rho = 1 its value is minus the mean advantage, often near 0: it trains.
    """
    rho = torch.exp(torch.where(mask, logp - logp_old, 0.0))  # (B, T)
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    objective = torch.minimum(rho * advantages, clipped * advantages)
    return -torch.where(mask, objective, 0.0).sum() / denominator


def kl_to_reference(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """(B, T) k3 estimate of KL(policy || initial policy) at each sampled token, in nats, never < 0.
    k3 = r - 1 - log r, r = pi_ref(y_t) / pi(y_t): its mean over the policy's own samples is the KL.
    Its gradient is (1 - r) grad log pi, and in the mean that of KL(initial policy || policy).
    >>> kl_to_reference(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -1.0]]))
    tensor([[0.0000, 0.3679]])
    """
    log_r = logp_ref - logp
    return torch.expm1(log_r) - log_r  # exp(x) - 1 would round to less than x


def micro_batches(completions: list[Completion], size: int) -> list[list[Completion]]:
    """Parts of `size`, by prompt and length: a prompt is computed once, and padding is short."""
    order = lambda c: (len(c.row["prompt_ids"]), c.row["prompt_ids"], len(c.ids))  # noqa: E731
    return chunks(sorted(completions, key=order), size)


def collate(completions: list[Completion], model, prompt: str = "prompt_ids") -> dict:
    """inputs: (B, P + T) ids and attention mask, and T; prompts are padded on the left, completions
    on the right. (B, T): mask, advantages (each step's for all its tokens) and, with a KL, ref."""
    prompts, prompt_mask = pad([c.row[prompt] for c in completions], model.device)
    ids, mask = pad([c.ids for c in completions], model.device, "right")
    inputs = torch.cat([prompts, ids], dim=1), torch.cat([prompt_mask, mask], dim=1), ids.shape[1]
    batch = {"completions": completions, "inputs": inputs, "mask": mask.bool()}
    by_token = []
    for c in completions:
        lengths = [end - start for start, end in c.steps]
        by_token.append(np.repeat(np.float32(c.advantages or [0.0] * len(c.steps)), lengths))
    batch["advantages"], _ = pad(by_token, model.device, "right")
    if completions[0].ref_logprobs:
        batch["ref"], _ = pad([c.ref_logprobs for c in completions], model.device, "right")
    return batch


@torch.no_grad()
def fill_reference(initial, completions: list[Completion], settings: TrainSettings) -> None:
    """The log-probs of each completion's tokens under the initial policy, for the KL."""
    for part in micro_batches(completions, settings.micro_batch):
        logp = token_logprobs(initial, *collate(part, initial)["inputs"], settings.temperature)
        for c, of_tokens in zip(part, logp.tolist(), strict=True):
            c.ref_logprobs = of_tokens[: len(c.ids)]


def grpo_loss(model, batch: dict, n_tokens: int, settings: TrainSettings) -> tuple[Tensor, dict]:
    """A micro-batch's share of the loss, and the sums over its tokens of what is logged."""
    mask, advantages = batch["mask"], batch["advantages"]
    low, high = settings.clip_low, settings.clip_high
    logp = token_logprobs(model, *batch["inputs"], settings.temperature)
    old = batch.setdefault("old", logp.detach())  # before a weight has moved: there rho is 1
    loss = policy_loss(logp, old, advantages, mask, low, high, n_tokens)
    rho = torch.exp(logp.detach() - old)
    clipped = ((rho > 1 + high) & (advantages > 0)) | ((rho < 1 - low) & (advantages < 0))
    logged = {"entropy": -old, "ratio": rho, "clip_fraction": clipped}  # entropy: E[-log pi]
    if "ref" in batch:
        logged["kl"] = kl_to_reference(logp, batch["ref"])
        loss = loss + settings.kl * (torch.where(mask, logged["kl"], 0.0).sum() / n_tokens)
    return loss, {name: values[mask].sum() for name, values in logged.items()}


def update(model, optimizer, completions: list, settings, loss_of=grpo_loss) -> dict:
    """The optimizer steps on one batch; returns means over the tokens computed at the last of them.
    Each token has the weight 1 / n_tokens: with a mean per completion, a wrong answer would get
    cheaper by going on; with a mean per micro-batch the gradient would depend on how it is cut."""
    trained = [c for c in completions if c.rewards is not None]
    n_tokens = sum(len(c.ids) for c in trained)
    if not settings.kl:  # then an advantage of 0 is a gradient of 0
        trained = [c for c in trained if any(c.advantages)] or trained[:1]
    batches = [collate(part, model) for part in micro_batches(trained, settings.micro_batch)]
    for _ in range(settings.updates_per_batch):
        sums = {}
        for batch in batches:
            loss, of_batch = loss_of(model, batch, n_tokens, settings)
            loss.backward()
            sums |= {name: sums.get(name, 0.0) + value.item() for name, value in of_batch.items()}
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()
        optimizer.zero_grad()
    n_computed = sum(len(c.ids) for c in trained)
    return {name: total / n_computed for name, total in sums.items()} | {"grad_norm": grad_norm}


# ---- Training ------------------------------------------------------------------------------------
class Run:
    """The folder of a run: settings, logs, checkpoint. `step` is the last one that is complete, or
    None in mid-update. Stops at a run that is there without --resume, and at other settings."""

    MAY_CHANGE = "resume steps out micro_batch save_every judge_url judge_threads judge_patience"
    MAY_CHANGE += " max_judge_calls"

    def __init__(self, settings: TrainSettings):
        name = Path(settings.model.rstrip("/").removesuffix("/final")).name
        self.out = Path(settings.out or f"runs/{name}-{settings.method}")
        self.out.mkdir(parents=True, exist_ok=True)
        self.checkpoint = self.out / "checkpoint.pt"
        self.state = {"step": 0}
        self.lock = FileLock(self.out / ".lock", timeout=0, is_singleton=True)
        try:
            self.lock.acquire()
            if self.checkpoint.exists():
                self.state = torch.load(self.checkpoint, map_location="cpu")
            self.step, before = self.state["step"], self.state.get("settings", {})
        except Exception as error:
            stop(f"{self.out} is in use, or damaged ({type(error).__name__}): take another --out")
        if not settings.resume and (before or (self.out / "settings.json").exists()):
            stop(f"{self.out} holds a run: add --resume to go on with it, or another --out")
        for name, value in vars(settings).items():
            if name not in self.MAY_CHANGE.split() and before.get(name, value) != value:
                stop(f"{self.out} was started with {name} {before[name]}, not {value}")
        for path in (self.out / "metrics.jsonl", self.out / "rollouts.jsonl"):
            path.touch()  # and forget what came after the checkpoint
            write_log(path, [r for r in read_log(path) if r.get("step", 0) <= self.step], "w")
        self.saved, self.settings = self.step, vars(settings)

    def start(self, model, optimizer, paid: dict) -> None:
        """Give what the checkpoint holds to its owners, and write down the settings."""
        self.owners = {"model": model, "optimizer": optimizer}
        self.paid = paid
        if self.step:
            paid.update(self.state["paid"])
            for name, owner in self.owners.items():
                owner.load_state_dict(self.state.pop(name))  # not to be held twice
        sampling = {"sampling": model.generation_config.to_diff_dict()}
        write_log(self.out / "settings.json", [self.settings | sampling], "w")

    def save(self) -> None:
        """Replace checkpoint.pt, whole or not at all, if there is a new step that is complete."""
        if self.step not in (None, self.saved):
            state = {name: owner.state_dict() for name, owner in self.owners.items()}
            state |= {"step": self.step, "settings": self.settings, "paid": self.paid}
            torch.save(state, self.out / "checkpoint.tmp")
            (self.out / "checkpoint.tmp").replace(self.checkpoint)
            self.saved = self.step

    def log(self, step: int, metrics: dict, completions: list[Completion], tokenizer) -> None:
        """Append a step's numbers to metrics.jsonl, and all its completions to rollouts.jsonl."""
        write_log(self.out / "metrics.jsonl", [{"step": step} | metrics])
        unlogged = ("row", "ids", "prompt_ids", "teacher_prompt_ids", "ref_logprobs")
        records = []
        for c in completions:
            known = {k: v for k, v in (c.row | vars(c)).items() if k not in unlogged}
            records.append({"step": step, "prompt": tokenizer.decode(c.row["prompt_ids"])} | known)
        write_log(self.out / "rollouts.jsonl", records)
        self.step = step


def measure(completions: list[Completion], group_size: int) -> dict[str, float]:
    """What a batch says. Watch `accuracy` beside `reward`: a widening gap is reward hacking."""
    rewards = [np.mean(c.rewards) for c in completions if c.rewards is not None]
    groups = chunks(completions, group_size)
    values = {
        "reward": rewards,
        "reward_std": [np.std(rewards)],
        "accuracy": [c.correct for c in completions if c.correct is not None] or [math.nan],
        "no_signal": [not any(any(c.advantages) for c in group) for group in groups],
        "cut": [c.cut for c in completions],
        "to_judge": [judge_prompts.speaks_to_judge(c.text) for c in completions],
        "judge_failed": [c.rewards is None for c in completions],
        "length": [len(c.ids) for c in completions],
    }
    return {name: float(np.mean(value)) for name, value in values.items()}


def set_up(settings: TrainSettings, rows: list[dict]) -> tuple:
    """(run, judge, tokenizer, model, initial, optimizer). Bad input stops before models load."""
    if len(rows) < settings.prompts_per_step:
        stop(f"--prompts-per-step {settings.prompts_per_step}: there are {len(rows)} problems")
    run = Run(settings)
    judge = Judge(settings, run.out.parent) if settings.method in ("process", "outcome") else None
    source, tokenizer = find_model(settings.model)
    for row in rows:
        row["prompt_ids"] = policy_prompt(tokenizer, row["question"])
    model = load_model(source)
    initial = load_model(source).requires_grad_(False) if settings.kl else None
    for loaded in filter(None, (model, initial)):
        set_sampling(loaded, tokenizer, rows[0]["prompt_ids"], settings)
    adamw = {"betas": (0.9, 0.99), "weight_decay": 0.01, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    run.start(model, optimizer, judge.paid if judge else {})
    return run, judge, tokenizer, model, initial, optimizer


def train(settings, rows=None, sample=sample_groups, fill=fill_advantages, loss=grpo_loss):
    """Train a model by one of the methods: sample, judge, advantage, update, log."""
    needed = ("question", "answer" if settings.method == "sparse" else "reference")
    rows = rows or load_rows(settings.data, "train", needed=needed)
    run, judge, tokenizer, model, initial, optimizer = set_up(settings, rows)
    n_prompts, group_size = settings.prompts_per_step, settings.group_size
    kind = settings.judge_input if settings.method == "process" else settings.method
    ended = functools.partial(judge.submit, kind=kind) if judge else None
    steps = range(run.step + 1, settings.steps + 1)
    print(f"run: {run.out}, {settings.method}, {len(rows)} problems, {run.step} steps done")
    if judge:
        calls = group_size * (MAX_STEPS if kind in ("prefix", "alone") else 1) + 1  # a problem
        print(f"{judge.name}: up to {calls * n_prompts * len(steps):,} calls, if nothing is cached")
    bar = tqdm(steps, settings.method, settings.steps, initial=run.step)
    history = read_log(run.out / "metrics.jsonl")
    held = []  # signals to end that have come while the weights were moving
    try:
        for step in bar:
            torch.manual_seed(settings.seed * 1_000_003 + step)  # resumed, it draws what this draws
            rng = np.random.default_rng([settings.seed, step])
            problems = [rows[i] for i in rng.choice(len(rows), n_prompts, replace=False)]
            clock = [time.monotonic()]
            for row in problems if judge else []:  # so that no completion will wait for it
                judge.pool.submit(judge.ask_rubric, row)
            groups = sample(model, tokenizer, problems, group_size, settings.sample_batch, ended)
            completions = [c for group in groups for c in group]  # 1. sample
            clock.append(time.monotonic())
            if initial:  # while the judge reads
                fill_reference(initial, completions, settings)
            clock.append(time.monotonic())
            if judge:
                judge.wait(completions)  # 2. judge
            clock.append(time.monotonic())
            fill(completions, settings)  # 3. advantage
            metrics = measure(completions, group_size) | run.paid
            on_term = signal.signal(signal.SIGTERM, lambda *_: held.append("SIGTERM"))
            run.step = None  # the weights are moving: save() does nothing until log()
            optimizer.param_groups[0]["lr"] = settings.lr * min(1.0, step / 5)  # warm-up
            metrics |= update(model, optimizer, completions, settings, loss)  # 4. update
            if not math.isfinite(metrics["grad_norm"]):
                stop(f"step {step}: the gradient is no number; lower --lr, or raise --kl")
            phases = ("seconds_sample", "seconds_reference", "seconds_judge", "seconds_update")
            metrics |= zip(phases, np.diff([*clock, time.monotonic()]).tolist(), strict=True)
            run.log(step, metrics, completions, tokenizer)  # 5. log
            signal.signal(signal.SIGTERM, on_term)
            if held:
                raise KeyboardInterrupt
            shown = {k: f"{metrics[k]:.3f}" for k in ("reward", "accuracy")} | run.paid
            history.append(metrics)
            bar.set_postfix(shown | judge_prompts.warn(history))
            if step % settings.save_every == 0 or step == settings.steps:
                run.save()
    finally:  # also after an error or Ctrl-C
        bar.close()
        if judge:
            judge.close()
        run.save()
    model.save_pretrained(run.out / "final")
    tokenizer.save_pretrained(run.out / "final")
    print(f"trained model: {run.out / 'final'}; see it: python tests/report.py {run.out}")


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
    """{"pass@1": [mean, low, high], "pass@2": ...} of records of n completions and how many are
    correct, with 95% bootstrap intervals over problems."""
    draws = np.random.default_rng(0).integers(len(counts), size=(1000, len(counts)))
    rates = {}
    for k in [2**i for i in range(counts[0]["n"].bit_length())]:
        values = np.array([pass_at_k(record["n"], record["correct"], k) for record in counts])
        low, high = np.percentile(values[draws].mean(axis=1), [2.5, 97.5])
        rates[f"pass@{k}"] = [float(values.mean()), float(low), float(high)]
    return rates


def evaluate(settings: EvalSettings) -> None:
    """Evaluate models: a table of pass@1 and pass@k, and optionally the problems that one fails."""
    n, out, table = settings.samples, Path(settings.out), {}
    models = {name: find_model(name) for name in settings.model}
    rows = load_rows(settings.data, settings.split, settings.problems)
    out.mkdir(parents=True, exist_ok=True)
    for name, (source, tokenizer) in models.items():
        for row in rows:
            row["prompt_ids"] = policy_prompt(tokenizer, row["question"])
        model = load_model(source)
        set_sampling(model, tokenizer, rows[0]["prompt_ids"], settings)
        torch.manual_seed(settings.seed)
        groups = sample_groups(model, tokenizer, rows, n, settings.sample_batch)
        counts, path = [], out / (name.strip("./").replace("/", "-") + ".jsonl")
        write_log(path, counts, "w")
        for group in tqdm(groups, f"eval, {n} samples each", len(rows), leave=False):
            record = {"model": name, "n": n} | {key: group[0].row[key] for key in COLUMNS}
            record |= {key: sum(getattr(c, key) for c in group) for key in ("correct", "cut")}
            counts.append(record | {"texts": [c.text for c in group]})
            write_log(path, counts[-1:])  # as they come
        table[name] = {}
        for k, rate in pass_rates(counts).items():
            table[name][f"{k}, %"] = "{:.1f} [{:.1f}, {:.1f}]".format(*100 * np.array(rate))
        print(f"{name}: pass@1 {table[name]['pass@1, %']}; counts per problem: {path}")
    if settings.save_hard:
        hard = [{key: r[key] for key in COLUMNS} for r in counts if r["correct"] == 0]
        write_log(Path(settings.save_hard), hard, "w")
        print(f"{settings.save_hard}: {len(hard)} of {len(rows)} problems")
    print(f"\nmeans over problems, with 95% bootstrap intervals\n{DataFrame(table).T.to_string()}")


# ---- Command line --------------------------------------------------------------------------------
def read_flags(settings_class: type, argv: list[str], description: str):
    """Settings of this class from its flags, one a field. Wrong ones end the program."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for f in fields(settings_class):
        flag = {"help": f.metadata["meaning"]}
        if f.type is bool:
            flag["action"] = "store_true"
        elif f.default is MISSING:
            flag |= {"required": True, "nargs": "+" if f.type == list[str] else None}
        else:
            flag |= {"type": json.loads if f.type is dict else f.type, "default": f.default}
            flag["choices"] = f.metadata["choices"]
            flag["help"] += "" if f.default == "" else f" (default: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), **flag)
    settings = settings_class(**vars(parser.parse_args(argv)))
    for f in fields(settings_class):
        value, smallest = getattr(settings, f.name), f.metadata["at_least"]
        if smallest is not None and not smallest <= value < math.inf:
            flag = f.name.replace("_", "-")
            parser.error(f"argument --{flag}: {value} is no number of {smallest} or more")
    return settings


def run_command(command: Callable, settings_class: type, argv: list[str], about: str) -> None:
    """Call it with its settings; what goes wrong outside of this file ends it with one line."""
    logging.disable_progress_bar()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: a checkpoint, then out
    try:
        command(read_flags(settings_class, argv, about))
    except KeyboardInterrupt:
        stop("interrupted; a training run goes on from its last checkpoint with --resume")
    except torch.OutOfMemoryError:
        stop("out of memory: --micro-batch 1, a smaller --sample-batch, --kl 0 (no second model)")
    except (OSError, UnicodeError) as error:
        stop(str(error))
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        stop("the model's logits are no numbers: its weights are damaged, or --lr is too high")


def main(argv: list[str] | None = None) -> None:
    """exprl.py [train] FLAGS, or exprl.py eval FLAGS."""
    argv = sys.argv[1:] if argv is None else argv
    name, *flags = argv if argv and argv[0][0] != "-" else ["train", *argv]
    if name == "train":
        run_command(train, TrainSettings, flags, __doc__)
    elif name == "eval":
        run_command(evaluate, EvalSettings, flags, EvalSettings.__doc__)
    else:
        stop(f"no command {name}: python tests/report.py (report, plot) or tests/calibrate.py")


if __name__ == "__main__":
    main()
