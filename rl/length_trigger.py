"""`trimtab-rl length-trigger METRICS.jsonl`: what the length-triggered rate would have done.

Reads the metric log of any run, one JSON object a line (nested ones are flattened, a/b/c), replays
the detector over it and says when it would have fired and which rate it would have set, with a
picture. Nothing of the run is needed but the log.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ..optim import LengthDetector
from .recording import read_rows

# Where logs keep them: ours, verl's, TRL's, others'. The first that a log has is taken, as it
# stands or behind other folders (but timing/step is no step).
_KEYS = {
    "step": ("update", "step", "global_step", "training/global_step"),
    "length": (
        "response_length/mean",
        "completions/mean_length",
        "length",
        "completion_length",
        "mean_length",
    ),
    "truncated": ("response_length/clip_ratio", "completions/clipped_ratio", "truncated"),
    "mismatch": ("mismatch/k3", "rollout_corr/k3_kl", "sampling/sampling_logp_difference/mean"),
    "grad_norm": ("actor/grad_norm", "grad_norm"),
    "lr": ("actor/lr", "lr", "learning_rate"),
}
_WHOLE_ONLY = ("update", "step")
_OWN_FACTOR = "length_rate/factor"


class Replay(NamedTuple):
    """What the detector made of a log.

    Args:
        steps: of each row with a length, as logged.
        lengths: mean response length, tokens.
        smoothed: the detector's average of it.
        rates: learning rate of the run, without our own factor if it had one, or the one given.
        replayed: learning rate with the detector's factor.
        triggered_at: the step of the trigger; None if it did not fire.
        surge: index of the first row after the warm-up at which the length alone would have fired.
        skipped: rows without a finite length, or that a resumed run wrote again.
        baseline: tokens; None if the log is shorter than the warm-up.
        keys: which key of the log served as which number.
    """

    steps: list[float]
    lengths: list[float]
    smoothed: list[float]
    rates: list[float]
    replayed: list[float]
    triggered_at: float | None
    surge: int | None
    skipped: int
    baseline: float | None
    keys: dict[str, str]


def replay(
    rows: Iterable[dict[str, Any]],
    detector: LengthDetector,
    *,
    keys: dict[str, str] | None = None,
    lr: float | None = None,
) -> Replay:
    """Runs a detector over a log.

    Args:
        rows: of the log, in order; those without a length are passed over.
        detector: fresh.
        keys: names in the log for "step", "length", "truncated", "mismatch", "grad_norm", "lr";
            those not given are looked for under the names that are known.
        lr: the rate to scale, if the log has none, or to replace it.

    Returns:
        A Replay. Periods count in the log's steps, also where it has only every tenth; the warm-up
        and the averages count its rows. If the run had a length-triggered rate of ours, its factor
        is divided out of its rates first.

    Raises:
        ValueError: a key is not in the log, or what the detector needs is missing or no number.
    """
    flat = [_flattened(row) for row in rows]
    found = _keys(flat, keys or {}, needed={"length", *detector.joint})
    for name in ("lr", *detector.joint):  # they may be logged now and then, in rows of their own
        _hold(flat, name, found)
    watched = [row for row in flat if math.isfinite(_number(row, found["length"], math.nan))]
    if any(row.get(found.get("step")) is None for row in watched):
        found.pop("step", None)  # not in every row: then none counts, and rows do
    steps = [_number(row, found.get("step"), i) for i, row in enumerate(watched)]
    if not all(map(math.isfinite, steps)):
        raise ValueError(f"step: expected finite numbers under {found['step']!r}, got NaN or inf")
    kept = _without_abandoned(steps)
    watched, steps = [watched[i] for i in kept], [steps[i] for i in kept]
    skipped = sum(found["length"] in row for row in flat) - len(watched)
    first = 1 if steps[:1] == [1] else 0  # the detector counts from 0, as schedulers do
    base_rates = [lr if lr is not None else _base_rate(row, found) for row in watched]
    if any(rate is None for rate in base_rates):
        raise ValueError("lr: expected a learning rate in every row of the log, or --lr, got none")
    alone = copy.deepcopy(detector)
    alone.joint = {}
    smoothed, factors, triggered_at = [], [], None
    for i, (logged, row) in enumerate(zip(steps, watched, strict=True)):
        step = int(logged) - first
        joint = {name: _number(row, found[name]) for name in detector.joint}
        factors.append(detector.factor_at(step))
        truncated = _number(row, found.get("truncated"))
        seen = {
            "mean_length": _number(row, found["length"]),
            "truncated_fraction": truncated if truncated is None or 0 <= truncated <= 1 else None,
        }
        alone.observe(**seen, step=i)
        fired = detector.observe(**seen, step=step, **joint)
        smoothed.append(detector.smoothed)
        if fired:
            triggered_at = logged
    return Replay(
        steps,
        [_number(row, found["length"]) for row in watched],
        smoothed,
        base_rates,
        [rate * factor for rate, factor in zip(base_rates, factors, strict=True)],
        triggered_at,
        alone.triggered_at,
        skipped,
        detector.baseline,
        found,
    )


def _without_abandoned(steps: list[float]) -> list[int]:
    """Indices of the rows that count: a resumed run goes back and writes some steps again."""
    kept: list[int] = []
    for i, step in enumerate(steps):
        while kept and steps[kept[-1]] >= step:
            kept.pop()
        kept.append(i)
    return kept


def _hold(rows: list[dict[str, Any]], number: str, found: dict[str, str]) -> None:
    """Fills in what the rows between leave out: the last value, and the first one before it."""
    if number not in found:
        return
    key = found[number]
    known = [row[key] for row in rows if row.get(key) is not None]
    if not known:
        raise ValueError(f"--{number}_key: expected numbers under {key} in the log, got none")
    last = known[0]
    for row in rows:
        row[key] = last = last if row.get(key) is None else row[key]


def main(arguments: list[str]) -> None:
    """The subcommand.

    Args:
        arguments: behind `length-trigger`.

    Raises:
        ValueError, ArgumentError: an argument or the log is wrong; nothing is written then.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="trimtab-rl length-trigger",
        description="When would a length-triggered learning rate have fired, and what would it "
        "have set? Reads any run's metric log.",
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("metrics", type=str, help="JSON lines, one step each")
    for name, known in _KEYS.items():
        parser.add_argument(
            f"--{name}_key", type=str | None, default=None, help=f"default: {', '.join(known)}"
        )
    parser.add_argument("--lr", type=float | None, default=None, help="rate, if the log has none")
    parser.add_argument(
        "--plot", type=str | None, default=None, help="PNG to write (default: beside the log)"
    )
    parser.add_class_arguments(LengthDetector, "detector")
    parsed = parser.parse_args(arguments)
    log = Path(parsed.metrics)
    if not log.is_file():
        raise ValueError(f"length-trigger: expected a metric log, {parsed.metrics} is no file")
    options = vars(parsed.detector)
    keys = {name: parsed[f"{name}_key"] for name in _KEYS if parsed[f"{name}_key"] is not None}
    picture = Path(parsed.plot) if parsed.plot else log.with_suffix(".length_trigger.png")
    rows = read_rows(log)
    with _silenced(LengthDetector.__module__):  # it warns of what is printed below
        result = replay(rows, LengthDetector(**options), keys=keys, lr=parsed.lr)
    if not picture.parent.is_dir():
        raise ValueError(f"--plot: expected a file in a folder that exists, got {picture}")
    print(describe(result, LengthDetector(**options)))
    draw(result, picture)
    print(picture)


