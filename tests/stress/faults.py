"""What happens when something breaks? This program makes each fault and writes a table of them.

    python tests/stress/faults.py        # takes a few minutes, writes tests/docs/faults.md

Each fault happens to a small training run in the toy world, in a process of its own. The table
says what the user reads, the exit status, what is kept, and whether the run ends with the weights
of an undisturbed run after --resume. test_faults.py makes each fault again and compares its row.
"""

import contextlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "toy"), str(ROOT / "tests" / "tools")]
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).resolve().parent), *sys.path[:2]])

import openai  # noqa: E402
import program_judge  # noqa: E402
import torch  # noqa: E402
import toy_world  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: E402, F401

import exprl  # noqa: E402
from exprl import option  # noqa: E402

TABLE = ROOT / "tests" / "docs" / "faults.md"
SETTINGS = [exprl.TrainingSettings, exprl.SamplingSettings, exprl.JudgeSettings]
SIZES = (
    "--iterations 2 --prompts-per-iteration 2 --group-size 4 --max-new-tokens 60 --temperature 1 "
    "--lr 1e-3 --micro-batch 4 --kl 0.1 --save-every 1 --judge-model toy-judge"
)

COMPLETIONS = 8  # completions in an iteration
KEY = "sk-which-nobody-may-see"


# ---- A judge that breaks -------------------------------------------------------------------------
class Server(program_judge.ChatServer):
    """The toy judge. After some calls it answers with `fault`. `paid` counts its other replies."""

    def __init__(self, fault=None, after=math.inf):
        self.fault, self.after, self.paid = fault, after, 0
        self.lock = threading.Lock()
        super().__init__(self.reply_or_break)
        self.RequestHandlerClass = Handler

    def handle_error(self, request, address):
        """Do nothing. The process on the other side was killed."""

    def reply_or_break(self, request):
        if request["messages"][0]["content"].startswith("Reply with"):  # the first, small call
            return "ready" if self.after else self.fault
        with self.lock:
            if self.paid >= self.after:
                return self.fault
            self.paid += 1
        return toy_world.answer(request)


class Handler(program_judge.ChatHandler):
    """Besides replies, it can close the connection or be late."""

    def reply(self, status, body):
        if status == "closed":
            self.close_connection = True
            return
        if status == "late":
            time.sleep(3)
            status = 200
        with contextlib.suppress(OSError):  # nobody waits any more
            super().reply(status, body)


# ---- Runs, each in a process of its own ----------------------------------------------------------
# A fork server imports this module once, so that a process starts within a tenth of a second.
exprl.is_correct("1", "1")  # loads the parsers of math_verify, which takes a second
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["faults"])


def train_in_child(arguments, output, patience, timeout, file_size):
    """Train with short waits. What the program prints goes to a file."""
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    os.environ["OPENAI_API_KEY"] = KEY
    exprl.PATIENCE, exprl.PAUSE = patience, 0.1
    openai.OpenAI = partial(openai.OpenAI, timeout=timeout)
    _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, hard_limit))
    try:
        exprl.run_command(exprl.train, SETTINGS, arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard_limit, hard_limit))


