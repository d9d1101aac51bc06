r"""ExpRL in one script: reinforcement learning on problems that the model cannot solve yet.

RL with a sparse reward (1 for a correct answer, 0 otherwise) needs a correct answer now and then.
On hard problems there is none, so there is nothing to reinforce. ExpRL (Exploratory RL, arXiv
2606.17024) uses the reference solution of each problem as a scaffold for the reward. The policy
never sees this solution. One iteration of the training loop has five parts:

  1. sample     The policy writes G completions of each problem. It sees only the question.
  2. judge      An LLM behind an API turns each reference into a rubric, a list of 2 to 6 items,
                once per problem. Then it compares each completion with the reference and the
                rubric, and writes a score k from 1 to 5: one score for the whole completion
                (Outcome) or one score for each of its steps (Process).
  3. advantage  The reward is s = (k - 1) / 4, which lies in 0..1.
                Outcome: A = (s - mean) / std over the problem's G completions. Every token of a
                completion gets the same A.
                Process: A_t = s_t - s_(t-1) for the tokens of step t, and A_1 = s_1 - s_last, so
                that the advantages of all steps sum to 0: more steps alone gain nothing.
  4. update     PPO's clipped loss with these advantages, plus a small KL penalty that keeps the
                policy close to the initial policy.
  5. log        Every number and every completion is written to disk.

For example, take two completions of one problem, with three steps and with two:

    Process    scores 1, 5, 5 and 5, 1    rewards 0, 1, 1 and 1, 0    A = -1, 1, 0 and 1, -1
    Outcome    scores 4 and 2             rewards 0.75 and 0.25       A = 0.71 and -0.71

No answer has to be correct for this. Under Process, a step becomes more likely if it scores higher
than the step before it. The first step does so if it scores higher than the last. Under Outcome, a
completion becomes more likely if it scores higher than the mean of its group. Over many
iterations the policy can come closer to solutions that it could not reach at first.

Training with the judge's reward is stage 1, which the paper calls RL mid-training. Stage 2 runs the
same loop from the model of stage 1 with the sparse reward (--method sparse). Now there are correct
answers to reinforce.

  python exprl.py --model Qwen2.5-0.5B                                            # stage 1 on GSM8K
  python exprl.py --model runs/process/final --method sparse --no-std --kl 0      # stage 2
  python tests/tools/evaluate.py --model Qwen2.5-0.5B runs/sparse/final           # pass@1, pass@k

By default stage 1 makes about 14,400 judge calls: one for each of 200 x 8 x 8 completions, and one
for the rubric of each problem drawn. GSM8K serves as the example because it is well known. Train
on problems that your own model fails (evaluate.py finds them with --save-hard).

If you are here for the method, skim everything under a banner that says (plumbing).

Words: a *problem* has a question, a *reference* (the hidden solution) and an answer. The policy
gets a *prompt* and writes a *completion*, which is made of *steps*. The judge's *score* (1..5)
becomes a *reward* (0..1), and the reward becomes an *advantage*. The *initial* policy is the model
before training. The G completions of one problem are a *group*.

Shapes: B completions, P prompt tokens, T completion tokens with padding, V vocabulary. N counts the
tokens that the policy sampled, without padding: the loss works on flat (N,) tensors.
"""

import copy
import hashlib
import json
import math
import os
import random
import re
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import MISSING, dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import Literal

import openai
import torch
from math_verify import parse, verify
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm, trange
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser

import judge_prompts


# ---- Settings (plumbing): every field is a flag of the command line ------------------------------
def option(default, meaning):
    """Make a dataclass field that HfArgumentParser turns into a flag with this help text."""
    return field(default=default, metadata={"help": meaning})


class Settings:
    """The base class of all settings."""

    may_be_zero = ("lr", "kl", "clip_low", "clip_high", "seed", "max_judge_calls")

    def __post_init__(self):
        """Raise ValueError for a number that is negative or infinite, or 0 where 0 is useless."""
        for name, value in vars(self).items():
            is_zero = value == 0 and name in self.may_be_zero
            if type(value) in (int, float) and not is_zero and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value}: give a positive number")


@dataclass(kw_only=True)
class TrainingSettings(Settings):
    """Settings of the model, the method and the length of training."""

    _argument_group_name = "training"
    model: str = option(MISSING, "a hub id, a folder (RUN/final), or the bare name of a Qwen model")
    method: Literal["process", "outcome", "sparse"] = option(
        "process", "process: a score per step. outcome: one per completion. sparse: 1 if correct"
    )
    out: str = option("", "run folder; if empty, runs/METHOD")
    resume: bool = option(False, "continue the run in --out, if there is one")
    iterations: int = option(200, "iterations of the training loop (paper: 230)")
    prompts_per_iteration: int = option(
        8, "problems in one iteration; more make the gradient less noisy (paper: 32 to 36)"
    )
    group_size: int = option(
        8, "G, the completions of a problem; use more for harder problems (paper: 10 to 16)"
    )
    process_norm: Literal["delta", "end", "group"] = option(
        "delta", "subtract the step before (delta), the last step (end), or the group mean (group)"
    )
    no_std: bool = option(
        False, "outcome, sparse: do not divide A by the group's std (the paper's stage 2)"
    )
    optimizer_steps: int = option(
        1, "passes over an iteration's completions; with 1, clipping has no effect (paper: 1 to 2)"
    )
    lr: float = option(
        1e-6, "learning rate after 5 iterations of warm-up; raise it for a short run (paper: 1e-6)"
    )
    kl: float = option(
        0.001, "weight of the KL penalty; 0 saves memory (paper: 0.001, and 0 in stage 2)"
    )
    clip_low: float = option(0.2, "lower clip of the probability ratio: 1 - CLIP_LOW (paper: 0.2)")
    clip_high: float = option(
        0.26, "upper clip: 1 + CLIP_HIGH (paper: 0.26 for process, 0.28 for outcome)"
    )
    micro_batch: int = option(
        4, "completions in one backward pass; lower it if memory runs out (same result)"
    )
    save_every: int = option(10, "iterations between checkpoints")


