"""Line charts as SVG text: what `report.html` and `compare.html` are drawn with.

Own SVG, not matplotlib's: a chart takes 2-10 kB and no time, its text stays text, and its colours
follow the page (light or dark). Lines have their values as tooltips.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

Points = Sequence[tuple[float, float | None]]

COLORS = ("#2a78d6", "#d9622b", "#2c9a5b", "#b5388f", "#8a6d00", "#0f8a94", "#7152c9", "#c33c3c")
MARGIN = {"left": 52, "right": 10, "top": 26, "bottom": 24}
LEGEND_LINE = 14
WIDTH, PLOT_HEIGHT = 400, 190
LONGEST_TITLE = 58


def line_chart(
    series: Mapping[str, Points],
    title: str,
    *,
    log: bool = False,
    zero: bool = False,
    band: tuple[Points, Points] | None = None,
    marks: Mapping[str, float] | None = None,
    x_label: str = "update",
    points: int = 300,
) -> str:
    """A chart of one or more lines.

    Args:
        series: name -> (x, y) in order of x; a y that is None or not finite leaves a gap.
        title: stands above; its unit belongs in it.
        log: logarithmic y; values <= 0 are gaps, and without any value > 0 the axis is linear.
        zero: the y axis begins at 0.
        band: lower and upper (x, y) of an area behind the lines.
        marks: name -> x of dashed vertical lines.
        x_label: of the x axis.
        points: most points of a line; of longer ones each stretch keeps its least and its greatest.

    Returns:
        An `<svg>` element, or "" when there is nothing to draw.
    """
    band = band or ((), ())
    drawn = {name: thinned(line, points) for name, line in series.items()}
    edges = [thinned(line, points) for line in band]
    finite = [y for line in (*drawn.values(), *edges) for _, y in line if _is_number(y)]
    log = log and any(y > 0 for y in finite)
    if log:
        finite = [y for y in finite if y > 0]
    if not finite:
        return ""
    xs = [x for line in drawn.values() for x, y in line if _is_number(y)] or [0.0]
    named = {name: line for name, line in drawn.items() if any(_is_number(y) for _, y in line)}
    legend = [*named, *(marks or {})] if len(named) > 1 or marks else []
    height = PLOT_HEIGHT + LEGEND_LINE * math.ceil(len(legend) / 2)
    frame = _Frame(min(xs), max(xs), *_limits(finite, log, zero), log)

    shown = title if len(title) <= LONGEST_TITLE else f"{title[: LONGEST_TITLE - 1]}…"
    parts = [f'<text class="t" x="8" y="16">{_text(shown)}</text>', _axes(frame, x_label)]
    if all(edges):
        outline = [*edges[0], *reversed(edges[1])]
        corners = " ".join(frame.point(x, y) for x, y in outline if frame.shows(y))
        parts.append(f'<polygon points="{corners}" fill="{COLORS[0]}" opacity=".15"/>')
    for i, (name, line) in enumerate(named.items()):
        parts.append(_line(frame, name, line, COLORS[i % len(COLORS)], dashed=i >= len(COLORS)))
    for x in (marks or {}).values():
        if frame.left <= x <= frame.right:
            at = frame.x(x)
            parts.append(
                f'<path class="m" d="M{at:.1f} {MARGIN["top"]}V{PLOT_HEIGHT - MARGIN["bottom"]}"/>'
            )
    parts += _legend(legend, len(named))
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{_text(title)}">'
        f"{''.join(parts)}</svg>"
    )


def thinned(line: Points, points: int) -> list[tuple[float, float | None]]:
    """At most about `points` of a line's points, with every spike.

    Args:
        line: (x, y) in order.
        points: how many to keep, >= 4.

    Returns:
        The line itself if it is short enough; else each stretch's first point with its least and
        its greatest y, in order.
    """
    line = list(line)
    if len(line) <= points:
        return line
    size = math.ceil(len(line) / (points // 2))
    kept = []
    for start in range(0, len(line), size):
        stretch = [(i, line[i][1]) for i in range(start, min(start + size, len(line)))]
        known = [(i, y) for i, y in stretch if _is_number(y)] or stretch[:1]
        chosen = {min(known, key=lambda e: e[1])[0], max(known, key=lambda e: e[1])[0]}
        kept += [line[i] for i in sorted(chosen)]
    return kept


class _Frame:
    """From data to the picture."""

    def __init__(self, left: float, right: float, low: float, high: float, log: bool) -> None:
        self.left, self.right, self.low, self.high, self.log = left, right, low, high, log

    def x(self, x: float) -> float:
        inner = WIDTH - MARGIN["left"] - MARGIN["right"]
        share = (x - self.left) / (self.right - self.left) if self.right > self.left else 0.5
        return MARGIN["left"] + inner * share

    def y(self, y: float) -> float:
        low, high, y = (math.log10(v) if self.log else v for v in (self.low, self.high, y))
        inner = PLOT_HEIGHT - MARGIN["top"] - MARGIN["bottom"]
        return MARGIN["top"] + inner * (high - y) / (high - low)

    def point(self, x: float, y: float) -> str:
        return f"{self.x(x):.1f},{self.y(y):.1f}"

    def shows(self, y: float | None) -> bool:
        return _is_number(y) and (not self.log or y > 0)


def _limits(values: list[float], log: bool, zero: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return (low / 1.3, high * 1.3) if low < high else (low / 3, high * 3)
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return (low if zero and low == 0 else low - room), high + room


def _ticks(frame: _Frame) -> list[float]:
    if frame.log:
        first, last = math.floor(math.log10(frame.low)), math.floor(math.log10(frame.high))
        within = [n for n in range(first, last + 1) if abs(n) < 300]
        for digits in ((1,), (1, 2, 5), range(1, 10)):
            found = [m * 10.0**n for n in within for m in digits]
            found = [tick for tick in found if frame.low <= tick <= frame.high]
            if len(found) > 1:
                return found[:: math.ceil(len(found) / 6)]
        return [frame.low, frame.high]
    return nice_ticks(frame.low, frame.high)


def nice_ticks(low: float, high: float) -> list[float]:
    """Round numbers for an axis.

    Args:
        low: end of the axis.
        high: other end, > low.

    Returns:
        Two to six multiples of 1, 2 or 5 times a power of ten.
    """
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _axes(frame: _Frame, x_label: str) -> str:
    right, bottom = WIDTH - MARGIN["right"], PLOT_HEIGHT - MARGIN["bottom"]
    parts = []
    ticks = _ticks(frame)
    for tick, shown in zip(ticks, _told_apart(ticks), strict=True):
        y = frame.y(tick)
        parts.append(f'<path class="g" d="M{MARGIN["left"]} {y:.1f}H{right}"/>')
        parts.append(f'<text class="a e" x="{MARGIN["left"] - 5}" y="{y + 3:.1f}">{shown}</text>')
    for x, kind in ((frame.left, ""), (frame.right, " e")):
        if x == frame.right and frame.left == frame.right:
            continue
        parts.append(
            f'<text class="a{kind}" x="{frame.x(x):.1f}" y="{bottom + 14}">{_end(x)}</text>'
        )
    middle = (MARGIN["left"] + right) / 2
    parts.append(f'<text class="a c" x="{middle}" y="{bottom + 14}">{_text(x_label)}</text>')
    return "".join(parts)


def _told_apart(ticks: list[float]) -> list[str]:
    """Texts with as many digits as tell the ticks apart."""
    for digits in range(3, 12):
        texts = [f"{tick:.{digits}g}" for tick in ticks]
        if len(set(texts)) == len(ticks):
            break
    return texts


def _end(x: float) -> str:
    return str(int(x)) if float(x).is_integer() else f"{x:.3g}"


def _line(frame: _Frame, name: str, line: Points, color: str, dashed: bool) -> str:
    pieces: list[list[str]] = [[]]
    for x, y in line:
        if frame.shows(y):
            pieces[-1].append(frame.point(x, y))
        elif pieces[-1]:
            pieces.append([])
    values = [y for _, y in line if frame.shows(y)]
    tip = f"{name}: first {values[0]:.4g}, last {values[-1]:.4g}" if values else name
    style = ' stroke-dasharray="5 3"' if dashed else ""
    shapes = "".join(
        f'<polyline points="{" ".join(piece)}"/>'
        if len(piece) > 1
        else f'<circle cx="{piece[0].split(",")[0]}" cy="{piece[0].split(",")[1]}" r="2.5"/>'
        for piece in pieces
        if piece
    )
    return f'<g class="l" stroke="{color}"{style}><title>{_text(tip)}</title>{shapes}</g>'


def _legend(names: list[str], lines: int) -> list[str]:
    parts = []
    for i, name in enumerate(names):
        x, y = 8 + 196 * (i % 2), PLOT_HEIGHT + LEGEND_LINE * (i // 2) + 4
        color = f'stroke="{COLORS[i % len(COLORS)]}"' if i < lines else 'class="m"'
        dash = ' stroke-dasharray="5 3"' if len(COLORS) <= i < lines else ""
        parts.append(f'<path {color}{dash} stroke-width="2" d="M{x} {y - 3}h14"/>')
        shown = name if len(name) <= 32 else f"{name[:15]}…{name[-16:]}"
        parts.append(f'<text class="a" x="{x + 18}" y="{y}">{_text(shown)}</text>')
    return parts


def _is_number(y: float | None) -> bool:
    return isinstance(y, int | float) and math.isfinite(y)


def _text(text: str) -> str:
    return html.escape(str(text))


CSS = """
svg { width: 100%; height: auto; display: block; }
svg text { fill: currentColor; font: 11px system-ui, sans-serif; }
svg .t { font-weight: 600; font-size: 12px; } svg .a { font-size: 10px; opacity: .75; }
svg .e { text-anchor: end; } svg .c { text-anchor: middle; }
svg .g { stroke: currentColor; opacity: .14; } svg .m { stroke: #c33; stroke-dasharray: 4 3; }
svg .l { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
"""
