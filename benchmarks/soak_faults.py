"""What goes wrong inside the trainer of `soak.py`.

What changes the data (gradients and weights that are NaN) is a function of the update's number, so
an undisturbed twin has it as well. What must not change anything (a kill within a checkpoint, an
engine that raises) waits for a file in the folder `control`.
"""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from trimtab.rl import durable


class Faults(pl.Callback):
    """Faults of the trainer's process.

    Args:
        seed: of the updates whose gradient or step is poisoned.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """Puts the faults in their places."""
        (optimizer,) = trainer.optimizers
        optimizer.register_step_post_hook(lambda *_: self._poison_weights(module))
        generate = module.engine.generate

        def failing(requests: Any) -> Any:
            armed = Path("control/engine")
            if armed.exists():
                left = int(armed.read_text()) - 1
                armed.unlink() if not left else armed.write_text(str(left))
                raise RuntimeError("soak: the engine dies")
            return generate(requests)

        module.engine.generate = failing
        durable._ErrorsLater.write = _killed_half_way(durable._ErrorsLater.write)

    def on_after_backward(self, trainer: pl.Trainer, module: Any) -> None:
        """A gradient that is NaN, in one of fifteen updates."""
        if self._drawn(module, "gradient") < 1 / 15:
            next(module.policy.parameters()).grad.view(-1)[0] = float("nan")

    def _poison_weights(self, module: Any) -> None:
        if self._drawn(module, "weight") < 1 / 50:
            with torch.no_grad():
                next(module.policy.parameters()).view(-1)[0] = float("nan")

    def _drawn(self, module: Any, what: str) -> float:
        # the first step of a run has no checkpoint before it to go back to
        if module.updates_done < 10:
            return 1.0
        return random.Random(f"{self.seed} {what} {module.updates_done}").random()


def _killed_half_way(write: Any) -> Any:
    def dying(file: Any, data: Any) -> int:
        armed = Path("control/checkpoint")
        if str(file._file.name).endswith(".ckpt.unfinished") and armed.exists():
            left = int(armed.read_text())
            if left == 0:
                armed.unlink()
                write(file, bytes(data)[: len(data) // 2])
                file._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            armed.write_text(str(left - 1))
        return write(file, data)

    return dying
