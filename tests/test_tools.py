"""Tools in a process of their own: values, errors and limits."""

import os
import signal
import subprocess
import sys
import time

import pytest

from trimtab.rl.tools import ToolRunner, ToolUse, run_python


@pytest.fixture
def runner():
    made = []

    def make(**options):
        made.append(ToolRunner(ToolUse(**{"timeout": 20.0} | options), max_chars=500))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_python_replies_what_a_notebook_would(runner):
    calls = ["7+5", "x = 3\nprint('a')\nx * 2", "print(1)", "x = 1", "  1 + 1  ", ""]
    assert runner().replies(calls) == ["12", "a\n6", "1", "", "2", ""]
    assert run_python("'a' + 'b'") == "'ab'"


def test_errors_are_their_last_line(runner):
    found = runner().replies(["1/0", "1 +", "raise SystemExit(3)", "unknown"])
    assert found[0] == "ZeroDivisionError: division by zero"
    assert found[1].startswith("SyntaxError:") and found[2] == "SystemExit: 3"
    assert found[3] == "NameError: name 'unknown' is not defined"


def test_calls_see_nothing_of_each_other(runner):
    found = runner().replies(["import builtins; builtins.kept = 1", "kept", "1"])
    assert found == ["", "NameError: name 'kept' is not defined", "1"]


def ended(pid):
    """Waits until a process is gone, or a zombie that its parent has not reaped yet."""
    deadline = time.monotonic() + 30
    while True:
        state = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        )
        if not state.stdout.strip() or state.stdout.strip().startswith("Z"):
            return True
        assert time.monotonic() < deadline, "what the call started lives on"
        time.sleep(0.05)


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_a_call_is_ended_with_all_it_started(runner, tmp_path, session, waits):
    """In time or not, in its session or in one of its own."""
    pids = tmp_path / "pids"
    code = (
        "import subprocess, time\n"
        f"p = subprocess.Popen(['sleep', '1000'], start_new_session={session}, close_fds=False)\n"
        f"open({str(pids)!r}, 'w').write(str(p.pid))\n"
        f"time.sleep({1000 if waits else 0})\n7"
    )
    tool = runner(timeout=3.0)
    expected = "TimeoutError: no answer within 3 s" if waits else "7"
    assert tool.replies([code, "2"]) == [expected, "2"]
    assert ended(int(pids.read_text()))


def test_memory_is_bounded(runner):
    found = runner(memory_mb=200).replies(["len(bytearray(10**9))", "len(bytearray(10**6))"])
    assert found[0].startswith("MemoryError") and found[1] == "1000000"


def test_floods_and_crashes_cost_their_call_only(runner):
    calls = [
        "print('x' * 10**7)",
        "import os; os.write(1, b'x' * 10**7); os.write(2, b'y' * 10**7); 5",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os._exit(7)",
        "input()",
        "3",
    ]
    found = runner().replies(calls)
    assert found[0] == "x" * 500 and found[1] == "5"
    assert found[2] == "RuntimeError: the call ended with signal 9"
    assert found[3] == "RuntimeError: the call ended with no answer"
    assert found[4].startswith("EOFError") and found[5] == "3"


def test_a_function_by_name(runner, tmp_path, monkeypatch):
    (tmp_path / "my_tool.py").write_text("def shout(call):\n    return call.upper() + '!'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    assert runner(function="my_tool:shout").replies(["hello"]) == ["HELLO!"]
    with pytest.raises(ValueError, match="cannot import 'my_tool:nothing'"):
        runner(function="my_tool:nothing")


def test_a_process_that_died_is_an_error_and_another_one_can_start(runner):
    tool = runner()
    tool.replies(["1"])
    os.kill(tool._process.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="the tool's process died"):
        tool.replies(["1"] * 3)
    assert tool.replies(["4"]) == ["4"]


def test_the_module_needs_no_torch():
    code = "import sys, trimtab.rl.tools; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_call_is_what_stands_behind_the_last_start():
    use = ToolUse(start="<", end=">")
    assert use.call_in("a<b<7+5>") == "7+5"
    assert use.call_in("7+5>") == "" and use.call_in("<>") == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [("start", ""), ("end", ""), ("reply", "none"), ("max_calls", 0), ("max_reply_tokens", 0),
     ("timeout", 0.0), ("memory_mb", 1)],
)  # fmt: skip
def test_options_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"tool.{name}: expected .*, got {value!r}"):
        ToolUse(**{name: value})


# Edits that must turn this file red:
# - no end_all_below; no SET_CHILD_SUBREAPER; the answer read to the end of the pipe
# - no RLIMIT_AS; no redirect of the child's streams; no fork (calls share a process)
# - max_chars not applied
