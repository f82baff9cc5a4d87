"""What a person sees at the end: a table on the terminal and a picture."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .recording import read_rows

_BUCKET = re.compile(r"mismatch/abs_dlogp/p_(.+)_(.+)")


def print_table(summary: dict[str, Any], folder: Path) -> None:
    """Before and after, where the time went, and where everything is.

    Args:
        summary: the run's summary.json.
        folder: the run's folder.
    """
    console = Console()
    before, after = summary.get("before"), summary.get("after")
    if before and after:
        table = Table(title="held-out problems")
        for column in ("", "before", "after"):
            table.add_column(column, justify="left" if not column else "right")
        for title, key, form in (
            ("sampled accuracy", "sampled", "{:.3f}"),
            ("greedy accuracy", "greedy", "{:.3f}"),
            ("mean length (tokens)", "length", "{:.1f}"),
        ):
            cells = [when[key] for when in (before, after)]
            table.add_row(title, *("-" if c is None else form.format(c) for c in cells))
        if before["lost"] or after["lost"]:
            table.add_row("rollouts without a reward", str(before["lost"]), str(after["lost"]))
        for label in sorted(before["by_label"].keys() | after["by_label"].keys()):
            cells = [_label_cell(when["by_label"].get(label)) for when in (before, after)]
            table.add_row(f"{label}: share, accuracy", *cells)
        console.print(table)
    seconds = summary["seconds"]
    time_table = Table(title=f"wall time of {summary['updates']} updates (s)")
    for name in (*seconds, "sum"):
        time_table.add_column(name, justify="right")
    time_table.add_row(*(f"{s:.1f}" for s in (*seconds.values(), sum(seconds.values()))))
    console.print(time_table)
    console.print(f"run folder: {folder}", soft_wrap=True, highlight=False)


def _label_cell(found: list[float] | None) -> str:
    return "-" if found is None else f"{found[0]:.2f}, {found[1]:.3f}"


def draw_report(metrics: Path, picture: Path) -> None:
    """Draws a run: reward, length, mismatch, learning rate, entropy, groups.

    Args:
        metrics: the run's metrics.jsonl.
        picture: PNG to write.

    Raises:
        ValueError: there are no metrics.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = read_rows(metrics) if metrics.is_file() else []
    if not rows:
        raise ValueError(f"{metrics}: no metrics to draw")
    figure, axes = plt.subplots(2, 3, figsize=(15, 7.5), constrained_layout=True)
    (reward, length, mismatch), (rate, entropy, groups) = axes

    _line(reward, rows, "reward", "mean reward")
    reward.set(
        title="reward", ylim=(0, 1.02) if max(r.get("reward", 0) for r in rows) <= 1 else None
    )

    _line(length, rows, "length", "mean")
    spreads = [row for row in rows if row.get("length_std") is not None]
    updates, means = _series(spreads, "length")
    spread = _series(spreads, "length_std")[1]
    low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
    length.fill_between(updates, low, high, alpha=0.2, label="one standard deviation")
    length.set(title="response length (tokens)")
    length.set_ylim(bottom=0)

    buckets = sorted(
        {name for row in rows for name in row if _BUCKET.fullmatch(name)},
        key=lambda name: float(_BUCKET.fullmatch(name)[1]),
    )
    for i, name in enumerate(buckets):
        low_edge, high_edge = _BUCKET.fullmatch(name).groups()
        color = plt.cm.viridis(i / max(1, len(buckets) - 1))
        _line(mismatch, rows, name, f"p in [{low_edge}, {high_edge})", color=color)
    _line(mismatch, rows, "mismatch/abs_dlogp_mean", "all tokens", color="black")
    mismatch.set(title="mean |log p trainer - log p rollout| (nats)", yscale="log")

    _line(rate, rows, "lr", "learning rate", drawstyle="steps-post")
    fired = [row["update"] for row in rows if row.get("length_rate/triggered")]
    if fired:
        rate.axvline(fired[0], color="tab:red", linestyle="--", label="length trigger")
    factors = [(row["update"], row.get("length_rate/factor", 1.0)) for row in rows]
    falls = [u for (_, a), (u, b) in pairwise(factors) if b < a]
    for i, update in enumerate(falls):
        label = "rate falls" if i == 0 else None
        rate.axvline(update, color="tab:orange", linestyle=":", label=label)
    rate.set(title="learning rate")
    rate.set_ylim(bottom=0)

    _line(entropy, rows, "entropy", "entropy (nats)")
    entropy.set(title="entropy of the sampled positions")
    entropy.set_ylim(bottom=0)

    _line(groups, rows, "groups/mixed", "groups with mixed outcomes")
    _line(groups, rows, "trust_region/kept_sequences", "rollouts inside the trust region")
    _line(groups, rows, "truncated", "rollouts cut at the limit")
    groups.set(title="fractions", ylim=(-0.02, 1.02))

    for axis in axes.flat:
        axis.set_xlabel("update")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    unfinished = picture.with_name(f".{picture.name}.png")
    figure.savefig(unfinished, dpi=110)
    plt.close(figure)
    unfinished.replace(picture)


def _series(rows: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    found = [(row["update"], row[name]) for row in rows if row.get(name) is not None]
    return [update for update, _ in found], [value for _, value in found]


def _line(axis: Any, rows: list[dict[str, Any]], name: str, label: str, **style: Any) -> None:
    updates, values = _series(rows, name)
    if updates:
        axis.plot(updates, values, label=label, **style)
