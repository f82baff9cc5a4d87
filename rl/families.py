"""Which metrics belong on a chart together, and what their families are called.

A family is what stands before the first slash of a name. One that is not listed here is drawn all
the same, under its own name: the metrics of a new algorithm need no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

FAMILIES = {
    "": ("Update", "numbers of each update"),
    "speed": ("Speed", "tokens a second"),
    "time": ("Wall time", "seconds of each part of an update"),
    "mismatch": ("Mismatch of rollout and trainer", "log-probabilities in nats"),
    "trust_region": ("Trust region", "rollouts and tokens kept, divergences in nats"),
    "pruning": ("Vocabulary pruning", "the safe set of each token, as the trainer sees it"),
    "length_rate": ("Length-triggered learning rate", "factor of the rate"),
    "variance": ("Gradient variance", "signal is the squared norm of the gradient"),
    "prefix": ("Shared prefix", "tokens computed once, speed-up over repeating the prompt"),
    "groups": ("Groups", "fractions of the prompts by the outcomes of their rollouts"),
    "group": ("Groups", "by the outcomes of their rollouts"),
    "budget": ("Rollout budgets", "rollouts allotted to prompts"),
    "remax": ("ReMax", "the greedy rollout as the baseline"),
    "reval": ("ReVal", "values read from the logits"),
    "replay": ("Replay", "rollouts of earlier updates"),
    "tree": ("Tree sampling", "segments, branches and shared tokens"),
    "imitation": ("Imitation", "the teacher beside the reward"),
    "reference": ("Reference policy", "divergence in nats, resets"),
    "health": ("Health", "what the run's monitors saw"),
    "clip": ("Clipping", "fractions of tokens"),
    "entropy": ("Entropy", "nats"),
    "stability": ("Stability", "states of the monitors: 0 healthy, 1 watch, 2 alarm"),
}
UNITS = {
    "entropy": "nats",
    "length": "tokens",
    "length_std": "tokens",
    "tokens": "an update",
    "truncated": "fraction",
    "mismatch/k1": "nats",
    "mismatch/k3": "nats",
    "mismatch/abs_dlogp": "nats",
    "mismatch/abs_dlogp/p": "nats, by the token's probability",
    "mismatch/abs_dlogp/length": "nats, by the position in the response",
    "mismatch/k3/p": "nats, by the token's probability",
    "mismatch/k3/length": "nats, by the position in the response",
    "pruning/safe_count": "tokens of the vocabulary",
    "pruning/kept_mass": "probability",
    "speed/rollout": "tokens/s",
    "speed/update": "tokens/s",
    "time": "s",
    "prefix/hot_bytes": "bytes",
    "prefix/seconds": "s",
    "budget/rollouts": "a prompt, by its success rate",
    "imitation/kl": "nats",
    "reference/k3": "nats",
    "replay/size": "rollouts",
}
_TOGETHER = ("_min", "_mean", "_max")
_PARTS = ("prefix/seconds", "budget/rollouts")  # of one number: <this>_<part>


def family_of(name: str) -> str:
    """The family of a metric.

    Args:
        name: e.g. `mismatch/k3`.

    Returns:
        What stands before the first slash; "" for a plain name. `epoch_2/` of a later optimizer
        step on the same rollouts is none.
    """
    name = _epoch(name)[1]
    return name.partition("/")[0] if "/" in name else ""


def family_title(family: str) -> tuple[str, str]:
    """Title and one line of explanation.

    Args:
        family: as `family_of` gives it.

    Returns:
        (title, explanation); an unknown family's title is its name, without an explanation.
    """
    return FAMILIES.get(family, (family.replace("_", " "), ""))


def charts(names: Iterable[str]) -> dict[str, dict[str, list[str]]]:
    """Metrics by family and by chart.

    Buckets (`k3/p_0.1_0.5`, ...) share a chart, as do the least, mean and greatest of one number,
    its epochs, and all parts of the wall time.

    Args:
        names: of metrics.

    Returns:
        family -> chart -> names, families in the order of FAMILIES, unknown ones last.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name in names:
        found.setdefault(family_of(name), {}).setdefault(_chart_of(name), []).append(name)
    order = list(FAMILIES)
    for members in (members for made in found.values() for members in made.values()):
        members.sort(key=_bucket)
    known = sorted((f for f in found if f in FAMILIES), key=order.index)
    return {f: found[f] for f in (*known, *(f for f in found if f not in FAMILIES))}


def chart_title(chart: str, members: list[str]) -> str:
    """Title of a chart with its unit.

    Args:
        chart: a key of `charts`.
        members: the metrics on it.

    Returns:
        E.g. `mismatch/k3 (nats)`.
    """
    unit = UNITS.get(chart) or (UNITS.get(members[0]) if len(members) == 1 else None)
    shown = members[0] if len(members) == 1 else chart
    return f"{shown} ({unit})" if unit else shown


def line_name(name: str, chart: str) -> str:
    """What a metric is called in the legend of its chart.

    Args:
        name: of the metric.
        chart: a key of `charts`.

    Returns:
        What it adds to the chart's name: `1e-4 to 1e-2` of a bucket, `max`; else its last part.
    """
    epoch, name = _epoch(name)
    rest = name.removeprefix(chart).strip("_/")
    if re.match(r"\d", rest):
        rest = rest.replace("_", " to ")
    return f"{rest or name.rpartition('/')[2]}{epoch}"


def _epoch(name: str) -> tuple[str, str]:
    """`, epoch 2` of a later step on the same rollouts, or nothing; and the name without it."""
    found = re.fullmatch(r"epoch_(\d+)/(.+)", name)
    return (f", epoch {found[1]}", found[2]) if found else ("", name)


def _chart_of(name: str) -> str:
    name = _epoch(name)[1]
    if name.startswith("time/"):
        return "time"
    parent, _, leaf = name.rpartition("/")
    if "/" in parent and (found := re.match(r"([A-Za-z_]+?)_\d", leaf)):  # a bucket
        return f"{parent}/{found[1]}"
    for whole in _PARTS:
        if name.startswith(f"{whole}_"):
            return whole
    for ending in _TOGETHER:
        if name.endswith(ending):
            return name.removesuffix(ending)
    return name


def _bucket(name: str) -> float:
    number = re.search(r"_(\d[\d.]*(?:e[+-]?\d+)?)_", name.rpartition("/")[2])
    return float(number[1]) if number else 0.0
