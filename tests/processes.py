"""Processes for tests, forked from one that has imported torch and Transformers: each costs 0.3 s instead of 5.

Our own packages are not among what it has imported, so a process may be one that never saw them. As a script, this file
is that process: it reads a JSON object a line, forks, and says how each child ended.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


class Killed(BaseException):
    """Stands for SIGKILL in this process: no code of ours handles it."""


class Process:
    """A started process: its own session and process group, its output in a file.

    Attributes:
        pid: Its id, and that of its process group.
        returncode: As `subprocess` has it; None while it runs.
    """

    def __init__(self, server, output):
        self.server = server
        self.output_file = output
        self.pid = None
        self.returncode = None

    def poll(self):
        """The exit code, None while it runs."""
        self.server.pump(0)
        return self.returncode

    def wait(self, timeout=60):
        """The exit code; the group is killed, and TimeoutError raised, when it does not end in time."""
        end = time.monotonic() + timeout
        while self.returncode is None:
            if time.monotonic() > end:
                self.kill_group()
                raise TimeoutError(f"no end after {timeout} s; output: {self.output()[-3000:]}")
            self.server.pump(0.05)
        return self.returncode

    def kill_group(self, number=signal.SIGKILL):
        """Send a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def group_is_empty(self, within=5):
        """Whether no process of its group is left, at the latest after `within` seconds."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        return False

    def output(self):
        """What it has written to stdout and stderr so far."""
        return Path(self.output_file).read_text(encoding="utf-8", errors="replace")


class ForkServer:
    """The process that others are forked from; started when the first is asked for."""

    def __init__(self):
        self.server = None
        self.folder = tempfile.TemporaryDirectory()
        self.processes = {}
        self.started = 0

    def start(self, target, arguments=(), *, before="", env=None, cwd=None, threads=1, checkout=True):
        """Start a process.

        Args:
            target: "module:function", called without arguments and with `sys.argv` set, as a console script does; a
                `Path` of a script; or source text.
            arguments: `sys.argv[1:]`, turned into text.
            before: Source that is run first, in the process: to set a limit, to inject a fault.
            env: Added to the environment; None as a value removes.
            cwd: Folder it runs in (default: one of its own).
            threads: Of torch.
            checkout: Whether our packages are found, in this checkout.
        """
        self.started += 1
        output = os.path.join(self.folder.name, f"output-{self.started}")
        kind = "file" if isinstance(target, Path) else "call" if ":" in target and "\n" not in target else "source"
        request = {
            "number": self.started,
            kind: str(target),
            "argv": [str(argument) for argument in arguments],
            "before": before,
            "env": {"HF_HUB_OFFLINE": "1", **(env or {})},
            "cwd": str(cwd or self.folder.name),
            "threads": threads,
            "path": [str(ROOT)] if checkout else [],
            "output": output,
        }
        Path(output).touch()
        process = self.processes[self.started] = Process(self, output)
        self._send(request)
        while process.pid is None:
            self.pump(1)
        return process

    def run(self, target, arguments=(), *, timeout=60, check=True, **options):
        """Run a process to its end; with `check` it must succeed."""
        process = self.start(target, arguments, **options)
        process.wait(timeout)
        assert not check or process.returncode == 0, process.output()[-3000:]
        return process

    def start_ranks(self, target, arguments=(), *, count=2, env=None, **options):
        """Start processes that share a run, as torchrun would; their list."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start(
                target,
                arguments,
                env={name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
                | (env or {}),
                **options,
            )
            for rank in range(count)
        ]

    def pump(self, timeout):
        """Take what the server says, for at most `timeout` seconds."""
        while select.select([self.server.stdout], [], [], timeout)[0]:
            line = self.server.stdout.readline()
            assert line, "the fork server ended"
            reply = json.loads(line)
            process = self.processes[reply["number"]]
            process.pid = reply["pid"]
            process.returncode = reply["returncode"]
            timeout = 0

    def close(self):
        """End the server, and whatever it has started."""
        if self.server is not None:
            self.server.stdin.close()
            self.server.wait()
            self.server.stdout.close()
        self.folder.cleanup()

    def _send(self, request):
        if self.server is None:
            env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
            env["HF_HOME"] = self.folder.name  # read once, on import: remote code is copied there
            self.server = subprocess.Popen(
                [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, bufsize=0
            )
        self.server.stdin.write(json.dumps(request).encode() + b"\n")


def serve():
    """Read requests, fork, say how children ended; kill what is left when there are no more requests."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import (  # noqa: F401, the classes whose import takes long
        AutoImageProcessor,
        AutoModel,
        AutoProcessor,
        Blip2ForConditionalGeneration,
        CLIPModel,
        LlavaForConditionalGeneration,
        Trainer,
    )

    gc.collect()
    gc.freeze()  # children then copy less memory
    replies = os.fdopen(os.dup(1), "w")
    numbers = {}
    waiting = b""
    while True:
        if select.select([0], [], [], 0.01 if numbers else None)[0]:
            received = os.read(0, 65536)
            if not received:
                break
            *lines, waiting = (waiting + received).split(b"\n")
            for line in lines:
                request = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    replies.close()
                    _exit_with(request, torch)
                numbers[pid] = request["number"]
                _reply(replies, request["number"], pid, None)
        while numbers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            _reply(replies, numbers.pop(ended[0]), ended[0], os.waitstatus_to_exitcode(ended[1]))
    for pid in numbers:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _reply(replies, number, pid, returncode):
    print(json.dumps({"number": number, "pid": pid, "returncode": returncode}), file=replies, flush=True)


def _exit_with(request, torch):
    """In the child: run the request, and end as an interpreter does, short of freeing its memory (a second)."""
    try:
        code = run_request(request, torch)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        code = 120
    os._exit(code or 0)


def run_request(request, torch):
    """Become the process that was asked for; returns its exit code."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the tests run in the background
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    with open(request["output"], "ab", buffering=0) as output, open(os.devnull) as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    for name, value in request["env"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    os.chdir(request["cwd"])
    sys.path[:0] = request["path"]
    torch.set_num_threads(request["threads"])
    exec(compile(request["before"], "<before>", "exec"), {})
    if "file" in request:
        sys.argv = [request["file"], *request["argv"]]
        return runpy.run_path(request["file"], run_name="__main__") and 0
    if "source" in request:
        sys.argv = ["-c", *request["argv"]]
        exec(compile(request["source"], "<test>", "exec"), {"__name__": "__main__"})
        return 0
    module, _, function = request["call"].partition(":")
    sys.argv = [module, *request["argv"]]
    return getattr(import_module(module), function)()


if __name__ == "__main__":
    serve()
