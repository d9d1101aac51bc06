"""A night with an API that behaves as real providers do, and five kills in the middle of it."""

import hashlib
import json
import re
import shutil
from collections import Counter

import faults
import pytest
import soak

FLAGS = ["--prompts-per-iteration", 5]
OF_A_TEXT = {  # the same text meets the same trouble every time
    "400": (400, "this model's maximum context length is 8192 tokens"),
    "403": (403, "this text was rejected by our moderation"),
    "cut off": faults.reply("A draft:\nStep 1: 5\nStep 2: 5", "length"),
    "empty": faults.reply(""),
    "thoughts": "<think>\nStep 1: 1\n- is it 40?\n- no\n</think>\n",
}
OF_A_MOMENT = {  # the second try succeeds
    "429": (429, "rate limit reached"),
    "500": (500, "the server had an error"),
    "503": (503, "overloaded"),
    "an error in a 200": (200, "overloaded"),
    "no choices": {"id": "x", "object": "chat.completion", "choices": []},
    "a closed connection": ("closed", {}),
    "a timeout": ("late", {}),
    "429 again and again": (429, "rate limit reached"),
}
TRIES = {"429 again and again": 10}
TROUBLES = OF_A_TEXT | OF_A_MOMENT


class Handler(faults.Handler):
    def do_GET(self):
        self.reply(403, {"error": {"message": "this key may not list models"}})


class Provider(faults.Server):
    """Has trouble with 10% of the calls. A hash of the call decides which call and which trouble.

    `met` counts the calls that met each trouble, and `kept` has the keys of the replies that are on
    disk. `paid_again` counts the requests for them.
    """

    def __init__(self):
        self.met, self.tries, self.kept, self.paid_again = Counter(), Counter(), set(), 0
        super().__init__()
        self.RequestHandlerClass = Handler

    def reply_or_break(self, request):
        if "max_tokens" in request:
            return self.error(400, "unsupported parameter: use max_completion_tokens instead")
        messages = request["messages"][:2]  # what follows belongs to the same call
        if len(messages) == 1:
            return "ready"
        call = json.dumps([request["model"], {}, messages])
        key = hashlib.sha256(call.encode()).hexdigest()  # as in JudgeClient.ask
        names = [*TROUBLES]
        draw = int(key, 16) % (10 * len(names))
        name = names[draw] if draw < len(names) else ""
        with self.lock:
            self.tries[key] += 1
            is_over = name in OF_A_MOMENT and self.tries[key] > TRIES.get(name, 1)
            self.paid_again += key in self.kept
            self.met[name] += self.tries[key] == 1
        reply = faults.toy_world.answer(request | {"messages": messages})
        if not name or is_over:
            return reply
        trouble = TROUBLES[name]
        if name == "thoughts":
            return trouble + reply
        if isinstance(trouble, dict):
            return 200, trouble
        status, words = trouble
        return self.error(status, words) if isinstance(words, str) else trouble

    def error(self, status, words):
        """Return an error whose text differs each time, as request numbers do."""
        return status, {"error": {"message": f"{words} (request {len(self.requests)})"}}


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    return faults.World(shutil.copytree(tiny, tmp_path_factory.mktemp("providers") / "world"))


def lines(file):
    """Return the lines about the judge that a run has printed."""
    return [line for line in re.split(r"[\r\n]+", file.read_text()) if "the judge toy" in line]


def test_a_provider_that_refuses_max_tokens_stops_the_run_with_the_flag_to_change(world):
    status, words = world.train(world.place(), "--judge-url", Provider().url)
    assert status == 1
    assert "use max_completion_tokens" in words and "--judge-options" in words


def test_twenty_iterations_and_five_kills_end_with_the_same_weights(world):
    settings = soak.SoakSettings(iterations=20)
    calm, stormy = Provider(), Provider()
    out, _, _ = soak.train(world, settings, calm, 0, *FLAGS, timeout=1)
    printed = lines(world.folder / f"output{world.count}")
    killed, kills, _ = soak.train(world, settings, stormy, 3, *FLAGS, timeout=1)
    assert kills >= 5
    assert faults.difference(killed, out) == "bit for bit"
    assert stormy.paid_again == 0
    del calm.met[""]
    assert len(calm.met) > 8 and sum(calm.met.values()) > 20
    # one line per kind of trouble, whatever number the provider writes into it
    kinds = [re.sub(r"\(request \d+\)|ends with .*", "", line) for line in printed]
    assert 5 < len(kinds) == len(set(kinds)) <= len(TROUBLES)
    for name in ("400", "403"):
        assert sum(f"Error code: {name}" in line for line in printed) == (name in calm.met)
    failed = [r["rewards"] is None for r in faults.exprl.read_jsonl(out / "rollouts.jsonl")]
    assert 0 < sum(failed) < len(failed) / 4
    for file in world.folder.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert faults.KEY.encode() not in content and b"Traceback" not in content, file
