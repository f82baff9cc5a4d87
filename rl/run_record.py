"""What a run's folder says, read for people: `report.html`, `trimtab-rl compare`, the dashboard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .recording import RunFolder, read_rows

LAST = 10  # updates that "at the end" means


@dataclass(frozen=True)
class RunRecord:
    """A run as its folder has it; parts that are missing are empty.

    Args:
        folder: of the run.
        config: the resolved configuration.
        environment: where it was started, and versions.
        summary: held-out results and wall times.
        rows: metrics of each update, with the token rates.
        transcripts: rollouts that were written down.
        evaluations: of `trimtab-rl eval`, oldest first.
    """

    folder: RunFolder
    config: dict[str, Any]
    environment: dict[str, Any]
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    transcripts: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]

    @property
    def updates(self) -> int:
        """Updates that were done."""
        return max((row["update"] for row in self.rows), default=0)

    @property
    def state(self) -> str:
        """`finished`, or how far it has come."""
        planned = self.config.get("updates")
        if self.folder.finished(self.updates) and self.updates:
            return "finished"
        return f"unfinished: {self.updates} of {planned} updates"


def read_run(path: str | Path) -> RunRecord:
    """Reads a run's folder.

    Args:
        path: the folder.

    Returns:
        A RunRecord.

    Raises:
        ValueError: it is no run's folder, or a file in it is not what a run writes.
    """
    folder = RunFolder.existing(str(path))
    return RunRecord(
        folder,
        _config(folder.config),
        _json(folder.environment),
        _json(folder.summary),
        [row | token_rates(row) for row in _lines(folder.metrics)],
        _lines(folder.transcripts),
        [_json(found) for found in sorted(folder.path.glob("eval-*.json"))],
    )


def token_rates(row: Mapping[str, Any]) -> dict[str, float]:
    """Tokens and tokens a second of an update.

    Args:
        row: its metrics.

    Returns:
        `tokens`, `speed/rollout` and `speed/update`, as far as the row has what they are made of.
    """
    rollouts, length = row.get("rollouts"), row.get("length")
    if rollouts is None or length is None:
        return {}
    rates = {"tokens": rollouts * length}
    for part in ("rollout", "update"):
        seconds = row.get(f"time/{part}")
        if seconds:
            rates[f"speed/{part}"] = rates["tokens"] / seconds
    return rates


def figures(record: RunRecord) -> dict[str, float | None]:
    """The final figures of a run.

    Args:
        record: of the run.

    Returns:
        Title -> value; None where the run has none.
    """
    before, after = (record.summary.get(when) or {} for when in ("before", "after"))
    rows = record.rows
    return {
        "updates": record.updates,
        "sampled accuracy before": before.get("sampled"),
        "sampled accuracy after": after.get("sampled"),
        "greedy accuracy before": before.get("greedy"),
        "greedy accuracy after": after.get("greedy"),
        f"mean reward, last {LAST} updates": mean_of(rows[-LAST:], "reward"),
        f"mean length, last {LAST} updates (tokens)": mean_of(rows[-LAST:], "length"),
        "wall time (s)": sum(wall_seconds(rows).values()) if rows else None,
        "tokens": sum(row.get("tokens") or 0.0 for row in rows) if rows else None,
        "rollout (tokens/s)": _rate(rows, "rollout"),
        "update (tokens/s)": _rate(rows, "update"),
        "skipped updates": rows[-1].get("skipped_updates") if rows else None,
    }


def wall_seconds(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Wall time of updates by part; its sum is what they took.

    Args:
        rows: of metrics.jsonl.

    Returns:
        `rollout`, `reward` and `update`, seconds; for rollouts that were made while the trainer
        computed, `wait`, which was waited for them, in place of the first two.
    """
    seconds: dict[str, float] = {}
    for row in rows:
        ahead = row.get("time/wait") is not None
        for part in ("wait", "update") if ahead else ("rollout", "reward", "update"):
            seconds[part] = seconds.get(part, 0.0) + (row.get(f"time/{part}") or 0.0)
    return seconds


def mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Mean of a metric over the rows that have it.

    Args:
        rows: of metrics.jsonl.
        name: of the metric.

    Returns:
        The mean, None without any value.
    """
    values = [v for row in rows if (v := row.get(name)) is not None and math.isfinite(v)]
    return sum(values) / len(values) if values else None


def flat(tree: Any, key: str = "") -> dict[str, Any]:
    """A nested configuration by dotted keys.

    Args:
        tree: dicts of dicts; lists are values.
        key: of the tree itself.

    Returns:
        Dotted key -> value.
    """
    if not isinstance(tree, dict):
        return {key: tree}
    items = [flat(value, f"{key}.{name}" if key else str(name)) for name, value in tree.items()]
    return {k: v for item in items for k, v in item.items()}


def _rate(rows: Sequence[Mapping[str, Any]], part: str) -> float | None:
    tokens = sum(row["tokens"] for row in rows if f"speed/{part}" in row)
    seconds = sum(row[f"time/{part}"] for row in rows if f"speed/{part}" in row)
    return tokens / seconds if seconds else None


def _lines(path: Path) -> list[dict[str, Any]]:
    rows = read_rows(path) if path.is_file() else []
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("update"), int):
            raise ValueError(
                f"{path}:{number}: expected an object with its update, got {row!r:.60}"
            )
    return rows


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {found!r:.60}")
    return found


def _config(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected configuration keys, got {found!r:.60}")
    return found
