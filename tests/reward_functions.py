"""Reward functions for the tests: importable by name, here and in a reward process."""

import ctypes
import itertools
import json
import os
import signal
import sys
import time

_kept = []


def length(prompts, completions, completion_ids, **columns):
    return [float(len(text)) for text in completions]


def tokens(prompts, completions, completion_ids, **columns):
    return [sum(ids) for ids in completion_ids]


def matches(prompts, completions, completion_ids, target, **columns):
    return [float(text == wanted) for text, wanted in zip(completions, target, strict=True)]


def obey(prompts, completions, completion_ids, **columns):
    """Does what the completion says; scores 1 where it says `score`."""
    (order,) = completions
    if order == "raise":
        raise RuntimeError("no")
    if order == "long message":
        raise RuntimeError("x" * 5_000_000)
    if order == "hang":
        time.sleep(60)
    if order == "exit":
        os._exit(3)
    if order == "sys.exit":
        sys.exit(3)
    if order == "print":
        print("x" * 3_000_000, flush=True)
    if order == "print to both":
        for _ in range(3_000):
            os.write(1, b"o" * 1000)
            os.write(2, b"e" * 1000)
    if order == "segfault":
        ctypes.string_at(0)
    if order == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if order == "kill the supervisor":
        os.kill(os.getppid(), signal.SIGKILL)
    if order == "interrupt":
        raise KeyboardInterrupt
    if order == "ignore and hang":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(60)
    if order == "spin":
        while True:
            pass
    if order == "closed output":
        os.close(1)
        os.close(2)
    if order == "allocate":
        _kept.append(bytearray(400 << 20))
    if order == "no memory":
        raise MemoryError
    if order.startswith("fork"):  # "fork, exit NAME": children note their ids, and live on
        _, then, folder = order.split(" ")
        for name in ("child", "session"):
            if os.fork() == 0:
                if name == "session":
                    os.setsid()
                    if os.fork():
                        os._exit(0)
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                with open(os.path.join(folder, name), "w") as file:
                    file.write(str(os.getpid()))
                while True:
                    time.sleep(60)
        while not all(_written(os.path.join(folder, name)) for name in ("child", "session")):
            time.sleep(0.005)
        if then == "exit":
            os._exit(3)
        if then == "hang":
            time.sleep(60)
    results = {
        "none": [None],
        "nan": [float("nan")],
        "long": [1.0, 2.0],
        "short": [],
        "number": 1.0,
    }
    if order == "garbage":
        return [1.0] * 13_000_000
    if order == "long text":
        return "1" * 100_000_000
    if order == "long number":
        return ["1" * 100_000_000]
    if order == "endless":
        return itertools.count()
    results |= {"text": ["high"], "infinite": [float("inf")], "pid": [float(os.getpid())]}
    return results.get(order, [1.0])


def _written(path):
    return os.path.exists(path) and os.path.getsize(path) > 0


async def asynchronous(prompts, completions, completion_ids, **columns):
    return [1.0]


unpicklable = lambda prompts, completions, completion_ids, **columns: [1.0]
unpicklable.__qualname__ = "made.<locals>.unpicklable"

NOT_A_FUNCTION = json.dumps({})


def digits_written(prompts, completions, completion_ids):
    """The number of digits, in units of 24: longer answers are better, and no two need be alike."""
    return [sum(c.isdigit() for c in text) / 24 for text in completions]


def fails_on_a(prompts, completions, completion_ids):
    if "a" in completions[0]:
        raise RuntimeError("no score")
    return [len(completions[0]) / 16]


def always_fails(prompts, completions, completion_ids):
    raise RuntimeError("no score")


def lost_on_the_second_rank(prompts, completions, completion_ids):
    """Of tiny_run's prompts, 4 an update over two ranks: the second rank's first four have none."""
    if int(prompts[0][0]) % 4 >= 2:
        raise RuntimeError("no score")
    return digits_written(prompts, completions, completion_ids)


def reversed_digits(call):
    """A tool: the digits of the call, backwards."""
    return "".join(c for c in reversed(call) if c.isdigit()) or "0"
