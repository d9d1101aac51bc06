r"""The judge of exprl.py, asked through real HTTP servers that behave or misbehave on purpose.

Each test starts a server on 127.0.0.1 and connects a `Judge` to it. What the server replies is a
function of the request, so a test decides what happens to which completion.
"""

import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import openai
import program_judge
import pytest
import toy_world
from transformers import LlamaConfig, LlamaForCausalLM

import exprl
import judge_prompts

KEY = "sk-very-secret"
RUBRIC = "- two halves make one\n- the sum is 3"
PROBLEM = {
    "question": r"What is \frac{2}{2} + {2}?",
    "reference": r"It is {1} + 2 = 3.",
    "answer": "3",
    "domain": "math",
}
OTHER = {
    "question": "What is 4 + 4?",
    "reference": "Twice four is 8.",
    "answer": "8",
    "domain": "math",
}
STEPS = ("### a\n", "### b\n", "### c")
KINDS = ("outcome", "together", "prefix", "alone")
BUSY = {"error": {"message": "busy"}}


# ---- Tools ---------------------------------------------------------------------------------------
class Handler(program_judge.ChatHandler):
    """Refuse to list the models, and break down in ways for which HTTP has no status."""

    def do_GET(self):
        self.reply(403, {"error": {"message": "this key may not list models"}})

    def reply(self, status, body):
        if status == "closed":
            self.close_connection = True
        elif status == "torn":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "5")
            self.end_headers()
            self.wfile.write(b'{"id"')
        elif status == "late":
            time.sleep(1.2)
            self.reply(200, body)
        else:
            with suppress(OSError):  # the client may have hung up
                super().reply(status, body)


class Server(program_judge.ChatServer):
    """A chat server with an answer of its own to the test call at the start of a run."""

    def __init__(self, answer, first):
        super().__init__(lambda request: first if is_first(request) else answer(request))
        self.RequestHandlerClass = Handler

    @property
    def calls(self):
        """The requests about rubrics and completions, without the test calls."""
        return [request for request in self.requests if not is_first(request)]

    def handle_error(self, request, client_address):
        """Print nothing when a client hangs up."""


def is_first(request):
    """Return whether a request is the test call: it has one message, other calls have two."""
    return len(request["messages"]) == 1


def chat(content, finish_reason="stop", **more):
    """Return (status, body) of a complete reply, for what a plain string cannot express."""
    message = {"role": "assistant", "content": content}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    return 200, {"choices": [choice]} | more


def in_turn(*answers):
    """Return a function that gives one answer after the other, and the last one for ever."""
    remaining = itertools.chain(answers, itertools.repeat(answers[-1]))
    return lambda request: next(remaining)


def system(request):
    return request["messages"][0]["content"]


def user(request):
    return request["messages"][1]["content"]


def fenced(request):
    """Return the texts that stand between tags in a user message."""
    pattern = r"^<(text-\d+-[0-9a-f]{8})>\n(.*?)\n</\1>$"
    return [text for _, text in re.findall(pattern, user(request), re.DOTALL | re.MULTILINE)]


def wants_rubric(request):
    first_line = judge_prompts.system_message("rubric", "math", True).split("\n")[0]
    return system(request).startswith(first_line)


def completion(*steps, problem=PROBLEM, truncated=False):
    """Return a completion of these steps, one token each."""
    spans = [(t, t + 1) for t in range(len(steps))]
    ids = [*range(len(steps))]
    return exprl.Completion(problem, "".join(steps), [*steps], spans, None, truncated, [0], ids)


def rewards(judge, *completions):
    return [verdict.rewards for verdict in judge(completions)]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    """Use one key, no proxy and short waits. Afterwards, the key must be in no file."""
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(exprl, "PATIENCE", 20.0)
    monkeypatch.setattr(exprl, "PAUSE", 0.01)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    yield
    for path in tmp_path.rglob("*.json*"):
        assert KEY not in path.read_text()


@pytest.fixture
def serve():
    """serve(answer): start a server. `answer` is a string, (status, body) or a function."""
    servers = []

    def start(answer, first="ready"):
        server = Server(answer if callable(answer) else lambda request: answer, first)
        servers.append(server)
        return server

    yield start
    for server in servers:
        threading.Thread(target=server.shutdown, daemon=True).start()  # this takes half a second


