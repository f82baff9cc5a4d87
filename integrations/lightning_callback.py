"""The Callback class of whichever namespace of Lightning is there, and what our callbacks share."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from ._versions import require

_NAMESPACES = {"lightning.pytorch": "lightning", "pytorch_lightning": "pytorch-lightning"}

if TYPE_CHECKING:
    from pytorch_lightning import Callback
else:
    # A callback of either namespace works in the Trainer of the other: so take the one that the
    # program has imported already, and lightning.pytorch where it has both or none.
    for _name in sorted(_NAMESPACES, key=lambda name: name not in sys.modules):
        try:
            _namespace = import_module(_name)
        except ImportError:
            continue
        require(_NAMESPACES[_name], _namespace.__version__, "2.6", "3")
        Callback = _namespace.Callback
        break
    else:
        raise ImportError(
            "trimtab.integrations.lightning needs `lightning` or `pytorch-lightning`, 2.6 or later"
        )

# Strategies by name, since either namespace has its own; DeepSpeedStrategy is a DDPStrategy.
_EXACT = ("SingleDeviceStrategy", "DDPStrategy", "ModelParallelStrategy")
_REFUSED = ("DeepSpeedStrategy", "FSDPStrategy")


def refuse_strategy(strategy: Any, what: str) -> None:
    """Passes on one device, under DDP and under ModelParallelStrategy (FSDP2).

    Args:
        strategy: the Trainer's.
        what: that is not exact elsewhere.

    Raises:
        ValueError: another strategy, by its name.
    """
    names = [base.__name__ for base in type(strategy).__mro__]
    known = [name for name in names if name in _EXACT + _REFUSED]
    if not known or known[0] in _REFUSED:
        raise ValueError(
            "trainer.strategy: expected a single device, ddp or ModelParallelStrategy (FSDP2) for "
            f"{what}, found {names[0]}"
        )


def refuse_second(callback: Any, trainer: Any) -> None:
    """Passes if the Trainer has one callback of this class.

    Raises:
        ValueError: it has several.
    """
    count = sum(isinstance(other, type(callback)) for other in trainer.callbacks)
    if count > 1:
        raise ValueError(
            f"callbacks: expected one {type(callback).__name__}, found {count}; leave one in"
        )


def mean_over_ranks(trainer: Any, values: Sequence[float | None]) -> list[float | None]:
    """Of each number its mean over the ranks that have it; None where none has.

    One collective on every rank, whichever numbers it has. A NaN of one rank is one of all.
    """
    sums = [0.0 if value is None else float(value) for value in values]
    there = [float(value is not None) for value in values]
    pairs = torch.tensor([sums, there], dtype=torch.float64, device="cpu")
    if trainer.world_size > 1:
        device = trainer.strategy.root_device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        pairs = trainer.strategy.reduce(pairs.to(device, dtype), reduce_op="mean")
    return [total / ranks if ranks else None for total, ranks in pairs.t().tolist()]