@dataclass(kw_only=True)
class SamplingSettings(Settings):
    """Settings of the problems and of the sampling."""

    _argument_group_name = "sampling"
    data: str = option(
        "gsm8k", "gsm8k, math, a file (FILE.jsonl), or a hub id with or without :CONFIGURATION"
    )
    temperature: float = option(0.8, "temperature of sampling; higher explores more (paper: 0.8)")
    max_new_tokens: int = option(512, "length at which a completion is truncated (paper: 16384)")
    sample_batch: int = option(
        64,
        "completions sampled at once, but at least those of one problem; lower it to save memory",
    )
    seed: int = option(0, "seed of the sampling and of the choice of problems")


@dataclass(kw_only=True)
class JudgeSettings(Settings):
    """Settings of the judge. The docstring of judge_prompts.py explains its calls."""

    _argument_group_name = "judge"
    judge_model: str = option(
        "gpt-4.1-mini", "name of the judge at its API (paper: Qwen3-4B-Instruct-2507)"
    )
    judge_url: str = option(
        "", "address of the judge's API; if empty, OPENAI_BASE_URL or otherwise OpenAI's address"
    )
    judge_options: str = option(
        '{"temperature": 0, "max_tokens": 2048}', "JSON object, sent with every call (the paper's)"
    )
    judge_threads: int = option(32, "judge calls under way at the same time")
    judge_input: Literal["together", "prefix", "alone"] = option(
        "together",
        "what the judge sees in one call under --method process. together: all steps, to score "
        "each of them (ours: one call per completion). prefix: a step and the steps before it (as "
        "in the paper). alone: one step (as in the paper's released code)",
    )
    rubric: Literal["reference", "none"] = option(
        "reference", "a rubric from the reference (as in the paper), or none (as in its code)"
    )
    max_judge_calls: int = option(
        0, "stop when the run has paid for this many judge calls; 0: no limit"
    )


# ---- Messages and files (plumbing) ---------------------------------------------------------------
def stop(message):
    """End the program with one line that says what is wrong and what to do (exit status 1)."""
    raise SystemExit(f"exprl: {' '.join(message.split())}")


def chunks(items, size):
    """Cut a list into consecutive parts of `size` items. The last part may be shorter."""
    return [items[i : i + size] for i in range(0, len(items), size)]


def append_jsonl(path, records):
    """Append dictionaries to a JSON-lines file."""
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))


def read_jsonl(path):
    """Read the dictionaries of a JSON-lines file. A line that a crash cut short is skipped."""
    records = []
    for line in path.open() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


# ---- Problems (plumbing): dictionaries with question, reference, answer and domain ---------------
DATASETS = {"gsm8k": "openai/gsm8k:main", "math": "DigitalLearningGmbH/MATH-lighteval"}


def read_problem(record, needed):
    r"""Return a dictionary with the question, reference, answer and domain of a record.

    GSM8K keeps "reference #### answer" in one column. MATH calls its columns problem and solution,
    and the answer is in the \boxed{} of the solution. Raises ValueError for a malformed record.

    >>> read_problem({"problem": "1 + 1?", "solution": r"It is \boxed{2}."}, "answer")
    {'question': '1 + 1?', 'reference': 'It is \\boxed{2}.', 'answer': '2', 'domain': 'math'}
    """
    problem = {
        "question": record.get("problem"),
        "reference": record.get("solution"),
        "answer": None,
        "domain": "math",
    }
    for name in problem:
        value = record.get(name, problem[name])
        problem[name] = "" if value is None else str(value).strip()
    if "####" in problem["answer"]:
        solution, problem["answer"] = re.split("#### *", problem["answer"])
        problem["reference"] = re.sub(r"<<.*?>>", "", solution).strip()  # <<3*4=12>>: calculator
    elif not problem["answer"] and r"\boxed" in problem["reference"]:
        problem["answer"] = (parse(problem["reference"]) or [""])[-1]  # parse: [value, its text]
    for name in ("question", needed):
        if not problem[name]:
            raise ValueError(f"it has no {name}")
    if problem["domain"] not in judge_prompts.DOMAINS:
        raise ValueError(f"its domain {problem['domain']} is not math, science or code")
    return problem


def load_problems(source, split, needed):
    """Load the problems of a JSON-lines file, or of a split of a hub data set.

    Stops with one line that names the source, and the number of a malformed record.
    """
    problems = []
    try:
        if source.endswith(".jsonl"):
            records = map(json.loads, Path(source).read_text("utf-8-sig").strip().split("\n"))
        else:
            from datasets import load_dataset  # here, since the import takes a second

            name, _, config = DATASETS.get(source, source).partition(":")
            records = load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub's errors do not have a common base class
        stop(f"--data {source} cannot be loaded: {error}")
    try:
        for record in records:
            problems.append(read_problem(record, needed))
    except (ValueError, AttributeError) as error:
        stop(f"--data {source}, record {len(problems) + 1} cannot be used: {error}")
    return problems


# ---- The sparse reward ---------------------------------------------------------------------------
def is_correct(completion, answer):
    r"""Return whether the final answer of a completion equals the known answer.

    This is the sparse reward, and the accuracy in every log. The package math_verify finds the
    final answer (a \boxed{}, otherwise the last number) and compares values: 1/2 equals 0.5.

    >>> is_correct(r"So it is \boxed{\frac{1}{2}}.", "0.5"), is_correct("It is .5", "5")
    (True, False)
    """
    return verify(parse(f"${answer}$"), parse(completion))


# ---- Policy: prompt, model, sampling -------------------------------------------------------------
# The instruction is the same in every method, stage and evaluation.
INSTRUCTION = (
    "Solve the problem by reasoning step by step. Start each step on a new line with ###. "
    r"End with the final answer in \boxed{}."
)
END_OF_TURN = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"]


