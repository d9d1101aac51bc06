"""Train for thousands of iterations while the judge fails and the process is killed.

    python tests/stress/soak.py --iterations 2000 --kill-every 100 --percent 10

The same training runs twice, in the toy world. The first run is undisturbed. In the second, the
judge fails in --percent of its calls, and the process is killed (-9) and resumed again and again.
The program prints whether both runs end with the same weights and metrics, whether a reply that
was kept was paid for again, and whether memory and open files grow.
"""

import contextlib
import hashlib
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import faults  # noqa: E402

import exprl  # noqa: E402
from exprl import option  # noqa: E402

FAILURES = [answer for answer in faults.UNAVAILABLE.values() if answer[0] != "late"]
FAILURES.append("I would rather not say.")


@dataclass(kw_only=True)
class SoakSettings(exprl.Settings):
    """How long the two runs are, and how often the second one is disturbed."""

    may_be_zero = ("kill_every", "percent", "seed")
    iterations: int = option(2000, "iterations of each run")
    kill_every: int = option(100, "iterations between two kills; 0: no kills")
    percent: float = option(10.0, "percentage of judge calls that fail; 0: none")
    seed: int = option(0, "seed of the failures and the kills")


class MoodyJudge(faults.Server):
    """A toy judge that fails at random. If it is asked again for a score, it gives one."""

    def __init__(self, percent, seed):
        self.percent, self.draw = percent, random.Random(seed)
        self.failed, self.kept, self.paid_again = 0, set(), 0
        super().__init__()

    def reply_or_break(self, request):
        messages = request["messages"][:2]
        call = json.dumps([request["model"], {}, messages])
        key = hashlib.sha256(call.encode()).hexdigest()  # as in Judge.ask
        with self.lock:
            self.requests.clear()  # thousands of them would fill the memory
            if len(request["messages"]) == 2 and self.draw.random() * 100 < self.percent:
                self.failed += 1
                return self.draw.choice(FAILURES)
            self.paid += 1
            self.paid_again += key in self.kept
        return faults.toy_world.answer(request | {"messages": messages})


def memory_and_files(pid):
    """Return (resident memory in MB, number of open files) of a process, or None if it ended."""
    with contextlib.suppress(OSError, IndexError):
        status = Path(f"/proc/{pid}/status").read_text()
        memory = int(status.partition("VmRSS:")[2].split()[0]) / 1000
        return memory, len(os.listdir(f"/proc/{pid}/fd"))


def train(world, settings, judge, kill_every, *more, **limits):
    """Train -> (folder of the run, number of kills, [(iterations, MB, open files), ...]).

    `more` are flags of exprl.py, and `limits` are those of faults.World.start.
    """
    out, kills, seen, draw = world.place(), 0, [], random.Random(settings.seed)
    flags = ["--iterations", settings.iterations, "--save-every", 2, "--judge-url", judge.url]
    flags += ["--judge-options", "{}", *more]
    limits = {"patience": 60} | limits
    process, output = world.start(out, *flags, **limits)
    while process.is_alive():
        process.join(0.05)
        log = out / "metrics.jsonl"
        n_logged = log.read_bytes().count(b"\n") if log.exists() else 0
        now = memory_and_files(process.pid)
        if now and n_logged >= 100 * len(seen):
            seen.append((n_logged, *now))
        if kill_every and n_logged >= kill_every * (kills + 1):
            process.join(draw.random() / 2)
            process.kill()
            process.join()
            kills += 1
            records = exprl.read_jsonl(out.parent / "judge_cache.jsonl")
            judge.kept = {record["key"] for record in records}
            process, output = world.start(out, "--resume", *flags, **limits)
    status, words = faults.result(process, output)
    if status:
        exprl.stop(f"the run stopped: {words}")
    return out, kills, seen


def soak(settings: SoakSettings):
    """Train with and without failures and kills, and compare the weights."""
    with tempfile.TemporaryDirectory() as folder:
        world = faults.World(Path(folder))
        judge = MoodyJudge(settings.percent, settings.seed)
        begun = time.monotonic()
        calm, _, seen = train(world, settings, world.judge, 0)
        middle = time.monotonic()
        stormy, kills, _ = train(world, settings, judge, settings.kill_every)
        end = time.monotonic()
        difference = faults.difference(stormy, calm)
    print(f"undisturbed: {settings.iterations} iterations in {middle - begun:.0f} s")
    for n_logged, memory, files in seen:
        print(f"  after {n_logged} iterations: {memory:.0f} MB, {files} open files")
    print(f"disturbed: {judge.failed} failed calls and {kills} kills in {end - middle:.0f} s")
    print(f"weights and metrics: {difference}")
    print(f"replies paid: {judge.paid}, of which were already kept: {judge.paid_again}")
    if difference != "bit for bit" or judge.paid_again:
        exprl.stop("the disturbed run is not like the undisturbed one")


if __name__ == "__main__":
    exprl.run_command(soak, [SoakSettings], sys.argv[1:])