def wait_for(condition, seconds=60):
    """Wait until condition() is true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.01)


@dataclass
class World:
    """A small toy world, its judge, and `twin`, a run that nothing happens to."""

    folder: Path
    judge: Server = field(default_factory=Server)
    count: int = 0

    def __post_init__(self):
        if not (self.folder / "base").exists():
            toy_world.build_small(self.folder)
        self.twin = self.place()
        assert self.train(self.twin)[0] == 0

    def place(self):
        """Return a new folder for a run, with a cache of its own."""
        self.count += 1
        folder = self.folder / f"place{self.count}"
        folder.mkdir()
        return folder / "run"

    def start(self, out, *flags, patience=0.3, timeout=60, file_size=resource.RLIM_INFINITY):
        """Start a run -> (process, file of its output). Flags replace those of SIZES."""
        self.count += 1
        output = self.folder / f"output{self.count}"
        files = ["--model", self.folder / "base", "--data", self.folder / "train.jsonl"]
        arguments = [*files, "--out", out, "--judge-url", self.judge.url, *SIZES.split(), *flags]
        arguments = [str(argument) for argument in arguments]
        process = FORKS.Process(
            target=train_in_child, args=(arguments, output, patience, timeout, file_size)
        )
        process.start()
        return process, output

    def train(self, out, *flags, **limits):
        """Run it to its end -> (exit status, the last line that the user reads)."""
        return result(*self.start(out, *flags, **limits))

    def resume(self, out):
        """Say what becomes of a run with --resume, and whether replies are paid twice."""
        missing, paid = count_replies(self.twin) - count_replies(out), self.judge.paid
        status, words = self.train(out, "--resume")
        if status:
            return f"no: {words}"
        twice = self.judge.paid - paid - missing
        return difference(out, self.twin) + (f"; {twice} replies paid twice" if twice > 0 else "")


def result(process, output):
    """Wait for a process -> (exit status, the last line that the user reads)."""
    process.join(120)
    assert process.exitcode is not None, "the process did not end within two minutes"
    text = output.read_text(errors="replace")
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip() and "%|" not in line]
    line = re.sub(r"[^\s'\"]*/(?=(?:place\d+|base|broken)\b)", "", lines[-1]) if lines else ""
    line = re.sub(r"place\d+/", "", line)
    line = re.sub(r"^\S+: error:", "exprl.py: error:", line)
    line = re.sub(r"(?<=127\.0\.0\.1:)\d{4,}", "PORT", line)
    is_traceback = "Traceback (most recent call last)" in text
    return process.exitcode, "Traceback: " * is_traceback + line


def difference(out, twin):
    """Compare two finished runs, in words."""
    weights = [(run / "final" / "model.safetensors").read_bytes() for run in (out, twin)]
    if weights[0] != weights[1]:
        return "other weights"
    logs = [read_logs(run) for run in (out, twin)]
    missing = [i for i, records in logs[1].items() if logs[0].get(i) != records]
    return "bit for bit" + (f", but the logs lack iterations {missing}" if missing else "")


def read_logs(out):
    """Return {iteration: its last metrics and completions}, without the amounts paid."""
    logged = {}
    for record in exprl.read_jsonl(out / "metrics.jsonl"):
        for name in ("judge_calls", "prompt_tokens", "completion_tokens"):
            record.pop(name, None)
        logged[record["iteration"]] = [record]
    for record in exprl.read_jsonl(out / "rollouts.jsonl"):
        logged.setdefault(record["iteration"], []).append(record)
    return {i: records[:1] + records[1:][-COMPLETIONS:] for i, records in logged.items()}


def count_replies(out):
    """Count the judge's replies that are kept beside a run."""
    records = exprl.read_jsonl(out.parent / "judge_cache.jsonl")
    return len({record["key"] for record in records})


def kept(out):
    """Say what is left of a run that has ended."""
    file, iterations = out / "checkpoint.pt", 0
    with contextlib.suppress(Exception):  # torch raises all kinds for a damaged file
        iterations = torch.load(file)["iteration"]
    return f"{iterations} iteration{'s' * (iterations != 1)}, {count_replies(out)} replies"


# ---- The judge breaks ----------------------------------------------------------------------------
def error(text):
    return {"error": {"message": text}}


def reply(content, finish_reason="stop"):
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


UNAVAILABLE = {  # the run waits, then it stops
    "429, too many requests": (429, error("slow down")),
    "502 with a page": (502, "<html>Bad gateway</html>"),
    "503": (503, error("loading")),
    "a page with status 200": (200, "<html>Welcome</html>"),
    "an error with status 200": (200, error("overloaded")),
    "a closed connection": ("closed", {}),
    "no answer in time": ("late", error("sorry")),
}
REFUSED = {  # the run stops at once
    "401, a wrong key": (401, error("no such key")),
    "404, no such model": (404, error("no such model")),
}
UNSCORED = {  # it answers, but gives no score
    "400, the prompt is too long": (400, error("too long")),
    "null as content": (200, reply(None)),
    "a reply that the length limit cut off": (200, reply("Step 1: 5", "length")),
    "no score in the reply": "I would rather not say.",
    "a score for the first step only": "Step 1: 5",
}


