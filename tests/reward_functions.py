"""Reward functions for the tests: importable by name, here and in a reward process."""

import json
import os
import sys
import time


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
    results = {
        "none": [None],
        "nan": [float("nan")],
        "long": [1.0, 2.0],
        "short": [],
        "number": 1.0,
    }
    results |= {"text": ["high"], "infinite": [float("inf")], "pid": [float(os.getpid())]}
    return results.get(order, [1.0])


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
