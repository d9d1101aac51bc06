"""What happens when something breaks? Each fault is made for real; faults.md is the table of them.

    python tests/faults.py            # all of them, some minutes; writes tests/faults.md

Around toy runs of two steps, whose undisturbed twin is known: what does the user read, what is the
exit status, what is kept, and does --resume, where that is the way on, end in the twin's weights
and metrics, with no reply of the judge paid twice? The tests make each fault too, and compare it
with its row.
"""

import contextlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]
os.environ["HF_HUB_OFFLINE"] = "1"  # no fault is waited for

import report  # noqa: E402
import torch  # noqa: E402
import toy_world  # noqa: E402
from datasets import disable_progress_bars  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import AutoTokenizer, PreTrainedModel  # noqa: E402

import exprl  # noqa: E402
import judge_prompts  # noqa: E402

TABLE = TESTS / "faults.md"
SIZES = {
    "--steps": "2", "--prompts-per-step": "2", "--group-size": "4", "--max-new-tokens": "60",
    "--temperature": "1", "--lr": "1e-3", "--micro-batch": "4", "--kl": "0.1",
    "--save-every": "1", "--judge-model": "toy-judge", "--judge-patience": "0",
}  # fmt: skip


@dataclass
class Row:
    """A line of the table."""

    group: str
    fault: str
    reads: str = ""  # the last line that the user reads, its paths and numbers as `...`
    status: str = ""  # exit status
    kept: str = ""
    resumed: str = ""


class Server(toy_world.ChatServer):
    """The toy judge; it breaks after some calls until it is mended. `paid` counts its replies."""

    def __init__(self, fault=None, after: float = float("inf")):
        self.fault, self.after, self.paid, self.lock = fault, after, Counter(), threading.Lock()
        super().__init__(self.reply_or_break)
        self.RequestHandlerClass = Handler

    def handle_error(self, request, address) -> None:
        """Nothing: the other side was killed."""

    def reply_or_break(self, request: dict):
        with self.lock:
            breaks = len(self.requests) > self.after
            if not breaks:
                self.paid[json.dumps(request["messages"])] += 1
        return self.fault if breaks else toy_world.answer(request)


class Handler(toy_world.ChatHandler):
    """Replies, or closes the connection, or is late, or sends what is no JSON."""

    def reply(self, status, body):
        if status == "closed":
            self.close_connection = True
        elif status == "torn":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b'{"id"')
            self.wfile.flush()
        else:
            time.sleep(1.5 if status == "late" else 0)
            with contextlib.suppress(OSError):
                super().reply(200 if status == "late" else status, body)


# ---- The world, and what is done in it -----------------------------------------------------------
@dataclass
class World:
    """A small toy world, its judge, and a run to which nothing happened."""

    folder: Path
    judge: Server = field(default_factory=Server)
    count: int = 0

    def __post_init__(self):
        if not (self.folder / "base").exists():
            toy_world.build(self.folder, seed=0, steps=900, n_train=24, n_held_out=64)
        self.twin = self.place()
        assert self.train(self.twin)[0] == 0

    def place(self) -> Path:
        """A fresh folder for a run, with a cache of its own."""
        self.count += 1
        return self.folder / f"place{self.count}" / "run"

    def command(self, out: Path, *flags: str, **changes: object) -> list[str]:
        """The arguments of a small training run."""
        made = {"--model": self.folder / "base", "--data": self.folder / "train.jsonl"}
        made |= {"--out": out, "--judge-url": self.judge.url} | SIZES
        made |= {"--" + name.replace("_", "-"): value for name, value in changes.items()}
        return ["train", *(str(word) for pair in made.items() for word in pair), *flags]

    def train(self, out: Path, *flags: str, **changes: object) -> tuple[int, str]:
        """Run it here: (exit status, the last line that the user reads)."""
        return run(exprl.main, self.command(out, *flags, **changes))

    def is_twin(self, out: Path) -> bool:
        """Whether weights and metrics are to the bit those of the undisturbed run."""
        weights = [(p / "final" / "model.safetensors").read_bytes() for p in (out, self.twin)]
        return weights[0] == weights[1] and learned(out) == learned(self.twin)

    def resumed(self, out: Path, **changes: object) -> str:
        """What becomes of it with --resume."""
        status, words = self.train(out, "--resume", **changes)
        if status:
            return f"no: {words}"
        return "to the bit" if self.is_twin(out) else "to other weights"


