"""Runs a submission where it can do no harm, and returns what its functions return.

A submission runs in one process under `bwrap` (the package bubblewrap, the tool under Flatpak). The
process sees the folders of the system and of Python, read-only, and a copy of the graded files. It
has no other file, no network, no other process to talk to, and an empty environment. It never sees
a test: it gets arguments and sends back a value, which properties.py compares. A submission that
prints, exits, hangs, patches torch or reports success therefore gains nothing.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import models
import runner
import torch

START = 300  # seconds in which Python and the packages must start
LARGEST = 2**21  # bytes of one reply
MEMORY = 10**9  # bytes of each process
COURSE = Path(__file__).resolve().parent
PYTHON = os.path.realpath(sys.executable)  # it finds its packages in SITE, also in a venv
SITE = os.path.abspath(os.path.join(torch.__file__, "../.."))
# The folders that a submission sees, besides its own
SYSTEM = "/usr/bin /usr/lib /usr/lib64 /bin /lib /lib64 /etc/ld.so.cache /etc/alternatives"
VISIBLE = {
    *map(Path, map(os.path.abspath, [*SYSTEM.split(), SITE, sys.base_prefix, f"{PYTHON}/../.."]))
}
VISIBLE -= {Path("/usr")}  # the prefix of a system's Python, which lies in /usr/lib
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": SITE}


class Stopped(Exception):
    """The reason why a graded function gave no value."""


# ---- The sandbox ---------------------------------------------------------------------------------
def bwrap_command(place):
    """Return the beginning of a command that runs in a sandbox, in which `place` is /submission.

    The limit on memory counts on top of this process, which has loaded the same packages.
    """
    # These are all namespaces. Without root, bwrap adds a user namespace, which the others need.
    options = (
        "bwrap --unshare-ipc --unshare-pid --unshare-net --unshare-uts --unshare-cgroup-try "
        "--die-with-parent --new-session --proc /proc --dev /dev --cap-drop ALL "
        "--size 16000000 --perms 1777 --tmpfs /tmp "
    )
    user = ""
    if not os.getuid():
        # The kernel limits neither the rights nor the processes of root, not even in a user
        # namespace. A user without rights takes its place.
        options += "--cap-add CAP_SETUID --cap-add CAP_SETGID"
        number = random.randrange(20000, 60000)
        user = f"setpriv --reuid {number} --regid {number} --clear-groups --inh-caps=-all"
    command = options.split()
    for path in sorted(VISIBLE):
        for parent in [*path.parents][-2::-1]:
            command += ["--dir", parent]  # otherwise only root could enter it
        command += ["--ro-bind-try", path, path]
    command += ["--ro-bind", place, "/submission"]
    pages = Path("/proc/self/statm").read_text().split()[0]
    memory = int(pages) * os.sysconf("SC_PAGE_SIZE") + MEMORY
    limits = f"prlimit --as={memory} --nproc=6 --nofile=64 --fsize=1000000 --core=0"
    end = "--chdir /submission --remount-ro /dev --remount-ro /"
    return [*command, *f"{end} {user} {limits}".split()]


def why_no_sandbox(folders):
    """Return the reason why there can be no sandbox on this machine, or "" if there can be one."""
    if not shutil.which("bwrap"):
        return "bwrap is missing: install the package bubblewrap"
    if any(VISIBLE & {*path.resolve().parents} for path in (COURSE, *folders)):
        return "the project or a submission lies in a folder that every submission can read"
    command = [*bwrap_command(COURSE), PYTHON, "-c", "import runner"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    return f"bwrap does not work here ({done.stderr[-200:].strip()})" if done.returncode else ""


class Sandbox(contextlib.AbstractContextManager):
    """The process of one submission. It starts again after a function that ended it."""

    def __init__(self, files, seconds, with_bwrap=True):
        """Copy the files {name: bytes}. Without bwrap there is no sandbox around them."""
        self.seconds, self.process, self.folder = seconds, None, tempfile.TemporaryDirectory()
        place = Path(self.folder.name)
        for name, content in files.items():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes(content)
        for module in (runner, models):
            shutil.copy(module.__file__, place)
        for path in (place, *place.rglob("*")):
            path.chmod(0o755)  # the user in the sandbox may be another one
        self.command = [*(bwrap_command(place) if with_bwrap else []), PYTHON, "runner.py"]

    def __exit__(self, *_):
        self.end()
        self.folder.cleanup()

    def end(self):
        """Kill the process. All that it has started ends with it."""
        if self.process:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.channel.close()
            self.process = None

    def begin(self, module):
        """Import a module, if necessary in a new process. Then the time of a function begins."""
        if not self.process:
            self.channel, theirs = socket.socketpair()
            self.process = subprocess.Popen(
                self.command, stdin=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                cwd=self.folder.name, env=ENVIRONMENT, start_new_session=True,
            )  # fmt: skip
            theirs.close()
            self.deadline = time.monotonic() + START
            self.receive()  # nothing of the submission has run yet
        self.deadline = time.monotonic() + self.seconds
        reply = self.ask({"module": module, "name": "", "args": [], "gradients": False})
        if "error" in reply:
            raise Stopped(reply["words"])
        self.deadline = time.monotonic() + self.seconds

    def ask(self, request):
        """Send a request and return the reply. If there is no honest one, end the process."""
        try:
            self.channel.sendall(json.dumps(request).encode() + b"\n")
            reply = self.receive()
            if "error" in reply:
                return {"error": reply["error"], "words": reply["words"][:600]}
            return {"out": runner.decode(reply["out"]), "args": reply["args"]}
        except TimeoutError:
            reason = f"It took more than {self.seconds:g} seconds."
        except (OSError, EOFError):
            reason = "Its process ended. Did it call exit, or need too much memory?"
        except Exception:
            reason = "It returns a value that is too large, or nested too deeply."
        self.end()
        raise Stopped(reason)

    def receive(self):
        """Return the next message. Raises an exception if it is late, too large or not JSON."""
        line = bytearray()
        while not line.endswith(b"\n"):
            remaining = self.deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            self.channel.settimeout(remaining)  # it also holds for the next `sendall`
            data = self.channel.recv(2**16)
            if not data:
                raise EOFError
            line += data
            if len(line) > LARGEST:
                raise ValueError
        return json.loads(line)
