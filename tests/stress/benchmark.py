"""Measure time and memory of a training iteration of exprl.py, of TRL, and of a lower limit.

    pip install -r tests/tools/requirements-trl.txt
    python tests/stress/benchmark.py                                  # a random model, 10M weights
    python tests/stress/benchmark.py --model Qwen2.5-0.5B --length 256
    python tests/stress/benchmark.py --grow                           # and what doubling does

The three systems run by turns, each time in a new process, with the same model, prompts, sizes,
float32 weights and threads. All completions have exactly --length tokens. Rewards are random, so
that no judge takes time. The limit is a bare `generate`, followed by bare forward and backward
passes over the tokens that an iteration needs. Both read each prompt once. With a KL
penalty, the initial policy reads them too. Memory is the peak of the process, or on CUDA the peak
of the device. It includes the weights and the state of the optimizer.
"""

import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Literal
from unittest import mock

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import exprl  # noqa: E402
from exprl import option  # noqa: E402


@dataclass(kw_only=True)
class BenchmarkSettings(exprl.Settings):
    """The model, the sizes of an iteration, and the number of repetitions."""

    may_be_zero = ("kl",)
    model: str = option(
        "", "hub id, bare name of a Qwen model, or folder; if empty, a random model"
    )
    prompts: int = option(2, "problems in an iteration")
    group: int = option(8, "completions of a problem")
    micro_batch: int = option(8, "completions in one backward pass; it has to divide --group")
    prompt_length: int = option(110, "tokens of a prompt, approximately")
    length: int = option(64, "tokens of a completion")
    vocabulary: int = option(8192, "tokens in the vocabulary of the random model")
    kl: float = option(0.001, "weight of the KL penalty; 0: no initial policy in memory")
    threads: int = option(1, "threads of torch on a CPU")
    iterations: int = option(2, "iterations that are timed, after a first one that is not")
    repeats: int = option(3, "processes of each system")
    grow: bool = option(False, "then double one size after the other for exprl.py")
    system: Literal["", "exprl", "trl", "limit"] = option(
        "", "measure this system in this process and print JSON; if empty, all three"
    )


def random_model(folder, vocabulary):
    """Write a random Llama (9.7M weights with 8,192 tokens) and a tokenizer of words."""
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


def prompt_ids(tokenizer, text):
    """Replace exprl.policy_prompt: the prompt is the text alone, as it is for TRL."""
    return tokenizer(text).input_ids


def make_prompts(tokenizer, settings):
    """Return different texts of about --prompt-length tokens."""
    draw, texts = random.Random(0), []
    for _ in range(settings.prompts):
        words = " ".join(f"w{draw.randrange(3, 64)}" for _ in range(settings.prompt_length))
        ids = tokenizer(words, add_special_tokens=False).input_ids[: settings.prompt_length]
        texts.append(tokenizer.decode(ids))
    return texts


def load(settings):
    """Return (model, initial policy or None, optimizer, tokenizer, problems)."""
    sampling = exprl.SamplingSettings(temperature=1.0, max_new_tokens=settings.length)
    problem = {"question": "", "reference": "", "answer": "", "domain": "math"}
    model, tokenizer = exprl.load_policy(settings.model, [problem], sampling)
    # No token has this id, so that every completion has --length tokens.
    model.generation_config.eos_token_id = [10**9]
    initial = None
    if settings.kl:
        initial, _ = exprl.load_policy(settings.model, [problem], sampling)
        initial.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    problems = [problem | {"question": text} for text in make_prompts(tokenizer, settings)]
    return model, initial, optimizer, tokenizer, problems


