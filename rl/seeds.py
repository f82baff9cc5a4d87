"""Seeds that depend on nothing but what they are for."""

from __future__ import annotations

import hashlib


def stable_seed(*parts: object) -> int:
    """A seed that depends on nothing but its arguments.

    Args:
        *parts: of the name of what is drawn, by their text.

    Returns:
        63 bits.
    """
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
