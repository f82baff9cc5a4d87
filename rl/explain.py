"""One line for what a configuration parser complains about, with the nearest valid key."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
import typing
from collections.abc import Collection
from typing import Any

_ON_THE_WAY = ("Parser key", "Problem with given class_path")


def explain(error: Exception, trainer_options: Collection[str]) -> str:
    """One line for a parser's error, with the nearest valid key where a key is unknown.

    jsonargparse nests its messages: a line for each key and class on the way, then what is wrong,
    or, for a union, what is wrong with each of its types.

    Args:
        error: what the parser raised.
        trainer_options: valid keys under `trainer`; the others are RLConfig's.

    Returns:
        The line.
    """
    lines = [line.strip().removeprefix("- ") for line in str(error).splitlines()]
    path: list[str] = []
    types = value = ""
    in_union = False
    task: Any = None
    for line in lines:
        if line.startswith(_ON_THE_WAY):
            types = ""  # of a union one of whose types says more
        if found := re.fullmatch(r"Problem with given class_path '([\w.]+)':", line):
            made = _class(found[1])
            if made is not None and not dataclasses.is_dataclass(made):
                path, task = [*path, "init_args"], made
        elif found := re.fullmatch(r'Parser key "([\w.]+)":', line):
            path.append(found[1])
        elif found := (
            re.match(r"Option '([\w.]+)' is not accepted", line)
            or re.match(r"Group '([\w.]+)' does not accept option '([\w.]+)'", line)
            or re.match(r"unrecognized arguments: --([\w.]+)", line)
        ):
            return _unknown_key(".".join([*path, *found.groups()]), trainer_options, task)
        elif line.startswith("Subtypes: ["):
            types = line.removeprefix("Subtypes: [").removesuffix("]")
        elif found := re.fullmatch(r"Expected an? (.+)\. Got value: (.*)", line):
            types, value = types or found[1], found[2]
            break
        elif line.startswith("Given value: "):
            value = line.removeprefix("Given value: ")
            break
        elif line == "Errors:":
            in_union = True
        elif in_union and re.match(r"[\w.]+: ", line):  # a check of one of our dataclasses
            return f"{'.'.join(path)}: {line}" if path else line
    if path and types:
        return f"{'.'.join(path)}: expected {_readable(types)}, got {value!r}"
    rest = " ".join(line for line in lines if not line.startswith(_ON_THE_WAY))
    return f"{'.'.join(path)}: {rest}" if path else rest


def _unknown_key(key: str, trainer_options: Collection[str], task: Any) -> str:
    """Names the nearest valid key: a sibling, one alike as a whole, or one elsewhere."""
    from .config import RLConfig

    valid = [*_keys(RLConfig), "trainer", *(f"trainer.{name}" for name in sorted(trainer_options))]
    valid += ["resume", "task.class_path", "task.init_args"]
    if task is not None:
        valid += [f"task.init_args.{name}" for name in _keys(task)]
    parent, _, leaf = key.rpartition(".")
    siblings = {v.rpartition(".")[2]: v for v in valid if v.rpartition(".")[0] == parent}
    leaves = {v.rpartition(".")[2]: v for v in reversed(valid)}
    near = None
    whole = {v: v for v in valid}
    for wanted, names, cutoff in ((leaf, siblings, 0.6), (key, whole, 0.8), (leaf, leaves, 0.6)):
        match = difflib.get_close_matches(wanted, names, n=1, cutoff=cutoff)
        near = near or (names[match[0]] if match else None)
    if near:
        return f"unknown configuration key '{key}'; did you mean '{near}'?"
    return f"unknown configuration key '{key}'; valid there: {', '.join(sorted(siblings))}"


def _keys(made: Any) -> list[str]:
    """Names a class takes, and under each the names of a dataclass it takes, with dots."""
    hints = typing.get_type_hints(made if dataclasses.is_dataclass(made) else made.__init__)
    keys = []
    for name in inspect.signature(made).parameters:
        kinds = typing.get_args(hints.get(name)) or (hints.get(name),)
        nested = [kind for kind in kinds if dataclasses.is_dataclass(kind)]
        keys += [name, *(f"{name}.{key}" for kind in nested for key in _keys(kind))]
    return keys


def _class(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None


def _readable(types: str) -> str:
    """Type names as a YAML file has them."""
    types = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", types).replace("NoneType", "null")
    types = re.sub(r"\btuple\b", "a list in brackets", types)
    types = re.sub(r"typing\.Literal\[(.*?)\]", r"\1", types)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", types).replace(", null", " or null")
