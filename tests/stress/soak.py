"""Thousands of toy steps with a judge that fails now and then and a process that is killed.

    python tests/soak.py --steps 2000 --kill-every 100 --faults 10

The same training twice: undisturbed, and with a judge of which --faults per cent of the calls meet
an outage (an error, a page, a closed connection, JSON that breaks off) or a reply without a score,
while the process is killed (-9) every --kill-every steps and goes on with --resume. Says whether
both end in the same bits, whether a reply was paid twice, and whether memory and open files grow.
"""

import contextlib
import os
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS.parent), str(TESTS)]

import faults  # noqa: E402
import torch  # noqa: E402

import exprl  # noqa: E402
from exprl import setting  # noqa: E402


@dataclass(kw_only=True)
class SoakSettings:
    """Train with faults and kills, and without; are the weights the same?"""

    steps: int = setting("to train", 2000, at_least=1)
    kill_every: int = setting("steps between kills; 0: none", 100, at_least=0)
    faults: int = setting("per cent of the judge's calls", 10, at_least=0)
    seed: int = setting("of faults and kills", 0, at_least=0)


class Moody(faults.Server):
    """A toy judge that fails at random, but a reply without a score is followed by one with it."""

    def __init__(self, per_cent: int, seed: int):
        self.per_cent, self.draw = per_cent, random.Random(seed)
        self.failed = 0
        super().__init__()

    def reply_or_break(self, request: dict):
        outages = [*faults.OUT.values(), "I would rather not say."]
        asked_again = len(request["messages"]) > 2
        with self.lock:
            if not asked_again and self.draw.random() * 100 < self.per_cent:
                self.failed += 1
                broken = self.draw.choice([o for o in outages if o[0] != "late"])
                if isinstance(broken, str):  # paid, though without a score
                    self.paid[str(request["messages"])] += 1
                return broken
        self.requests.clear()  # not to be kept for thousands of steps
        if asked_again:
            request["messages"] = request["messages"][:2]
        else:
            with self.lock:
                self.paid[str(request["messages"])] += 1
        return faults.toy_world.answer(request)


def of_process(pid: int) -> tuple[float, int]:
    """(resident memory in MB, open files) of a process; (0, 0) if it is gone."""
    with contextlib.suppress(OSError, IndexError):  # a process that has just ended has no memory
        status = Path(f"/proc/{pid}/status").read_text()
        memory = int(status.partition("VmRSS:")[2].split()[0]) / 1000
        return memory, len(os.listdir(f"/proc/{pid}/fd"))
    return 0.0, 0


def steps_of(out: Path) -> int:
    """Steps in the log, by its lines."""
    with contextlib.suppress(OSError):
        return (out / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


def train(world: faults.World, settings: SoakSettings, url: str, kill_every: int) -> tuple:
    """(its folder, kills, (steps, memory, open files) seen before each kill and the end)."""
    out, kills, seen, draw = world.place(), 0, [], random.Random(settings.seed)
    size = {"steps": settings.steps, "save_every": 10, "judge_patience": 1, "judge_url": url}
    process, words = faults.start(world, out, **size)
    target = kill_every + draw.uniform(-5, 5) if kill_every else float("inf")
    last = (0, 0.0, 0)
    while process.exitcode is None:
        process.join(0.05)
        memory, files = of_process(process.pid)
        last = (steps_of(out), memory, files) if memory else last
        if not seen or last[0] >= seen[-1][0] + 100:
            seen.append(last)
        if last[0] >= target and process.exitcode is None:
            process.kill()
            process.join()
            kills, target = kills + 1, target + kill_every
            process, words = faults.start(world, out, "--resume", **size)
    if process.exitcode:
        exprl.stop(f"the run stopped: {faults.last_line(words)}")
    return out, kills, [*seen, last]


def soak(settings: SoakSettings) -> bool:
    """Train with faults and kills, and without; are the weights the same?"""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        world = faults.World(Path(folder))
        judge = Moody(settings.faults, settings.seed)
        begun = time.monotonic()
        calm, _, seen = train(world, settings, world.judge.url, 0)
        middle = time.monotonic()
        stormy, kills, _ = train(world, settings, judge.url, settings.kill_every)
        end = time.monotonic()
        weights = [(out / "final" / "model.safetensors").read_bytes() for out in (calm, stormy)]
        same = weights[0] == weights[1] and faults.learned(calm) == faults.learned(stormy)
        twice = sum(n > 1 for n in judge.paid.values())
        took = f"{middle - begun:.0f} s undisturbed, {end - middle:.0f} s with"
        print(f"{settings.steps} steps: {took} {judge.failed} faults and {kills} kills")
        print(f"weights and metrics: {'the same bits' if same else 'OTHERS'}")
        print(f"replies paid: {judge.paid.total()}, more than once: {twice}")
        for steps, memory, files in seen:
            print(f"undisturbed, after {steps} steps: {memory:.0f} MB, {files} open files")
        return same


if __name__ == "__main__":
    exprl.run_command(soak, SoakSettings, sys.argv[1:], __doc__)
