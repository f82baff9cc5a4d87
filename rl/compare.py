"""`trimtab-rl compare RUN RUN...`: final figures of runs, what differs in their configurations.

`--output compare.html` overlays the curves of every metric they share, `--output compare.png` those
of the training.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .durable import replace_text
from .families import chart_title, charts, family_title
from .html_parts import chart_grid, html_page, html_table, number_text, series
from .run_record import RunRecord, figures, flat, read_run, wall_seconds
from .svg import line_chart

MISSING = "-"
# Names of the curves of a training: title, whether y begins at 0, whether it is logarithmic.
CURVES = {
    "reward": ("mean reward", True, False),
    "length": ("response length (tokens)", True, False),
    "mismatch/abs_dlogp_mean": ("mean |log p trainer - log p rollout| (nats)", False, True),
    "lr": ("learning rate", True, False),
    "entropy": ("entropy of the sampled positions (nats)", True, False),
    "grad_norm": ("gradient norm", False, True),
    "groups/mixed": ("groups with mixed outcomes (fraction)", True, False),
    "speed/rollout": ("rollout (tokens/s)", False, True),
    "speed/update": ("update (tokens/s)", False, True),
}
POINTS = 80_000  # of all lines together: the page stays below 2 MB


def main(arguments: list[str]) -> None:
    """`trimtab-rl compare`.

    Args:
        arguments: of the command line, after `compare`.

    Raises:
        ValueError, ArgumentError: an argument is wrong, or a folder is no run's.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        prog="trimtab-rl compare",
        description="Final figures of runs side by side, and what differs in their configurations.",
        exit_on_error=False,
        default_env=False,
    )
    parser.add_argument("runs", nargs="*", type=str, help="run folders, two or more")
    parser.add_argument(
        "--output",
        type=str | None,
        default=None,
        help="file.html overlays the curves of every metric, file.png those of the training",
    )
    parsed = parser.parse_args(arguments)
    if len(parsed.runs) < 2:
        raise ValueError(f"compare: expected two or more run folders, got {parsed.runs}")
    output = None if parsed.output is None else Path(parsed.output)
    if output is not None and output.suffix not in (".html", ".png"):
        raise ValueError(f"--output: expected a file.html or file.png, got {parsed.output}")
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"--output: expected a file in a folder that exists, got {parsed.output}")
    runs = named_runs(parsed.runs)
    if output is not None and not any(record.rows for record in runs.values()):
        raise ValueError(f"--output: none of {', '.join(runs)} has metrics to draw")
    print_comparison(runs)
    if output is not None:
        if output.suffix == ".html":
            replace_text(output, comparison_page(runs))
        else:
            draw_curves(runs, output)
        print(output)


def named_runs(paths: Sequence[str]) -> dict[str, RunRecord]:
    """Runs by the shortest names that tell them apart.

    Args:
        paths: of their folders.

    Returns:
        Folder name, or path where two folders have the same name, -> RunRecord.

    Raises:
        ValueError: a folder is no run's, or is given twice.
    """
    folders = [Path(path).resolve() for path in paths]
    for path, folder in zip(paths, folders, strict=True):
        if folders.count(folder) > 1:
            raise ValueError(f"compare: expected each run once, got {path} twice")
    last = [folder.name for folder in folders]
    names = [
        folder.name if last.count(folder.name) == 1 else path.rstrip("/")
        for path, folder in zip(paths, folders, strict=True)
    ]
    return {name: read_run(path) for name, path in zip(names, paths, strict=True)}


