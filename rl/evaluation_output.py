"""What `trimtab-rl eval` leaves: tables on the terminal, and a file."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .durable import replace_text
from .pass_at_k import Estimate


def store_evaluation(stored: dict[str, Any], folder: Path) -> None:
    """Writes the figures, prints them, and the path of the file.

    Args:
        stored: as it is written.
        folder: where; the file's name has the split and the time.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = folder / f"eval-{stored['split']}-{stamp}.json"
    replace_text(path, json.dumps(stored, indent=1))
    print_evaluation(stored)
    print(path)


def print_evaluation(stored: dict[str, Any]) -> None:
    """Prints the figures.

    Args:
        stored: as it is written.
    """
    console = Console()
    whose = stored["policy"] if "server" in stored else f"after update {stored['update']}"
    table = Table(title=Text(f"{stored['split']}, {whose}"))
    for column in ("", "value", "standard error", "problems"):
        table.add_column(column, justify="right" if column else "left")
    for title, found in stored["results"].items():
        table.add_row(title, *_cells(Estimate(**found)))
    console.print(table)
    for name, groups in stored["by_difficulty"].items():
        table = Table(title=Text(f"pass@1 by {name}"))
        for column in (name, "value", "standard error", "problems"):
            table.add_column(Text(column), justify="right")
        for label, found in groups.items():
            table.add_row(Text(label), *_cells(Estimate(**found)))
        console.print(table)
    console.print(f"a success is a {stored['success']}; the vote compares final answers as texts")
    if stored["lost"]:
        console.print(f"{stored['lost']} answers without a reward are left out")
    if stored.get("cut"):
        console.print(
            f"{stored['cut']} answers were cut at {stored['server']['max_tokens']} tokens"
        )


def _cells(found: Estimate) -> list[str]:
    shown = ["-" if v is None else f"{v:.3f}" for v in (found.value, found.standard_error)]
    return [*shown, str(found.problems)]