def policy_prompt(tokenizer, question, instruction=INSTRUCTION):
    """Return everything that the policy sees, as a list of P token ids.

    The policy never sees a reference. All prompts are made here, and training and evaluation pass
    only a question. (With another instruction, baselines.py makes the prompt of a teacher.) A model
    without a chat template gets plain text.
    """
    text = f"{instruction}\n\n{question}"
    if not tokenizer.chat_template:
        return tokenizer(f"{text}\n\nSolution:\n").input_ids
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],  # one turn: not every template has a system role
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,  # Qwen3 would spend all its tokens on thoughts
        # A template that prints the date must not change the prompts of a run resumed tomorrow.
        chat_template="{% macro strftime_now(_) %}1 Jan 2026{% endmacro %}"
        + tokenizer.chat_template,
    )
    return tokenizer(chat, add_special_tokens=False).input_ids  # the template wrote the BOS token


def end_tokens(tokenizer, model):
    """Return a list of the ids of the tokens that end a completion.

    They are the eos tokens of the tokenizer and of the model's configuration, and the tokens that
    chat templates write after a turn. Base models often do not configure the latter: Qwen2.5-0.5B
    configures <|endoftext|>, and its template ends a turn with <|im_end|>.
    """
    ids = [tokenizer.get_vocab().get(token) for token in END_OF_TURN] + [tokenizer.eos_token_id]
    configured = model.generation_config.eos_token_id
    ids += configured if isinstance(configured, list) else [configured]
    return sorted({*ids} - {None}) or stop("no end-of-sequence token: choose another --model")


def load_policy(name, problems, sampling):
    """Return (model, tokenizer) from the hub or a folder, ready to sample as `sampling` says.

    Weights are float32: at a learning rate of 1e-6, rounding to bf16 would undo most updates. The
    model stays in eval mode: dropout would make the log-probs differ from the sampler's. Stops if
    there is no such model, or if the longest prompt and completion exceed its context.
    """
    source = name if "/" in name or Path(name).is_dir() else f"Qwen/{name}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    except Exception as error:  # the hub's errors do not have a common base class
        stop(f"--model {name} cannot be loaded; give a hub id or a model folder: {error}")
    longest = max(len(policy_prompt(tokenizer, problem["question"])) for problem in problems)
    context = getattr(model.config, "max_position_embeddings", math.inf)
    if longest + sampling.max_new_tokens > context:
        stop(f"lower --max-new-tokens: a prompt has {longest} of the context's {context} tokens")
    # Make `generate` sample from softmax(logits / temperature), the distribution that the loss
    # uses. A model brings its own top_k, top_p and penalties (Qwen2.5: 20, 0.8, 1.1), and the
    # library's default for top_k is 50. This configuration switches all of them off.
    ends = end_tokens(tokenizer, model)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    return model.to(device).eval(), tokenizer


def mixed_precision(model):
    """Return a context in which a CUDA device computes in bf16, from weights that stay float32.

    PyTorch keeps bf16 copies of the trained weights until the context ends. After an optimizer step
    a new context is needed, because the copies still hold the old weights.
    """
    device = model.device.type
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device, torch.bfloat16, enabled=has_bf16)


def completion_mask(tokens, eos_ids):
    """(B, T) completion ids -> (B, T) bool, True up to and including the first eos token.

    Do not use `tokens != pad` instead. The pad token may be the eos token. The mask would then drop
    the eos token, and the policy would never learn to stop.

    >>> completion_mask(torch.tensor([[5, 2, 2, 2], [5, 6, 7, 8]]), {2}).int().tolist()
    [[1, 1, 0, 0], [1, 1, 1, 1]]
    """
    is_eos = torch.isin(tokens, tokens.new_tensor(sorted(eos_ids))).long()  # (B, T)
    n_eos_before = is_eos.cumsum(dim=1) - is_eos  # (B, T)
    return n_eos_before == 0


def pad(rows, side, device):
    """Pad B lists of token ids on one side -> (B, longest) ids, and (B, longest) bool mask."""
    tensors = [torch.tensor(row, device=device) for row in rows]
    # -1 marks padding, since every token id is at least 0
    padded = pad_sequence(tensors, batch_first=True, padding_value=-1, padding_side=side)
    return padded.clamp(min=0), padded >= 0


@dataclass
class Completion:
    """One sampled completion of one problem. Nothing changes it later."""

    problem: dict  # question, reference, answer, domain
    text: str
    step_texts: list[str]
    steps: list  # (start, end) spans of `ids`, which cover all of them
    correct: bool | None  # None if the problem has no answer to compare with
    truncated: bool  # it reached the length cap before an eos token
    prompt_ids: list[int]  # P token ids
    ids: list[int]  # the sampled token ids, up to and including the first eos token


def read_completion(problem, prompt_ids, ids, tokenizer, eos_ids):
    """Decode token ids, split them into steps and check the answer -> Completion."""
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    text = decode(ids)
    pieces = [decode([token]) for token in ids]  # singly, so that steps are spans of tokens
    steps = judge_prompts.split_steps(pieces)
    step_texts = [decode(ids[start:end]) for start, end in steps]
    correct = is_correct(text, problem["answer"]) if problem["answer"] else None
    truncated = ids[-1] not in eos_ids
    return Completion(problem, text, step_texts, steps, correct, truncated, prompt_ids, ids)