def differences(configs: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Configuration keys that are not the same in all runs.

    Args:
        configs: of the runs.

    Returns:
        Dotted key -> value in each run as text, `-` where it has none; without `run_dir`.
    """
    found = [flat(config) for config in configs]
    keys = dict.fromkeys(key for config in found for key in config if key != "run_dir")
    texts = {k: [str(c[k]) if k in c else MISSING for c in found] for k in keys}
    return {key: values for key, values in texts.items() if len(set(values)) > 1}


def print_comparison(runs: dict[str, RunRecord]) -> None:
    """Prints both tables.

    Args:
        runs: by name.
    """
    console = Console()
    if not console.is_terminal:  # a log or a pipe has no width to wrap at
        console = Console(width=max(120, 45 + 22 * len(runs)))
    for title, rows in (
        ("final figures", _figure_rows(runs)),
        ("differences in the configuration", _difference_rows(runs)),
    ):
        table = Table(title=title, title_justify="left")
        table.add_column("", overflow="fold")
        for name in runs:
            table.add_column(Text(name), justify="right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(number_text(cell)) for cell in row))
        if rows:
            console.print(table)
        else:
            console.print(f"{title}: none", markup=False)


def _figure_rows(runs: dict[str, RunRecord]) -> list[list[Any]]:
    found = [figures(record) for record in runs.values()]
    states = ["state", *(record.state for record in runs.values())]
    return [states, *([title, *(own[title] for own in found)] for title in found[0])]


def _difference_rows(runs: dict[str, RunRecord]) -> list[list[str]]:
    found = differences([record.config for record in runs.values()])
    return [[key, *values] for key, values in found.items()]


def comparison_page(runs: dict[str, RunRecord]) -> str:
    """The tables, and a chart of every metric with a line for each run.

    Args:
        runs: by name.

    Returns:
        HTML that loads nothing.
    """
    header = ("", *runs)
    differing = _difference_rows(runs)
    sections = [
        ("Final figures", html_table(_figure_rows(runs), header)),
        (
            "Differences in the configuration",
            html_table(differing, header) if differing else "none",
        ),
        ("Training", chart_grid(_curve_charts(runs))),
    ]
    names = dict.fromkeys(n for r in runs.values() for row in r.rows for n in row)
    points = max(30, min(300, POINTS // (len(runs) * max(1, len(names)))))
    for family, found in charts(n for n in names if n not in CURVES and n != "update").items():
        drawn = [
            line_chart(_lines(runs, name), chart_title(name, [name]), points=points)
            for members in found.values()
            for name in members
            if len({row.get(name) for r in runs.values() for row in r.rows}) > 1
        ]
        if drawn:
            sections.append((family_title(family)[0], chart_grid(drawn)))
    return html_page(f"{len(runs)} runs", sections)


def _lines(runs: dict[str, RunRecord], name: str, x: str = "update") -> dict[str, Any]:
    return {run: series(record.rows, name, x) for run, record in runs.items()}


def _curve_charts(runs: dict[str, RunRecord]) -> list[str]:
    drawn = [
        line_chart(_lines(runs, name), title, zero=zero, log=log)
        for name, (title, zero, log) in CURVES.items()
    ]
    over_time = {name: _over_seconds(record) for name, record in runs.items()}
    title = "mean reward over the wall time of the updates"
    return [*drawn, line_chart(over_time, title, zero=True, x_label="seconds")]


def _over_seconds(record: RunRecord) -> list[tuple[float, float | None]]:
    seconds, line = 0.0, []
    for row in record.rows:
        seconds += sum(wall_seconds([row]).values())
        line.append((seconds, row.get("reward")))
    return line


def draw_curves(runs: dict[str, RunRecord], picture: Path) -> None:
    """The curves of the training with a line for each run.

    Args:
        runs: by name.
        picture: PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(3, 3, figsize=(15, 11), constrained_layout=True)
    for axis, (name, (title, zero, log)) in zip(axes.flat, CURVES.items(), strict=True):
        for run, line in _lines(runs, name).items():
            axis.plot([x for x, _ in line], [y for _, y in line], label=run.replace("$", r"\$"))
        axis.set(title=title, xlabel="update")
        if log and any(y and y > 0 for line in _lines(runs, name).values() for _, y in line):
            axis.set_yscale("log")
        elif zero:
            axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    axes.flat[0].legend(fontsize=8)
    unfinished = picture.with_name(f".{picture.name}.png")
    figure.savefig(unfinished, dpi=110)
    plt.close(figure)
    unfinished.replace(picture)
