"""Tools that a rollout may call, run in a process of their own: Python, or a function by name.

Each call runs in a fork of a small process that never ran one, so calls see nothing of each other,
and is ended with all that it started when its time is over. The limits keep a run alive; they are
no security boundary: a call may read files and use the network as the trainer may. This module
imports neither torch nor the host libraries, so that a fork is cheap.
"""

from __future__ import annotations

import ast
import contextlib
import io
import multiprocessing
import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .reward_process import SET_CHILD_SUBREAPER, end_all_below, prctl
from .rewards import import_function

ToolFunction = Callable[[str], str]

_END = b"\x00\x00end"


@dataclass(frozen=True)
class ToolUse:
    """How rollouts call a tool, and what a call may cost.

    A rollout writes `start`, the call and `end`; the tool's reply follows as text that the policy
    did not write: it is in no loss, and is tokenised once.

    Args:
        start: text that begins a call; what stands between its last occurrence and `end` is the
            call.
        end: text of the one token that ends a call.
        reply: what follows a call; `{reply}` is what the tool says.
        function: `package.module:function`, text to text; null runs the call as Python and replies
            what it prints, and the value of its last expression.
        max_calls: calls of a rollout; the first beyond them ends it.
        max_reply_tokens: of one reply; what is longer is cut.
        timeout: seconds of one call.
        memory_mb: address space of one call.

    Raises:
        ValueError: an option is out of range.
    """

    start: str = "<python>"
    end: str = "</python>"
    reply: str = "{reply}"
    function: str | None = None
    max_calls: int = 4
    max_reply_tokens: int = 64
    timeout: float = 2.0
    memory_mb: int = 512

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("start", bool(self.start), "a text"),
            ("end", bool(self.end), "a text"),
            ("reply", "{reply}" in self.reply, "a text with {reply}"),
            ("max_calls", self.max_calls >= 1, "a count >= 1"),
            ("max_reply_tokens", self.max_reply_tokens >= 1, "a count >= 1"),
            ("timeout", self.timeout > 0, "seconds > 0"),
            ("memory_mb", self.memory_mb >= 64, "megabytes >= 64"),
        ):
            if not holds:
                raise ValueError(f"tool.{name}: expected {expected}, got {getattr(self, name)!r}")

    def call_in(self, text: str) -> str:
        """The call that ends a text.

        Args:
            text: of the policy since the last reply, `end` included or not.

        Returns:
            What stands behind the last `start`; empty where there is none.
        """
        _, found, call = text.removesuffix(self.end).rpartition(self.start)
        return call if found else ""


class ToolRunner:
    """Runs calls one after the other, each in a fork of its own.

    Args:
        use: limits, and the function if it is not Python.
        max_chars: of one reply; what is longer is cut.

    Raises:
        ValueError: the function cannot be imported.
        RuntimeError: the process does not start.
    """

    def __init__(self, use: ToolUse, max_chars: int = 2000) -> None:
        if use.function is not None:
            import_function(use.function)  # an error here names it
        self.use, self.max_chars = use, max_chars
        self._process: Any = None
        self._pipe: Any = None

    def replies(self, calls: Sequence[str]) -> list[str]:
        """What the tool says to each call.

        Args:
            calls: their texts.

        Returns:
            Replies in order. A call that fails, or takes too much time or memory, has the error's
            last line as its reply, as an interpreter would print it.

        Raises:
            RuntimeError: the process that forks them died.
        """
        if not calls:
            return []
        if self._process is None:
            self._start()
        answers = []
        try:
            for call in calls:
                self._pipe.send(call)
                answers.append(self._pipe.recv())
        except (EOFError, OSError) as died:
            self.close()
            raise RuntimeError(f"the tool's process died ({died or 'EOF'})") from died
        return answers

    def close(self) -> None:
        """Ends the process and whatever call is running."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve,
            args=(self.use, self.max_chars, os.getcwd(), theirs),
            name="trimtab-tool",
            daemon=True,
        )
        self._process.start()
        theirs.close()
        if not self._pipe.poll(60):
            self.close()
            raise RuntimeError("the tool's process did not start within 60 s")
        self._pipe.recv()


def run_python(code: str) -> str:
    """Runs code as a notebook's cell does.

    Args:
        code: statements; a last expression is a value.

    Returns:
        What it printed, and the value's `repr` unless it is None.

    Raises:
        BaseException: whatever the code raises.
    """
    tree = ast.parse(code.strip())
    value, names = None, {"__name__": "__main__"}
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(tree, "<tool>", "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), "<tool>", "eval"), names)
    parts = [printed.getvalue().rstrip("\n"), "" if value is None else repr(value)]
    return "\n".join(part for part in parts if part)


def _serve(use: ToolUse, max_chars: int, directory: str, pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends this
    prctl(SET_CHILD_SUBREAPER, 1)  # what leaves a call's session comes here, and is ended
    function: ToolFunction = run_python
    if use.function is not None:
        os.chdir(directory)
        function = import_function(use.function)
    pipe.send("ready")
    while True:
        try:
            call = pipe.recv()
        except EOFError:
            return
        pipe.send(_forked(function, call, use, max_chars))


def _forked(function: ToolFunction, call: str, use: ToolUse, max_chars: int) -> str:
    """The reply of a child that has `use.timeout` seconds for it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _answer(function, call, use, max_chars, write)  # does not return
    os.close(write)
    answer, deadline, timed_out = b"", time.monotonic() + use.timeout, False
    # to its end mark, not to the end of the pipe, which what the call started may hold
    while not answer.endswith(_END) and len(answer) <= 8 * max_chars:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([read], [], [], left)[0]:
            timed_out = True
            break
        part = os.read(read, 65536)
        if not part:
            break
        answer += part
    os.close(read)
    status = end_all_below(child).get(child, 0)
    if timed_out:
        return f"TimeoutError: no answer within {use.timeout:g} s"
    if not answer:
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "no answer"
        return f"RuntimeError: the call ended with {how}"
    return answer.removesuffix(_END).decode(errors="replace")[:max_chars]


def _answer(function: ToolFunction, call: str, use: ToolUse, max_chars: int, write: int) -> None:
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):  # a flood would fill the terminal, a read would wait for it
            os.dup2(nothing, stream)
        size = use.memory_mb * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            reply = str(function(call))
        except BaseException as error:
            # the last line of what an interpreter would print, without the file
            reply = traceback.format_exception_only(error)[-1].strip() or type(error).__name__
        with os.fdopen(write, "wb") as pipe:
            pipe.write(reply[:max_chars].encode(errors="replace") + _END)
    finally:
        sys.stdout = sys.stderr = None  # nothing left to flush
        os._exit(0)
