"""`report.html`: a run on one page that opens offline; all of it is inline, nothing is a script.

Summary, the plots of report.png, a section for every family of metrics the run has, transcripts
side by side across the training, configuration and versions. All text of a run is escaped.
"""

from __future__ import annotations

import json
import re
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from .durable import replace_text
from .families import chart_title, charts, family_title, line_name
from .html_parts import chart_grid, html_page, html_table, number_text, series
from .html_transcripts import transcripts_table
from .run_record import RunRecord, figures, read_run, wall_seconds
from .svg import Points, line_chart

POINTS = 80_000  # of all lines together, about 11 bytes each: the page stays below 2 MB
# What the overview draws by hand; the sections below leave these out.
OVERVIEW = {
    "reward", "length", "length_std", "lr", "entropy", "truncated", "groups/mixed",
    "trust_region/kept_sequences", "mismatch/abs_dlogp_mean", "speed/rollout", "speed/update",
}  # fmt: skip
_BUCKET = re.compile(r"mismatch/abs_dlogp/p_(.+)_(.+)")


def write_html_report(path: str | Path) -> Path:
    """Writes a run's report.html; what the run does not have is left out.

    Args:
        path: the run's folder.

    Returns:
        The page.

    Raises:
        ValueError: the folder is no run's, or a file in it is not what a run writes.
    """
    record = read_run(path)
    page = record.folder.page
    replace_text(page, html_report(record))
    return page


def html_report(record: RunRecord) -> str:
    """The page as text.

    Args:
        record: of the run.

    Returns:
        HTML.
    """
    sections = [
        ("Summary", _summary(record)),
        ("Training", _overview(record.rows)),
        *_families(record.rows),
        ("Transcripts", transcripts_table(record.transcripts)),
        ("Configuration", _configuration(record)),
    ]
    name = Path(record.folder.path).absolute().name
    return html_page(f"{name} - {record.state}", [(t, body) for t, body in sections if body])


# ---------------------------------------------------------------- summary


def _summary(record: RunRecord) -> str:
    wall = wall_seconds(record.rows)
    parts = [html_table(figures(record).items())]
    before, after = (record.summary.get(when) for when in ("before", "after"))
    if before or after:
        parts.append("<h3>Held-out problems</h3>" + _before_after(before or {}, after or {}))
    if record.rows:
        cells = [*wall.items(), ("sum", sum(wall.values()))]
        parts.append("<h3>Wall time of the updates (s)</h3>")
        parts.append(html_table([[value for _, value in cells]], [name for name, _ in cells]))
    for found in record.evaluations:
        parts.append(_evaluation(found))
    return "".join(parts)


def _before_after(before: dict[str, Any], after: dict[str, Any]) -> str:
    titles = {
        "sampled": "sampled accuracy",
        "greedy": "greedy accuracy",
        "length": "mean length (tokens)",
        "lost": "rollouts without a reward",
        "seconds": "wall time of the evaluation (s)",
    }
    rows: list[list[Any]] = [[t, before.get(k), after.get(k)] for k, t in titles.items()]
    labels = [when.get("by_label") or {} for when in (before, after)]
    for label in sorted(labels[0].keys() | labels[1].keys()):
        for i, what in enumerate(("share", "accuracy")):
            rows.append(
                [f"{label}: {what}", *((found.get(label) or (None,) * 2)[i] for found in labels)]
            )
    return html_table(rows, ("", "before", "after"))


def _evaluation(found: dict[str, Any]) -> str:
    """A result of `trimtab-rl eval`: figures that are plain numbers with their standard error."""
    rows = [
        (name, value.get("value"), value.get("standard_error"))
        for name, value in (found.get("results") or {}).items()
        if isinstance(value, dict)
    ]
    if not rows:
        return ""
    title = f"trimtab-rl eval: {found.get('split')}, after update {found.get('update')}"
    if "server" in found:
        title = f"trimtab-rl eval: {found.get('split')}, {found.get('policy')}"
    return f"<h3>{escape(title)}</h3>" + html_table(rows, ("", "", "standard error"))


# ---------------------------------------------------------------- charts


