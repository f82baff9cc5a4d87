"""Optimizers and learning-rate schedules."""

from .adam_mini import AdamMini, AdamMiniState, adam_mini_reference, adam_mini_update
from .blocks import BlockEntry, BlockLayout, BlockMap, geometric_layout, infer_blocks
from .lr_scheduler import LengthDetector, LengthTriggeredLR

__all__ = [
    "AdamMini",
    "AdamMiniState",
    "BlockEntry",
    "BlockLayout",
    "BlockMap",
    "LengthDetector",
    "LengthTriggeredLR",
    "adam_mini_reference",
    "adam_mini_update",
    "geometric_layout",
    "infer_blocks",
]
