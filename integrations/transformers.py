"""Transformers: what a program on it imports; each part is in a file of its own.

    Trainer(
        model,
        args,
        optimizer_cls_and_kwargs=adam_mini(args),              transformers_optimizer.py
        compute_loss_func=gem_compute_loss(),                  transformers_loss.py
        callbacks=[
            LengthTriggeredLRCallback(),                       transformers_rate.py
            StabilityMonitorCallback([GradientNormMonitor()])  transformers_monitor.py
        ],
    )
    model.generate(ids, **pruned_generation(rho))              transformers_generation.py

What belongs to the Trainer needs accelerate, as the Trainer does, and is imported when first asked
for; the rest works without. `adam_mini` needs transformers 5.2, the rest 5.0. Read and tried:
transformers 5.24.0 with accelerate 1.15.0.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._versions import require, version_of

require("transformers", version_of("transformers"), "5.0", "6")

from transformers.utils import is_accelerate_available

from .transformers_generation import (
    VocabularyPruningLogitsProcessor,
    pruned_generation,
)
from .transformers_loss import gem_compute_loss

if TYPE_CHECKING:
    from .transformers_monitor import StabilityMonitorCallback
    from .transformers_optimizer import adam_mini, use_adam_mini
    from .transformers_rate import LengthTriggeredLRCallback

__all__ = [
    "LengthTriggeredLRCallback",
    "StabilityMonitorCallback",
    "VocabularyPruningLogitsProcessor",
    "adam_mini",
    "gem_compute_loss",
    "pruned_generation",
    "use_adam_mini",
]

_NEED_ACCELERATE = {
    "LengthTriggeredLRCallback": "transformers_rate",
    "StabilityMonitorCallback": "transformers_monitor",
    "adam_mini": "transformers_optimizer",
    "use_adam_mini": "transformers_optimizer",
}


def __getattr__(name: str) -> Any:
    if name not in _NEED_ACCELERATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if not is_accelerate_available():
        raise ImportError(
            f"trimtab.integrations.transformers: {name} needs accelerate, as the Trainer does; "
            "pip install accelerate"
        )
    return getattr(import_module(f".{_NEED_ACCELERATE[name]}", __package__), name)