def _overview(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""

    def of(**names: str) -> dict[str, Points]:
        return {title.replace("_", " "): series(rows, name) for title, name in names.items()}

    spread = [r for r in rows if r.get("length_std") is not None and r.get("length") is not None]
    band = tuple(
        [(r["update"], max(0.0, r["length"] + sign * r["length_std"])) for r in spread]
        for sign in (-1, 1)
    )
    buckets = sorted(
        {name for row in rows for name in row if _BUCKET.fullmatch(name)},
        key=lambda name: float(_BUCKET.fullmatch(name)[1]),
    )
    mismatch = of(all_tokens="mismatch/abs_dlogp_mean") | {
        "p in [{}, {})".format(*_BUCKET.fullmatch(name).groups()): series(rows, name)
        for name in buckets
    }
    return chart_grid(
        [
            line_chart(of(reward="reward"), "mean reward", zero=True),
            line_chart(
                of(mean="length"),
                "response length (tokens; area: one standard deviation)",
                zero=True,
                band=band,
            ),
            line_chart(mismatch, "mean |log p trainer - log p rollout| (nats)", log=True),
            line_chart(of(rate="lr"), "learning rate", zero=True, marks=_rate_marks(rows)),
            line_chart(of(entropy="entropy"), "entropy of the sampled positions (nats)", zero=True),
            line_chart(
                of(
                    groups_with_mixed_outcomes="groups/mixed",
                    inside_the_trust_region="trust_region/kept_sequences",
                    cut_at_the_limit="truncated",
                ),
                "fractions",
                zero=True,
            ),
            line_chart(
                of(rollout="speed/rollout", update="speed/update"), "tokens a second", log=True
            ),
        ]
    )


def _rate_marks(rows: list[dict[str, Any]]) -> dict[str, float]:
    marks = {}
    fired = [row["update"] for row in rows if row.get("length_rate/triggered")]
    if fired:
        marks["length trigger"] = fired[0]
    factors = [(row["update"], row.get("length_rate/factor") or 1.0) for row in rows]
    falls = [update for (_, a), (update, b) in pairwise(factors) if b < a]
    if falls:
        marks["rate falls first"] = falls[0]
    return marks


def _families(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, HTML) of every family; what never changed is a line of text, not a chart."""
    names = [name for name in dict.fromkeys(n for row in rows for n in row) if name != "update"]
    points = max(40, min(300, POINTS // max(1, len(names))))
    sections = []
    for family, found in charts(names).items():
        title, explanation = family_title(family)
        drawn, constant = [], {}
        for chart, members in found.items():
            moving = []
            for name in members:
                values = {row[name] for row in rows if row.get(name) is not None}
                if len(values) > 1 or (len(rows) == 1 and values):
                    moving.append(name)
                elif values:
                    constant[name] = next(iter(values))
            above = OVERVIEW.issuperset(moving) or all(map(_BUCKET.fullmatch, moving))
            if moving and not above:
                lines = {line_name(name, chart): series(rows, name) for name in moving}
                log = family in ("time", "speed")  # the first update compiles
                drawn.append(line_chart(lines, chart_title(chart, moving), log=log, points=points))
        if not drawn and not constant:
            continue
        body = f'<p class="n">{escape(explanation)}</p>' if explanation else ""
        body += chart_grid(drawn)
        if constant:
            same = ", ".join(f"{name} = {number_text(v)}" for name, v in constant.items())
            body += f'<p class="n">the same in every update: {escape(same)}</p>'
        sections.append((title, body))
    return sections


def _configuration(record: RunRecord) -> str:
    config = yaml.safe_dump(record.config, sort_keys=False, allow_unicode=True)
    made = json.dumps(record.environment, indent=1, ensure_ascii=False)
    parts = f"<details><summary>config.yaml</summary><pre>{escape(config)}</pre></details>"
    if record.environment:
        versions = (record.environment.get("versions") or {}).items()
        parts = html_table([(str(name), str(version)) for name, version in versions]) + parts
        parts += f"<details><summary>environment</summary><pre>{escape(made)}</pre></details>"
    return parts
