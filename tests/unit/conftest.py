"""What the tests share: a small toy world, its judge on a real HTTP server, and a way to train."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import baselines  # noqa: E402
import torch  # noqa: E402
import toy_world  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import exprl  # noqa: E402

SMALL = [
    "--steps",
    "2",
    "--prompts-per-step",
    "2",
    "--group-size",
    "4",
    "--max-new-tokens",
    "60",
    "--temperature",
    "1",
    "--lr",
    "1e-3",
    "--micro-batch",
    "4",
    "--kl",
    "0.1",
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A toy world with few problems; its base model has the form, and is right now and then."""
    folder = tmp_path_factory.mktemp("tiny")
    toy_world.build(folder, seed=0, steps=900, n_train=24, n_held_out=64)
    return folder


@pytest.fixture(scope="session")
def judge():
    """The toy judge behind its HTTP server."""
    server = toy_world.ChatServer(toy_world.answer)
    yield server
    server.shutdown()


@pytest.fixture
def model():
    """A random transformer with a vocabulary of 40."""
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
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def no_key(monkeypatch):
    """Without a judge in the environment."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def train_command(tiny: Path, judge, out: Path, *flags: str) -> list[str]:
    """A run of two small steps; a flag given here replaces the one of SMALL."""
    files = ["--model", tiny / "base", "--data", tiny / "train.jsonl", "--out", out]
    server = ["--judge-url", judge.url, "--judge-model", "toy-judge"]
    return list(map(str, ["train", *files, *server, *SMALL, *flags]))


@pytest.fixture
def train(tiny, judge, no_key):
    """train(out, *flags): the run of train_command, in this process; returns its folder."""

    def run(out: Path, *flags: str) -> Path:
        run_training(train_command(tiny, judge, out, *flags))
        return out

    return run


def run_training(command: list[str]) -> None:
    """exprl.py, or baselines.py where a flag asks for what only that has."""
    if {"sft", "distill", "--reference"} & {*command}:
        exprl.run_command(baselines.train, baselines.BaselineSettings, command[1:], "")
    else:
        exprl.main(command)


def sample_with(monkeypatch, sample) -> None:
    """Make the training loop take its samples from this function."""
    rows, _, fill, loss = exprl.train.__defaults__
    monkeypatch.setattr(exprl.train, "__defaults__", (rows, sample, fill, loss))


def surroundings(**changes) -> dict[str, str]:
    """The environment of a shell in which this interpreter's environment is active."""
    bin_folder = str(Path(sys.executable).parent)
    path = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OPENAI")}
    return kept | {"VIRTUAL_ENV": sys.prefix, "PATH": path} | changes


@pytest.fixture(scope="session", autouse=True)
def walk(tmp_path_factory):
    """train_small.sh with few steps, started before the other tests and running beside them."""
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


def read(path: Path) -> list[dict]:
    """The records of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps_of(run: Path) -> list[dict]:
    """The metrics of a run's steps, without the times, which differ from run to run."""
    records = [r for r in read(run / "metrics.jsonl") if "reward" in r]
    return [{k: v for k, v in r.items() if not k.startswith("seconds")} for r in records]


def weights_of(run: Path) -> bytes:
    """The trained weights, to the bit."""
    return (run / "final" / "model.safetensors").read_bytes()
