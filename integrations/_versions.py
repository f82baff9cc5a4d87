"""The versions of a host that its integration was tried with."""

from __future__ import annotations

import re


def require(host: str, found: str, low: str, below: str) -> None:
    """Passes if low <= found < below, by the numbers before any letter.

    Args:
        host: name of the package, as pip has it.
        found: its version.
        low: the first one that works.
        below: the first one that was not tried.

    Raises:
        ImportError: it is another version; one line with the range.
    """
    if not _numbers(low) <= _numbers(found) < _numbers(below):
        raise ImportError(
            f"{host}: expected a version from {low} on and below {below}, found {found}; "
            f"pip install '{host}>={low},<{below}'"
        )


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 16, 1) of "0.16.1rc2"; zeros at the end do not count, so 1.0 is 1."""
    numbers = [int(x) for x in re.match(r"[\d.]*", version).group().split(".") if x]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