ANSWERS = UNAVAILABLE | REFUSED | UNSCORED


def judge_breaks(answer, after, world, out):
    server = Server(answer, after)
    timeout = 1 if answer[0] == "late" else 60
    done = world.train(out, "--judge-url", server.url, timeout=timeout)
    server.shutdown()
    return done


def judge_is_back(world, out):
    server = Server(ANSWERS["503"], after=9)
    process, output = world.start(out, "--judge-url", server.url, patience=60)
    wait_for(lambda: len(server.requests) > 12)
    server.after = math.inf
    done = result(process, output)
    server.shutdown()
    return done


# ---- Files that are damaged, or cannot be written ------------------------------------------------
def tear(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def execute(path):
    torch.save({"iteration": 1, "model": Evil()}, path)


DAMAGE = {
    "`checkpoint.pt` is torn, and then deleted as the message says": ("checkpoint.pt", tear),
    "`checkpoint.pt` is deleted": ("checkpoint.pt", Path.unlink),
    "`checkpoint.pt` would execute a command, and is then deleted": ("checkpoint.pt", execute),
    "`metrics.jsonl` is torn": ("metrics.jsonl", tear),
    "`rollouts.jsonl` is torn": ("rollouts.jsonl", tear),
    "`judge_cache.jsonl` is torn": ("../judge_cache.jsonl", tear),
    "`judge_cache.jsonl` is deleted": ("../judge_cache.jsonl", Path.unlink),
}


def file_is_damaged(name, damage, world, out):
    """Damage a file after one iteration and resume the run."""
    assert world.train(out, "--iterations", "1")[0] == 0
    damage(out / name)
    status, words = world.train(out, "--resume")
    assert not Path("executed").exists()
    if status:
        (out / name).unlink()  # as the message says
    return status, words


def disk_is_full(name, share, flags, world, out):
    """Limit the size of all files to a share of the size that one file has in the twin."""
    return world.train(out, *flags, file_size=int(share * (world.twin / name).stat().st_size))


# ---- The process is stopped ----------------------------------------------------------------------
def send_signals(numbers, world, out):
    """Send signals during the fifth call of the judge -> (exit status, last line)."""
    server = Server("Please wait.", after=4)
    flags = ["--judge-url", server.url, "--save-every", "100", "--judge-threads", "1"]
    process, output = world.start(out, *flags, "--iterations", "50")
    arrived, answered = threading.Event(), threading.Event()

    def hold(request):
        if server.paid == 4:
            arrived.set()
            answered.wait(60)
            server.after = math.inf
        return server.reply_or_break(request)

    server.answer = hold
    assert arrived.wait(60)
    for number in numbers:
        os.kill(process.pid, number)
        wait_for(lambda: "stopping" in output.read_text() or process.exitcode is not None)
    answered.set()
    done = result(process, output)
    server.shutdown()
    return done


def two_with_one_cache(world, out):
    outs = [out, out.parent / "other"]
    started = [world.start(folder) for folder in outs]
    done = [result(*process) for process in started]
    assert difference(outs[1], world.twin) == "bit for bit"
    return max(done)


def kill_at_random(world, out, times=20):
    """Kill runs up to 0.3 seconds after the judge's reply 0, 1, 2, ..., and resume each."""
    draw, outcomes = random.Random(0), Counter()
    for n_replies in range(times):
        killed, server = world.place(), Server()
        process, _ = world.start(killed, "--judge-url", server.url)
        wait_for(lambda n=n_replies, s=server: s.paid >= n)
        process.join(draw.random() * 0.3)
        process.kill()
        process.join()
        server.shutdown()
        outcomes[world.resume(killed)] += 1
    said = ", ".join(f"{n} of {times} {outcome}" for outcome, n in outcomes.items())
    return -9, "", "the iterations up to the last checkpoint", said


# ---- Models, data, flags -------------------------------------------------------------------------
def model_is_changed(change, world, out):
    folder = out.parent / "broken"
    shutil.copytree(world.folder / "base", folder)
    change(folder)
    return world.train(out, "--model", folder)


def set_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without(name):
    """Remove a token, or the chat template, from the tokenizer and the configuration."""

    def change(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        setattr(tokenizer, name, None)
        tokenizer.save_pretrained(folder)
        for file in (folder / "config.json", folder / "generation_config.json"):
            values = json.loads(file.read_text())
            file.write_text(json.dumps(values | {f"{name}_id": None}))

    return change


MODELS = {
    "its weights are torn": lambda folder: tear(folder / "model.safetensors"),
    "a weight is NaN": set_nan,
    "it has no configuration": lambda folder: (folder / "config.json").unlink(),
    "it has no tokenizer": lambda folder: [p.unlink() for p in folder.glob("tokenizer*")],
    "it has no end-of-sequence token": without("eos_token"),
    "it has no padding token": without("pad_token"),
    "it has no chat template": without("chat_template"),
}
PROBLEMS = toy_world.make_rows(0, 4, 0)[0]


def changed(**values):
    """Four problems as text, with other values."""
    return "".join(json.dumps(problem | values) + "\n" for problem in PROBLEMS)


DATA = {
    "an empty file": "",
    "text that is not JSON": "what is this\n",
    "JSON that is not an object": "[1, 2]\n",
    "a record without a question": json.dumps({"reference": "x"}),
    "a record without a reference": json.dumps({"question": "x"}),
    "an unknown domain": changed(domain="law"),
    "fewer problems than --prompts-per-iteration": changed().split("\n")[0],
    "a byte order mark": "\ufeff" + changed(),
    "a NUL in an answer": changed(answer="5\09"),
    "half a surrogate pair in a reference": changed(reference="\ud800"),
    "an answer that explodes": changed(answer="10^{10^{10}}").split("\n")[0],
}


def data_is_changed(text, world, out):
    data = out.parent / "broken.jsonl"
    data.write_text(text)
    return world.train(out, "--data", data, "--iterations", 1, "--group-size", 2)


FLAGS = [
    "--iterations 0", "--lr nan", "--lr 1e30", "--temperature 0", "--clip-low -1", "--method ppo",
    "--judge-options {bad", "--iteration 3", "--max-judge-calls 3", "--max-new-tokens 300",
    "--model runs/none", "--data runs/none.jsonl", "--judge-url http://127.0.0.1:9/v1",
]  # fmt: skip


def flag_is_given(words, world, out):
    return world.train(out, *words.split(" ", 1))


def runs_again(flags, world, out):
    """Start a second run in the folder of a first one."""
    assert world.train(out, "--iterations", "1")[0] == 0
    return world.train(out, *flags)


# ---- All of them ---------------------------------------------------------------------------------
def all_faults():
    """Return {group: {name: function}}.

    A function makes a fault happen to a run and returns (exit status, last line).
    """
    judge = {}
    for name, answer in ANSWERS.items():
        judge[f"{name}, after 9 calls"] = partial(judge_breaks, answer, 9)
    for name in ("503", "no score in the reply"):
        judge[f"{name}, after 3 calls"] = partial(judge_breaks, ANSWERS[name], 3)
    for name in ("503", "401, a wrong key", "a page with status 200"):
        judge[f"{name}, from the start"] = partial(judge_breaks, ANSWERS[name], 0)
    judge["503, after 9 calls, and the judge is back while the run waits"] = judge_is_back
    full = {
        "`settings.json`": partial(disk_is_full, "settings.json", 0.5, []),
        "`rollouts.jsonl`": partial(disk_is_full, "rollouts.jsonl", 0.75, ["--save-every", 2]),
        "`checkpoint.pt`": partial(disk_is_full, "checkpoint.pt", 0.75, []),
    }
    stopped = {
        "kill -9 at 20 random moments": kill_at_random,
        "SIGTERM": partial(send_signals, [signal.SIGTERM]),
        "Ctrl-C": partial(send_signals, [signal.SIGINT]),
        "Ctrl-C twice": partial(send_signals, [signal.SIGINT] * 2),
        "two runs at the same time with one `judge_cache.jsonl`": two_with_one_cache,
    }
    flags = {f"`{words}`": partial(flag_is_given, words) for words in FLAGS}
    flags["a second run in the same folder"] = partial(runs_again, [])
    flags["`--resume --lr 0.1`, another rate"] = partial(runs_again, ["--resume", "--lr", 0.1])
    return {
        "The judge breaks": judge,
        "A file is damaged before --resume": {
            name: partial(file_is_damaged, *damage) for name, damage in DAMAGE.items()
        },
        "The disk is full while a file is written": full,
        "The process is stopped": stopped,
        "The model": {name: partial(model_is_changed, change) for name, change in MODELS.items()},
        "The data": {name: partial(data_is_changed, text) for name, text in DATA.items()},
        "The flags": flags,
    }


# ---- The table -----------------------------------------------------------------------------------
NOT_RESUMED = ("The model", "The data", "The flags")
HEADER = [
    "fault",
    "last line that the user reads",
    "exit status",
    "what is kept",
    "with `--resume`",
]


def make_row(world, group, name, make):
    """Make a fault happen -> its line of the table."""
    out = world.place()
    status, words, *more = make(world, out)
    if group not in NOT_RESUMED and not more:
        more.append(kept(out))
        more.append(world.resume(out) if status else f"not needed: {difference(out, world.twin)}")
    return line([name, words, str(status), *more])


def line(cells):
    """Write a line of a table. The advice of the judge's messages stands above the tables."""
    cells = [cell.replace(exprl.HELP, "(Check ...)") for cell in cells]
    cells = [" ".join(cell.replace("|", "\\|").split()) for cell in cells]
    cells = [cell if len(cell) < 160 else cell[:160] + "..." for cell in cells]
    return "| " + " | ".join(cells) + " |"


def write_page(rows):
    """Write {group: lines} as the page."""
    page = [
        "# When something breaks",
        "",
        "This page is for people who want to know what a fault costs them. The command",
        "`python tests/stress/faults.py` causes each fault and writes this page. Each fault hits a",
        "training run of two iterations in the toy world, which needs 20 replies of the judge. To",
        "save time, the run waits less than a second for an unavailable judge, not ten minutes.",
        "",
        "- *run* is the folder of the run.",
        "- *bit for bit* means that weights and metrics equal those of an undisturbed run.",
        "- *Traceback:* stands before the last line of a traceback.",
        "- A reply that was kept was never paid for again, unless the last column says so.",
        f"- *(Check ...)* stands for this advice: `{exprl.HELP}`",
        "",
        f"There are {sum(map(len, rows.values()))} faults.",
    ]
    for group, lines in rows.items():
        header = HEADER[:3] if group in NOT_RESUMED else HEADER
        page += ["", f"## {group}", "", line(header), "|" + "---|" * len(header), *lines]
    return "\n".join(page) + "\n"


@dataclass(kw_only=True)
class FaultSettings(exprl.Settings):
    """Which faults are made."""

    only: str = option("", "make only the faults with this text in their name, and write no page")


def main(settings: FaultSettings):
    """Make the faults, print their rows, and write tests/docs/faults.md."""
    with tempfile.TemporaryDirectory() as folder:
        world, rows = World(Path(folder)), {}
        for group, faults in all_faults().items():
            rows[group] = []
            for name, make in faults.items():
                if settings.only in name:
                    rows[group].append(make_row(world, group, name, make))
                    print(rows[group][-1], flush=True)
    if not settings.only:
        TABLE.write_text(write_page(rows))
        print(f"{TABLE}: {sum(map(len, rows.values()))} faults")


if __name__ == "__main__":
    exprl.run_command(main, [FaultSettings], sys.argv[1:])