@contextmanager
def _silenced(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def describe(result: Replay, detector: LengthDetector) -> str:
    """The replay in words.

    Args:
        result: from `replay`.
        detector: with the same arguments, for the words.

    Returns:
        A few lines.
    """
    used = ", ".join(f"{name} = {key}" for name, key in result.keys.items())
    why = "without a finite length, or steps that were written again later"
    passed = f" ({result.skipped} rows passed over: {why})" if result.skipped else ""
    lines = [f"{len(result.steps)} steps{passed}; {used}"]
    if result.baseline is None:
        lines.append(f"shorter than the warm-up of {detector.warmup} steps: nothing to compare")
        return "\n".join(lines)
    lines.append(f"baseline: {result.baseline:.1f} tokens over {detector.warmup} steps")
    if result.triggered_at is None and result.surge is not None:
        lines.append(
            f"would not have fired: the length surged at step {result.steps[result.surge]:g}, but "
            f"{' and '.join(detector.joint)} had not risen with it"
        )
        return "\n".join(lines)
    if result.triggered_at is None:
        highest = max(result.smoothed[detector.warmup :], default=result.smoothed[-1])
        lines.append(
            f"would not have fired: highest smoothed length {highest:.1f} tokens, "
            f"{highest / result.baseline:.2f} times the baseline (limit {detector.ratio:g})"
            if result.baseline > 0
            else "would not have fired: the baseline is 0 tokens"
        )
        return "\n".join(lines)
    at = result.steps.index(result.triggered_at)
    lines.append(
        f"would have fired at step {result.triggered_at:g}: smoothed length "
        f"{result.smoothed[at]:.1f} tokens"
    )
    if detector.mode == "alert":
        lines.append("mode alert: the rate stays as it is")
        return "\n".join(lines)
    first = 1 if result.steps[0] == 1 else 0
    period = detector.period_factor * max(result.triggered_at - first, 1)
    lines.append(f"the rate falls every {period:g} steps from there (origin: {detector.origin})")
    factors = [new / old if old else 1.0 for new, old in zip(result.replayed, result.rates)]
    falls = [i for i, (a, b) in enumerate(pairwise(factors), 1) if not math.isclose(a, b)]
    if not falls:
        lines.append("no fall within this log")
    for i in falls:
        lines.append(
            f"step {result.steps[i]:g}: learning rate {result.replayed[i]:.3g} in place of "
            f"{result.rates[i]:.3g} (factor {factors[i]:g})"
        )
    return "\n".join(lines)


def draw(result: Replay, picture: Path) -> None:
    """Lengths and rates, as they were and as they would have been.

    Args:
        result: from `replay`.
        picture: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (length, rate) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    length.plot(result.steps, result.lengths, alpha=0.4, label="mean")
    length.plot(result.steps, result.smoothed, label="smoothed")
    if result.baseline is not None:
        length.axhline(result.baseline, color="gray", linestyle=":", label="baseline")
    length.set(title="response length (tokens)")
    rate.plot(result.steps, result.rates, drawstyle="steps-post", label="without it")
    rate.plot(result.steps, result.replayed, drawstyle="steps-post", label="length-triggered")
    rate.set(title="learning rate")
    for axis in (length, rate):
        axis.set_ylim(bottom=0)
        axis.set_xlabel(result.keys.get("step", "step"))
        axis.grid(alpha=0.3)
        if result.triggered_at is not None:
            axis.axvline(result.triggered_at, color="tab:red", linestyle="--", label="trigger")
        axis.legend(fontsize=8)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def _keys(rows: list[dict[str, Any]], given: dict[str, str], needed: set[str]) -> dict[str, str]:
    """The log's name of each number that it has; a name may leave out the folders before it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    found = {}
    for number, known in _KEYS.items():
        wanted = (given[number],) if number in given else known
        ways = [[name for name in names if name == key] for key in wanted]
        ways += [
            [name for name in names if name.endswith(f"/{key}")]
            for key in wanted
            if number in given or key not in _WHOLE_ONLY
        ]
        hits = next((way for way in ways if way), [])
        if len(hits) > 1:
            raise ValueError(f"--{number}_key: expected one key, the log has {', '.join(hits)}")
        if hits:
            found[number] = hits[0]
        elif number in given or number in needed:
            raise ValueError(
                f"--{number}_key: expected one of {', '.join(wanted)} in the log, got "
                f"{json.dumps(names)[:300]}"
            )
    return found


def _base_rate(row: dict[str, Any], found: dict[str, str]) -> float | None:
    rate = _number(row, found.get("lr"))
    own = next((name for name in row if f"/{name}".endswith(f"/{_OWN_FACTOR}")), None)
    factor = _number(row, own, 1.0)
    return rate if rate is None or not factor else rate / factor


def _number(row: dict[str, Any], key: str | None, default: float | None = None) -> float | None:
    value = row.get(key)
    try:
        return default if value is None else float(value)
    except ValueError:
        raise ValueError(f"{key}: expected a number in the log, got {value!r:.60}") from None


def _flattened(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object in each line of the log, got {row!r:.60}")
    flat = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= _flattened(value, f"{prefix}{name}/")
        elif isinstance(value, int | float | str) or value is None:
            flat[f"{prefix}{name}"] = value
    return flat