@pytest.fixture
def connect(tmp_path):
    """connect(server): return a judge for a run. The runs of a test share one folder."""

    def start(server, kind="outcome", run="run", rubric="none", threads=8, options="", **settings):
        url = server.url if isinstance(server, Server) else server
        settings |= {"judge_url": url, "rubric": rubric, "judge_threads": threads}
        if kind != "outcome":
            settings["judge_input"] = kind
        if options:
            settings["judge_options"] = options
        out = tmp_path / "runs" / run
        out.mkdir(parents=True, exist_ok=True)
        method = "outcome" if kind == "outcome" else "process"
        return exprl.Judge(exprl.JudgeSettings(**settings), method, out)

    return start


@pytest.fixture
def cached(tmp_path):
    """cached(): the replies on disk."""
    file = tmp_path / "runs" / "judge_cache.jsonl"
    return lambda: [record["reply"] for record in read(file)] if file.exists() else []


def message_of(function, *arguments, **options):
    """Return the line with which a call ends the program. It is one line without the key."""
    started = time.monotonic()
    with pytest.raises(SystemExit) as stopped:
        function(*arguments, **options)
    assert time.monotonic() - started < 10
    message = str(stopped.value)
    assert message.startswith("exprl: ") and "\n" not in message and KEY not in message
    return message


# ---- Calls and rewards ---------------------------------------------------------------------------
def test_the_rubric_comes_first_and_once_per_problem(serve, connect):
    points = {
        problem["question"]: f"- reaches {problem['answer']}0\n- ends in {problem['answer']}1"
        for problem in (PROBLEM, OTHER)
    }

    def answer(request):
        question = next(question for question in points if question in user(request))
        return points[question] if wants_rubric(request) else "Score: 4"

    server = serve(answer)
    judge = connect(server, rubric="reference")
    for iteration in range(2):
        texts = [f"{iteration}: text {i}" for i in range(3)]
        group = [
            completion(text, problem=problem) for problem in (PROBLEM, OTHER) for text in texts
        ]
        for verdict, asked in zip(judge(group), group):
            assert verdict.rewards == [0.75] and verdict.replies == ["Score: 4"]
            assert verdict.rubric == points[asked.problem["question"]]
    assert [wants_rubric(request) for request in server.calls] == [True] * 2 + [False] * 12
    for request in server.calls:
        for question, rubric in points.items():
            is_shown = question in user(request) and not wants_rubric(request)
            assert (rubric in user(request)) == is_shown


