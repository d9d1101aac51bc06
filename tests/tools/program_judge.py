"""What judges that are programs share: a chat-completions server and a reader of the prompts.

Such a judge is a function that turns a request into a reply. `exprl.py` meets it only as a URL, as
it meets an LLM behind an API. The toy world has one, and value_judge.py is another.
"""

import json
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[2])]

import judge_prompts  # noqa: E402


# ---- Reading a prompt of judge_prompts.py --------------------------------------------------------
class Call(NamedTuple):
    """What a judge call asks about."""

    kind: str  # outcome, together, prefix, alone or rubric
    question: str
    reference: str  # "" if the prompt has none
    texts: list[str]  # the texts to judge: the steps, or the whole completion


def read_kind(system: str) -> str | None:
    """Return the kind of call that a system message belongs to, or None."""
    for kind in judge_prompts.KINDS:
        for domain in judge_prompts.DOMAINS:
            first_line = judge_prompts.system_message(kind, domain, True).split("\n")[0]
            if system.startswith(first_line):
                return kind
    return None


def read_call(messages: list[dict]) -> Call | None:
    r"""Read the messages of a judge call. Returns None if they are not one.

    What the policy wrote stands last and between tags that it cannot write (`judge_prompts.fence`).
    So a heading inside a completion is never mistaken for a heading of the prompt.

    >>> row = {"question": "1 + 1?", "reference": "1 + 1 = 2", "domain": "math"}
    >>> attempt = judge_prompts.fence(["### 2\n## Reference solution\n3"])
    >>> read_call(judge_prompts.judge_messages("together", row, attempt=attempt))[1:]
    ('1 + 1?', '1 + 1 = 2', ['### 2\n## Reference solution\n3'])
    """
    kind = read_kind(messages[0]["content"])
    if kind is None:
        return None
    given, _, attempt = messages[1]["content"].partition("\n## Text to judge\n")
    headings = re.split(
        r"^## (Problem|Reference solution|Checkpoints)\n", given, flags=re.MULTILINE
    )
    sections = dict(zip(headings[1::2], map(str.strip, headings[2::2]), strict=True))
    fenced = re.findall(r"^<(text-\d+-[0-9a-f]{8})>\n(.*?)\n</\1>", attempt, re.DOTALL | re.M)
    texts = [text for _, text in fenced]
    return Call(kind, sections["Problem"], sections.get("Reference solution", ""), texts)


# ---- The server ----------------------------------------------------------------------------------
class ChatServer(ThreadingHTTPServer):
    """A chat-completions server on 127.0.0.1. `answer(request)` makes each reply.

    `answer` returns a string (the reply's content) or (status, body) to misbehave on purpose.
    `requests` keeps the requests that arrived. Port 0 stands for any free port.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer, port=0):
        self.answer, self.requests = answer, []
        super().__init__(("127.0.0.1", port), ChatHandler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """The address that --judge-url expects."""
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class ChatHandler(BaseHTTPRequestHandler):
    """GET /v1/models and POST /v1/chat/completions."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def log_message(self, *arguments):
        """Not a line for each request."""

    def do_GET(self):
        self.reply(200, {"object": "list", "data": [{"id": "program", "object": "model"}]})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request["authorization"] = self.headers["Authorization"]
        self.server.requests.append(request)
        content = self.server.answer(request)
        if isinstance(content, tuple):
            self.reply(*content)
            return
        letters = sum(len(message["content"]) for message in request["messages"])
        usage = {"prompt_tokens": letters // 4, "completion_tokens": len(content) // 4}
        usage["total_tokens"] = sum(usage.values())
        message = {"role": "assistant", "content": content}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        self.reply(200, {
            "id": "program", "object": "chat.completion", "created": 0, "model": request["model"],
            "choices": [choice], "usage": usage,
        })  # fmt: skip

    def reply(self, status: int, body: dict | str) -> None:
        kind = "text/html" if isinstance(body, str) else "application/json"
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()


def serve(answer, url_file: Path | None = None, port: int = 0) -> None:
    """Run a judge until the process that started it is gone. Its URL goes into the file."""
    server = ChatServer(answer, port)
    if url_file:
        partial = url_file.with_suffix(".partial")
        partial.write_text(server.url, encoding="utf-8")
        partial.rename(url_file)
    else:
        print(f"--judge-url {server.url}", flush=True)
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(0.5)
        server.requests.clear()
