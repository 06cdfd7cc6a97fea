"""A process that has imported the training command once and forks a child for every run.

A run in a fresh interpreter spends seconds on importing torch; a forked one starts at once, so a test can afford many
real processes and real signals. The server runs no torch operation itself: its children begin without threads.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

LIMIT_S = float(os.environ.get("RESILIENT_T5_LIMIT_S", "60"))
"""After this long a run counts as hanging; a crowded machine needs more."""


class ForkServer:
    """Starts runs of bin/train as children of one warm process. Use it as a context manager."""

    def __enter__(self):
        root = Path(__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *error):
        # Closing its standard input would not do: a process forked by another test may hold a copy of the pipe.
        self._process.stdin.write(json.dumps("end") + "\n")
        self._process.stdin.flush()
        self._process.wait(LIMIT_S)

    def _ask(self, request):
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, argv, output, before=None):
        """Start a run; its console goes to the file `output`. Returns its process id.

        `before` is a list of ("module:function", arguments): called in the child before the command, to place faults in it.
        """
        return self._ask({"argv": [str(item) for item in argv], "output": str(output), "before": before})

    def poll(self, pid):
        """None while the run goes on, else its exit status: minus the number of the signal that ended it, or its code."""
        return self._ask({"poll": pid})

    def wait(self, pid, seconds=LIMIT_S):
        """The exit status of a run."""
        until = time.monotonic() + seconds
        while (status := self.poll(pid)) is None:
            if time.monotonic() > until:
                os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"run {pid} did not end in {seconds} s")
            time.sleep(0.02)
        return status

    def wait_timed(self, pid, seconds=LIMIT_S):
        """(exit status, when it was seen on the monotonic clock, at most a millisecond late); (None, None) when it hangs."""
        return self._ask({"wait": pid, "seconds": seconds})

    def run(self, argv, output, before=None, seconds=LIMIT_S):
        """Run to the end, for at most so many seconds, and return the exit status."""
        return self.wait(self.start(argv, output, before), seconds)


def serve():
    """Answer requests on stdin until it closes."""
    import resilient_t5.training.entrypoints.train  # noqa: F401  the import that every child is to find done
    from resilient_t5.commands.train import main

    # A shell starts what goes to the background with SIGINT ignored, and nohup SIGHUP; a run keeps to that, and no attack
    # would reach it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        request = json.loads(line)
        if request == "end":
            return
        if "argv" in request:
            pid = os.fork()
            if pid == 0:
                run_child(main, request["argv"], request["output"], request["before"])
            answer = pid
        elif "wait" in request:
            answer = wait_for(request["wait"], request["seconds"])
        else:
            done, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if done else None
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def wait_for(pid, seconds):
    """Wait for a child as closely as possible; kill it when it takes longer than `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic()
        time.sleep(0.001)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None, None


def run_child(main, argv, output, before):
    """The forked child: own console, own standard input, its fault if it is to have one, then the command."""
    null = os.open(os.devnull, os.O_RDONLY)
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((null, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    code = 1
    try:
        for place, arguments in before or ():
            module, _, name = place.partition(":")
            getattr(importlib.import_module(module), name)(**arguments)
        code = main(argv)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