class Clock:
    """The seconds of sampling and updating, per iteration. The first iteration does not count."""

    def __init__(self):
        self.seconds = []

    def add(self, sampling, updating):
        self.seconds.append((sampling, updating))

    def result(self):
        sampling, updating = map(fmean, zip(*self.seconds[1:]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak = peak * (1 if sys.platform == "darwin" else 1024)  # bytes there, KiB elsewhere
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        return {"sampling": sampling, "updating": updating, "peak": peak / 1e9}


def run_exprl(settings):
    """Train with the functions of exprl.py."""
    model, initial, optimizer, tokenizer, problems = load(settings)
    training = exprl.TrainingSettings(
        model=settings.model, method="outcome", kl=settings.kl, group_size=settings.group
    )
    clock, draw = Clock(), random.Random(0)
    for _ in range(settings.iterations + 1):
        start = time.monotonic()
        with mock.patch.object(exprl, "policy_prompt", prompt_ids):
            completions = exprl.sample(model, tokenizer, problems, settings.group, 64)
        middle = time.monotonic()
        assert {len(completion.ids) for completion in completions} == {settings.length}
        batches = exprl.make_micro_batches(completions, settings.micro_batch, model.device)
        if initial:
            exprl.add_initial_logprobs(initial, batches)
        rewards = [[draw.random()] for _ in completions]
        advantages = exprl.compute_advantages(rewards, training)
        exprl.update(model, optimizer, batches, advantages, training)
        clock.add(middle - start, time.monotonic() - middle)
    return clock.result()


def run_trl(settings):
    """Train with TRL's GRPOTrainer."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    clock, draw, state = Clock(), random.Random(0), {}

    class TimedTrainer(GRPOTrainer):
        def _generate(self, *args):
            start = time.monotonic()
            generated = super()._generate(*args)
            state["sampling"] = time.monotonic() - start
            return generated

    class Timer(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            state["start"] = time.monotonic()

        def on_step_end(self, *args, **kwargs):
            seconds = time.monotonic() - state["start"]
            clock.add(state["sampling"], seconds - state["sampling"])

    def reward(completion_ids, **_):
        assert {len(ids) for ids in completion_ids} == {settings.length}
        return [draw.random() for _ in completion_ids]

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    data = Dataset.from_dict({"prompt": make_prompts(tokenizer, settings)})
    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, max_steps=settings.iterations + 1, num_generations=settings.group,
            per_device_train_batch_size=settings.micro_batch,
            gradient_accumulation_steps=settings.prompts * settings.group // settings.micro_batch,
            max_completion_length=settings.length, temperature=1.0, top_k=0, top_p=1.0,
            generation_kwargs={"min_new_tokens": settings.length},
            beta=settings.kl, learning_rate=1e-6, loss_type="dapo", disable_dropout=True,
            bf16=torch.cuda.is_available(), activation_checkpointing=False,
            model_init_kwargs={"dtype": "float32"}, remove_unused_columns=False,
            save_strategy="no", report_to="none", logging_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        trainer = TimedTrainer(settings.model, reward, config, data, processing_class=tokenizer)
        trainer.add_callback(Timer())
        trainer.train()
    return clock.result()


def run_limit(settings):
    """Generate, and let the model read only the tokens that an iteration needs."""
    model, initial, optimizer, tokenizer, problems = load(settings)
    prompts = [prompt_ids(tokenizer, problem["question"]) for problem in problems]
    padded, mask = exprl.pad(prompts, "left", model.device)
    clock = Clock()
    for _ in range(settings.iterations + 1):
        start = time.monotonic()
        begun = model.generate(
            padded[:, :-1],
            attention_mask=mask[:, :-1],
            max_new_tokens=1,
            return_dict_in_generate=True,
        )
        begun.cache.batch_repeat_interleave(settings.group)
        sequences = model.generate(
            padded, attention_mask=mask, num_return_sequences=settings.group, cache=begun.cache
        )
        completions = sequences[:, -settings.length :]
        middle = time.monotonic()
        for ids in [*padded[:, None], *completions.split(settings.micro_batch)]:
            if initial:
                with torch.no_grad(), exprl.mixed_precision(initial):
                    initial(ids)
            with exprl.mixed_precision(model):
                logp = model(ids).logits.log_softmax(-1).gather(2, ids[..., None])
            logp.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        clock.add(middle - start, time.monotonic() - middle)
    return clock.result()


SYSTEMS = {"exprl": run_exprl, "trl": run_trl, "limit": run_limit}


def in_a_process(settings, **changes):
    """Measure one system in a new process. Stops with its last words if it fails."""
    values = asdict(settings) | changes
    command = [sys.executable, str(Path(__file__).resolve())]
    for name, value in values.items():
        command += ["--" + name.replace("_", "-"), str(value)]
    env = os.environ | {"OMP_NUM_THREADS": str(settings.threads)}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3600)
    except subprocess.TimeoutExpired:
        exprl.stop(
            f"{values['system']} took over an hour: give fewer --iterations or less --length"
        )
    if done.returncode:
        exprl.stop(f"{values['system']} failed: {done.stderr.strip()[-400:]}")
    return json.loads(done.stdout.strip().split("\n")[-1])


def spread(values):
    """Write the median and the range of some numbers."""
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def print_table(rows):
    """Print rows of texts, the first of which is the header."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(text.rjust(width) for text, width in zip(row, widths)))


def print_comparison(settings):
    """Measure the three systems by turns and print the table."""
    measured = {system: [] for system in SYSTEMS}
    for _ in range(settings.repeats):
        for system, runs in measured.items():
            run = in_a_process(settings, system=system)
            runs.append(run | {"iteration": run["sampling"] + run["updating"]})
    header = ["", "sampling, s", "update, s", "iteration, s", "tokens/s", "peak, GB"]
    rows = [[*header, "time / TRL's", "memory / TRL's"]]
    n_tokens = settings.prompts * settings.group * settings.length
    for system, runs in measured.items():
        cells = {name: [run[name] for run in runs] for name in runs[0]}
        shares = {
            name: spread([own[name] / trl[name] for own, trl in zip(runs, measured["trl"])])
            for name in ("iteration", "peak")
        }
        rows.append([
            system, *(spread(cells[name]) for name in ("sampling", "updating", "iteration")),
            f"{n_tokens / median(cells['iteration']):.0f}", spread(cells["peak"]),
            shares["iteration"], shares["peak"],
        ])  # fmt: skip
    sizes = f"{settings.prompts} x {settings.group} completions of {settings.length} tokens"
    print(f"an iteration of {sizes}: median and range of {settings.repeats} processes")
    print_table(rows)


def print_growth(settings, folder):
    """Double one size after the other and print log2 of what that does to exprl.py."""
    doubled = ["length", "group"]
    if settings.model == f"{folder}/model":
        doubled.append("vocabulary")
    base = in_a_process(settings, system="exprl")
    rows = [["doubled", *base]]
    for name in doubled:
        changes = {name: 2 * getattr(settings, name)}
        if name == "vocabulary":
            changes["model"] = random_model(f"{folder}/larger", changes[name])
        larger = in_a_process(settings, system="exprl", **changes)
        rows.append([name, *(f"{math.log2(larger[key] / base[key]):.2f}" for key in base)])
    print("\nexponents of growth of exprl.py (1: in proportion, 0: not at all)")
    print_table(rows)


def benchmark(settings: BenchmarkSettings):
    """Measure time and memory of a training iteration of exprl.py, of TRL, and of a limit."""
    if settings.group % settings.micro_batch:
        exprl.stop(f"--micro-batch {settings.micro_batch} has to divide --group {settings.group}")
    if settings.model and "/" not in settings.model and not Path(settings.model).is_dir():
        settings.model = f"Qwen/{settings.model}"  # as exprl.py does, for TRL
    if settings.system:
        print(json.dumps(SYSTEMS[settings.system](settings)))
        return
    with tempfile.TemporaryDirectory() as folder:
        settings.model = settings.model or random_model(f"{folder}/model", settings.vocabulary)
        print_comparison(settings)
        if settings.grow:
            print_growth(settings, folder)


if __name__ == "__main__":
    exprl.run_command(benchmark, [BenchmarkSettings], sys.argv[1:])
