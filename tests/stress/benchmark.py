"""How long is a training step, and how much memory does it take? exprl.py, TRL, and a lower limit.

    pip install -r tests/requirements-trl.txt
    python tests/benchmark.py                                  # a random Llama of 10M parameters
    python tests/benchmark.py --model Qwen2.5-0.5B --length 256

Each run is a process of its own, the systems by turns, with the same model, prompts, sizes, float32
and threads. Completions have exactly --length tokens; rewards are drawn, so that no judge is waited
for. The limit is a bare `generate`, and bare passes, forward and backward, over the tokens that a
step cannot do without: each prompt once, and its completions (forward once more for the KL).
Memory is the peak of the process (on CUDA that of the device), weights and AdamW's state included.
--grow doubles length, group and, of the random model, vocabulary: what grows how fast?
--judge trains with a judge that takes 0, 0.5 and 2 seconds a call: how much of that is waited for?
--judge-prompts DATA counts the tokens of judge calls instead, in --model's tokens: for each kind of
call, and how many of them are the same for all completions of a problem, from the start on.
"""

import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from pandas import DataFrame
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

from toy_world import ChatServer  # noqa: E402

import exprl  # noqa: E402
import judge_prompts  # noqa: E402
from exprl import setting  # noqa: E402


@dataclass(kw_only=True)
class BenchmarkSettings:
    """Time and memory of a training step: exprl.py, TRL, and a lower limit."""

    model: str = setting("hub id, short name or folder; default: random, of 10M parameters", "")
    prompts: int = setting("problems in a batch", 2, at_least=1)
    group: int = setting("completions of each", 8, at_least=2)
    micro_batch: int = setting("completions in one backward pass", 8, at_least=1)
    prompt_length: int = setting("tokens of a prompt, about", 110, at_least=2)
    length: int = setting("tokens of a completion", 64, at_least=2)
    vocabulary: int = setting("of the random model", 8192, at_least=64)
    kl: float = setting("weight of the KL; 0: no initial model", 0.001, at_least=0)
    threads: int = setting("of torch on a CPU", 1, at_least=1)
    steps: int = setting("to be timed, after a first one that is not", 2, at_least=1)
    repeats: int = setting("processes of each system", 3, at_least=1)
    grow: bool = setting("then double length, group and vocabulary, one at a time", False)
    judge: bool = setting("instead, exprl.py with a judge of 0, 0.5 and 2 s a call", False)
    judge_prompts: str = setting("instead, count the tokens of judge calls on this data", "")
    system: str = setting("one only, in this process", "", "exprl", "trl", "limit")


