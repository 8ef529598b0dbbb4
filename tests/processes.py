"""Processes for tests, forked from a server that has imported torch and Transformers: each takes 0.3 s instead of 5 s.

The server does not import the packages of this project, so a process can run without them. Run as a script, this file
is the server: it reads one JSON object per line, forks, and reports the exit code of each child.
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
    """Simulates SIGKILL: no code handles it."""


class Process:
    """A started process, in a new session and process group, with its output in a file.

    Attributes:
        pid: ID of the process and of its process group.
        returncode: Exit code as in `subprocess`, or None while the process runs.
    """

    def __init__(self, server, output):
        self.server = server
        self.output_file = output
        self.pid = None
        self.returncode = None

    def poll(self):
        """Return the exit code, or None while the process runs."""
        self.server.pump(0)
        return self.returncode

    def wait(self, timeout=60):
        """Return the exit code. After the timeout, kill the group and raise TimeoutError."""
        end = time.monotonic() + timeout
        while self.returncode is None:
            if time.monotonic() > end:
                self.kill_group()
                raise TimeoutError(f"still running after {timeout} s; output: {self.output()[-3000:]}")
            self.server.pump(0.05)
        return self.returncode

    def kill_group(self, number=signal.SIGKILL):
        """Send a signal to the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def group_is_empty(self, within=5):
        """Whether all processes of the group end within this many seconds."""
        end = time.monotonic() + within
        while time.monotonic() < end:
            try:
                os.killpg(self.pid, 0)
            except ProcessLookupError:
                return True
            time.sleep(0.05)
        return False

    def output(self):
        """The stdout and stderr so far."""
        return Path(self.output_file).read_text(encoding="utf-8", errors="replace")


class ForkServer:
    """Forks processes from a server process, which is started on first use."""

    def __init__(self):
        self.server = None
        self.folder = tempfile.TemporaryDirectory()
        self.processes = {}
        self.started = 0

    def start(self, target, arguments=(), *, before="", env=None, cwd=None, threads=1, checkout=True):
        """Start a process.

        Args:
            target: "module:function", called without arguments like a console script; a `Path` of a script; or source
                text.
            arguments: `sys.argv[1:]`, converted to text.
            before: Source that the process runs first, for example to set a limit or inject a fault.
            env: Environment variables to add, or to remove if the value is None.
            cwd: Working directory (default: a temporary one).
            threads: Number of torch threads.
            checkout: Whether the packages of this checkout can be imported.
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
        """Run a process until it ends; with `check` it must succeed."""
        process = self.start(target, arguments, **options)
        process.wait(timeout)
        assert not check or process.returncode == 0, process.output()[-3000:]
        return process

    def start_ranks(self, target, arguments=(), *, count=2, env=None, **options):
        """Start the ranks of a distributed run, like torchrun, and return their processes."""
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
        """Read replies of the server, waiting at most `timeout` seconds for the first."""
        while select.select([self.server.stdout], [], [], timeout)[0]:
            line = self.server.stdout.readline()
            assert line, "the fork server ended"
            reply = json.loads(line)
            process = self.processes[reply["number"]]
            process.pid = reply["pid"]
            process.returncode = reply["returncode"]
            timeout = 0

    def close(self):
        """Stop the server and all processes that it started."""
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
    """Fork a child for each request and report exit codes; at the end of the requests, kill the remaining children."""
    import accelerate  # noqa: F401
    import peft  # noqa: F401
    import torch
    from transformers import (  # noqa: F401, slow to import
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
    """In the child: run the request and exit like the interpreter, without freeing memory, which takes a second."""
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
    """Run a request in the forked child and return its exit code."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run in the background
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
