"""The processes behind a reward function: a supervisor, and below it one that calls the function.

    trainer --calls--> supervisor --calls--> worker (the user's function) --> whatever it starts

The supervisor runs no code of the user. It keeps the time, says how a worker died, starts the next
one, lets a little of what it prints through and swallows the rest, and is the process that orphans
below it are handed to (Linux: a subreaper), so that it can end all of them: when a worker is
replaced, when the trainer closes the pipe, and when the trainer is killed, which closes it as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import math
import multiprocessing
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

START_SECONDS = 60.0  # for the imports of a worker
_PRINTED = 16_384  # bytes of a run's reward function that reach the terminal
SET_PARENT_DEATH_SIGNAL, SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)


def serve(function: bytes, timeout: float, memory_mb: int | None, pipe: Any) -> None:
    """The supervisor's life: one answer to each call, until the pipe is closed.

    Args:
        function: the reward function, pickled: unpickling it imports the user's module.
        timeout: seconds for one call.
        memory_mb: most MiB of a worker, or None.
        pipe: to the trainer. Calls are dicts of arguments; answers (kind, value): `reward` with a
            float, `none`, `error` and `timeout` with a text, `failed` if no worker starts.
    """
    os.setsid()  # Ctrl-C is for the trainer, which ends this process
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    prctl(SET_CHILD_SUBREAPER, 1)
    supervisor = _Supervisor(function, timeout, memory_mb, pipe)
    try:
        supervisor.run()
    except (EOFError, OSError):
        pass  # the trainer is gone
    finally:
        end_all_below(supervisor.worker)


class _Supervisor:
    def __init__(self, function: bytes, timeout: float, memory_mb: int | None, pipe: Any) -> None:
        self.function, self.timeout, self.memory_mb, self.pipe = function, timeout, memory_mb, pipe
        self.worker: int | None = None
        self.death = -1  # can be read once the worker has ended; -1 where there is no such thing
        self.calls: Any = None  # pipe to the worker
        self.output = -1  # what the worker prints
        self.room = _PRINTED

    def run(self) -> None:
        failed = self.start()
        self.pipe.send(("failed", failed) if failed else ("ready", None))
        while True:
            self.wait(self.pipe, None)
            call = self.pipe.recv_bytes()
            failed = self.start() if self.worker is None else None
            self.pipe.send(("failed", failed) if failed else self.answer(call))

    def answer(self, call: bytes) -> tuple[str, Any]:
        try:
            self.calls.send_bytes(call)
            if not self.wait(self.calls, self.timeout):
                self.end()
                return "timeout", f"no answer within {self.timeout:g} s"
            kind, value = self.calls.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            return "error", f"the reward process died ({self.end()})"
        if kind == "out of memory":  # what it holds would cost the next rollouts, too
            self.end()
            return "error", value
        return kind, value

    def start(self) -> str | None:
        """Forks a worker; None, or why it did not start."""
        self.calls, theirs = multiprocessing.Pipe()
        self.output, printing = os.pipe()
        supervisor = os.getpid()
        self.worker = os.fork()  # safe: this process has one thread
        if self.worker == 0:
            self.calls.close()
            self.pipe.close()
            os.close(self.output)
            os.setpgid(0, 0)
            _work(self.function, self.memory_mb, theirs, printing, supervisor)
        theirs.close()
        os.close(printing)
        with contextlib.suppress(ProcessLookupError):  # it may lead its group already
            os.setpgid(self.worker, self.worker)
        self.death = os.pidfd_open(self.worker) if hasattr(os, "pidfd_open") else -1
        os.set_blocking(self.output, False)
        try:
            if not self.wait(self.calls, START_SECONDS):
                self.end()
                return f"did not start within {START_SECONDS:g} s"
            kind, why = self.calls.recv()
        except (EOFError, OSError):
            return f"died as it started ({self.end()})"
        if kind != "ready":
            self.end()
            return f"did not start: {why}"
        return None

    def wait(self, wanted: Any, seconds: float | None) -> bool:
        """Until there is something to read (or the end of it); swallows what is printed meanwhile.

        Raises EOFError if the trainer has closed its pipe, ChildProcessError if the worker, which
        was to write, has ended: what it had started may still hold its end of the pipe.
        """
        deadline = math.inf if seconds is None else time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            poll = select.poll()  # select has no room for file numbers above 1023
            for file in (self.output, self.death):
                if file >= 0:
                    poll.register(file, select.POLLIN)
            poll.register(self.pipe, 0)  # its end only
            poll.register(wanted, select.POLLIN)
            ready = dict(poll.poll(None if left == math.inf else math.ceil(left * 1000)))
            if self.output in ready:
                self.swallow()
            if wanted.fileno() in ready:
                return True
            if self.pipe.fileno() in ready:
                raise EOFError
            if self.death in ready:
                if wanted is not self.pipe:
                    raise ChildProcessError("the worker has ended")
                self.end()  # by itself, between two calls
        return False

    def swallow(self) -> None:
        """Passes the first bytes on to the terminal, if it takes them."""
        try:
            data = os.read(self.output, 1 << 16)
        except BlockingIOError:
            return
        if not data:
            os.close(self.output)
            self.output = -1
            return
        if self.room <= 0:
            return
        shown = data[: min(self.room, select.PIPE_BUF)]
        self.room -= len(data)
        if self.room <= 0:
            shown += b"\n[the reward function prints more; the rest is dropped]\n"
        terminal = select.poll()
        terminal.register(2, select.POLLOUT)
        with contextlib.suppress(OSError):  # a terminal that is gone, a log on a full disk
            if terminal.poll(0):
                os.write(2, shown)

    def end(self) -> str:
        """Ends the worker and all that it has started; how it ended, if it had before."""
        status = end_all_below(self.worker).get(self.worker, 0)
        if self.output >= 0:
            self.swallow()
        for file in (self.output, self.death):
            if file >= 0:
                os.close(file)
        self.calls.close()
        self.worker, self.output, self.death = None, -1, -1
        if os.WIFSIGNALED(status):
            return signal.Signals(os.WTERMSIG(status)).name
        return f"exit code {os.waitstatus_to_exitcode(status)}"


def _work(
    function: bytes, memory_mb: int | None, pipe: Any, printing: int, supervisor: int
) -> NoReturn:
    """The worker's life; never returns into the supervisor's code."""
    code = 1
    try:
        prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() == supervisor:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.dup2(printing, 1)
            os.dup2(printing, 2)
            if memory_mb is not None:
                import resource

                # not RLIMIT_AS: libraries reserve addresses by the gigabyte that they never use
                resource.setrlimit(resource.RLIMIT_DATA, (memory_mb << 20, memory_mb << 20))
            _answer_calls(function, pipe)
            code = 0
    except SystemExit as exited:
        code = exited.code if isinstance(exited.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
        os._exit(code & 0xFF)


def _answer_calls(pickled: bytes, pipe: Any) -> None:
    try:
        function = pickle.loads(pickled)
    except Exception as error:
        pipe.send(("failed", _described(error)))
        return
    pipe.send(("ready", None))
    while True:
        try:
            call = pipe.recv()
        except EOFError:
            return
        try:
            answer = _reward(function(**call))
        except MemoryError as error:
            answer = ("out of memory", _described(error))
        except Exception as error:
            answer = ("error", _described(error))
        pipe.send(answer)


def _reward(result: Any) -> tuple[str, Any]:
    if inspect.isawaitable(result):
        raise TypeError("asynchronous reward functions are not supported")
    if isinstance(result, str | bytes) or not isinstance(result, Iterable):
        shown = f"{result[:40]!r}" if isinstance(result, str | bytes) else f"{result!r:.60}"
        raise TypeError(f"expected a list of one number or None, got {shown}")
    (reward,) = result
    if reward is None:
        return "none", None
    value = float(reward)
    return ("reward", value) if math.isfinite(value) else ("error", f"the reward is {value}")


def _described(error: BaseException) -> str:
    where = (traceback.extract_tb(error.__traceback__) or [None])[-1]
    place = f"{where.filename}:{where.lineno}: " if where else ""
    return f"{place}{type(error).__name__}: {str(error)[:500]}"


def end_all_below(worker: int | None) -> dict[int, int]:
    """Kills the worker's group and, on Linux, every process below; their wait statuses by id."""
    statuses: dict[int, int] = {}
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if worker is not None:
            os.killpg(worker, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):  # none is left
        while True:
            for pid in _children():  # orphans among them, which were handed to this process
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            ended, status = os.waitpid(-1, 0)
            statuses[ended] = status
    return statuses


def _children() -> list[int]:
    path = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in path.read_text().split()] if path.exists() else []


def prctl(option: int, value: int) -> None:
    """Asks Linux; elsewhere there is no such thing."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)
