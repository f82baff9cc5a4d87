"""What the pages are made of: the page itself, tables, charts side by side; texts are escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from .svg import CSS as CHART_CSS
from .svg import Points

CSS = """
:root { color-scheme: light dark; }
body { font: 14px/1.45 system-ui, sans-serif; margin: 1.5rem auto; max-width: 1280px;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
.n { opacity: .7; } nav a { margin-right: .9em; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); gap: 14px; }
table { border-collapse: collapse; } th, td { padding: 3px 10px; text-align: left;
  border-bottom: 1px solid #8884; vertical-align: top; }
td.r { text-align: right; font-variant-numeric: tabular-nums; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; }
.wide { overflow-x: auto; } .wide td { min-width: 180px; } details { margin: .6em 0; }
"""


def html_page(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A page of sections with links to them.

    Args:
        title: text.
        sections: (title, HTML).

    Returns:
        HTML that loads nothing.
    """
    links = "".join(f'<a href="#s{i}">{escape(t)}</a>' for i, (t, _) in enumerate(sections))
    body = "".join(
        f'<section id="s{i}"><h2>{escape(t)}</h2>{part}</section>\n'
        for i, (t, part) in enumerate(sections)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{CSS}{CHART_CSS}</style></head>\n"
        f"<body><h1>{escape(title)}</h1><nav>{links}</nav>\n{body}</body></html>\n"
    )


def html_table(rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> str:
    """A table of plain values.

    Args:
        rows: of cells; numbers are aligned right, None is a dash.
        header: titles of the columns.

    Returns:
        HTML, every text escaped.
    """
    head = "".join(f"<th>{escape(str(title))}</th>" for title in header)
    return f"<table>{f'<tr>{head}</tr>' if header else ''}{''.join(map(_row, rows))}</table>"


def _row(cells: Sequence[Any]) -> str:
    made = []
    for cell in cells:
        number = isinstance(cell, int | float) or cell is None
        made.append(f"<td{' class=r' if number else ''}>{escape(number_text(cell))}</td>")
    return f"<tr>{''.join(made)}</tr>"


def number_text(value: Any) -> str:
    """A value for people.

    Args:
        value: a number, a text, or None.

    Returns:
        Whole numbers with separators, others with four digits, None as a dash.
    """
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.1f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def series(rows: Iterable[dict[str, Any]], name: str, x: str = "update") -> Points:
    """A metric's values.

    Args:
        rows: of metrics.jsonl.
        name: of the metric.
        x: what it is drawn over.

    Returns:
        (x, value or None) of the rows that have both names.
    """
    return [(row[x], row[name]) for row in rows if name in row and x in row]


def chart_grid(drawn: Iterable[str]) -> str:
    """Charts side by side.

    Args:
        drawn: from `line_chart`; empty ones are left out.

    Returns:
        HTML.
    """
    return f'<div class="grid">{"".join(f"<div>{chart}</div>" for chart in drawn if chart)}</div>'
