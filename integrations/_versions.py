"""The versions of a host that its integration was tried with."""

from __future__ import annotations

import re
from importlib import import_module


def require(host: str, found: str, low: str, below: str) -> None:
    """Passes if low <= found < below, by the numbers before any letter.

    Args:
        host: name of the package, as pip has it.
        found: its version, "none" if there is none.
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


def version_of(module: str) -> str:
    """The version of a host's module, which is imported; "none" where it is not installed.

    Args:
        module: as in an import statement.

    Raises:
        ModuleNotFoundError: something that the host needs is not installed.
    """
    try:
        return import_module(module).__version__
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise
        return "none"


def _numbers(version: str) -> tuple[int, ...]:
    """(0, 16, 1) of "0.16.1rc2"; zeros at the end do not count, so 1.0 is 1."""
    numbers = [int(x) for x in re.match(r"[\d.]*", version).group().split(".") if x]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)
