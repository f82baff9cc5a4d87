"""Rollouts one update ahead of the trainer: they are made while it computes, by a thread.

At update u the trainer hands over its weights, starts the rollouts of update u + 1, and trains on
those of update u. So what it trains on was sampled by the policy of one update before: never of
more, whatever takes longer. What is sampled depends on weights and seeds alone, not on the time
that anything takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from .collect import Collected


class RolloutsAhead:
    """The rollouts of one update, on their way or here."""

    def __init__(self) -> None:
        self.update: int | None = None
        self._thread: threading.Thread | None = None
        self._outcome: list[Collected | BaseException] = []  # of this thread: one, once it is done

    def start(self, update: int, collect: Callable[[], Collected]) -> None:
        """Collects in a thread.

        Args:
            update: that these rollouts are for.
            collect: makes and scores them; nothing else may use its engine meanwhile.
        """
        assert self.update is None, "the rollouts before have not been taken"
        self.update, self._outcome = update, (outcome := [])

        def work() -> None:
            try:
                outcome.append(collect())
            except BaseException as error:  # raised where they are taken
                outcome.append(error)

        # a daemon: a server that does not answer must not keep an interrupted run alive
        self._thread = threading.Thread(target=work, name="trimtab-rollouts", daemon=True)
        self._thread.start()

    def put(self, update: int, found: Collected) -> None:
        """Rollouts that are here already, from a checkpoint.

        Args:
            update: that they are for.
            found: scored.
        """
        self.update, self._outcome = update, [found]

    def pending(self) -> Collected | None:
        """The rollouts, waited for but not taken; None if there are none, or they failed."""
        found = self._wait()
        return None if isinstance(found, BaseException) else found

    def _wait(self) -> Collected | BaseException | None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self._outcome[0] if self._outcome else None

    def take(self) -> tuple[Collected, float]:
        """The rollouts, once; and the seconds that were waited for them.

        Raises:
            Exception: what the thread raised.
        """
        started = time.perf_counter()
        found = self._wait()
        if isinstance(found, BaseException):
            raise found
        assert found is not None, "no rollouts were started"
        self.update, self._outcome = None, []
        return found, time.perf_counter() - started

    def drop(self) -> None:
        """Forgets the rollouts, also failed ones, once what makes them has let go of its engine."""
        self._wait()
        self.update, self._outcome = None, []

    def close(self, seconds: float = 5.0) -> None:
        """Gives a thread that still works a moment; rollouts that are here stay, for a checkpoint.

        Args:
            seconds: that it gets. After them its rollouts are forgotten.
        """
        if self._thread is not None:
            self._thread.join(seconds)
            if self._thread.is_alive():
                self.update, self._thread, self._outcome = None, None, []