def random_model(folder: str, vocabulary: int) -> str:
    """Write a random Llama (9.7M parameters with 8,192 tokens) and a tokenizer of words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=256, intermediate_size=1024, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=2, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def make_prompts(tokenizer, n: int, length: int) -> list[str]:
    """n different texts of about `length` tokens."""
    draw = np.random.default_rng(0)
    texts = []
    for _ in range(n):
        words = " ".join(f"w{i}" for i in draw.integers(3, 64, size=length))
        ids = tokenizer(words, add_special_tokens=False).input_ids[:length]
        texts.append(tokenizer.decode(ids))
    return texts


class Clock:
    """Seconds by phase and step; the first step is not counted."""

    def __init__(self):
        self.seconds = []

    def step(self, sample: float, update: float) -> None:
        self.seconds.append((sample, update))

    def result(self) -> dict[str, float]:
        sample, update = np.mean(self.seconds[1:], axis=0)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = peak * (1 if sys.platform == "darwin" else 1024)  # bytes there, else KiB
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        return {"sample": sample, "update": update, "peak": peak / 1e9}


def run_exprl(settings: BenchmarkSettings, source: str, tokenizer, texts: list[str]) -> dict:
    """Steps of exprl.py."""
    sizes = {"max_new_tokens": settings.length, "micro_batch": settings.micro_batch}
    own = exprl.TrainSettings(
        model=source, method="outcome", kl=settings.kl, temperature=1.0, **sizes
    )
    own.group_size = settings.group
    rows = [{"question": "", "answer": "", "prompt_ids": tokenizer(t).input_ids} for t in texts]
    model = exprl.load_model(source)
    initial = exprl.load_model(source).requires_grad_(False) if settings.kl else None
    for loaded in filter(None, (model, initial)):
        exprl.set_sampling(loaded, tokenizer, rows[0]["prompt_ids"], own)
    model.generation_config.min_new_tokens = settings.length
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    clock, draw = Clock(), np.random.default_rng(0)
    for _ in range(settings.steps + 1):
        start = time.monotonic()
        groups = exprl.sample_groups(model, tokenizer, rows, settings.group, own.sample_batch)
        completions = [c for group in groups for c in group]
        middle = time.monotonic()
        for c in completions:
            assert len(c.ids) == settings.length
            c.scores = [draw.uniform(1, 5)]
        if initial:
            exprl.fill_reference(initial, completions, own)
        exprl.fill_advantages(completions, own)
        exprl.update(model, optimizer, completions, own)
        clock.step(middle - start, time.monotonic() - middle)
    return clock.result()


def run_trl(settings: BenchmarkSettings, source: str, tokenizer, texts: list[str]) -> dict:
    """Steps of TRL's GRPOTrainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    clock, draw, state = Clock(), np.random.default_rng(0), {}

    class Timed(GRPOTrainer):
        def _generate(self, *args):
            start = time.monotonic()
            made = super()._generate(*args)
            state["sample"] = time.monotonic() - start
            return made

    class Steps(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            state["start"] = time.monotonic()

        def on_step_end(self, *args, **kwargs):
            taken = time.monotonic() - state["start"]
            clock.step(state["sample"], taken - state["sample"])

    def reward(completion_ids, **_):
        assert all(len(ids) == settings.length for ids in completion_ids)
        return draw.uniform(0, 1, len(completion_ids)).tolist()

    n = settings.prompts * settings.group
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=settings.steps + 1, num_generations=settings.group,
            per_device_train_batch_size=settings.micro_batch,
            gradient_accumulation_steps=n // settings.micro_batch,
            max_completion_length=settings.length, temperature=1.0, top_k=0, top_p=1.0,
            generation_kwargs={"min_new_tokens": settings.length},
            beta=settings.kl, learning_rate=1e-6, loss_type="dapo", disable_dropout=True,
            bf16=torch.cuda.is_available(), activation_checkpointing=False,
            model_init_kwargs={"dtype": "float32"}, remove_unused_columns=False,
            save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": texts})
        trainer = Timed(source, reward, config, data, processing_class=tokenizer)
        trainer.add_callback(Steps())
        trainer.train()
    return clock.result()


def run_limit(settings: BenchmarkSettings, source: str, tokenizer, texts: list[str]) -> dict:
    """A bare `generate`, and bare passes over the tokens that a step cannot do without."""
    model = exprl.load_model(source)
    initial = exprl.load_model(source).requires_grad_(False) if settings.kl else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    prompts = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
    prompts = {name: prompts[name].to(model.device) for name in ("input_ids", "attention_mask")}
    exact = {"max_new_tokens": settings.length, "min_new_tokens": settings.length}
    exact |= {"do_sample": True, "top_k": 0, "num_return_sequences": settings.group}
    clock = Clock()
    for _ in range(settings.steps + 1):
        start = time.monotonic()
        made = model.generate(**prompts, **exact)[:, -settings.length :]
        middle = time.monotonic()
        passes = [*prompts["input_ids"][:, None], *made.split(settings.micro_batch)]
        for ids in passes:
            if initial:
                with torch.no_grad():
                    initial(ids)
            logp = model(ids).logits.log_softmax(-1).gather(2, ids[..., None])
            logp.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.step(middle - start, time.monotonic() - middle)
    return clock.result()


SYSTEMS = {"exprl": run_exprl, "trl": run_trl, "limit": run_limit}


def in_a_process(settings: BenchmarkSettings, system: str, **changes) -> dict[str, float]:
    """What a system takes, in a fresh process. Stops with its last words if it fails."""
    command = [sys.executable, str(Path(__file__).resolve())]
    for name, value in (vars(settings) | changes | {"system": system}).items():
        if name not in ("grow", "judge", "judge_prompts"):
            command += ["--" + name.replace("_", "-"), str(value)]
    env = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600)
    except subprocess.TimeoutExpired:
        exprl.stop(f"{system} took over an hour: fewer --steps, or smaller sizes")
    if done.returncode:
        exprl.stop(f"{system} failed: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def middle_and_range(values: list[float]) -> str:
    return f"{np.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def benchmark(settings: BenchmarkSettings) -> None:
    """Time and memory of a training step: exprl.py, TRL, and a lower limit."""
    if settings.prompts * settings.group % settings.micro_batch:
        exprl.stop("--micro-batch has to divide --prompts times --group")
    if settings.system:
        source, tokenizer = exprl.find_model(settings.model)
        texts = make_prompts(tokenizer, settings.prompts, settings.prompt_length)
        print(json.dumps(SYSTEMS[settings.system](settings, source, tokenizer, texts)))
        return
    with tempfile.TemporaryDirectory() as folder:
        is_random = not settings.model
        settings.model = settings.model or random_model(f"{folder}/model", settings.vocabulary)
        if settings.judge_prompts:
            count_judge_tokens(settings)
            return
        if settings.judge:
            print_waiting(settings, folder)
            return
        taken = {system: [] for system in SYSTEMS}
        for _ in tqdm(range(settings.repeats), "a process of each", leave=False):
            for system in SYSTEMS:
                taken[system].append(in_a_process(settings, system))
        tokens = settings.prompts * settings.group * settings.length
        table, ratios = {}, {}
        for system, runs in taken.items():
            totals = [run["sample"] + run["update"] for run in runs]
            table[system] = {
                "sampling, s": middle_and_range([run["sample"] for run in runs]),
                "update, s": middle_and_range([run["update"] for run in runs]),
                "step, s": middle_and_range(totals),
                "tokens/s": f"{tokens / np.median(totals):.0f}",
                "peak, GB": middle_and_range([run["peak"] for run in runs]),
            }
            own = [run["sample"] + run["update"] for run in taken["exprl"]]
            memory = [a["peak"] / b["peak"] for a, b in zip(taken["exprl"], runs, strict=True)]
            ratios[f"exprl.py / {system}"] = {
                "time": middle_and_range([a / b for a, b in zip(own, totals, strict=True)]),
                "memory": middle_and_range(memory),
            }
        del ratios["exprl.py / exprl"]
        print(f"a step of {settings.prompts} x {settings.group} x {settings.length} tokens")
        print(
            f"medians and ranges of {settings.repeats} processes\n{DataFrame(table).T.to_string()}"
        )
        print(f"\n{DataFrame(ratios).T.to_string()}")
        if settings.grow:
            print_growth(settings, is_random, folder)


def print_growth(settings: BenchmarkSettings, is_random: bool, folder: str) -> None:
    """With what power of a size do time and memory of exprl.py grow? log2 of what doubling does."""
    doubled = {"length": settings.length, "group": settings.group}
    doubled |= {"vocabulary": settings.vocabulary} if is_random else {}
    base, table = in_a_process(settings, "exprl"), {}
    for name, value in doubled.items():
        changes = {name: 2 * value}
        if name == "vocabulary":
            changes["model"] = random_model(f"{folder}/larger", 2 * value)
        larger = in_a_process(settings, "exprl", **changes)
        powers = {key: f"{np.log2(larger[key] / base[key]):.2f}" for key in base}
        table[f"{name} {value} -> {2 * value}"] = powers
    print(f"\nexponents of growth\n{DataFrame(table).T.to_string()}")


def train_with_judge(settings: BenchmarkSettings, seconds: float, folder: Path) -> list[dict]:
    """The metrics of steps of ExpRL-Process, without the first, with a judge that takes so long."""
    _, tokenizer = exprl.find_model(settings.model)
    texts = make_prompts(tokenizer, settings.prompts, settings.prompt_length)
    rows = [{"question": text, "reference": "1"} for text in texts]
    exprl.write_log(folder.with_suffix(".jsonl"), rows, "w")
    scores = [f"Step {t}: {1 + t % 5}" for t in range(1, exprl.MAX_STEPS + 1)]
    reply = "\n".join(["- a checkpoint", "- another one", *scores])
    server = ChatServer(lambda request: time.sleep(seconds) or reply)
    with open(os.devnull, "w") as quiet, contextlib.redirect_stdout(quiet):
        exprl.train(exprl.TrainSettings(
            model=settings.model, data=str(folder.with_suffix(".jsonl")), out=str(folder / "run"),
            judge_url=server.url, judge_options={}, steps=settings.steps + 1, kl=settings.kl,
            prompts_per_step=settings.prompts, group_size=settings.group,
            max_new_tokens=settings.length, micro_batch=settings.micro_batch, temperature=1.0,
        ))  # fmt: skip
    server.shutdown()
    return exprl.read_log(folder / "run" / "metrics.jsonl")[1:]


def print_waiting(settings: BenchmarkSettings, folder: str) -> None:
    """How long a step takes with a judge of 0, 0.5, 2 seconds a call, 16 calls at a time."""
    torch.set_num_threads(settings.threads)
    taken = {0: [], 0.5: [], 2: []}
    for repeat in range(settings.repeats):
        for seconds, steps in taken.items():
            steps += train_with_judge(settings, seconds, Path(folder) / f"{seconds}-{repeat}")
    phases = ("sample", "reference", "judge", "update")
    table, instant = {}, None
    for seconds, steps in taken.items():
        row = {f"{p}, s": middle_and_range([m[f"seconds_{p}"] for m in steps]) for p in phases}
        totals = [sum(m[f"seconds_{p}"] for p in phases) for m in steps]
        instant = instant or np.median(totals)
        row |= {"step, s": middle_and_range(totals)}
        row |= {"to instant": f"{np.median(totals) / instant:.2f}"}
        table[f"{seconds} s a call"] = row
    print(f"a step of {settings.prompts} x {settings.group} x {settings.length} tokens at most")
    print(f"medians and ranges of {len(steps)} steps\n{DataFrame(table).T.to_string()}")


def common_start(first: list[int], second: list[int]) -> int:
    """How many tokens are the same from the start on."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def count_judge_tokens(settings: BenchmarkSettings) -> None:
    """Prompt tokens of judge calls for a completion as long as the reference, of as many steps as
    it has lines; its lines stand for the checkpoints too."""
    _, tokenizer = exprl.find_model(settings.model)
    rows = exprl.load_rows(settings.judge_prompts, "train", 200, ("question", "reference"))
    table = {}
    for kind in ("outcome", "together", "prefix", "alone", "quotes"):
        calls, tokens, same = [], [], []
        for row in rows:
            lines = row["reference"].strip().split("\n")
            own, others = ([f"### {n}{line}\n" for line in lines] for n in ("A: ", "B: "))
            prompts = [prompts_of(tokenizer, kind, row, lines, steps) for steps in (own, others)]
            calls.append(len(prompts[0]))
            tokens.append(sum(map(len, prompts[0])))
            same.append(sum(map(common_start, *prompts)))
        table[kind] = {
            "calls": np.mean(calls),
            "tokens": np.mean(tokens),
            "tokens a call": sum(tokens) / sum(calls),
            "the same": sum(same) / sum(calls),
            "the same, %": 100 * sum(same) / sum(tokens),
        }
    print(f"means over {len(rows)} problems: for a completion, and for a call")
    print(DataFrame(table).T.round(1).to_string())


def prompts_of(tokenizer, kind: str, row: dict, checkpoints: list, steps: list) -> list[list[int]]:
    """The token ids of the calls that judge a completion of these steps."""
    rubric, made = "\n".join(f"- {point}" for point in checkpoints), []
    points = checkpoints if kind == "quotes" else None
    for messages in judge_prompts.judge_calls(kind, row, rubric, "".join(steps), steps, points):
        whole = "\n".join(f"{m['role']}\n{m['content']}" for m in messages)
        made.append(tokenizer(whole, add_special_tokens=False).input_ids)
    return made


if __name__ == "__main__":
    exprl.run_command(benchmark, BenchmarkSettings, sys.argv[1:], __doc__)
