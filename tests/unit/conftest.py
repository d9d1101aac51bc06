"""What the unit tests share: a judge on a real HTTP server, and ways to train."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import program_judge
import pytest
import torch
import toy_world
from transformers import LlamaConfig, LlamaForCausalLM

import exprl

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SETTINGS = [exprl.TrainingSettings, exprl.SamplingSettings, exprl.JudgeSettings]
SMALL = [
    "--iterations", "2", "--prompts-per-iteration", "2", "--group-size", "4", "--micro-batch", "4",
    "--max-new-tokens", "60", "--temperature", "1", "--lr", "1e-3", "--kl", "0.1",
]  # fmt: skip


@pytest.fixture(scope="session")
def judge():
    """The toy judge behind its HTTP server."""
    server = program_judge.ChatServer(toy_world.answer)
    yield server
    server.shutdown()


@pytest.fixture
def model():
    """A random transformer with a vocabulary of 40 tokens, which samples at temperature 0.7."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    model.generation_config.temperature = 0.7
    return model


@pytest.fixture
def no_key(monkeypatch):
    """Remove the key and the address of a judge from the environment."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def train_command(tiny, judge, out, *flags):
    """Return the flags of a run of two small iterations. `flags` come last and therefore win."""
    files = ["--model", tiny / "base", "--data", tiny / "train.jsonl", "--out", out]
    server = ["--judge-url", judge.url, "--judge-model", "toy-judge"]
    return [str(part) for part in [*files, *server, *SMALL, *flags]]


@pytest.fixture(autouse=True)
def keep_signals():
    """Undo what `train` does with Ctrl-C and SIGTERM, so that they still end pytest."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def run_training(command):
    """Train in this process with exprl.py, or with baselines.py if a flag is known only there."""
    if {"sft", "distill", "--reference"} & {*command}:
        import baselines

        settings = [baselines.BaselineSettings, *SETTINGS[1:]]
        exprl.run_command(baselines.train, settings, command)
    else:
        exprl.run_command(exprl.train, SETTINGS, command)


@pytest.fixture
def train(tiny, judge, no_key):
    """train(out, *flags) trains as train_command says, in this process, and returns `out`."""

    def run(out, *flags):
        run_training(train_command(tiny, judge, out, *flags))
        return out

    return run


def surroundings(**changes):
    """Return the environment variables of a shell in which this Python's environment is active."""
    bin_folder = str(Path(sys.executable).parent)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI")}
    return kept | {"VIRTUAL_ENV": sys.prefix, "PATH": path} | changes


@pytest.fixture(scope="session")
def walk(tmp_path_factory):
    """(process, runs): train_small.sh with few iterations, in the background."""
    runs = tmp_path_factory.mktemp("walk") / "toy"
    few = surroundings(RUNS=str(runs), BASE_STEPS="20", STAGE1="2", STAGE2="1", PROBLEMS="8")
    with open(runs.parent / "output", "w") as output:
        command = ["bash", str(ROOT / "train_small.sh")]
        process = subprocess.Popen(
            command, env=few, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    yield process, runs
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)


@pytest.fixture(scope="session", autouse=True)
def start_walk(request):
    """Start `walk` before the first test if any test needs it, since it takes a while."""
    if any("walk" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("walk")


def read(path):
    """Return the records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def iterations_of(run):
    """Return the last record of each iteration of a run, without the amounts paid to the judge.

    The amounts differ between an uninterrupted run and a resumed one, and everything else is equal.
    """
    file = run / "metrics.jsonl"
    records = {record["iteration"]: record for record in exprl.read_jsonl(file)}
    for record in records.values():
        for name in ("judge_calls", "prompt_tokens", "completion_tokens"):
            record.pop(name, None)
    return [records[iteration] for iteration in sorted(records)]


def weights_of(run):
    """Return the trained weights, bit for bit."""
    return (run / "final" / "model.safetensors").read_bytes()