@pytest.mark.parametrize("rubric", ["reference", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_calls_are_those_of_judge_calls(kind, rubric, serve, connect):
    def answer(request):
        if wants_rubric(request):
            return RUBRIC
        scores = [1 + "abc".index(text.strip()[-1]) for text in fenced(request)]
        lines = [f"Step {t}: {score}" for t, score in enumerate(scores, 1)]
        return "\n".join(lines) if kind == "together" else f"Score: {scores[-1]}"

    server = serve(answer)
    judge = connect(server, kind, rubric=rubric, threads=1)
    expected = [[0.5]] if kind == "outcome" else [[0.0, 0.25, 0.5]]
    assert rewards(judge, completion(*STEPS)) == expected
    steps = ["".join(STEPS)] if kind == "outcome" else [*STEPS]
    calls = judge_prompts.judge_calls(kind, PROBLEM, RUBRIC if rubric == "reference" else "", steps)
    if rubric == "reference":
        calls.insert(0, judge_prompts.judge_messages("rubric", PROBLEM))
    assert [request["messages"] for request in server.calls] == calls


def test_the_reward_of_score_k_is_k_minus_1_quarters(serve, connect):
    server = serve(lambda request: f"Score: {fenced(request)[0]}")
    group = [completion(str(k)) for k in range(1, 6)]
    assert rewards(connect(server), *group) == [[0.0], [0.25], [0.5], [0.75], [1.0]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [("",), (" \n\n",), ("###",), ("...", " -- !\n")])
def test_a_completion_without_words_gets_reward_0_without_a_call(kind, steps, serve, connect):
    server = serve("Score: 5")
    expected = [0.0] if kind == "outcome" else [0.0] * len(steps)
    assert rewards(connect(server, kind), completion(*steps)) == [expected]
    assert server.calls == []


def test_a_truncated_completion_gets_outcome_0_without_a_call(serve, connect):
    server = serve("Step 1: 4\nStep 2: 5\nStep 3: 3")
    truncated = completion(*STEPS, truncated=True)
    assert rewards(connect(server), truncated) == [[0.0]]
    assert server.calls == []
    assert rewards(connect(server, "together"), truncated) == [[0.75, 1.0, 0.5]]


def test_options_model_and_key_reach_the_server(serve, connect):
    server = serve("Score: 4")
    options = '{"max_completion_tokens": 99, "extra_body": {"chat": {"thinking": false}}}'
    rewards(connect(server, options=options, judge_model="the-model"), completion("text"))
    assert len(server.requests) == 2
    for request in server.requests:
        assert request["model"] == "the-model"
        assert request["authorization"] == f"Bearer {KEY}"
        assert request["max_completion_tokens"] == 99 and request["chat"] == {"thinking": False}
        assert not {"temperature", "max_tokens"} & set(request)


def test_calls_run_in_parallel_and_no_more_than_judge_threads(serve, connect):
    lock, at_once, peaks = threading.Lock(), [], []

    def answer(request):
        with lock:
            at_once.append(request)
            peaks.append(len(at_once))
        time.sleep(0.1)
        with lock:
            at_once.remove(request)
        return "Score: 4"

    judge = connect(serve(answer), threads=5)
    group = [completion(f"text {i}") for i in range(20)]
    assert rewards(judge, *group) == [[0.75]] * 20
    assert max(peaks) == 5


# ---- Replies that cannot be used -----------------------------------------------------------------
def test_a_malformed_reply_is_asked_for_again(serve, connect, cached):
    server = serve(in_turn("hm", "Score: 10", "Score: 2", "Score: 5"))
    [verdict] = connect(server)([completion("text")])
    assert (verdict.rewards, verdict.replies) == ([0.25], ["Score: 2"])
    first, second, third = (request["messages"] for request in server.calls)
    again = {"role": "user", "content": judge_prompts.ASK_AGAIN}
    assert second == [*first, {"role": "assistant", "content": "hm"}, again]
    assert third == [*second, {"role": "assistant", "content": "Score: 10"}, again]
    assert cached() == ["Score: 2"]
    assert rewards(connect(server), completion("text")) == [[0.25]]  # kept under the first question
    assert len(server.calls) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_after_three_malformed_replies_the_verdict_is_none(kind, serve, connect, cached):
    good = "Step 1: 4\nStep 2: 4" if kind == "together" else "Score: 4"
    bad = "Step 1: 4" if kind == "together" else "Score: 0"
    server = serve(lambda request: bad if "bad" in user(request) else good)
    group = [completion("### bad", "### text"), completion("### good", "### text")]
    failed, judged = connect(server, kind)(group)
    assert failed.rewards is None and failed.replies[-1] == bad
    assert judged.rewards == ([0.75] if kind == "outcome" else [0.75] * 2)
    assert bad not in cached() and good in cached()
    assert sum(fenced(request)[0].startswith("### bad") for request in server.calls) == 3


@pytest.mark.parametrize("answer", ["- only one item", (403, BUSY), chat(RUBRIC, "length")])
def test_a_failed_rubric_fails_the_completions_of_its_problem(answer, serve, connect, cached):
    def reply(request):
        if OTHER["question"] in user(request) and wants_rubric(request):
            return answer
        return RUBRIC if wants_rubric(request) else "Score: 4"

    server = serve(reply)
    group = [completion("x"), completion("y"), completion("x", problem=OTHER)]
    assert rewards(connect(server, rubric="reference"), *group) == [[0.75], [0.75], None]
    asked = [request for request in server.calls if OTHER["question"] in user(request)]
    assert all(map(wants_rubric, asked)) and len(asked) <= 3
    assert {*cached()} == {RUBRIC, "Score: 4"}


def test_more_than_half_failed_stops_the_run_and_keeps_no_failure(serve, connect, cached):
    server = serve(lambda request: "no verdict" if "bad" in user(request) else "Score: 3")
    judge = connect(server)
    half = [completion(text) for text in ("good", "bad 1", "fine", "bad 2")]
    assert rewards(judge, *half) == [[0.5], None, [0.5], None]
    most = [completion(text) for text in ("good", "bad 1", "bad 2")]
    assert "no verdict" in message_of(judge, most)
    server.answer = lambda request: "ready" if is_first(request) else "Score: 4"
    assert rewards(connect(server), *most) == [[0.5], [0.75], [0.75]]
    assert "no verdict" not in cached()


def test_a_reply_cut_by_its_length_limit_is_not_a_verdict(serve, connect, cached):
    def answer(request):
        is_cut = "long" in user(request)
        return chat("A draft:\nScore: 5\nBut wait", "length") if is_cut else "Score: 3"

    assert rewards(connect(serve(answer)), completion("long"), completion("x")) == [None, [0.5]]
    assert cached() == ["Score: 3"]


@pytest.mark.parametrize(
    ("reply", "reward"),
    [
        ("<think>\nScore: 5\n</think>\nScore: 2", [0.25]),
        ("Score: 5\n</think>\nScore: 2", [0.25]),  # the template opened the tag
        ("Score: 5\n</think>\nIt is weak.", None),
        ("<think>\nIs it\nScore: 5\n? Let me see.", None),  # never closed
        ("<think>1</think>\n<think>\nScore: 5\n</think>\nScore: 2", [0.25]),
        ("<think></think>Score: 2", [0.25]),
    ],
)
def test_thoughts_are_removed_before_parsing(reply, reward, serve, connect):
    server = serve(lambda request: reply if "deep" in user(request) else "Score: 3")
    assert rewards(connect(server), completion("deep"), completion("x")) == [reward, [0.5]]


def test_thoughts_do_not_become_rubric_items(serve, connect):
    thoughts = "<think>\n- is it 40?\n- 3 * 5 = 15\n</think>\n"
    server = serve(lambda request: thoughts + RUBRIC if wants_rubric(request) else "Score: 3")
    [verdict] = connect(server, rubric="reference")([completion("x")])
    assert verdict.rubric == RUBRIC


@pytest.mark.parametrize("body", [chat(None), chat(""), chat(None, "content_filter")])
def test_an_empty_reply_is_not_a_verdict(body, serve, connect, cached):
    server = serve(lambda request: body if "bad" in user(request) else "Score: 3")
    assert rewards(connect(server), completion("x"), completion("bad")) == [[0.5], None]
    assert cached() == ["Score: 3"]


@pytest.mark.parametrize(
    "usage",
    [{}, {"usage": None}, {"usage": {}}],
)
def test_a_reply_without_usage_counts(usage, serve, connect):
    assert rewards(connect(serve(chat("Score: 4", **usage))), completion("x")) == [[0.75]]


def test_half_of_a_surrogate_pair_in_a_reply_is_kept(serve, connect):
    server = serve("half a pair: \ud800\nScore: 4")
    for run in ("one", "two"):
        assert rewards(connect(server, run=run), completion("x")) == [[0.75]]
    assert len(server.calls) == 1


# ---- The cache -----------------------------------------------------------------------------------
def test_another_run_of_the_folder_pays_for_nothing_that_is_kept(serve, connect):
    server = serve(lambda request: RUBRIC if wants_rubric(request) else "Score: 4")
    group = [completion("x"), completion("y"), completion("z", problem=OTHER)]
    first = connect(server, rubric="reference", run="one")(group)
    assert len(server.calls) == 5
    judge = connect(server, rubric="reference", run="two")
    assert judge(group) == first and judge(group) == first
    assert len(server.calls) == 5 and judge.paid["judge_calls"] == 1  # the test call


def test_the_cache_distinguishes_model_options_and_messages(serve, connect):
    count = itertools.count()
    server = serve(lambda request: f"Score: {1 + next(count)}")
    assert rewards(connect(server), completion("### a")) == [[0.0]]
    assert rewards(connect(server, judge_model="m2"), completion("### a")) == [[0.25]]
    assert rewards(connect(server, options='{"max_tokens": 9}'), completion("### a")) == [[0.5]]
    assert rewards(connect(server, "prefix"), completion("### a")) == [[0.75]]
    assert rewards(connect(server, "alone"), completion("### a")) == [[1.0]]  # another task
    assert rewards(connect(server), completion("### a")) == [[0.0]]
    assert len(server.calls) == 5


def test_equal_completions_get_one_verdict(serve, connect, cached):
    """Both threads may ask, and a judge may reply differently. The first reply counts for all."""
    count = itertools.count()

    def answer(request):
        time.sleep(0.05)
        return f"Score: {1 + next(count) % 5}"

    judge = connect(serve(answer))
    verdicts = judge([completion("twin") for _ in range(8)])
    assert all(verdict == verdicts[0] for verdict in verdicts) and len(cached()) == 1
    assert judge([completion("twin")]) == verdicts[:1]


def test_the_first_line_of_a_key_wins(serve, connect, tmp_path):
    server = serve("Score: 4")
    rewards(connect(server), completion("text"))
    file = tmp_path / "runs" / "judge_cache.jsonl"
    [record] = read(file)
    exprl.append_jsonl(file, [record | {"reply": "Score: 1"}])  # from another run
    assert rewards(connect(server), completion("text")) == [[0.75]]
    assert len(server.calls) == 1


def test_a_run_reads_what_another_run_has_paid_for_meanwhile(serve, connect):
    count = itertools.count()
    server = serve(lambda request: f"Score: {1 + next(count)}")
    one, two = connect(server, run="one"), connect(server, run="two")
    assert rewards(one, completion("text")) == [[0.0]]
    assert rewards(two, completion("text")) == [[0.0]]
    assert len(server.calls) == 1


def tear_last_line(file):
    file.write_bytes(file.read_bytes()[:-15])


def test_a_torn_last_line_of_the_cache_costs_one_call(serve, connect, tmp_path):
    server = serve("Score: 4")
    group = [completion(text) for text in "abc"]
    rewards(connect(server, threads=1), *group)
    tear_last_line(tmp_path / "runs" / "judge_cache.jsonl")
    assert rewards(connect(server), *group) == [[0.75]] * 3
    assert [fenced(request) for request in server.calls[3:]] == [["c"]]


# ---- The start of a run --------------------------------------------------------------------------
def test_a_key_that_may_not_list_models_works(serve, connect):
    server = serve("Score: 4")
    plain = openai.OpenAI(base_url=server.url, api_key=KEY)
    with pytest.raises(openai.PermissionDeniedError):
        plain.models.list()
    assert rewards(connect(server), completion("text")) == [[0.75]]


def test_an_outage_at_the_start_may_pass(serve, connect, monkeypatch):
    monkeypatch.setattr(exprl, "PAUSE", 0.5)
    server = serve("Score: 4")
    server.answer = in_turn((503, BUSY), "ready", "Score: 4")
    assert rewards(connect(server), completion("text")) == [[0.75]]


def refusal(status, words):
    return status, {"error": {"message": words, "code": "no"}}


AT_THE_START = {
    "an option": (refusal(400, "use max_completion_tokens"), "--judge-options"),
    "the key": (refusal(401, "wrong\nkey"), "OPENAI_API_KEY"),
    "no credit": (refusal(402, "no credit"), "OPENAI_API_KEY"),
    "the model": (refusal(404, "no such model"), "--judge-model"),
    "an outage": (refusal(503, "overloaded"), "--judge-url"),
}


@pytest.mark.parametrize(("first", "flag"), AT_THE_START.values(), ids=AT_THE_START)
def test_a_failing_first_call_stops_at_once_with_the_servers_words(first, flag, serve, connect):
    server = serve("Score: 4", first=first)
    message = message_of(connect, server)
    words = first[1]["error"]["message"]
    assert words.replace("\n", " ") in message
    assert server.url in message and server.calls == []


@pytest.mark.parametrize(("first", "flag"), AT_THE_START.values(), ids=AT_THE_START)
def test_a_failing_first_call_says_what_to_check(first, flag, serve, connect):
    assert flag in message_of(connect, serve("Score: 4", first=first))


EMPTY = {
    "empty": "",
    "null": chat(None),
    "cut": chat("Let me think", "length"),
    "thoughts": "<think>hm",
}


@pytest.mark.parametrize("first", EMPTY.values(), ids=EMPTY)
def test_an_empty_first_reply_names_max_tokens_and_thinking(first, serve, connect):
    message = message_of(connect, serve("Score: 4", first=first))
    assert "max_tokens" in message and "thinking" in message


def test_an_unreachable_server_stops_at_once(connect):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    assert url in message_of(connect, url)


@pytest.mark.parametrize("url", ["http://[::bad/v1", "not an address"])
def test_an_address_that_is_malformed_stops_at_once(url, connect):
    assert "--judge-url" in message_of(connect, url)


def test_neither_key_nor_url_stops_with_what_to_set(connect, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody may reach the real OpenAI
    message = message_of(connect, "")
    assert "OPENAI_API_KEY" in message and "--judge-url" in message
    assert "value_judge.py" in message  # the way to continue without a key


def test_a_server_of_your_own_needs_no_key(serve, connect, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    assert rewards(connect(serve("Score: 4")), completion("text")) == [[0.75]]


def test_the_url_may_come_from_the_environment(serve, connect, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", serve("Score: 4").url)
    assert rewards(connect(""), completion("text")) == [[0.75]]
    assert rewards(connect(serve("Score: 3")), completion("new")) == [[0.5]]


INVALID = ['{"temperature": 0', "", "[1]", "null", '{"temprature": 0}', '{"model": "m"}']


@pytest.mark.parametrize("options", INVALID)
def test_invalid_judge_options_are_answered_with_a_valid_example(options, serve, connect):
    message = message_of(connect, serve("Score: 4"), judge_options=options)
    [example] = re.findall(r"--judge-options '(\{.*?\})'", message)
    assert isinstance(json.loads(example), dict)


def test_white_space_around_the_key_is_ignored(serve, connect, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    server = serve("Score: 4")
    connect(server)
    assert server.requests[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    "key",
    [
        "sk-very\nsecret",
        "sk-vérysecret",
    ],
)
def test_a_key_with_strange_characters_is_not_shown(key, serve, connect, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    try:
        connect(serve("Score: 4"))
    except SystemExit as stopped:
        assert "secret" not in str(stopped)
    assert "secret" not in "".join(capsys.readouterr())


# ---- Errors later in the run ---------------------------------------------------------------------
@pytest.mark.parametrize("status", [400, 403, 413, 422])
@pytest.mark.parametrize("kind", ["outcome", "prefix"])
def test_a_refused_text_has_no_verdict_and_is_asked_again_in_another_run(
    status, kind, serve, connect, cached, capsys
):
    error = refusal(status, "context too long")
    server = serve(lambda request: error if "bad" in user(request) else "Score: 3")
    group = [completion("good"), completion("bad")]
    judge = connect(server, kind, run="one")
    assert rewards(judge, *group) == [[0.5], None]
    assert capsys.readouterr().out.count("context too long") == 1
    assert judge.paid["judge_calls"] == 2 and cached() == ["Score: 3"]
    server.answer = lambda request: "ready" if is_first(request) else "Score: 4"
    assert rewards(connect(server, kind, run="two"), *group) == [[0.5], [0.75]]


@pytest.mark.parametrize("status", [401, 402, 404])
def test_a_wrong_key_or_model_or_no_credit_stops_at_once(status, serve, connect, cached):
    server = serve(refusal(status, "not any more"))
    judge = connect(server, threads=1)
    assert "not any more" in message_of(judge, [completion(f"text {i}") for i in range(20)])
    assert len(server.calls) < 5 and cached() == []


OUTAGES = {
    "408": (408, BUSY),
    "429": (429, BUSY),
    "500": (500, BUSY),
    "502 with a page": (502, "<html>Bad gateway</html>"),
    "503": (503, BUSY),
    "200 with a page": (200, "<html>Welcome</html>"),
    "200 with an error": (200, BUSY),
    "200 with an error and no choices": (200, BUSY | {"choices": None}),
    "no choices": (200, {"id": "x", "object": "chat.completion", "choices": []}),
    "broken JSON": ("torn", {}),
    "a closed connection": ("closed", {}),
    "no reply in time": ("late", {}),
}
BROKEN = {
    "no message": (200, {"choices": [{"index": 0, "finish_reason": "stop"}]}),
    "a null choice": (200, {"choices": [None]}),
    "a list for a text": chat([{"type": "text", "text": "Score: 5"}]),
}
OUTAGES |= BROKEN
IN_TIME = '{"timeout": 0.5}'


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES)
def test_an_outage_that_passes_is_waited_out(outage, serve, connect, cached):
    options = IN_TIME if outage[0] == "late" else ""
    server = serve(in_turn(*[outage] * 4, "Score: 4"))
    assert rewards(connect(server, options=options), completion("text")) == [[0.75]]
    assert cached() == ["Score: 4"]


@pytest.mark.parametrize("outage", OUTAGES.values(), ids=OUTAGES)
def test_an_outage_that_lasts_stops_the_run_and_is_not_a_verdict(
    outage, serve, connect, cached, monkeypatch
):
    is_late = outage[0] == "late"
    monkeypatch.setattr(exprl, "PATIENCE", 0.8 if is_late else 0.1)
    options = IN_TIME if is_late else ""
    server = serve(outage)
    judge = connect(server, options=options)
    assert "--resume" in message_of(judge, [completion("text")])
    assert len(server.calls) > 1 and cached() == []
    server.answer = lambda request: "ready" if is_first(request) else "Score: 4"
    assert rewards(connect(server, options=options), completion("text")) == [[0.75]]


def test_one_slow_call_does_not_end_a_run_whose_other_calls_are_answered(
    serve, connect, monkeypatch
):
    monkeypatch.setattr(exprl, "PATIENCE", 0.4)
    is_over = threading.Event()

    def answer(request):
        if "limited" in user(request):
            return "Score: 5" if is_over.is_set() else (429, BUSY)
        time.sleep(0.1)
        if fenced(request) == ["text 11"]:
            is_over.set()
        return "Score: 4"

    judge = connect(serve(answer), threads=2)
    group = [completion("limited"), *(completion(f"text {i}") for i in range(12))]
    assert rewards(judge, *group) == [[1.0]] + [[0.75]] * 12


# ---- Payments ------------------------------------------------------------------------------------
def test_calls_and_tokens_are_counted_in_memory_and_on_disk(serve, connect, tmp_path):
    usage = {"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}
    judge = connect(serve(chat("Score: 4", usage=usage)), "prefix")
    before = judge.paid.copy()  # of the test call
    rewards(judge, completion(*STEPS))
    judge.paid.subtract(before)
    assert judge.paid == {"judge_calls": 3, "prompt_tokens": 300, "completion_tokens": 21}
    bill = read(tmp_path / "runs" / "run" / "judge_calls.jsonl")
    assert sum(amounts.get("judge_calls", 0) for amounts in bill) == 4


@pytest.mark.parametrize("status", [429, 503])
def test_an_error_status_costs_nothing(status, serve, connect):
    judge = connect(serve(in_turn(*[(status, BUSY)] * 5, "Score: 4")))
    assert rewards(judge, completion("x"), completion("y")) == [[0.75]] * 2
    assert judge.paid["judge_calls"] == 3


def test_a_request_that_times_out_counts(serve, connect):
    server = serve(in_turn(*[("late", {})] * 2, "Score: 4"))
    judge = connect(server, options=IN_TIME)
    assert rewards(judge, completion("text")) == [[0.75]]
    assert judge.paid["judge_calls"] == len(server.requests) == 4


class SlowCounter(Counter):
    """A counter that is slow to read, so that threads without a lock read the same number."""

    def __getitem__(self, name):
        value = super().__getitem__(name)
        time.sleep(0.002)
        return value


def run_into_limit(server, connect, **settings):
    judge = connect(server, threads=32, max_judge_calls=10, **settings)
    judge.paid = SlowCounter(judge.paid)
    message = message_of(judge, [completion(f"text {i}") for i in range(60)])
    assert "--max-judge-calls 10" in message
    return judge


@pytest.mark.parametrize("reply", ["Score: 4", "malformed"])
def test_max_judge_calls_is_never_exceeded(reply, serve, connect):
    server = serve(lambda request: time.sleep(0.02) or reply)
    judge = run_into_limit(server, connect)
    assert len(server.requests) == judge.paid["judge_calls"] == 10


def test_max_judge_calls_is_not_exceeded_when_some_calls_fail(serve, connect):
    replies, count = [], itertools.count()

    def answer(request):
        if next(count) % 2:
            return 503, BUSY
        replies.append(request)
        return "Score: 4"

    judge = run_into_limit(serve(answer), connect)
    assert len(replies) + 1 == judge.paid["judge_calls"] <= 10


def test_max_judge_calls_is_not_exceeded_by_requests_that_time_out(serve, connect):
    server = serve(("late", {}))
    run_into_limit(server, connect, options=IN_TIME)
    assert len(server.requests) <= 10


def test_what_is_kept_costs_nothing_of_max_judge_calls(serve, connect):
    server = serve("Score: 4")
    judge = connect(server, max_judge_calls=3)
    group = [completion("x"), completion("y")]
    for _ in range(2):
        assert rewards(judge, *group) == [[0.75]] * 2
    assert "--max-judge-calls 3" in message_of(judge, [completion("new")])
    assert len(server.requests) == 3


def test_judge_calls_includes_what_was_paid_before_a_kill(serve, connect):
    """A killed run is imitated by a judge that is still waiting for its reply."""
    go_on = threading.Event()
    server = serve(lambda request: "Score: 3" if go_on.wait(20) else "")
    killed = connect(server)
    thread = threading.Thread(target=killed, args=([completion("text")],))
    thread.start()
    while not server.calls:
        time.sleep(0.01)
    resumed = connect(server)
    go_on.set()
    thread.join()
    assert resumed.paid["judge_calls"] == 3  # two test calls, and the one that was under way
    assert connect(server, run="other").paid["judge_calls"] == 1


# ---- The judge inside a run ----------------------------------------------------------------------
@pytest.fixture
def train_once(tmp_path, monkeypatch):
    """train_once(server): train a random model for one iteration -> the folder of the run."""
    tokenizer = toy_world.make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    monkeypatch.setattr(exprl, "stop_on_signal", threading.Event)  # leaves pytest's handlers alone
    [problem, _], _ = toy_world.make_rows(0, 2, 0)
    out = tmp_path / "runs" / "run"

    def run(server, **settings):
        training = exprl.TrainingSettings(
            model=str(tmp_path / "base"), method="outcome", out=str(out), resume=True, iterations=1
        )
        sampling = exprl.SamplingSettings(max_new_tokens=24)
        judging = exprl.JudgeSettings(judge_url=server.url, rubric="none", **settings)
        exprl.train(training, sampling, judging, problems=[problem | {"domain": "math"}])
        return out

    run.out = out
    return run


def score_by_hash(request):
    digest = hashlib.sha256(user(request).encode()).digest()
    return f"Score: {1 + digest[0] % 5}"


def test_the_initial_policy_reads_while_the_judge_works(serve, train_once, monkeypatch):
    """Each of the two waits for the other, so a run that does one after the other fails."""
    judge_works, initial_reads = threading.Event(), threading.Event()
    overlaps = []
    add_initial_logprobs = exprl.add_initial_logprobs

    def answer(request):
        judge_works.set()
        overlaps.append(initial_reads.wait(5))
        return score_by_hash(request)

    def read_slowly(initial, batches):
        initial_reads.set()
        overlaps.append(judge_works.wait(5))
        add_initial_logprobs(initial, batches)

    monkeypatch.setattr(exprl, "add_initial_logprobs", read_slowly)
    out = train_once(serve(answer))
    assert len(overlaps) > 1 and all(overlaps)
    [metrics] = read(out / "metrics.jsonl")
    assert metrics["judge_failed"] == 0 and metrics["judge_calls"] == len(overlaps)
    for record in read(out / "rollouts.jsonl"):
        [score] = re.findall(r"Score: (\d)", "".join(record["replies"])) or ["1"]
        assert record["rewards"] == [(int(score) - 1) / 4]


@pytest.mark.parametrize("trouble", ["an outage", "--max-judge-calls"])
def test_a_judge_that_stops_leaves_the_iteration_untrained(trouble, serve, train_once, monkeypatch):
    monkeypatch.setattr(exprl, "PATIENCE", 0.2)
    answers = itertools.chain(["Score: 4"] * 2, itertools.repeat((503, BUSY)))
    server = serve(lambda request: next(answers))
    limit = 0
    if trouble == "--max-judge-calls":
        server, limit = serve(score_by_hash), 3
    with pytest.raises(SystemExit, match="--resume"):
        train_once(server, max_judge_calls=limit)
    assert not {"metrics.jsonl", "checkpoint.pt", "final"} & {*os.listdir(train_once.out)}
    healthy = serve(score_by_hash)
    [metrics] = read(train_once(healthy) / "metrics.jsonl")
    assert metrics["judge_calls"] == 3 + len(healthy.requests)
    paid = [json.dumps(request["messages"]) for request in server.calls[:2]]
    assert not {*paid} & {json.dumps(request["messages"]) for request in healthy.calls}


def judge_hanging_calls(url, out):
    """Judge 64 completions in the background, as `train` does, and wait for the verdicts."""
    settings = exprl.JudgeSettings(judge_url=url, rubric="none", judge_threads=64)
    judge = exprl.Judge(settings, "outcome", out)
    exprl.stop_on_signal()
    completions = [completion(f"text {i}") for i in range(64)]
    ThreadPoolExecutor(1).submit(judge, completions).result()


def test_a_second_ctrl_c_ends_a_run_whose_judge_hangs(serve, tmp_path):
    go_on = threading.Event()
    server = serve(lambda request: str(go_on.wait(60)))
    process = multiprocessing.get_context("fork").Process(
        target=judge_hanging_calls, args=(server.url, tmp_path), daemon=True
    )
    process.start()
    try:
        deadline = time.monotonic() + 20
        while len(server.calls) < 64 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(server.calls) == 64
        os.kill(process.pid, signal.SIGINT)
        process.join(1)
        assert process.is_alive()  # the first Ctrl-C waits for the end of the iteration
        os.kill(process.pid, signal.SIGINT)
        process.join(5)
        assert process.exitcode == -signal.SIGINT
    finally:
        process.kill()
        go_on.set()