@torch.no_grad()
def sample(model, tokenizer, problems, n, batch_size):
    """Sample n completions of each problem -> list of completions, problem after problem.

    The model reads each prompt once. Its cache of keys and values is then repeated for the n
    completions. The last token of a prompt is not in this cache, because `generate` has to begin
    with a token that the model has not read yet. Up to `batch_size` completions are sampled at
    once, but at least the n completions of one problem. Stops if the model does not sample from
    softmax(logits / temperature), the distribution that the loss uses.
    """
    eos_ids = set(model.generation_config.eos_token_id)
    completions = []
    for batch in chunks(problems, max(1, batch_size // n)):  # B / n problems
        prompts = [policy_prompt(tokenizer, problem["question"]) for problem in batch]
        prompt_ids, mask = pad(prompts, "left", model.device)  # (B / n, P)
        with mixed_precision(model):
            start = model.generate(
                prompt_ids[:, :-1],
                attention_mask=mask[:, :-1],
                max_new_tokens=1,
                return_dict_in_generate=True,
                output_logits=True,
                output_scores=True,
            )
            # The scores are the logits after everything that `generate` does to them. If a top_k or
            # a penalty still acts, the scores are not logits / temperature.
            scores = start.scores[0] * model.generation_config.temperature
            if not torch.allclose(scores, start.logits[0]):
                stop("this model samples with a top_k, a penalty or similar: use another --model")
            start.cache.batch_repeat_interleave(n)  # (B / n, heads, P - 1, d) -> (B, ...)
            sequences = model.generate(
                prompt_ids, attention_mask=mask, num_return_sequences=n, cache=start.cache
            )
        tokens = sequences[:, prompt_ids.shape[1] :]  # (B, T)
        for problem, prompt, group in zip(batch, prompts, chunks(tokens, n)):  # (n, T)
            for row, is_sampled in zip(group, completion_mask(group, eos_ids)):
                ids = row[is_sampled].tolist()
                completions.append(read_completion(problem, prompt, ids, tokenizer, eos_ids))
    return completions


# ---- Judge client (plumbing): transport, cache and bill ------------------------------------------
PATIENCE = 600.0  # seconds: the run stops if the judge is unavailable and no new call begins
PAUSE = 5.0  # seconds between two tries
TRIES = 3  # a call fails after this many replies that cannot be parsed
HELP = """(Check OPENAI_API_KEY, --judge-url http://HOST:PORT/v1, --judge-model and \
--judge-options '{"temperature": 0, "max_tokens": 2048}'. Without a key: \
tests/tools/value_judge.py is a free judge. --resume continues a run.)"""


class JudgeClient:
    """The connection to an LLM judge behind an OpenAI-compatible API, with a cache and a bill.

    Replies that can be parsed are kept in RUN/../judge_cache.jsonl. A call whose reply is in this
    file is not sent again. All runs in the parent folder share this file. `paid` counts the
    requests and tokens of this run. A resumed run reads its earlier count from
    RUN/judge_calls.jsonl. Stops if a first, small call fails.
    """

    def __init__(self, settings, method, out):
        self.name = f"the judge {settings.judge_model} {settings.judge_url or '(default address)'}"
        self.settings, self.lock = settings, threading.RLock()
        self.kind = settings.judge_input if method == "process" else "outcome"
        self.cache_file, self.bill = out.parent / "judge_cache.jsonl", out / "judge_calls.jsonl"
        self.cache, self.reported, self.paid = {}, set(), Counter()
        for amounts in read_jsonl(self.bill):
            self.paid.update(amounts)
        try:
            self.options = json.loads(settings.judge_options)
            key = (os.environ.get("OPENAI_API_KEY") or "none").strip()
            # The client waits 600 seconds for a reply. Retries are ours, so that each is counted.
            self.client = openai.OpenAI(
                base_url=settings.judge_url or None, api_key=key, max_retries=0
            )
            if not self.request([{"role": "user", "content": "Reply with the word ready."}], PAUSE):
                raise ValueError("its reply is empty: raise max_tokens or turn thinking off")
        except Exception as error:  # a malformed address, key or option raises many classes
            stop(f"{self.name} fails: {error} {HELP}")

    def ask(self, messages, parse_reply):
        """Return (parsed reply, reply) of one call, from the cache or from the judge.

        If a reply cannot be parsed, the judge is asked again, up to TRIES times in all. Then the
        parsed reply is None. Only replies that can be parsed are kept in the cache.
        """
        call = json.dumps([self.settings.judge_model, self.options, messages])
        key = hashlib.sha256(call.encode()).hexdigest()
        conversation, reply = [*messages], self.cache.get(key, "")
        for _ in range(TRIES):
            if parse_reply(reply) is not None:
                break
            reply = self.request(conversation, PATIENCE)
            conversation += judge_prompts.ask_again(reply)
        with self.lock:
            if parse_reply(reply) is None:
                self.report(
                    "parse",
                    f"a call failed. Its last reply ends with {reply[-100:]!r} "
                    "('' means that the judge refused, or that max_tokens cut the reply off)",
                )
            elif key not in self.cache:
                self.cache[key] = reply
                append_jsonl(self.cache_file, [{"key": key, "reply": reply}])
            reply = self.cache.get(key, reply)  # another thread may have been first
        return parse_reply(reply), reply

    def request(self, messages, patience):
        """Return the text of one reply, without thoughts.

        Returns "" if the judge refuses this text (it is too long, or moderation rejects it), or if
        the length limit cuts the reply off. If the judge is unavailable, the request is sent again.
        The run stops if no thread has begun a new call for `patience` seconds. A wrong key or model
        name stops it at once.
        """
        self.end = time.monotonic() + patience  # for all threads: a new call is a sign of life
        while True:
            self.pay(judge_calls=1)
            try:
                reply = self.client.chat.completions.create(
                    model=self.settings.judge_model, messages=messages, **self.options
                )
                choice, usage = reply.choices[0], reply.usage
                text = choice.message.content or ""
                if usage:
                    self.pay(
                        prompt_tokens=usage.prompt_tokens or 0,
                        completion_tokens=usage.completion_tokens or 0,
                    )
                if choice.finish_reason == "length":
                    return ""  # a truncated reply may contain a provisional score
                return re.sub(r"^.*</think>|<think>.*", "", text, flags=re.DOTALL)
            except Exception as error:  # the API returned an error, or not a valid reply
                status = getattr(error, "status_code", None)
                if type(error) is not openai.APITimeoutError:
                    self.pay(judge_calls=-1)  # other errors cost nothing
                self.report(type(error), error)
                if status in (400, 403, 413, 422) and patience > PAUSE:  # not in the first call
                    return ""
                if status in (401, 402, 404) or time.monotonic() > self.end:
                    stop(f"{self.name} is unavailable: {error} {HELP}")
            time.sleep(PAUSE)

    def report(self, kind, message):
        """Print the first message of each kind."""
        with self.lock:
            if kind not in self.reported:
                self.reported.add(kind)
                tqdm.write(f"{self.name}: {message}")

    def pay(self, **amounts):
        """Add to what this run has paid, in memory and on disk. Stops at --max-judge-calls."""
        limit = self.settings.max_judge_calls
        with self.lock:
            if 0 < limit < self.paid["judge_calls"] + amounts.get("judge_calls", 0):
                stop(f"--max-judge-calls {limit} is reached: raise it (and continue with --resume)")
            self.paid.update(amounts)
            append_jsonl(self.bill, [amounts])


# ---- Rewards: from the judge, or from the answer -------------------------------------------------
@dataclass
class Verdict:
    """The rewards of one completion, and the judge's texts behind them."""

    rewards: list[float] | None  # in 0..1: one per step, or one for the whole; None: judge failed
    rubric: str = ""
    replies: list[str] = ()  # the judge's replies, one per call


def check_answers(completions):
    """Return the sparse reward: 1 for a correct answer and 0 otherwise."""
    return [Verdict([float(completion.correct)]) for completion in completions]


class Judge(JudgeClient):
    """An LLM judge. Calling it turns the completions of an iteration into verdicts.

    `kind` is the kind of call: outcome, or --judge-input (together, prefix or alone, explained at
    the top of judge_prompts.py). `ask` makes one call and returns (parsed reply, reply).
    """

    def __call__(self, completions):
        """Return a verdict for each completion. Stops if most of the verdicts failed."""
        for record in read_jsonl(self.cache_file):  # other runs may have added to it
            self.cache.setdefault(record["key"], record["reply"])  # the first line of a key counts
        problems = {c.problem["question"]: c.problem for c in completions}
        with ThreadPoolExecutor(self.settings.judge_threads) as threads:
            rubrics = dict(zip(problems, threads.map(self.make_rubric, problems.values())))
            rubric_of_each = [rubrics[c.problem["question"]] for c in completions]
            verdicts = list(threads.map(self.judge, completions, rubric_of_each))
        failed = [verdict.replies for verdict in verdicts if verdict.rewards is None]
        if len(failed) > len(verdicts) / 2:
            stop(f"{self.name} failed on most completions. A reply: {failed[-1][-1]!r} {HELP}")
        return verdicts

    def make_rubric(self, problem):
        """Return (rubric, reply). If the judge failed, the rubric is None."""
        if self.settings.rubric == "none":
            return "", ""
        return self.ask(judge_prompts.judge_messages("rubric", problem), judge_prompts.parse_rubric)

    def judge(self, completion, rubric_and_reply):
        """Judge one completion, with as many calls as the kind of judge input needs -> Verdict.

        A completion without words gets the lowest score without a judge call. Under `outcome`, a
        truncated completion also gets it, since it did not finish. If a call fails, the rewards are
        None: a low score would punish the policy for a failure of the judge.
        """
        rubric, rubric_reply = rubric_and_reply
        is_outcome = self.kind == "outcome"
        steps = [completion.text] if is_outcome else completion.step_texts
        if not re.search(r"\w", completion.text) or (is_outcome and completion.truncated):
            return Verdict([0.0] * len(steps))
        if rubric is None:
            return Verdict(None, replies=[rubric_reply])
        parse_scores = partial(judge_prompts.parse_scores, kind=self.kind, n_steps=len(steps))
        scores, replies = [], []
        for messages in judge_prompts.judge_calls(self.kind, completion.problem, rubric, steps):
            new_scores, reply = self.ask(messages, parse_scores)
            replies.append(reply)
            if new_scores is None:
                return Verdict(None, rubric, replies)
            scores += new_scores
        return Verdict([(score - 1) / 4 for score in scores], rubric, replies)


# ---- Advantages ----------------------------------------------------------------------------------
def group_advantages(rewards, divide_by_std=True):
    """The rewards of a problem's G completions -> G advantages A = (s - mean) / (std + 1e-6).

    ExpRL-Outcome uses it, and so does the sparse reward (GRPO: PPO with such advantages). std has
    the denominator n - 1. Without `divide_by_std`, A = s - mean. A reward may be None (the judge
    failed): that completion is left out of mean and std, and gets 0. If all known rewards are
    equal, there is nothing to compare and all advantages are 0.

    >>> group_advantages([1.0, 0.0, None, 0.5], divide_by_std=False)
    [0.5, -0.5, 0.0, 0.0]
    """
    known = [reward for reward in rewards if reward is not None]
    if len(set(known)) < 2:
        return [0.0] * len(rewards)
    mean = fmean(known)
    scale = stdev(known) + 1e-6 if divide_by_std else 1.0
    return [0.0 if reward is None else (reward - mean) / scale for reward in rewards]


def step_advantages(step_rewards, norm):
    """ExpRL-Process: the step rewards s_1..s_last of one problem's completions -> advantages.

    delta: A_t = s_t - s_(t-1), and A_1 = s_1 - s_last
    end:   A_t = s_t - s_last, and A_last = s_last
    group: A_t = s_t - mean over the completions of (mean over the steps of a completion)

    None of them divides by a standard deviation. The result has the shape of the argument. Pass
    only completions that the judge could score. Raises ValueError for another norm.

    The formulas are the paper's. Delta rewards a step for the progress that it adds:

        [0.25, 1]    -> [-0.75, 0.75]     the weak first step becomes less likely
        [0.75, 1, 1] -> [-0.25, 0.25, 0]  so does a good first step, if the last step is better
        [1, 1, 1]    -> [0, 0, 0]         no step adds anything, and only the KL penalty acts
        [0, 0, 0]    -> [0, 0, 0]         every step is bad, and still nothing is learned

    A_1 subtracts s_last because the other differences add up to s_last - s_1. The sum over the
    steps is then 0, so that more steps alone gain nothing. (The loss averages over tokens, and
    steps differ in length, so this is not exact.) In the paper's released code a completion of one
    step gets A = s_1 under delta, which rewards a policy for not writing steps. Here it gets 0.

    Under end, a step before the last one gains only if it is better than the last: [1, 1, 0] ->
    [1, 1, 0], but [1, 1, 1] -> [0, 0, 1]. This can draw a policy to answers that come too early.

    Under group, a wrong last step becomes less likely, and this step contains the end token. While
    nearly all answers are wrong, completions can therefore grow until they are truncated.

    Delta does not compare completions with each other. A larger group raises the chance that some
    attempts at a hard problem contain both good and bad steps.

    >>> [step_advantages([[0.25, 1.0], [0.5]], norm) for norm in ("delta", "end", "group")]
    [[[-0.75, 0.75], [0.0]], [[-0.75, 1.0], [0.5]], [[-0.3125, 0.4375], [-0.0625]]]
    """
    if norm == "delta":  # at t = 0, s[t - 1] is s[-1], the reward of the last step
        return [[s[t] - s[t - 1] for t in range(len(s))] for s in step_rewards]
    if norm == "end":
        return [[reward - s[-1] for reward in s[:-1]] + s[-1:] for s in step_rewards]
    if norm == "group":
        means = [fmean(s) for s in step_rewards]
        return [[reward - fmean(means) for reward in s] for s in step_rewards]
    raise ValueError(f"norm {norm!r} is not delta, end or group")


def compute_advantages(rewards, training):
    """The rewards of all completions, group after group -> advantages of the same shape.

    A completion whose reward is None (the judge failed) gets the advantage None. It counts neither
    in the mean of its group nor in the loss.
    """
    advantages = []
    for group in chunks(rewards, training.group_size):
        known = [reward for reward in group if reward is not None]
        if training.method == "process":
            values = step_advantages(known, training.process_norm)
        else:
            outcomes = group_advantages([reward[0] for reward in known], not training.no_std)
            values = [[advantage] for advantage in outcomes]
        remaining = iter(values)
        advantages += [None if reward is None else next(remaining) for reward in group]
    return advantages


# ---- Loss and update -----------------------------------------------------------------------------
def completion_logits(model, prompt_ids, completion_ids):
    """(P,) prompt and (B, T) completions of it -> (B, T, V), the logits that predict each token.

    A plain forward pass over [prompt, completion] gives the same logits. This function computes
    them with one pass over the prompt instead of B. The logits at a token predict the next token:

        the last prompt token -> y_1    y_1 -> y_2    ...    y_(T-1) -> y_T    y_T -> (dropped)

    First the prompt alone runs through the model. It leaves a cache of keys and values, which is
    repeated for the B completions. Then the completions run, and each of their tokens attends to
    the cached prompt and to the tokens before it. Gradients flow through the cache. The model
    counts positions from the length of the cache. An attention mask is not needed: the prompt has
    no padding, and the padding of a completion comes last, where no real token sees it.

    (Since version 5.24 transformers calls this argument `cache`. It was past_key_values before.)
    """
    n_completions = len(completion_ids)
    prompt = model(prompt_ids[None], use_cache=True, logits_to_keep=1)
    first = prompt.logits.expand(n_completions, 1, -1)  # (B, 1, V) predicts y_1
    prompt.cache.batch_repeat_interleave(n_completions)  # (1, heads, P, d) -> (B, heads, P, d)
    following = model(completion_ids, cache=prompt.cache).logits  # (B, T, V) predicts the others
    return torch.cat([first, following[:, :-1]], dim=1)


def token_logprobs(model, prompt_ids, completion_ids, temperature):
    """(P,) prompt and (B, T) completions -> (B, T) float32 log-probs of the completions' tokens.

    log pi(y_t | x, y_<t) = log_softmax(logits / temperature)[y_t], the distribution from which
    `generate` sampled. Entries of padded tokens have no meaning.
    """
    logits = completion_logits(model, prompt_ids, completion_ids)  # (B, T, V)
    rows = []
    for row, ids in zip(logits, completion_ids):  # one by one, to hold one row's float32 logits
        logp = torch.log_softmax(row.float() / temperature, dim=-1)  # (T, V)
        rows.append(logp.gather(1, ids[:, None])[:, 0])  # (T,)
    return torch.stack(rows)


def policy_loss(logp, logp_old, advantages, clip_low, clip_high):
    """PPO's clipped loss of each token: all tensors (N,) -> (N,), not reduced.

    loss = -min(ratio A, clip(ratio, 1 - clip_low, 1 + clip_high) A), ratio = exp(logp - logp_old)

    On the first pass the ratio is 1 and the mean loss is minus the mean advantage, often close to
    0. Its gradient is not 0.

    >>> policy_loss(torch.tensor([0.5, 0.0]), torch.zeros(2), torch.tensor([1.0, -1.0]), 0.2, 0.25)
    tensor([-1.2500,  1.0000])
    """
    ratio = torch.exp(logp - logp_old)
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)


def kl_to_initial(logp, logp_initial):
    """The k3 estimate of KL(policy || initial policy) at each sampled token: (N,) -> (N,), in nats.

    k3 = r - 1 - log r, with r = pi_initial(y_t) / pi(y_t), is the third estimator in a note by
    Schulman (2020). It is never negative, because r - 1 >= log r. Its mean over tokens sampled
    from the policy is KL(policy || initial policy) at this position.

    The gradient of k3 is not the gradient of this KL, because autograd does not differentiate
    through the sampling. With grad r = -r grad log pi, and means over y_t at a given prefix:

        grad k3             = (1 - r) grad log pi
        E_pi[grad log pi]   = 0
        E_pi[r grad log pi] = E_initial[grad log pi]
        E_pi[grad k3]       = -E_initial[grad log pi] = grad KL(initial policy || policy)

    Both KLs are 0 only where the policies agree, so the penalty pulls in the intended direction.

    >>> kl_to_initial(torch.tensor([0.0, 0.0]), torch.tensor([0.0, -1.0]))
    tensor([0.0000, 0.3679])
    """
    log_r = logp_initial - logp
    return torch.expm1(log_r) - log_r  # expm1(x) is exp(x) - 1 without the rounding error near 0


@dataclass
class MicroBatch:
    """Up to --micro-batch completions of one problem, padded on the right."""

    completions: list[Completion]
    prompt_ids: Tensor  # (P,)
    completion_ids: Tensor  # (B, T)
    mask: Tensor  # (B, T) bool, True at the N tokens that were sampled
    # add_initial_logprobs, grpo_loss and update fill in the fields below:
    logp_initial: Tensor | None = None  # (N,) log-probs under the initial policy
    logp_old: Tensor | None = None  # (N,) log-probs under the policy that sampled
    advantages: Tensor | None = None  # (N,)
    is_judged: Tensor | None = None  # (N,) bool, False where the judge failed

    def logprobs(self, model):
        """The log-probs of the sampled tokens under a model -> (N,)."""
        temperature = model.generation_config.temperature
        logp = token_logprobs(model, self.prompt_ids, self.completion_ids, temperature)  # (B, T)
        return logp[self.mask]


def make_micro_batches(completions, size, device):
    """Divide completions, in their order, into micro-batches of one problem each -> list."""
    batches = []
    for prompt_ids, group in groupby(completions, key=lambda completion: completion.prompt_ids):
        for part in chunks(list(group), size):
            ids, mask = pad([completion.ids for completion in part], "right", device)
            batches.append(MicroBatch(part, torch.tensor(prompt_ids, device=device), ids, mask))
    return batches


@torch.no_grad()
def add_initial_logprobs(initial, batches):
    """Compute the log-probs of the micro-batches under the initial policy, for the KL penalty."""
    with mixed_precision(initial):
        for batch in batches:
            batch.logp_initial = batch.logprobs(initial)


def spread_over_tokens(completion, advantages):
    """Give each token the advantage of its step, or the completion's only advantage -> list."""
    if len(advantages) == 1:
        return advantages * len(completion.ids)
    spans = zip(advantages, completion.steps)
    return [A for A, (start, end) in spans for _ in range(start, end)]


def grpo_loss(model, batch, training):
    """Return the loss of each sampled token, (N,), and a dictionary of (N,) tensors to log."""
    logp = batch.logprobs(model)  # (N,)
    if batch.logp_old is None:  # the first pass: logp belongs to the policy that sampled
        batch.logp_old = logp.detach()
    loss = policy_loss(
        logp, batch.logp_old, batch.advantages, training.clip_low, training.clip_high
    )
    logged = {"entropy": -batch.logp_old}  # its mean over sampled tokens estimates the entropy
    if batch.logp_initial is not None:
        logged["kl"] = kl_to_initial(logp, batch.logp_initial)
        loss = loss + training.kl * logged["kl"]
    return loss, logged


def update(model, optimizer, batches, advantages, training, loss=grpo_loss):
    """Do the optimizer steps of an iteration. Return the means to log from the last one.

    `advantages` has one entry per completion, in the order of the micro-batches. An entry is None
    where the judge failed, and the loss leaves that completion out. Every token of the others has
    the weight 1 / (number of these tokens in the iteration). Averaging per completion would punish
    each token of a long wrong answer less. Averaging per micro-batch would make the gradient depend
    on how the completions are divided. Raises RuntimeError if the gradient is not finite.
    """
    remaining = iter(advantages)
    for batch in batches:
        spread, judged = [], []
        for completion in batch.completions:
            values = next(remaining)
            spread += spread_over_tokens(completion, values or [0.0])  # 0 will not be used
            judged += [values is not None] * len(completion.ids)
        batch.advantages = torch.tensor(spread, device=model.device)  # (N,)
        batch.is_judged = torch.tensor(judged, device=model.device)  # (N,)
    n_tokens = sum(batch.is_judged.sum() for batch in batches)
    for _ in range(training.optimizer_steps):
        totals = Counter()
        for batch in batches:
            with mixed_precision(model):
                losses, logged = loss(model, batch, training)  # (N,)
            (losses[batch.is_judged].sum() / n_tokens).backward()
            for name, values in logged.items():
                totals[name] += (values[batch.is_judged].sum() / n_tokens).item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        totals["grad_norm"] = norm.item()
        optimizer.step()
        optimizer.zero_grad()
    return dict(totals)


# ---- Run folder (plumbing) -----------------------------------------------------------------------
# These settings may change when a run is resumed. They do not change what an iteration computes.
MAY_CHANGE = {
    "resume",
    "iterations",
    "out",
    "save_every",
    "micro_batch",
    "judge_url",
    "judge_threads",
    "max_judge_calls",
}


def open_run(out, settings):
    """Prepare the folder of a run. A run exists once its first iteration is logged.

    Refuses to overwrite an existing run unless --resume is given, and refuses to resume with
    different settings.
    """
    file, exists = out / "settings.json", (out / "metrics.jsonl").exists()
    if exists and not settings["resume"]:
        stop(f"{out} contains a run: add --resume to continue it, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    if not exists:
        file.write_text(json.dumps(settings, indent=1))
    before = json.loads(file.read_text())
    for name in settings.keys() - MAY_CHANGE:
        if settings[name] != before[name]:
            stop(f"{out} has {name} = {before[name]}, not {settings[name]}: choose another --out")


def save_checkpoint(file, iteration, model, optimizer):
    """Save the state of the training. A kill never leaves half a file."""
    state = {
        "iteration": iteration,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    temporary = file.with_suffix(".tmp")
    torch.save(state, temporary)
    temporary.replace(file)


def load_checkpoint(file, model, optimizer):
    """Continue from a checkpoint, if there is one, and return the number of iterations done.

    Iterations after the checkpoint run again and are logged again. Readers of the logs have to use
    the last record of an iteration.
    """
    if not file.exists():
        return 0
    try:
        state = torch.load(file, map_location="cpu")
    except Exception as error:  # a damaged file raises many classes
        stop(f"{file} cannot be read ({error}): delete it and use --resume to start over")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["iteration"]


def stop_on_signal():
    """Return an event that the first Ctrl-C or SIGTERM sets. A second one ends the program."""
    event = threading.Event()

    def handle(number, _):
        event.set()
        signal.signal(number, signal.SIG_DFL)
        tqdm.write("stopping after this iteration (a second Ctrl-C stops at once)")

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handle)
    return event


# ---- Training ------------------------------------------------------------------------------------
def log(out, iteration, metrics, completions, verdicts, advantages, group_size):
    """Append an iteration's numbers to metrics.jsonl and its completions to rollouts.jsonl.

    Returns the numbers. If the reward rises and the accuracy does not, suspect reward hacking.
    """
    known = [fmean(verdict.rewards) for verdict in verdicts if verdict.rewards is not None]
    correct = [c.correct for c in completions if c.correct is not None]
    groups = chunks([any(advantage or []) for advantage in advantages], group_size)
    metrics = {
        "iteration": iteration,
        "reward": fmean(known),
        "accuracy": fmean(correct) if correct else math.nan,
        "groups_without_signal": fmean(not any(group) for group in groups),
        "truncated": fmean(c.truncated for c in completions),
        "judge_failed": 1 - len(known) / len(verdicts),
        "length": fmean(len(c.ids) for c in completions),
    } | metrics
    append_jsonl(out / "metrics.jsonl", [metrics])
    records = [
        {"iteration": iteration, "advantages": values} | vars(verdict) | vars(completion)
        for completion, verdict, values in zip(completions, verdicts, advantages)
    ]
    append_jsonl(out / "rollouts.jsonl", records)
    return metrics


def train(
    training,
    sampling,
    judging,
    problems=None,
    sample=sample,
    reward=None,
    advantage=compute_advantages,
    loss=grpo_loss,
):
    """Train a model: sample, judge, advantage, update, log."""
    # The functions sample, reward, advantage and loss can be replaced by others of the same
    # signature (see tests/tools/baselines.py). `reward` turns completions into verdicts.
    is_sparse = training.method == "sparse"
    needed = "answer" if is_sparse else "reference"
    problems = problems or load_problems(sampling.data, "train", needed)
    out = Path(training.out or f"runs/{training.method}")
    open_run(out, vars(training) | vars(sampling) | vars(judging))
    if reward is None:
        reward = check_answers if is_sparse else Judge(judging, training.method, out)
    model, tokenizer = load_policy(training.model, problems, sampling)
    # The KL penalty refers to --model, so the copy is made before a checkpoint is loaded.
    initial = copy.deepcopy(model).requires_grad_(False) if training.kl else None
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))  # weight decay 0.01
    done = load_checkpoint(out / "checkpoint.pt", model, optimizer)
    background, stopping = ThreadPoolExecutor(1), stop_on_signal()
    bar = trange(done + 1, training.iterations + 1, desc=f"{out}")
    for iteration in bar:
        seed = sampling.seed * 1_000_003 + iteration  # a resumed run draws the same again
        torch.manual_seed(seed)
        shuffled = random.Random(seed).sample(problems, len(problems))
        drawn = shuffled[: training.prompts_per_iteration]  # all of them, if there are fewer
        # 1. sample
        completions = sample(model, tokenizer, drawn, training.group_size, sampling.sample_batch)
        # 2. judge in the background, while the initial policy computes its log-probs
        pending = background.submit(reward, completions)
        batches = make_micro_batches(completions, training.micro_batch, model.device)
        if initial:
            add_initial_logprobs(initial, batches)
        verdicts = pending.result()
        rewards = [verdict.rewards for verdict in verdicts]
        # 3. advantage
        advantages = advantage(rewards, training)
        # 4. update, with a warm-up of the learning rate
        optimizer.param_groups[0]["lr"] = training.lr * min(1, iteration / 5)
        metrics = update(model, optimizer, batches, advantages, training, loss)
        # 5. log
        metrics |= getattr(reward, "paid", {})
        metrics = log(
            out, iteration, metrics, completions, verdicts, advantages, training.group_size
        )
        bar.set_postfix_str(f"reward {metrics['reward']:.3f}, accuracy {metrics['accuracy']:.3f}")
        is_last = iteration == training.iterations or stopping.is_set()
        if is_last or iteration % training.save_every == 0:
            save_checkpoint(out / "checkpoint.pt", iteration, model, optimizer)
        if stopping.is_set():
            stop(f"stopped after iteration {iteration}: continue with --resume")
    model.save_pretrained(out / "final")
    tokenizer.save_pretrained(out / "final")
    print(f"trained model: {out / 'final'}; to look at it: python tests/tools/report.py {out}")


# ---- Command line (plumbing) ---------------------------------------------------------------------
def run_command(command, settings_classes, argv):
    """Call a command with the settings that its flags give. Wrong flags end the program."""
    parser = HfArgumentParser(settings_classes, description=command.__doc__, allow_abbrev=False)
    try:
        settings = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:  # of Settings, or of an unknown flag
        parser.error(str(error))
    command(*settings)


if __name__ == "__main__":
    run_command(train, [TrainingSettings, SamplingSettings, JudgeSettings], sys.argv[1:])