def run(command: Callable, arguments: list[str]) -> tuple[int, str]:
    """(exit status, the last line that the user reads) of a command in this process. What leaves a
    traceback raises here, and more than one line of a failure does too."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            command(arguments)
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            assert "\n" not in stopped.code, stopped.code
            return 1, plain(stopped.code)
        lines = said.getvalue().strip().split("\n")  # of argparse
        return stopped.code or 0, plain(lines[-1])
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return 0, plain(re.split(r"[\r\n]+", said.getvalue().strip())[-1])


def plain(words: str) -> str:
    """Without what differs from run to run: folders and ports."""
    words = re.sub(r"\S*/(?=(?:place\d+|base|broken\d*)\b)", "", words)
    words = re.sub(r"place\d+/", "", words)
    words = re.sub(r"^\S+: error:", "exprl.py: error:", words)
    words = re.sub(r"(?<=127\.0\.0\.1:)\d+", "PORT", words)
    return re.sub(r"/tmp/[\w/.-]+", "...", words)


def learned(out: Path) -> list[dict]:
    """The metrics, without the times and what was paid."""
    names = ("judge_calls", "prompt_tokens", "completion_tokens")
    records = exprl.read_log(out / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in names and k[:7] != "seconds"} for r in records]


def kept(out: Path) -> str:
    """What is left of a run that has stopped."""
    steps = 0
    with contextlib.suppress(Exception):
        steps = torch.load(out / "checkpoint.pt")["step"]
    cache = out.parent / "judge_cache.jsonl"
    replies = len(exprl.read_log(cache)) if cache.exists() else 0
    has = [f"{steps} step{'' if steps == 1 else 's'}"] if steps else []
    return ", ".join([*has, *([f"{replies} replies"] if replies else [])]) or "nothing to keep"


# ---- The judge breaks in mid-run -----------------------------------------------------------------
def error(text: str, **more: str) -> dict:
    return {"error": {"message": text} | more}


def reply(**content: object) -> dict:
    choice = {"index": 0, "message": {"role": "assistant"} | content}
    return {"id": "x", "object": "chat.completion", "choices": [choice]}


OUT = {  # it is not there: no verdict
    "429, too many requests": (429, error("slow down")),
    "500": (500, error("broken")),
    "502 with a page": (502, "<html>Bad gateway</html>"),
    "503": (503, error("loading")),
    "408": (408, error("too slow")),
    "JSON that breaks off": ("torn", {}),
    "a page, and 200": (200, "<html>Welcome</html>"),
    "a list, and 200": (200, [1]),
    "the connection is closed": ("closed", {}),
    "no answer in time": ("late", error("sorry")),
}
REFUSED = {  # no later call would be answered either
    "401, a wrong key": (401, error("no such key")),
    "402, no credit": (402, error("pay first")),
    "403": (403, error("not for you")),
    "404, no such model": (404, error("no such model")),
    "429, a quota that is used up": (429, error("no quota left", code="insufficient_quota")),
}
UNSCORED = {  # it answers, but gives no score
    "400, the prompt is too long": (400, error("too long")),
    "no choices": (200, {"id": "x", "object": "chat.completion", "choices": []}),
    "null as content": (200, reply(content=None)),
    "a list as content": (200, reply(content=[{"type": "text", "text": "Score: 5"}])),
    "an error, and 200": (200, error("overloaded")),
    "no score in the reply": "I would rather not say.",
    "a score for the first step only": "Step 1: 5",
    "scores of 6": "\n".join(f"Step {t}: 6" for t in range(1, 17)),
}


def judge_breaks(world: World, name: str, answer: object, after: int) -> Row:
    """A judge that breaks after some calls, and is mended before the run goes on."""
    out, server = world.place(), Server(answer, after)
    row = Row("the judge breaks", f"{name}, after {after} calls")
    with hurried(0.5 if answer[0] == "late" else 8.0):
        code, row.reads = world.train(out, judge_url=server.url)
    cache = out.parent / "judge_cache.jsonl"
    with contextlib.suppress(AssertionError):  # a thread may still be writing
        wait_for(lambda: len(exprl.read_log(cache)) >= server.paid.total(), 5)
    row.status, row.kept, before = str(code), kept(out), len(learned(out))
    server.after = float("inf")
    row.resumed = world.resumed(out, judge_url=server.url)
    if before and name in UNSCORED:
        failed = sum(r["judge_failed"] for r in learned(out)[:before]) * 8
        row.resumed += f": {failed:.0f} verdict{'' if failed == 1 else 's'} had no score"
    twice = sum(n > 1 for n in server.paid.values())
    row.resumed += f"; {twice} paid twice" if twice else ""
    server.shutdown()
    return row


def judge_is_back(world: World, name: str, answer: object) -> Row:
    """An outage that ends while the run waits."""
    out, server = world.place(), Server(answer, 9)
    row = Row("the judge breaks", f"{name}, after 9 calls, and is back while the run waits")
    timer = threading.Timer(1.5, lambda: setattr(server, "after", float("inf")))
    timer.start()
    code, row.reads = world.train(out, judge_url=server.url, judge_patience="1")
    row.status, row.kept = str(code), kept(out)
    row.resumed = "not needed: " + ("to the bit" if world.is_twin(out) else "to other weights")
    server.shutdown()
    return row


# ---- Files that are damaged, or cannot be written ------------------------------------------------
def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def fill_with_noise(path: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(5000))


DAMAGE = {
    "is torn": tear,
    "is empty": lambda path: path.write_bytes(b""),
    "holds noise": fill_with_noise,
    "is gone": Path.unlink,
    "holds other JSON": lambda path: path.write_text('[1]\n{"a": 1}\n3\n'),
}


def file_is_damaged(world: World, name: str, what: str) -> Row:
    """A run of one step whose file is damaged before it goes on."""
    out = world.place()
    assert world.train(out, steps="1")[0] == 0
    DAMAGE[what](out / name)
    row = Row("a file is damaged before --resume", f"`{name.removeprefix('../')}` {what}")
    status, row.reads = world.train(out, "--resume")
    row.status, row.kept = str(status), kept(out)
    if not status:
        same = (out / "final" / "model.safetensors").read_bytes()
        same = same == (world.twin / "final" / "model.safetensors").read_bytes()
        row.resumed = (
            "to the bit" if world.is_twin(out) else "weights to the bit, metrics of step 2"
        )
        row.resumed = row.resumed if same else "to other weights"
    return row


class Evil:
    """A pickle that would run a command."""

    def __reduce__(self):
        return (os.system, ("touch executed",))


def pickle_executes(world: World) -> Row:
    out = world.place()
    assert world.train(out, steps="1")[0] == 0
    torch.save({"step": 1, "paid": Evil()}, out / "checkpoint.pt")
    row = Row("a file is damaged before --resume", "`checkpoint.pt` would execute a command")
    status, row.reads = world.train(out, "--resume")
    row.status, row.kept = str(status), kept(out)
    assert not Path("executed").exists()
    return row


def other_run(world: World) -> Row:
    out, other = world.place(), world.place()
    assert world.train(out, steps="1")[0] == 0
    assert world.train(other, steps="1", seed="5")[0] == 0
    shutil.copy(other / "checkpoint.pt", out / "checkpoint.pt")
    row = Row("a file is damaged before --resume", "`checkpoint.pt` is another run's")
    status, row.reads = world.train(out, "--resume")
    row.status, row.kept = str(status), kept(out)
    return row


WHEN_FULL = {"settings.json": 0, "final/": 0, "checkpoint.pt": 1}  # else after the second time
FULL = {
    "settings.json": "settings.json", "metrics.jsonl": "metrics.jsonl", "rollouts.jsonl":
    "rollouts.jsonl", "judge_cache.jsonl": "judge_cache.jsonl", "checkpoint.pt": "checkpoint.tmp",
    "final/": "final",
}  # fmt: skip


def disk_is_full(world: World, name: str) -> Row:
    """There is no room for a file when it is written once more."""
    out, seen, write_log, save = world.place(), Counter(), exprl.write_log, torch.save
    save_pretrained = PreTrainedModel.save_pretrained

    def check(path: Path) -> None:
        seen[path.name] += 1
        if path.name == FULL[name] and seen[path.name] > WHEN_FULL.get(name, 2):
            path.exists() and path.is_file() and path.open("a").write('{"torn')
            raise OSError(28, "No space left on device", path.name)

    exprl.write_log = lambda path, *args: (check(Path(path)), write_log(path, *args))[1]
    torch.save = lambda state, path: (check(Path(path)), save(state, path))[1]
    PreTrainedModel.save_pretrained = lambda self, path, *args, **kw: (
        check(Path(path)), save_pretrained(self, path, *args, **kw))[1]  # fmt: skip
    row = Row("the disk is full", f"while `{name}` is written")
    try:
        status, row.reads = world.train(out)
    finally:
        exprl.write_log, torch.save = write_log, save
        PreTrainedModel.save_pretrained = save_pretrained
    row.status, row.kept = str(status), kept(out)
    row.resumed = world.resumed(out)
    return row


# ---- The process is stopped, or is not alone -----------------------------------------------------
os.environ["PYTHONPATH"] = f"{TESTS}{os.pathsep}{TESTS.parent}"
FORKS = multiprocessing.get_context(
    "forkserver"
)  # a server that has torch loaded: a start is quick
FORKS.set_forkserver_preload(["faults"])


def in_child(arguments: list[str], words: str) -> None:
    """What a process of its own does: exprl.py; what that prints goes into a file."""
    with open(words, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    with hurried():
        exprl.main(arguments)


def start(world: World, out: Path, *flags: str, **changes: object):
    """A process that trains, and the file that has what it prints."""
    out.parent.mkdir(parents=True, exist_ok=True)
    world.count += 1
    words = out.parent / f"said{world.count}"
    process = FORKS.Process(
        target=in_child, args=(world.command(out, *flags, **changes), str(words))
    )
    process.start()
    return process, words


def last_line(path: Path) -> str:
    return plain(re.split(r"[\r\n]+", path.read_text().strip())[-1])


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def killed(world: World, times: int = 20) -> Row:
    """kill -9 at random moments between the start and the end, in the final save too."""
    draw, same, failed = random.Random(0), 0, ""
    begun = time.monotonic()
    process, _ = start(world, world.place())
    process.join(300)
    length = time.monotonic() - begun
    for i in range(times):
        out = world.place()
        process, _ = start(world, out)
        process.join(length * (i + draw.random()) / times)
        process.kill()
        process.join()
        how = world.resumed(out)
        same += how == "to the bit"
        failed = failed or how * (how != "to the bit")
    row = Row(
        "the process is stopped", "kill -9 at random moments, from the start to the last save"
    )
    row.status, row.kept = "-9", "the steps up to the last checkpoint"
    row.resumed = f"to the bit, {same} times of {times}" + failed
    return row


def killed_in_a_save(world: World) -> Row:
    """kill -9 while half of the checkpoint is written."""
    out = world.place()
    process, _ = start(world, out, steps="1")
    process.join(300)
    (out / "checkpoint.tmp").write_bytes((out / "checkpoint.pt").read_bytes()[:5000])
    with (out / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 2, "text": "torn')
    row = Row("the process is stopped", "kill -9 while a checkpoint is written")
    row.status, row.kept, row.resumed = "-9", kept(out), world.resumed(out)
    return row


def all_of(world: World, out: Path) -> tuple[str, str]:
    """What is kept of a long run that was stopped, and what becomes of it in two steps more."""
    steps = torch.load(out / "checkpoint.pt")["step"]
    more, whole = str(steps + 2), world.place()
    kept = "all whole steps" if steps == len(learned(out)) else f"{steps} steps"
    assert world.train(out, "--resume", steps=more)[0] == 0
    assert world.train(whole, steps=more)[0] == 0
    weights = [(p / "final" / "model.safetensors").read_bytes() for p in (out, whole)]
    return kept, "to the bit" if weights[0] == weights[1] else "to other weights"


def terminated(world: World, number: int, name: str) -> Row:
    out = world.place()
    often = "100" if number == signal.SIGTERM else "1"  # steps between checkpoints
    process, words = start(world, out, steps="500", save_every=often)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(learned(out)) > 2)
    os.kill(process.pid, number)
    process.join(60)
    row = Row("the process is stopped", name, last_line(words), str(process.exitcode), "")
    row.kept, row.resumed = all_of(world, out)
    return row


def interrupted_while_importing(world: World) -> Row:
    out = world.place()
    command = [sys.executable, str(TESTS.parent / "exprl.py"), *world.command(out)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    words, _ = process.communicate(timeout=60)
    row = Row("the process is stopped", "Ctrl-C while Python imports torch")
    row.reads = "Python's own traceback, " + plain(words.strip().split("\n")[-1])
    row.status, row.kept = str(process.returncode), kept(out)
    return row


def two_in_one_folder(world: World) -> Row:
    out = world.place()
    first, _ = start(world, out, steps="500")
    wait_for(lambda: (out / "metrics.jsonl").exists() and learned(out))
    other, words = start(world, out, "--resume", steps="500")
    other.join(60)
    assert first.exitcode is None
    first.terminate()
    first.join(60)
    row = Row("the process is not alone", "a second process on the same `--out`", last_line(words))
    row.status = str(other.exitcode)
    row.kept, row.resumed = all_of(world, out)
    return row


def two_with_one_cache(world: World) -> Row:
    first = world.place()
    outs = [first, first.parent / "beside"]
    started = [start(world, out) for out in outs]
    for process, _ in started:
        process.join(60)
    row = Row("the process is not alone", "two runs at a time with one `judge_cache.jsonl`")
    row.status = " and ".join(str(process.exitcode) for process, _ in started)
    lines = (first.parent / "judge_cache.jsonl").read_text().split("\n")
    row.kept = "each line whole" if all(json.loads(x) for x in lines if x) else "torn lines"
    row.resumed = "both: to the bit" if all(map(world.is_twin, outs)) else "to other weights"
    return row


# ---- Models, data, flags -------------------------------------------------------------------------
def broken_model(world: World, name: str, change: Callable[[Path], None]) -> Row:
    folder = world.place().parent / "broken"
    shutil.copytree(world.folder / "base", folder)
    change(folder)
    out = world.place()
    row = Row("the model", name)
    status, row.reads = world.train(out, model=folder)
    row.status = str(status)
    row.kept = "" if status else kept(out)
    return row


def change_json(name: str, **values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        known = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
        (folder / name).write_text(json.dumps(known | values))

    return change


def no_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def more_tokens(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{i}" for i in range(50)])
    tokenizer.save_pretrained(folder)


def without_eos(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    change_json("config.json", eos_token_id=None)(folder)
    change_json("generation_config.json", eos_token_id=None)(folder)


def without_pad(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)


def without_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)


def broken_template(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}{{ raise_exception('no') }}{% endfor %}"
    tokenizer.save_pretrained(folder)


MODELS = {
    "its weights are torn": lambda folder: tear(folder / "model.safetensors"),
    "it has no configuration": lambda folder: (folder / "config.json").unlink(),
    "a weight is no number": no_number,
    "it has no tokenizer": lambda folder: [p.unlink() for p in folder.glob("tokenizer*")],
    "the tokenizer has 50 tokens more": more_tokens,
    "no end-of-sequence token": without_eos,
    "no padding token": without_pad,
    "no chat template": without_template,
    "a chat template that raises": broken_template,
}


def four(**changes: str) -> str:
    """The first four rows of the world, each with another question, reference or answer."""
    return "".join(json.dumps(ROWS[i] | changes) + "\n" for i in range(4))


ROWS, _ = toy_world.make_rows(0, 24, 64)
DATA = {
    "an empty file": "",
    "no JSON": "what is this\n",
    "JSON that is no object": "[1, 2]\n",
    "a row without a question": json.dumps({"reference": "x"}),
    "a row without a reference": json.dumps({"question": "x"}),
    "a domain that there is not": four(domain="law"),
    "fewer rows than a batch": four().split("\n")[0],
    "a byte order mark": "\ufeff" + four(),
    "NUL in an answer": four(answer="5\09"),
    "half a surrogate pair in an answer": four(answer="\ud800"),
    "half a surrogate pair in a reference": four(reference=ROWS[0]["reference"] + "\ud800"),
    "a reference of 1 MB": four(reference=ROWS[0]["reference"] + " and so on" * 10**5),
    "an answer that explodes": four(answer="10^{10^{10}}"),
    "an answer of 100,000 digits": four(answer="9" * 10**5),
    "an answer of deep braces": four(answer="{" * 3000 + "}" * 3000),
}


def broken_data(world: World, name: str, text: str) -> Row:
    out = world.place()
    out.parent.mkdir(parents=True)
    data = out.parent / "broken.jsonl"
    data.write_text(text)
    row = Row("the data", name)
    few = (
        {"prompts_per_step": "1", "group_size": "2"}
        if "explodes" in name or "braces" in name
        else {}
    )
    status, row.reads = world.train(out, data=data, steps="1", **few)
    row.status, row.kept = str(status), "" if status else kept(out)
    return row


FLAGS = {
    "--steps 0": {}, "--group-size 1": {}, "--lr nan": {}, "--lr inf": {}, "--temperature 0": {},
    "--clip-low -1": {}, "--method ppo": {}, "--judge-options {bad": {}, "--stepz 3": {},
    "--judge-patience -1": {}, "--max-judge-calls 3": {}, "--lr 1e30": {},
    "--model runs/none": {}, "--data runs/none.jsonl": {}, "--judge-url http://127.0.0.1:9/v1": {},
}  # fmt: skip


def broken_flag(world: World, words: str) -> Row:
    out, (flag, value) = world.place(), words.split(" ", 1)
    row = Row("a flag", f"`{words}`")
    changes = {flag.removeprefix("--").replace("-", "_"): value}
    status, row.reads = world.train(out, **changes)
    row.status = str(status)
    return row


def evaluate(world: World, name: str, **changes: object) -> Row:
    out = world.place()
    made = {"--model": world.folder / "base", "--data": world.folder / "heldout.jsonl"}
    made |= {"--out": out, "--problems": "4", "--samples": "2", "--max-new-tokens": "60"}
    made |= {"--" + key.replace("_", "-"): value for key, value in changes.items()}
    row = Row("eval and report", name)
    words = [str(word) for pair in made.items() for word in pair]
    status, row.reads = run(exprl.main, ["eval", *words])
    row.status = str(status)
    return row


def evaluation_killed(world: World) -> Row:
    """kill -9 while problems are sampled; then the same command again."""
    folders = [world.place(), world.place()]
    made = {"--model": world.folder / "base", "--data": world.folder / "heldout.jsonl"}
    made |= {"--problems": "24", "--samples": "4", "--max-new-tokens": "60", "--sample-batch": "4"}
    commands = []
    for out in folders:
        words = [str(word) for pair in (made | {"--out": out}).items() for word in pair]
        commands.append(["eval", *words])
        out.parent.mkdir(parents=True)
    process = FORKS.Process(target=in_child, args=(commands[0], str(folders[0].parent / "said")))
    process.start()
    counted = lambda out: [p for p in out.glob("*.jsonl") if p.stat().st_size]  # noqa: E731
    wait_for(lambda: counted(folders[0]))
    process.kill()
    process.join()
    lines = [len(exprl.read_log(path)) for path in counted(folders[0])]
    row = Row("eval and report", "kill -9 in eval, and the same command again")
    row.kept = "what was counted so far" if 0 < lines[0] < 24 else f"{lines} of 24"
    status = [run(exprl.main, command)[0] for command in commands]
    same = counted(folders[0])[0].read_bytes() == counted(folders[1])[0].read_bytes()
    row.status = f"-9, then {status[0]}"
    row.resumed = "from the start, to the same counts and texts" if same else "to others"
    return row


def report_on(world: World, name: str, change: Callable[[Path], None]) -> Row:
    out = world.place()
    shutil.copytree(world.twin, out)
    change(out)
    row = Row("eval and report", name)
    page = out.parent / "report.html"
    figure = ["--figure", str(out.parent / "curves.png")]
    status, row.reads = run(report.main, [str(out), "--out", str(page), *figure])
    row.status, row.kept = str(status), "a page" if page.exists() else ""
    return row


def empty_file(world: World) -> Path:
    path = world.place().parent / "broken.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("")
    return path


def all_faults() -> dict[str, Callable[[World], Row]]:
    """{a name: what makes the fault and tells what happened}."""
    made: dict[str, Callable[[World], Row]] = {}
    for kinds in (OUT, REFUSED, UNSCORED):
        for name, answer in kinds.items():
            for after in (3, 9):
                made[f"judge: {name}, {after}"] = lambda w, n=name, a=answer, k=after: judge_breaks(
                    w, n, a, k
                )
    for name in ("503", "the connection is closed"):
        made[f"judge is back: {name}"] = lambda w, n=name: judge_is_back(w, n, OUT[n])
    files = ("checkpoint.pt", "settings.json", "metrics.jsonl", "rollouts.jsonl")
    for name in (*files, "../judge_cache.jsonl"):
        for what in DAMAGE:
            made[f"file: {name} {what}"] = lambda w, n=name, d=what: file_is_damaged(w, n, d)
    made |= {"file: a pickle": pickle_executes, "file: another run's": other_run}
    for name in FULL:
        made[f"full: {name}"] = lambda w, n=name: disk_is_full(w, n)
    made |= {
        "stopped: kill": killed,
        "stopped: kill in a save": killed_in_a_save,
        "stopped: SIGTERM": lambda w: terminated(
            w, signal.SIGTERM, "SIGTERM, a checkpoint being due in 100 steps"
        ),
        "stopped: Ctrl-C": lambda w: terminated(
            w, signal.SIGINT, "Ctrl-C, a checkpoint being made at each step"
        ),
        "stopped: Ctrl-C in imports": interrupted_while_importing,
        "two: one folder": two_in_one_folder,
        "two: one cache": two_with_one_cache,
    }
    for name, change in MODELS.items():
        made[f"model: {name}"] = lambda w, n=name, c=change: broken_model(w, n, c)
    for name, text in DATA.items():
        made[f"data: {name}"] = lambda w, n=name, t=text: broken_data(w, n, t)
    for words in FLAGS:
        made[f"flag: {words}"] = lambda w, f=words: broken_flag(w, f)
    made |= {
        "eval: no rows": lambda w: evaluate(w, "eval on an empty file", data=empty_file(w)),
        "eval: killed": evaluation_killed,
        "eval: no model": lambda w: evaluate(w, "eval of no model", model="runs/none"),
    }
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        for what in ("is torn", "is empty", "holds noise", "holds other JSON"):
            made[f"report: {name} {what}"] = lambda w, n=name, d=what: report_on(
                w, f"report, `{n}` {d}", lambda out: DAMAGE[d](out / n)
            )
    return made


# ---- The table -----------------------------------------------------------------------------------
def write_row(row: Row) -> str:
    """A line of the table."""
    cells = (row.fault, row.reads, row.status, row.kept, row.resumed)
    cells = [" ".join(cell.replace("|", "\\|").split())[:160] for cell in cells]
    return "| " + " | ".join(cells) + " |"


def write_table(rows: list[Row]) -> str:
    """The page."""
    page = [
        "# When something breaks",
        "",
        "Made by `python tests/faults.py`, which makes each fault for real, around toy runs of two "
        "steps (8 completions and 2 rubrics each); the tests make them again and compare. "
        '"To the bit": weights and metrics of the undisturbed run. `run` stands for the run\'s '
        "folder. The judge's patience is 0, if nothing else is said.",
        "",
        f"{len(rows)} faults; exit status 0 in {sum(r.status == '0' for r in rows)} of them.",
    ]
    for group in dict.fromkeys(row.group for row in rows):
        page += ["", f"## {group[0].upper()}{group[1:]}", ""]
        page += ["| fault | what the user reads, last | status | what is kept | with `--resume` |"]
        page += ["|---|---|---|---|---|"]
        page += [write_row(row) for row in rows if row.group == group]
    return "\n".join(page) + "\n"


@contextlib.contextmanager
def hurried(timeout: float = 8.0):
    """Short pauses, and no patience of the client."""
    known = judge_prompts.JUDGE_CLIENT, judge_prompts.FIRST_PAUSE
    judge_prompts.JUDGE_CLIENT = {"timeout": timeout, "max_retries": 0}
    judge_prompts.FIRST_PAUSE = 0.05
    disable_progress_bars()
    try:
        yield
    finally:
        judge_prompts.JUDGE_CLIENT, judge_prompts.FIRST_PAUSE = known


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, hurried():
        world, rows = World(Path(folder)), []
        for name, make in all_faults().items():
            started = time.monotonic()
            rows.append(make(world))
            print(f"{time.monotonic() - started:5.1f} s  {name}: {write_row(rows[-1])}", flush=True)
        TABLE.write_text(write_table(rows))
    print(f"{TABLE}: {len(rows)} faults")


if __name__ == "__main__":
    main()
