"""Reward functions for tests; a reward process imports this module, so it imports nothing heavy."""


def digits_written(prompts, completions, completion_ids):
    """The number of digits, in units of 24: longer answers are better, and no two need be alike."""
    return [sum(c.isdigit() for c in text) / 24 for text in completions]


def fails_on_a(prompts, completions, completion_ids):
    if "a" in completions[0]:
        raise RuntimeError("no score")
    return [len(completions[0]) / 16]


def always_fails(prompts, completions, completion_ids):
    raise RuntimeError("no score")
