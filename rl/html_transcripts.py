"""Transcripts of a run as HTML, side by side across its updates."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from .html_parts import number_text

COLUMNS, ROWS = 5, 8
CHARACTERS = 1_500  # of one text


def transcripts_table(rows: list[dict[str, Any]]) -> str:
    """The same problem side by side where it comes back, and all by update.

    Args:
        rows: of transcripts.jsonl.

    Returns:
        HTML; "" without rows.
    """
    if not rows:
        return ""
    by_problem: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for row in rows:
        by_problem.setdefault(str(row.get("problem")), {}).setdefault(row["update"], []).append(row)
    repeated = {p: found for p, found in by_problem.items() if len(found) > 1}
    parts = []
    if repeated:
        most = sorted(repeated, key=lambda p: -len(repeated[p]))[:ROWS]
        parts.append("<h3>The same problem across the training</h3>")
        for problem in most:
            found = repeated[problem]
            updates = spread_out(sorted(found), COLUMNS)
            parts.append(_prompt(found[updates[0]][0]))
            cells = ["".join(map(_answer, found[update][:2])) for update in updates]
            parts.append(_columns(updates, [cells]))
    by_update: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_update.setdefault(row["update"], []).append(row)
    updates = spread_out(sorted(by_update), COLUMNS)
    count = min(ROWS, max(len(by_update[update]) for update in updates))
    lines = [
        [
            _prompt(by_update[u][i]) + _answer(by_update[u][i]) if i < len(by_update[u]) else ""
            for u in updates
        ]
        for i in range(count)
    ]
    table = _columns(updates, lines)
    if repeated:
        return "".join(parts) + f"<details><summary>All by update</summary>{table}</details>"
    return table


def spread_out(values: Sequence[int], count: int) -> list[int]:
    """The first, the last and some in between.

    Args:
        values: in order.
        count: how many at most, >= 2.

    Returns:
        Some of the values, in order.
    """
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


def _columns(updates: Sequence[int], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>update {update}</th>" for update in updates)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _prompt(row: dict[str, Any]) -> str:
    prompt, name = str(row.get("prompt", "")), escape(str(row.get("problem")))
    if len(prompt) <= 120:
        return f'<p class="n">{name}</p><pre>{escape(prompt)}</pre>'
    last = escape(prompt[-100:])
    return (
        f"<details><summary>{name}: ...{last}</summary><pre>{escape(cut(prompt))}</pre></details>"
    )


def _answer(row: dict[str, Any]) -> str:
    reward = row.get("reward")
    shown = "lost" if reward is None else number_text(reward)
    facts = f"reward {shown}, {row.get('tokens')} tokens"
    if row.get("finish_reason") == "length":
        facts += ", cut at the limit"
    return f"<p><b>{escape(facts)}</b></p><pre>{escape(cut(str(row.get('completion', ''))))}</pre>"


def cut(text: str) -> str:
    """A text with its middle left out if it is long.

    Args:
        text: any.

    Returns:
        At most about CHARACTERS of it.
    """
    if len(text) <= CHARACTERS:
        return text
    half = CHARACTERS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters ...]\n{text[-half:]}"
