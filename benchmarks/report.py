"""Markdown tables from the JSON files of pytest-benchmark.

    python benchmarks/report.py benchmarks/results/bench_adam_mini.json [more.json ...]

Rows that name a provider and a size (bench_adam_mini.py) or a shape (bench_token_stats.py) become
one table for each thing that was timed, providers by sizes or shapes; those of bench_prefix.py one
table; others (bench_rl.py) one table for each benchmark group, times only.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="written by --benchmark-json")
    for file in parser.parse_args().files:
        print(f"## {file.stem}\n")
        print("\n\n".join(report(json.loads(file.read_text()))), end="\n\n")


def report(run: Row) -> list[str]:
    """The paragraphs and tables of one file."""
    rows = run["benchmarks"]
    parts = [where(run)]
    by_size = [row for row in rows if {"provider", "size"} <= row["extra_info"].keys()]
    by_shape = [row for row in rows if {"provider", "shape"} <= row["extra_info"].keys()]
    prefix = [row for row in rows if "prefix" in row["extra_info"]]
    plain = [row for row in rows if row not in by_size + by_shape + prefix]
    for clip, some in grouped(by_size, lambda row: row["extra_info"]["clip"]):
        title = "clip and step" if clip else "step"
        parts.append(size_table(title, some))
    for title, some in grouped(by_shape, lambda row: row["extra_info"]["table"]):
        parts.append(shape_table(title, some))
    if prefix:
        parts.append(prefix_table(prefix))
    for group, some in grouped(plain, lambda row: row["group"] or "all"):
        parts.append(time_table(group, some))
    return parts


def where(run: Row) -> str:
    """Machine, threads, versions and commit of a file, each value once."""
    infos = [row["extra_info"] for row in run["benchmarks"]]
    cpu = run["machine_info"]["cpu"]
    here = [f"{cpu.get('count', '?')} cores, {cpu.get('brand_raw', cpu.get('arch', '?'))}"]
    commit = run["commit_info"]
    parts = {
        "device": unique(infos, "device") or here,
        "threads": unique(infos, "threads"),
        "versions": [
            ", ".join(f"{name} {number}" for name, number in versions.items() if number)
            for versions in unique(infos, "versions")
        ]
        or [f"torch {number}" for number in unique(infos, "torch")],
        "commit": unique(infos, "commit")
        or [f"{str(commit.get('id'))[:12]}{'+changes' * bool(commit.get('dirty'))}"],
    }
    lines = [f"{key}: {'; '.join(map(str, values))}" for key, values in parts.items() if values]
    return "  \n".join(lines)


def shape_table(title: str, rows: list[Row]) -> str:
    """Providers by shapes of logits (bench_token_stats.py)."""
    shapes = [shape for shape, _ in grouped(rows, lambda row: row["extra_info"]["shape"])]
    head = [title, "computes"]
    for shape in shapes:
        head += [f"{shape}: ms", "ratio (quartiles)", "extra MB"]
    lines = []
    for provider, some in grouped(rows, lambda row: row["extra_info"]["provider"]):
        of_shape = {row["extra_info"]["shape"]: row for row in some}
        line = [provider, some[0]["extra_info"]["computes"]]
        for row in map(of_shape.get, shapes):
            line += ["-"] * 3 if row is None else shape_cells(row)
        lines.append(line)
    return markdown(head, lines)


def shape_cells(row: Row) -> list[str]:
    """Time, ratio and extra memory of one provider at one shape."""
    info = row["extra_info"]
    low, high = (number(value, 2) for value in info["ratio_quartiles"])
    return [
        number(1e3 * row["stats"]["median"], 1),
        f"{number(info['ratio'], 2)} ({low}-{high})",
        number(info["extra_mb"], 1),
    ]


def prefix_table(rows: list[Row]) -> str:
    """Speed-ups of shared-prefix training (bench_prefix.py)."""
    head = ["prompt:response x group", "provider", "route", "ms", "speed-up (range)", "bound"]
    head += ["share", "peak MB", "dense, one trajectory"]
    lines = []
    for row in rows:
        info, (p, s, g) = row["extra_info"], row["extra_info"]["prefix"]
        low, high = (number(value, 2) for value in info["speedup_range"])
        lines.append(
            [
                f"{p}:{s} x {g}",
                info["provider"],
                info["route"],
                number(1e3 * row["stats"]["median"], 0),
                f"{number(info['speedup'], 2)} ({low}-{high})",
                number(info["bound"], 2),
                number(info["share"], 2),
                number(info["peak_mb"], 0),
                number(info["dense_peak_mb"], 0),
            ]
        )
    return markdown(head, lines)


def size_table(title: str, rows: list[Row]) -> str:
    """Providers by sizes; state is that of the largest size."""
    sizes = [size for size, _ in grouped(rows, lambda row: row["extra_info"]["size"])]
    head = [title, "state B/param"]
    for size in sizes:
        head += [f"{size}: ms", "ratio (quartiles)", "GB/s", "extra MB"]
    lines = []
    for provider, some in grouped(rows, lambda row: row["extra_info"]["provider"]):
        of_size = {row["extra_info"]["size"]: row for row in some}
        line = [provider, number(some[-1]["extra_info"]["state_bytes_per_parameter"], 2)]
        for size in sizes:
            line += size_cells(of_size.get(size))
        lines.append(line)
    return markdown(head, lines)


def size_cells(row: Row | None) -> list[str]:
    """Time, ratio, rate and extra memory of one provider at one size."""
    if row is None:
        return ["-"] * 4
    info = row["extra_info"]
    low, high = (number(value, 2) for value in info["ratio_quartiles"])
    return [
        number(1e3 * row["stats"]["median"], 1),
        f"{number(info['ratio'], 2)} ({low}-{high})",
        number(info["gb_per_s"], 1),
        number(info["extra_mb"], 1),
    ]


def time_table(group: str, rows: list[Row]) -> str:
    """Medians of one group, and how often the first row's each of them is."""
    first = rows[0]["stats"]["median"]
    lines = []
    for row in rows:
        stats = row["stats"]
        name = ", ".join(map(str, (row.get("params") or {}).values())) or row["name"]
        line = [name, number(1e3 * stats["median"], 1), number(1e3 * stats["iqr"], 1)]
        lines.append([*line, str(stats["rounds"]), number(stats["median"] / first, 2)])
    return markdown([group, "median ms", "IQR ms", "rounds", "to the first"], lines)


def grouped(rows: list[Row], key: Any) -> list[tuple[Any, list[Row]]]:
    """Rows by key; keys and rows in the order in which they come first."""
    places: dict[Any, int] = {}
    for row in rows:
        places.setdefault(key(row), len(places))
    ordered = sorted(rows, key=lambda row: places[key(row)])
    return [(value, list(some)) for value, some in groupby(ordered, key)]


def unique(infos: Iterable[Row], key: str) -> list[Any]:
    """The values under `key`, each once."""
    values: list[Any] = []
    for info in infos:
        if info.get(key) not in [None, *values]:
            values.append(info[key])
    return values


def number(value: float | None, digits: int) -> str:
    """A number with so many digits after the point; a dash for none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table: the first column to the left, numbers to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


if __name__ == "__main__":
    main()
